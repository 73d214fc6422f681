"""Write what `make train-quick` prints into docs/first-run.md and its Chinese page: minutes on two cores.

    python benchmarks/first_run.py

Step lines are those of a few steps, checkpoints stand behind their step, and what depends on the machine is `…`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"en": "docs/first-run.md", "zh": "docs/zh/first-run.md"}
SHOWN_STEPS = (1, 2, 3, 25, 50, 51, 75, 100)
# train.py as it is, but with a line for every step: elsewhere than on a terminal it prints one in two seconds
PROGRAM = """
import sys
from gspo.metrics import progress
progress.LINE_EVERY_S = 0.0
sys.argv = ["train.py", *sys.argv[1:]]
import train
train.program()
"""
SPEED = (  # what depends on the machine -> what stands for it
    (r"\d+ tok/s  [\d.]+ (s|秒)  (left|剩余) .*", r"… tok/s  … \1  \2 …"),
    (
        r"takes about .*?: (\d+ more steps) of .* s and .* of evaluation",
        r"takes about …: \1 of … s and … of evaluation",
    ),
    (r"约需 .*?：(还有 \d+ 步)，每步 .* 秒，另加评估 .*", r"约需 …：\1，每步 … 秒，另加评估 …"),
    (r"(done in|用时) .*?([;；])", r"\1 …\2"),
    (r"CPU, \d+ threads?", "CPU, … threads"),
    (r"CPU，\d+ 线程", "CPU，… 线程"),
    (r"\S+/bin/python\S* |(?<=  )python ", ".venv/bin/python "),
)


def quick_run(*settings: str, language: str = "en") -> str:
    """Run `make train-quick` in a folder of its own; return what it prints, a line for every step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, "--config", "configs/quick.yaml", f"trainer.output_dir={folder}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GSPO_LANG": language, "PYTHONIOENCODING": "utf-8"}
        run = [*command, *settings]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return done.stdout.replace(folder, "outputs")


def transcript(printed: str) -> str:
    """Return what of it goes on the page."""
    kept: list[str] = []
    saved: dict[int, str] = {}  # step -> the line of its checkpoint
    for line in printed.splitlines():
        step = re.match(r"(?:step|步) (\d+)/", line)
        checkpoint = re.match(r"(?:checkpoint|检查点) .*step_0*(\d+)", line)
        if checkpoint:
            saved[int(checkpoint[1])] = line
        elif not re.match(r".*[:：] ?\d+ / \d+ (responses|个回复)", line) and not (
            step and int(step[1]) not in SHOWN_STEPS
        ):
            for pattern, mark in SPEED:
                line = re.sub(pattern, mark, line)
            kept.append(line)
    for step, line in saved.items():
        place = next(k for k, other in enumerate(kept) if other.startswith((f"step {step}/", f"步 {step}/")))
        while re.match(r"round \d+ (ends|begins)|第 \d+ 轮(结束|开始)", kept[place + 1]):
            place += 1
        kept.insert(place + 1, line)
    return "\n".join(kept)


def main() -> None:
    for language, page in PAGES.items():
        shown = transcript(quick_run(language=language))
        text = (ROOT / page).read_text(encoding="utf-8")
        before, _, rest = text.partition("```text\n")
        after = rest.partition("\n```\n")[2]
        (ROOT / page).write_text(f"{before}```text\n{shown}\n```\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
