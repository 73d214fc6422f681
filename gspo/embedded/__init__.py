"""Hold a task and a model that come with the repository, so that every command runs on a fresh machine."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path("data/equations")
