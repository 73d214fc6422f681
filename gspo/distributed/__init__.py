"""Ranks, device meshes, shards, transfers; only this folder uses torch.distributed. No training stage is known here."""
