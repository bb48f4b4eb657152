"""Where models run: PyTorch and ONNX Runtime."""
