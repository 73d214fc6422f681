"""Show on the terminal what a model answered: samples of a run's steps, or the answers of an evaluation.

    python -m gspo.samples outputs/quick                          # of the last step
    python -m gspo.samples outputs/quick --step 40 --worst 5      # the 5 prompts of step 40 with the lowest mean reward
    python -m gspo.samples outputs/quick --eval after --worst 5   # of the evaluation after training
    python -m gspo.samples answers.jsonl                          # written by eval.py --answers

A group is a prompt, as the model was given it, and its responses from the best to the worst: reward, tokens, whether
it was cut off, whether it is chosen or rejected in the widest pair, and the parts of its reward.
"""

import argparse
from pathlib import Path
from typing import Any

from gspo.checkpoint.evaluations import answers_file
from gspo.checkpoint.find_runs import run_folder_of
from gspo.command_line import parse_arguments
from gspo.errors import UserError
from gspo.read_paths import check_path, home_path, require_file
from gspo.report.read_run import is_group, read_lines
from gspo.system.console import say
from gspo.system.help_text import HelpText
from gspo.system.language import translated, word
from gspo.system.output import printable
from gspo.system.program import guarded

Row = dict[str, Any]
INDENT = "    "


def show_group(row: Row) -> str:
    """Return a group as text: none of its characters acts on a terminal."""
    rewards, n = row["rewards"], len(row["rewards"])
    ends = _column(row, "finish_reasons", n)
    mean = f"mean reward {_mean(row):.3f}"
    title = [translated(f"step {row['step']}: {mean}" if "step" in row else mean)]
    title += [translated(f"{ends.count('length')} of {n} cut off")] if "length" in ends else []
    truth = row.get("ground_truth")
    lines = [
        ", ".join(title),
        "  prompt",
        _indented(row.get("model_input", row["prompt"])),
        f"  {word('ground truth')}  {_shown(truth)}",
    ]
    order = sorted(range(n), key=lambda i: -rewards[i])
    lines += [line for i in order for line in (f"  {_head(row, i, n)}", _indented(row["responses"][i]))]
    greedy = row.get("greedy")
    if isinstance(greedy, dict) and _is_answer(greedy):
        lines += [f"  {word('greedy')}: {_head(greedy, 0, 1)}", _indented(greedy["responses"][0])]
    return "\n".join(lines)


def _head(row: Row, i: int, n: int) -> str:
    """Return the line above response i of n: all that is known of it beside its text."""
    text, parts = row["responses"][i], row.get("reward_parts")
    words = [f"{word('reward')} {row['rewards'][i]:.3f}"]
    if (length := _column(row, "lengths", n)[i]) is not None:
        words.append(translated(f"{length} tokens"))
    if _column(row, "finish_reasons", n)[i] == "length":
        words.append(word("CUT OFF"))
    if (correct := _column(row, "correct", n)[i]) is not None:
        words.append(word("right" if correct else "wrong"))
    words += [word(side) for side in ("chosen", "rejected") if row.get(side) == text]
    if prediction := _column(row, "predictions", n)[i]:
        words.append(f"{word('read as')} {prediction!r}")
    parts = parts if isinstance(parts, dict) else {}
    values = {name: _column(parts, name, n)[i] for name in parts}
    words += [f"{name} {value:g}" for name, value in values.items() if isinstance(value, int | float)]
    return printable(", ".join(map(str, words))).replace("\n", " ")


def _column(row: Row, name: str, n: int) -> list[Any]:
    """Return a list with an entry for each of n responses; of None where the row has no such list."""
    found = row.get(name)
    return found if isinstance(found, list) and len(found) == n else [None] * n


def _is_answer(greedy: Row) -> bool:
    return is_group({"step": 0, "prompt": "", **greedy}) and len(greedy["responses"]) == 1


def _shown(value: Any) -> str:
    return printable(str(value)).replace("\n", " ")


def _indented(text: str) -> str:
    return "\n".join(INDENT + line for line in printable(str(text)).split("\n"))


def _mean(row: Row) -> float:
    return sum(row["rewards"]) / len(row["rewards"]) if row["rewards"] else 0.0


def choose(rows: list[Row], step: int | None, worst: int | None, source: Path) -> list[Row]:
    """Return the groups to show: those of a step (None: the last, where there are steps), or its worst by mean reward.

    UserError where there are none.
    """
    steps = sorted({row["step"] for row in rows if "step" in row})
    if not rows or (step is not None and step not in steps):
        what = f"of step {step}" if step is not None and rows else "yet"
        kept = f" It holds those of {len(steps)} steps, {steps[0]} to {steps[-1]}." if steps else ""
        raise UserError(f"{source} holds no groups {what}.{kept}")
    wanted = step if step is not None else steps[-1] if steps else None
    found = [row for row in rows if row.get("step") == wanted]
    return found if worst is None else sorted(found, key=_mean)[:worst]


def open_groups(name: str, evaluation: str | None) -> tuple[list[Row], Path]:
    """Return the groups of a run, of one of its evaluations, or of a file of answers, and their file. UserError."""
    path = home_path(check_path(name, "RUN"))
    require_file(path, "RUN")
    if not path.is_file():
        folder = run_folder_of(path)
        path = answers_file(folder, f"eval_{evaluation}") if evaluation else folder / "samples.jsonl"
        if not path.is_file():
            cure = "eval.before_and_after" if evaluation else "trainer.sample_rows"
            raise UserError(f"{folder} holds no {path.name}: it is no run, or has written none ({cure}).")
    notes: list[str] = []
    rows = read_lines(path, lambda row: is_group({"step": 0, **row} if isinstance(row, dict) else row), notes)
    for note in notes:
        say(f"note: {note}.")
    return rows, path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.samples", description=__doc__, formatter_class=HelpText)
    parser.add_argument("run", metavar="RUN", help="outputs/NAME, or a file that eval.py --answers wrote")
    parser.add_argument("--step", type=int, help="the step (default: the last)")
    parser.add_argument("--worst", type=int, metavar="N", help="only the N prompts with the lowest mean reward")
    parser.add_argument("--eval", choices=("before", "after"), help="the answers of this evaluation instead")
    args = parse_arguments(parser)
    if args.worst is not None and args.worst < 1:
        raise UserError(f"--worst {args.worst}: it must be at least 1. Leave it out to see every prompt.")
    rows, path = open_groups(args.run, args.eval)
    print("\n\n".join(show_group(row) for row in choose(rows, args.step, args.worst, path)))


if __name__ == "__main__":
    guarded(main)
