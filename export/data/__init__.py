"""Texts as windows of token ids."""
