"""Sequences that are being read, and the cache of their prefixes."""
