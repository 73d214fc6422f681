"""Where the repository is, and what a program under tests/programs/ needs to import its own and the tests' helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"
PROGRAM_ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}
