"""Scoring responses, in processes of their own; it knows no model and no training."""
