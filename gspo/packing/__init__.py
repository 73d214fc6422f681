"""Responses as packed sequences and their log-probs under a model; no rewards, pairs or objectives."""
