"""The recipe: what to export."""
