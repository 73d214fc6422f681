"""Ranks, meshes, shards, transfers: the only room that may use torch.distributed; no stage of training comes in."""
