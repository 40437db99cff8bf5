"""Parity gates: how far a graph may be from its source."""
