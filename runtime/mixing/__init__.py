"""Mix the distributions of members."""
