"""Name the machine and write dated tables, for all benchmarks."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def cpu_name(info: str | None = None) -> str:
    """Return the processor's name as Linux has it (/proc/cpuinfo), with its family and model.

    Virtual machines often hide the rest of the name; the numbers still tell one generation from another.
    """
    lines = [line.partition(":") for line in (info or Path("/proc/cpuinfo").read_text()).splitlines()]
    found = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # the first processor's stays
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    name = found.get("model name") or platform.processor()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def heading(title: str, command: str, packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """Return a markdown heading with title, date, machine, versions and command."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])
    return f"## {title}\n\n{datetime.date.today()}, {cores} cores of {cpu_name()}, {versions}; `{command}`\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
