"""Ranks, device meshes, shards, transfers: the only room that may use torch.distributed. It knows no training stage."""
