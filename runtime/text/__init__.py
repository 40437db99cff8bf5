"""Text to tokens and back, and grammars."""
