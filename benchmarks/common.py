"""Name the machine and write dated tables, for all benchmarks."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's name as Linux has it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def heading(title: str, command: str, packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """Return a markdown heading with title, date, machine, versions and command."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])
    return f"## {title}\n\n{datetime.date.today()}, {cores} cores of {cpu_name()}, {versions}; `{command}`\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
