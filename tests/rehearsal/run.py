"""Run a program of this project, or a module, with the device that is not there.

python tests/rehearsal/run.py train.py --config configs/quick.yaml ...
python tests/rehearsal/run.py -m gspo.sample ...
"""

import runpy
import sys
from pathlib import Path

import install

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    sys.argv = sys.argv[1:]
    import gspo  # noqa: F401 -- before torch

    if install.wanted():
        install.install()
    sys.path.remove(str(Path(__file__).resolve().parent))  # what a program imports is its own
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
