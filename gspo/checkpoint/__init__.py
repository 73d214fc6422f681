"""Write and resume runs: checkpoints, their manifest, the run folder. Nothing here computes what is trained."""
