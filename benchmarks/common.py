"""What the benchmarks share: the machine, and dated tables."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def heading(title: str, command: str, packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """Title, date, machine, versions, command."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])
    return f"## {title}\n\n{datetime.date.today()}, {cores} cores of {cpu_name()}, {versions}; `{command}`\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
