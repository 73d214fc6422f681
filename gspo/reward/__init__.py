"""Score responses, in worker processes; nothing here knows of models or training."""
