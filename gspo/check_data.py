r"""Check the data before training: what is wrong with its rows, and whether the reward function scores gold answers.

    python -m gspo.check_data --config configs/standard.yaml [section.key=value ...] [--rows K | --all]

Every row is read; a sample of rows is tokenized and its answers are scored. Right ("gold") answers are a row's
`solution` and its ground truth as `\boxed{72}`, `#### 72`, `The answer is 72`, `答案：72` and `72`; the best of them
counts. Wrong ones are made from another row's ground truth, or empty where all are alike.
Exit code: 0 when training would start, 2 when not.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gspo.algorithm.objective import find_algorithm, learns_from_rows
from gspo.command_line import EVERY, parse_arguments
from gspo.config import Config
from gspo.data.encoding import Encoder, check_template_kwargs
from gspo.data.prompts import (
    Survey,
    check_positions,
    configured_splits,
    in_common,
    make_checker,
    survey,
)
from gspo.data.row_checker import TooLong, say_fields
from gspo.errors import UserError
from gspo.launch_checks import first_prompt
from gspo.models.loading import check_weights, load_model_config, load_tokenizer
from gspo.read_config import STANDARD, load_config
from gspo.reward.gold_check import SHOWN, GoldCheck, check_gold, sample
from gspo.reward.scorer import Scorer
from gspo.system.cells import columns
from gspo.system.console import say
from gspo.system.help_text import HelpText
from gspo.system.language import translated, word
from gspo.system.program import guarded

BAD, LONG, TWICE, IN_TRAIN = "bad rows", "too long", "duplicates", "also in train"
TRUTHS = "prompts with different ground truths"
NOT_FULL, NOT_ABOVE = "gold answers that count as wrong", "gold answers not above a wrong one"


@dataclass
class Found:
    """The problems of one split: how many of each kind, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        """Count a problem, and keep its text if it is among the first."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.first.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(what)


@dataclass
class Report:
    """One split: its line of the table, its problems, and the reasons why training would not start."""

    name: str
    cells: list[str]
    found: Found
    blocked: list[str]
    faults: str = ""  # what the reward function did where it failed
    first_prompt: str = ""  # as the model reads it


def check_splits(cfg: Config, rows: int | None) -> Iterator[Report]:
    """Check every split that training would read."""
    model_config, scorer = load_model_config(cfg.model.path), None
    tokenizer = load_tokenizer(cfg.model.path, cfg.data.chat_template)
    check_weights(cfg.model.path, values=True)
    train: Survey | None = None
    needs_solutions, stored = find_algorithm(cfg.objective.algorithm).needs_solutions, learns_from_rows(cfg)
    check_template_kwargs(tokenizer, cfg.data.chat_template_kwargs)
    for configured in configured_splits(cfg):
        found, blocked = Found(), []
        checker = make_checker(cfg, tokenizer, model_config, configured.name, needs_solutions, stored)

        def on_bad_row(error: UserError, found: Found = found) -> None:
            found.add(LONG if isinstance(error, TooLong) else BAD, str(error))

        keys = (cfg.data.prompt_key, cfg.data.truth_key)
        seen = survey(
            configured.files,
            checker,
            on_bad_row,
            split=configured.split,
            limit=configured.limit,
            keys_named=keys,
        )
        if configured.name == "train":
            say_fields([checker], own_function=cfg.reward.path is not None)
        bad, long = found.counts.get(BAD, 0), found.counts.get(LONG, 0)
        total = len(seen.prompts) + bad + long
        if bad:
            blocked.append(f"{configured.name}: {bad} bad rows")
        if long and cfg.data.overlong == "error":
            blocked.append(
                f"{configured.name}: {long} prompts are too long; raise data.max_prompt_length, or drop them"
            )
        if not len(seen.prompts):
            blocked.append(f"{configured.name}: no prompts in {', '.join(configured.files)}")
            yield Report(configured.name, [str(total), str(bad), str(long)], found, blocked)
            continue
        try:
            check_positions(checker, cfg)
        except UserError as e:
            blocked.append(f"{configured.name}: {e}")
        _find_repeats(seen, train, found)
        train = seen if configured.name == "train" else train
        scorer = scorer or Scorer(cfg.reward)
        gold = check_gold(scorer, seen.prompts, rows)
        _say_of_right_answers(seen, checker.encoder, rows, configured.name, gold, cfg.rollout.max_new_tokens)
        for kind, examples in ((NOT_FULL, gold.not_full), (NOT_ABOVE, gold.not_above)):
            found.first |= {kind: [str(e) for e in examples]} if examples else {}
        found.counts |= {NOT_FULL: gold.rows - gold.full, NOT_ABOVE: gold.compared - gold.above}
        if configured.name == "train" and cfg.reward.check_rows:  # the same sample as at the start of training
            verdict = check_gold(scorer, seen.prompts, cfg.reward.check_rows)
            blocked += [verdict.verdict()] if verdict.refused else [gold.verdict()] if gold.unscored else []
        cells = [str(total), str(bad), str(long), *_cells(seen, rows, found, configured.name, gold)]
        shown = first_prompt(seen.prompts, tokenizer) if configured.name == "train" else ""
        yield Report(configured.name, cells, found, blocked, gold.fault_lines(configured.name), shown)


def _say_of_right_answers(
    seen: Survey, encoder: Encoder, rows: int | None, name: str, gold: GoldCheck, most: int
) -> None:
    """Say in a line each that no right answer is known, or that one would be cut off at `most` tokens."""
    if unchecked := gold.no_right_answer():
        say(f"{name}: {unchecked}")
    truths = [(i, seen.prompts[i].ground_truth) for i in sample(len(seen.prompts), rows)]
    lengths = [(encoder.response_length(truth, most), -i) for i, truth in truths if isinstance(truth, str)]
    if lengths and max(lengths)[0] > most:
        length, place = max(lengths)
        say(
            f"note: {seen.prompts.place(-place)}: the ground truth has {length} tokens, its end included, and "
            f"responses are cut off after {most}: to say it whole takes a larger rollout.max_new_tokens."
        )


def _find_repeats(seen: Survey, train: Survey | None, found: Found) -> None:
    """Add the prompts that occur twice in this split, with one ground truth or several, and those that are in the
    training split as well."""
    pairs = seen.contradictions()
    found.counts[TRUTHS] = len(pairs)
    found.first[TRUTHS] = [seen.contradiction(pair) for pair in pairs[:SHOWN]]
    order = np.argsort(seen.keys, kind="stable")
    same = seen.keys[order[1:]] == seen.keys[order[:-1]]
    later, earlier = order[1:][same], order[:-1][same]
    found.counts[TWICE] = len(later)
    found.first[TWICE] = [
        f"{seen.prompts.place(later[k])} repeats {seen.prompts.place(earlier[k])}" for k in np.argsort(later)[:SHOWN]
    ]
    if train is None:
        return
    common = np.flatnonzero(in_common(seen.keys, train.keys))
    found.counts[IN_TRAIN] = len(common)
    found.first[IN_TRAIN] = [
        f"{seen.prompts.place(i)} is {train.prompts.place(int((train.keys == seen.keys[i]).argmax()))}"
        for i in common[:SHOWN].tolist()
    ]


def _cells(seen: Survey, rows: int | None, found: Found, name: str, gold: GoldCheck) -> list[str]:
    """Return the cells of the table that need the rows themselves."""
    lengths = [len(seen.prompts[i].ids) for i in sample(len(seen.prompts), rows)]
    return [
        f"{np.median(lengths):.0f} / {max(lengths)}",
        str(found.counts[TWICE]),
        "-" if name == "train" else str(found.counts.get(IN_TRAIN, 0)),
        f"{gold.gold_mean:.3f}" if gold.rows else "-",
        f"{gold.full / gold.rows:.3f}" if gold.rows else "-",
        f"{gold.wrong_mean:.3f}" if gold.compared else "-",
        f"{gold.above / gold.compared:.3f}" if gold.compared else "-",
    ]


TITLES = ["", "rows", "bad", "long", "tokens", "twice", "in train", "gold", "right", "wrong", "above"]


def show(reports: list[Report]) -> str:
    """Return the faults of the reward function first, the table, and the first problems of each kind."""
    table = [[*map(word, TITLES)]] + [[r.name, *r.cells, *[""] * (len(TITLES) - 1 - len(r.cells))] for r in reports]
    lines = [translated(report.faults) for report in reports if report.faults]
    lines.append(columns(table))
    for report in reports:
        for kind, count in report.found.counts.items():
            if count:
                problems = [f"  {translated(text)}" for text in report.found.first[kind]]
                lines += [f"\n{report.name}: {count} {word(kind)}", *problems]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gspo.check_data", description=__doc__, formatter_class=HelpText)
    parser.add_argument(
        "--config", default=STANDARD, help="YAML file, or a preset's name: quick, seed (default: %(default)s)"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--rows", type=int, default=1000, metavar="K", help="rows sampled (default: %(default)s)")
    amount.add_argument("--all", action="store_true", help="count tokens and score answers of every row")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.parameters")
    args = parse_arguments(parser, argv, EVERY)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: it must be at least 1.")
    cfg = load_config(args.config, args.overrides, note=say)
    reports = list(check_splits(cfg, None if args.all else args.rows))
    print(show(reports))
    print("".join(f"\n{translated(report.first_prompt)}" for report in reports if report.first_prompt))
    reasons = [reason for report in reports for reason in report.blocked]
    say("\ntraining would start" if not reasons else "\ntraining would not start:")
    for reason in reasons:
        print(f"  {translated(reason)}")
    return 2 if reasons else 0


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
