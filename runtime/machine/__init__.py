"""What this machine offers, and the plan measured on it."""
