"""From a recipe over labels to its bundle."""
