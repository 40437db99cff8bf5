"""Build ONNX graphs of decoders, and rewrite them."""
