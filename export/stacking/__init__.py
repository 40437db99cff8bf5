"""Members that are one base model and a little more each, in one graph that reads the base's weights once for all."""
