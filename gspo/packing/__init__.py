"""Packed sequences of prompts and responses, and their log-probs under a model; no pairs, no objective."""
