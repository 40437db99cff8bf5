"""Measuring a bundle on the machine that it runs on: see `profiler.profile`."""
