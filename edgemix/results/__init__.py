"""Results that commands print and the report draws."""
