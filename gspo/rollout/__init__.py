"""The sampling engine: N responses to each prompt; it knows no rewards, pairs or losses."""
