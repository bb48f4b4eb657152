"""Programs: graphs of ATen operations, such as torch.export writes, as `nn.Module`s."""
