"""The demo: train experts, export a mixture and evaluate it, offline."""
