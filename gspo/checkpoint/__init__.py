"""What a run keeps on disk and goes on from; it computes nothing that trains."""
