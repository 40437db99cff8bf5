"""Load models, adapters and tokenizers, and describe their architecture."""
