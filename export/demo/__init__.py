"""The demonstration: the whole walk, offline."""
