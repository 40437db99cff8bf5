"""Mixtures over labels: what is predicted of a text is a class, a label of each word, or a masked word."""
