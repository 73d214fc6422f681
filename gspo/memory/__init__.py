"""Report what each rank's memory will hold, before the run starts. No stage of training imports this folder."""
