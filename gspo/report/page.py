"""Write runs as one HTML page that loads nothing: its style, its scripts and its data are in it.

A response is never markup: it travels as JSON in which no `<` stands, and the scripts put it on the page as text. The
page's own policy names its scripts by their hashes, so a browser runs no others and fetches nothing.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from gspo.config import Config, flatten, to_dict
from gspo.metrics.health import healthy_range
from gspo.metrics.run_log import GLOSSARY, SEED_FIVE
from gspo.report.read_run import RunPage, setting_text
from gspo.system.output import CONTROLS

HERE = Path(__file__).parent
SCRIPTS = ("words.js", "compare_texts.js", "curves.js", "samples.js", "start.js")  # in the order of their use
CHINESE = HERE.parent.parent / "docs" / "zh" / "metrics.md"  # an installed package has no docs: English there
_OBEYED = re.compile("[" + "".join(re.escape(c) for c in ("<", ">", "&", *map(chr, CONTROLS))) + "]")


def page_of(runs: list[RunPage], language: str | None = None) -> str:
    """Return the page of these runs; language: zh, en, or None for the reader's own."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'",
        "title": html.escape(", ".join(run.name for run in runs)),
        "style": style,
        "data": safe_json(content_of(runs, language)),
        "script": script,
    }
    frame = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def safe_json(value: Any) -> str:
    """Return JSON that may stand inside a script element: without `<`, `>`, `&` and control characters."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def content_of(runs: list[RunPage], language: str | None) -> dict[str, Any]:
    """Return all that the page's scripts read."""
    names = [run.name for run in runs]
    shown = [run.name if names.count(run.name) == 1 else run.folder for run in runs]
    metrics = dict.fromkeys(name for run in runs for name in run.curves)
    ranges = {name: healthy_range(name, runs[0].health) for name in metrics}
    return {
        "language": language,
        "main": SEED_FIVE,
        "ranges": {name: limits for name, limits in ranges.items() if limits != (None, None)},
        "meaning": {"en": {name: GLOSSARY[name] for name in metrics if name in GLOSSARY}, "zh": chinese_glossary()},
        "settings": differing_settings([run.settings for run in runs]),
        "runs": [
            {
                "name": name,
                "folder": run.folder,
                "last_step": run.last_step,
                "rounds": run.rounds,
                "right_at": run.right_at,
                "curves": run.curves,
                "tables": run.tables,
                "prompts": run.prompts,
                "samples": run.samples,
                "notes": run.notes,
            }
            for name, run in zip(shown, runs, strict=True)
        ],
    }


def differing_settings(runs: list[dict[str, str]]) -> list[list[str | None]]:
    """Return [parameter, value in each run] of the runs' settings: those in which they differ. Of one run: those that
    it sets otherwise than by default, with the default last. None: a version that had no such parameter."""
    columns = [*runs]
    if len(runs) == 1:
        columns.append({name: setting_text(value) for name, value in flatten(to_dict(Config())).items()})
    names = dict.fromkeys(name for settings in runs for name in settings)
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("trainer.run_name", "trainer.output_dir")]


def chinese_glossary() -> dict[str, str]:
    """Return {metric: meaning} of the Chinese page of metrics; nothing where the documentation is not beside us."""
    if not CHINESE.is_file():
        return {}
    rows = re.findall(r"^\| `([\w/]+)` \| (.+) \|$", CHINESE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", meaning) for name, meaning in rows if name in GLOSSARY}
