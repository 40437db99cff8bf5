"""The manifest of a bundle over labels, and its checks."""
