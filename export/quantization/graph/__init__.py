"""Rewrite graphs with quantized operators."""
