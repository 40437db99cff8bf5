"""Labels of words: their places, consistent sequences of labels, entities."""
