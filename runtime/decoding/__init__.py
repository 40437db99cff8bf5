"""Decoding: prefill, sampling, speculation."""
