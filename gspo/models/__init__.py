"""A Hugging Face model and tokenizer: opened, checked, made faster, never trained here."""
