"""Fine-tune members, alone or jointly."""
