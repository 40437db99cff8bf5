"""The stages of an export that concern members."""
