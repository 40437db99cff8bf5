"""Recipe in, bundle out: everything that needs torch or transformers."""
