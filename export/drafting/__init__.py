"""Make what a bundle drafts with: the draft head and the n-grams."""
