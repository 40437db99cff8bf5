"""ONNX Runtime sessions, execution providers and key-value caches."""
