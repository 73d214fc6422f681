"""Read prompts from files, as token ids, in the order of training; nothing here samples, scores or trains."""
