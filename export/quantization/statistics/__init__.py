"""Statistics of activations on calibration text."""
