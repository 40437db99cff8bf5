"""Turn documents into chunks of token ids."""
