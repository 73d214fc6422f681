"""Hugging Face models and tokenizers: opened, checked and made faster; nothing here trains or samples."""
