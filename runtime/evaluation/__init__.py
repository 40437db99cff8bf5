"""Measure how well a bundle predicts text."""
