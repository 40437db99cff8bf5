"""Pruning: channels, heads and layers cut away, weights set to zero, and the recovery after it."""
