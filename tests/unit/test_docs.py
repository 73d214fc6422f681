"""Check what the pages say against the code, against each other, and against the files they link to."""

import re

import pytest
import yaml
from repository import ROOT

from gspo.config import Config, flatten, known_keys, to_dict
from gspo.config_aliases import ALIASES, FORMS
from gspo.metrics.run_log import GLOSSARY
from gspo.parameters import parameters_page

READMES = ["README.md", "README.zh.md"]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("tests/*.md"),
        *ROOT.glob("gspo/**/*.md"),
        *ROOT.glob("kernels/*.md"),
    ]
)
TRANSLATED = sorted(path.name for path in (ROOT / "docs" / "zh").glob("*.md"))


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """The lines of the shell blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL)
    lines = (re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def settings(page):
    return {word for word in re.findall(r"\b[a-z]+\.[a-z_]+\b", text(page)) if word in known_keys()}


def programs(page):
    """`make X`, `python -m gspo.X` and `--flags`, also in running text."""
    targets = "|".join(re.findall(r"^[a-z][a-z0-9-]*(?=:)", text("Makefile"), re.MULTILINE))
    return set(re.findall(rf"\bmake (?:{targets})(?![\w-])|python -m gspo(?:\.\w+)+|(?<=\s)--[a-z]\w+", text(page)))


def numbers(page):
    """Every number in a table."""
    return re.findall(r"\d[\d.]*", "\n".join(line for line in text(page).splitlines() if line.startswith("|")))


def links(page):
    """Link targets. A Chinese page may link to a Chinese page where the English one links to the English."""
    targets = re.findall(r"\]\(([^)#]+)\)", text(page))
    return {target.replace("docs/zh/", "docs/") for target in targets} - set(READMES)


def anchors(page):
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("of", [commands, settings, programs, numbers, links])
def test_both_readmes_say_the_same(of):
    assert of(READMES[0]) == of(READMES[1])


@pytest.mark.parametrize("name", TRANSLATED)
@pytest.mark.parametrize("of", [commands, settings, programs])
def test_a_translated_page_says_the_same(of, name):
    assert set(of(f"docs/{name}")) <= set(of(f"docs/zh/{name}"))


@pytest.mark.parametrize("page", READMES)
def test_a_readme_has_at_most_150_lines(page):
    assert len(text(page).splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)]*))?\)", text(page)):
        if "://" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file.resolve().relative_to(ROOT)), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_program_that_is_named_exists(page):
    for module in re.findall(r"python -m (gspo(?:\.\w+)+)", text(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page} names {module}"
    targets = re.findall(r"^[a-z][a-z0-9-]*(?=:)", text("Makefile"), re.MULTILINE)
    for target in re.findall(r"`make ([a-z0-9-]+)", text(page)):
        assert target in targets, f"{page} names make {target}"


def test_the_index_lists_every_page():
    listed = links("docs/README.md")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")} - {"README.md"}
    assert pages - listed == set()


def test_the_page_of_parameters_is_what_the_program_prints():
    assert text("docs/parameters.md") == parameters_page()


def test_the_page_of_metrics_has_the_glossary():
    table = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in GLOSSARY.items())
    assert table in text("docs/metrics.md")


def test_the_chinese_page_of_metrics_has_every_metric():
    chinese = re.findall(r"^\| `([a-z_/]+)` \|", text("docs/zh/metrics.md").partition("## ")[2], re.MULTILINE)
    assert chinese == [*GLOSSARY]


@pytest.mark.parametrize("page", ["docs/running.md", "docs/zh/running.md"])
def test_the_original_names_have_their_parameters_and_defaults(page):
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([a-z_.]+)` \| (\S+) \|", text(page), re.MULTILINE)
    assert len(rows) == 9
    defaults = flatten(to_dict(Config()))
    for name, key, default in rows:
        assert ALIASES[name.lower()] == key
        assert defaults[key] == type(defaults[key])(yaml.safe_load(default))


def test_the_chinese_page_of_parameters_has_every_parameter_with_its_default():
    pages = ("docs/parameters.md", "docs/zh/parameters.md")
    english, chinese = (re.findall(r"^(\| `[a-z_0-9.]+` \| .*?) \|", text(page), re.MULTILINE) for page in pages)
    assert chinese == english and len(english) > 90


@pytest.mark.parametrize("page", ["docs/algorithm.md", "docs/zh/algorithm.md"])
def test_the_page_of_the_algorithm_names_every_parameter_of_the_loss(page):
    names = to_dict(Config())["objective"]
    assert [name for name in names if not re.search(rf"`(objective\.)?{name}\b", text(page))] == []


@pytest.mark.parametrize("page", ["docs/seed.md", "docs/zh/seed.md"])
def test_the_page_of_the_original_lists_every_difference_of_the_defaults(page):
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.+?)` \| `(.+?)` \|", text(page), re.MULTILINE)
    defaults = flatten(to_dict(Config()))
    differing = [
        (key, str(meant), str(defaults[key])) for key, meant in FORMS["seed"].items() if meant != defaults[key]
    ]
    assert rows == differing
    rest = {key for key, meant in FORMS["seed"].items() if meant == defaults[key]}
    assert rest <= settings(page), "and names what else the form stands for"
