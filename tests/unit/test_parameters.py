"""The page of parameters is printed from the parameters."""

import runpy

from repository import ROOT

from gspo.config import PARAMETERS, Config, flatten, to_dict
from gspo.config_aliases import ALIASES


def test_the_printed_page_has_one_line_per_parameter_and_per_alias(capsys):
    runpy.run_path(str(ROOT / "gspo/parameters.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*PARAMETERS, *ALIASES]
    assert list(PARAMETERS) == list(flatten(to_dict(Config())))
    for row in rows[: len(PARAMETERS)]:
        assert len(row.split(" | ")) == 4 and not row.endswith("|  |")
