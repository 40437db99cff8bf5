"""Commands for mixtures over labels."""
