"""Sampling: N responses to each prompt, by an engine; nothing here knows rewards, pairs or losses."""
