"""Quantization algorithms: matrices in, blocks of integers out."""
