"""Serve many requests at once."""
