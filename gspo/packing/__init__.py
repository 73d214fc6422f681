"""Responses as packed sequences and their log-probs under a model; no pairs, no objective."""
