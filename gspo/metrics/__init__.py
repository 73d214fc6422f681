"""Numbers about a step or a model, shown and watched; nothing here changes a weight."""
