"""An ONNX model as the neutral graph: its sizes and constants known, its norms and hosts found."""
