"""What both READMEs must agree on: commands, settings, links, and where every module is listed."""

import re

import pytest
from repository import ROOT

from gspo.config import known_keys

BOTH = ["README.md", "README.zh.md"]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name):
    """Lines of the shell blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL)
    lines = (re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def settings(name):
    return {word for word in re.findall(r"\b[a-z]+\.[a-z_]+\b", text(name)) if word in known_keys()}


def programs(name):
    """In running text, too."""
    targets = "|".join(re.findall(r"^[a-z][a-z0-9-]*(?=:)", text("Makefile"), re.MULTILINE))
    return set(re.findall(rf"\bmake (?:{targets})(?![\w-])|python -m gspo\.\w+|(?<=\s)--[a-z]\w+", text(name)))


def links(name):
    targets = set(re.findall(r"\]\(([^)#]+)\)", text(name)))
    return {t for t in targets if t not in BOTH}


@pytest.mark.parametrize("of", [commands, settings, programs, links])
def test_both_say_the_same(of):
    assert of(BOTH[0]) == of(BOTH[1])


@pytest.mark.parametrize("name", BOTH)
def test_links_lead_somewhere(name):
    assert [t for t in links(name) if "://" not in t and not (ROOT / t).exists()] == []


@pytest.mark.parametrize("name", BOTH)
def test_every_module_has_its_place_in_the_layout(name):
    listed, room = set(), ""
    for line in text(name).rpartition("```")[0].rpartition("```")[2].splitlines():
        room = line.split()[0] if line.startswith(("gspo/", "kernels/", "benchmarks/", "configs/")) else room
        listed |= {room + file for file in re.findall(r"\b\w+\.py\b", line)}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "gspo").rglob("*.py") if p.name != "__init__.py"}
    assert modules - listed == set()
