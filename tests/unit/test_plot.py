"""The picture of a run's curves."""

import sys

import pytest

from gspo.errors import UserError
from gspo.plot import draw


def test_without_matplotlib_the_commands_that_install_it_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib: `make dev`, or pip install -r requirements-dev.txt"):
        draw(tmp_path, tmp_path / "x.png")
