"""Formats chosen so that a mixture loses least within a budget of bytes and time."""
