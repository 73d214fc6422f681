"""The page of parameters is printed from the parameters."""

import runpy
import subprocess
import sys

from repository import ROOT

from gspo.config import PARAMETERS, Config, flatten, to_dict
from gspo.config_aliases import ALIASES


def test_a_reader_that_leaves_after_three_lines_gets_no_traceback():
    command = f"{sys.executable} -m gspo.parameters | head -n 3"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 3 and "Traceback" not in done.stderr


def test_the_printed_page_has_one_line_per_parameter_and_per_alias(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parameters"])
    runpy.run_path(str(ROOT / "gspo/parameters.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*PARAMETERS, *ALIASES]
    assert list(PARAMETERS) == list(flatten(to_dict(Config())))
    for row in rows[: len(PARAMETERS)]:
        assert len(row.split(" | ")) == 4 and not row.endswith("|  |")
