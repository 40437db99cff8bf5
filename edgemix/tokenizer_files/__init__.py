"""Checks of a tokenizer.json before the tokenizers library, which has few bounds of its own, reads it."""
