"""From scored groups to weights: pairs, objective, update, the models of self-play; no file formats, no sampling."""
