r"""Look at the data before training: what is wrong with it, and whether the reward function knows the right answers.

    python -m gspo.check_data --config configs/standard.yaml [section.key=value ...] [--rows K | --all]

Every row is read; tokens are counted and answers scored on a sample. Right ("gold") answers are a row's `solution` and
its ground truth as `\boxed{72}`, `#### 72`, `The answer is 72`, `答案：72` and `72`; the best of them counts. Wrong
ones are made of another row's ground truth. Exit code: 0 when training would start, 2 when not.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gspo.config import Config, load_config
from gspo.data.prompts import Survey, TooLong, check_positions, make_checker, shared, survey, wanted_splits
from gspo.errors import UserError
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.reward.scorer import Scorer
from gspo.system.console import say
from gspo.system.program import guarded
from gspo.types import Prompt, Scores

RENDERINGS = (r"\boxed{{{}}}", "#### {}", "The answer is {}", "答案：{}", "{}")
FULL = 1.0 - 1e-6
SHOWN = 5  # problems of each kind
CHUNK = 256  # rows whose texts are scored in one go
BAD, LONG, TWICE, IN_TRAIN = "bad rows", "too long", "duplicates", "also in train"
NOT_FULL, NOT_ABOVE = "gold answers below 1.0", "gold answers not above a wrong one"


class ScoresTexts(Protocol):
    """The part of gspo.reward.scorer.Scorer that is needed here."""

    path: Any
    name: str

    def score_texts(self, prompts: list[Prompt], texts: list[list[str]]) -> Scores: ...


@dataclass(frozen=True)
class Example:
    """One sampled row: its best right answer and, where there is one, its best wrong answer."""

    place: str
    gold: str
    gold_score: float
    wrong: str | None
    wrong_score: float

    def __str__(self) -> str:
        said = f"{self.place}: {self.gold[-80:]!r} scores {self.gold_score:.3g}"
        return said + (f", the wrong {self.wrong!r:.80} {self.wrong_score:.3g}" if self.wrong is not None else "")


@dataclass(frozen=True)
class GoldCheck:
    """What the reward function makes of right and wrong answers to the sampled rows."""

    function: str
    rows: int = 0
    full: int = 0  # rows whose right answer scores 1.0
    gold_mean: float = 0.0
    compared: int = 0  # rows for which there is a wrong answer
    above: int = 0  # of these, rows whose right answer scores higher
    wrong_mean: float = 0.0
    calls: int = 0
    faults: int = 0  # calls that raised or timed out
    first_fault: str = ""  # what the first one did
    not_full: tuple[Example, ...] = ()  # the first of them
    not_above: tuple[Example, ...] = ()

    @property
    def refused(self) -> bool:
        """Nothing can be learned: no right answer scores above a wrong one."""
        return self.compared > 0 and self.above == 0

    def verdict(self) -> str | None:
        """None where all is well, or one paragraph: an error where `refused`, else a warning."""
        if self.faults and self.faults == self.calls:
            return (
                f"the reward function {self.function} failed on every answer it was given before training: it "
                f"{self.first_fault}. Mend it; reward.check_rows=0 trains all the same."
            )
        failed = f" {self.faults} of its calls failed, the first {self.first_fault}." if self.faults else ""
        if self.refused:
            return (
                f"the reward function {self.function} scores no right answer above a wrong one in {self.compared} "
                f"sampled rows; {self.not_above[0]}.{failed} Give the rows a `solution` that it scores 1.0, or mend "
                "the function; reward.check_rows=0 trains all the same."
            )
        if self.full < self.rows:
            return (
                f"the reward function {self.function} gives {self.rows - self.full} of {self.rows} sampled right "
                f"answers less than 1.0; {self.not_full[0]}.{failed}"
            )
        return None


def gold_texts(prompt: Prompt) -> list[str]:
    """Right answers: the row's `solution`, where there is one, and renderings of its ground truth."""
    solution = prompt.extra_info.get("solution")
    given = [solution] if isinstance(solution, str) and solution.strip() else []
    return given + renderings(prompt.ground_truth)


def renderings(truth: str) -> list[str]:
    """A ground truth as a final answer, in the ways that answers are marked."""
    return [form.format(truth) for form in RENDERINGS]


def sample(count: int, rows: int | None, seed: int = 0) -> list[int]:
    """Up to `rows` of `count` places, in order and the same every time; None: all."""
    if rows is None or rows >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, rows, replace=False).tolist())


def check_gold(scorer: ScoresTexts, prompts: Sequence[Prompt], rows: int | None, seed: int = 0) -> GoldCheck:
    """Score right and wrong answers to a sample of the prompts (None: all)."""
    places = sample(len(prompts), rows, seed)
    first = prompts[places[0]].ground_truth if places else ""
    gold_sum, wrong_sum, first_fault = 0.0, 0.0, ""
    sums = {"rows": 0, "full": 0, "compared": 0, "above": 0, "calls": 0, "faults": 0}
    not_full: list[Example] = []
    not_above: list[Example] = []
    for start in range(0, len(places), CHUNK):
        examples, scores = _score(scorer, prompts, places[start : start + CHUNK], first)
        sums["faults"] += scores.faults
        sums["calls"] += scores.calls
        first_fault = first_fault or scores.first_fault
        for e in examples:
            sums["rows"] += 1
            gold_sum += e.gold_score
            if e.gold_score >= FULL:
                sums["full"] += 1
            elif len(not_full) < SHOWN:
                not_full.append(e)
            if e.wrong is None:
                continue
            sums["compared"] += 1
            wrong_sum += e.wrong_score
            if e.gold_score > e.wrong_score:
                sums["above"] += 1
            elif len(not_above) < SHOWN:
                not_above.append(e)
    return GoldCheck(
        f"{scorer.path}: {scorer.name}",
        gold_mean=gold_sum / max(1, sums["rows"]),
        wrong_mean=wrong_sum / max(1, sums["compared"]),
        not_full=tuple(not_full),
        not_above=tuple(not_above),
        first_fault=first_fault,
        **sums,
    )


def require_gold(scorer: ScoresTexts, prompts: Sequence[Prompt], rows: int) -> None:
    """What training asks at its start: UserError when no right answer scores above a wrong one."""
    check = check_gold(scorer, prompts, rows)
    if check.refused:
        raise UserError(check.verdict())
    if check.verdict():
        say(f"warning: {check.verdict()}")


def _score(
    scorer: ScoresTexts, prompts: Sequence[Prompt], places: list[int], first_truth: str
) -> tuple[list[Example], Scores]:
    """Some rows' best right and best wrong answers, and what all were scored.

    A row's right and wrong texts go into one group: a `rank_responses` scores them against each other.
    """
    chosen = [prompts[i] for i in places]
    truths = [p.ground_truth for p in chosen] + [first_truth]
    golds, wrongs, groups = [], [], []
    for k, prompt in enumerate(chosen):
        later = [t for t in truths[k + 1 :] + truths[:k] if t != prompt.ground_truth]
        golds.append(gold_texts(prompt))
        wrongs.append(renderings(later[0]) if later else [])
        both = golds[-1] + wrongs[-1]
        groups.append(both + both[-1:] * (1 + 2 * len(RENDERINGS) - len(both)))
    scores = scorer.score_texts(chosen, groups)
    examples = []
    for k, row in enumerate(scores.rewards.tolist()):
        split = len(golds[k])
        gold = max(range(split), key=row.__getitem__)
        wrong = max(range(split, split + len(wrongs[k])), key=row.__getitem__, default=None)
        place = prompts.place(places[k]) if hasattr(prompts, "place") else f"prompt {chosen[k].id}"
        told = (None, 0.0) if wrong is None else (groups[k][wrong], row[wrong])
        examples.append(Example(place, groups[k][gold], row[gold], *told))
    return examples, scores


@dataclass
class Found:
    """What is wrong with one split: how many problems of each kind, and the first ones."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.first.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(what)


@dataclass
class Report:
    """One split: a line of the table, its problems, and why training would not start."""

    name: str
    cells: list[str]
    found: Found
    blocked: list[str]


def lint(cfg: Config, rows: int | None) -> Iterator[Report]:
    """Look at every split that training would read."""
    tokenizer, model_config, scorer = load_tokenizer(cfg.model.path), load_model_config(cfg.model.path), None
    train: Survey | None = None
    for wanted in wanted_splits(cfg):
        found, checker, blocked = Found(), make_checker(cfg, tokenizer, model_config), []

        def left_out(error: UserError, found: Found = found) -> None:
            found.add(LONG if isinstance(error, TooLong) else BAD, str(error))

        seen = survey(wanted.files, checker, left_out, split=wanted.split, limit=wanted.limit)
        bad, long = found.counts.get(BAD, 0), found.counts.get(LONG, 0)
        total = len(seen.prompts) + bad + long
        if bad:
            blocked.append(f"{wanted.name}: {bad} bad rows")
        if long and cfg.data.overlong == "error":
            blocked.append(f"{wanted.name}: {long} prompts are too long; raise data.max_prompt_length, or drop them")
        if not len(seen.prompts):
            blocked.append(f"{wanted.name}: no prompts in {', '.join(wanted.files)}")
            yield Report(wanted.name, [str(total), str(bad), str(long)], found, blocked)
            continue
        try:
            check_positions(checker, cfg)
        except UserError as e:
            blocked.append(f"{wanted.name}: {e}")
        _same(seen, train, found)
        train = seen if wanted.name == "train" else train
        scorer = scorer or Scorer(cfg.reward)
        gold = check_gold(scorer, seen.prompts, rows)
        for kind, examples in ((NOT_FULL, gold.not_full), (NOT_ABOVE, gold.not_above)):
            found.first |= {kind: [str(e) for e in examples]} if examples else {}
        found.counts |= {NOT_FULL: gold.rows - gold.full, NOT_ABOVE: gold.compared - gold.above}
        if wanted.name == "train" and cfg.reward.check_rows:  # the very sample that training takes
            verdict = check_gold(scorer, seen.prompts, cfg.reward.check_rows)
            blocked += [verdict.verdict()] if verdict.refused else []
        cells = [str(total), str(bad), str(long), *_cells(seen, rows, found, wanted.name, gold)]
        yield Report(wanted.name, cells, found, blocked)


def _same(seen: Survey, train: Survey | None, found: Found) -> None:
    """Prompts that occur twice in this split, and those that are in the training split as well."""
    order = np.argsort(seen.keys, kind="stable")
    same = seen.keys[order[1:]] == seen.keys[order[:-1]]
    later, earlier = order[1:][same], order[:-1][same]
    found.counts[TWICE] = len(later)
    found.first[TWICE] = [
        f"{seen.prompts.place(later[k])} repeats {seen.prompts.place(earlier[k])}" for k in np.argsort(later)[:SHOWN]
    ]
    if train is None:
        return
    common = np.flatnonzero(shared(seen.keys, train.keys))
    found.counts[IN_TRAIN] = len(common)
    found.first[IN_TRAIN] = [
        f"{seen.prompts.place(i)} is {train.prompts.place(int((train.keys == seen.keys[i]).argmax()))}"
        for i in common[:SHOWN].tolist()
    ]


def _cells(seen: Survey, rows: int | None, found: Found, name: str, gold: GoldCheck) -> list[str]:
    lengths = [len(seen.prompts[i].ids) for i in sample(len(seen.prompts), rows)]
    return [
        f"{np.median(lengths):.0f} / {max(lengths)}",
        str(found.counts[TWICE]),
        "-" if name == "train" else str(found.counts.get(IN_TRAIN, 0)),
        f"{gold.gold_mean:.3f}",
        f"{gold.full / gold.rows:.3f}",
        f"{gold.wrong_mean:.3f}" if gold.compared else "-",
        f"{gold.above / gold.compared:.3f}" if gold.compared else "-",
    ]


TITLES = ["", "rows", "bad", "too long", "tokens", "twice", "in train", "gold", "gold = 1", "wrong", "gold > wrong"]


def show(reports: list[Report]) -> str:
    """The table, and the first problems of each kind."""
    table = [TITLES] + [[r.name, *r.cells, *[""] * (len(TITLES) - 1 - len(r.cells))] for r in reports]
    widths = [max(len(line[i]) for line in table) for i in range(len(TITLES))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    for report in reports:
        for kind, count in report.found.counts.items():
            if count:
                lines += [f"\n{report.name}: {count} {kind}", *[f"  {text}" for text in report.found.first[kind]]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gspo.check_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/standard.yaml", help="YAML preset (default: %(default)s)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--rows", type=int, default=1000, metavar="K", help="rows sampled (default: %(default)s)")
    amount.add_argument("--all", action="store_true", help="count tokens and score answers of every row")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.config")
    args = parser.parse_intermixed_args(argv)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: at least one row is to be sampled.")
    cfg = load_config(args.config, args.overrides)
    reports = list(lint(cfg, None if args.all else args.rows))
    print(show(reports))
    reasons = [reason for report in reports for reason in report.blocked]
    print("\ntraining would start" if not reasons else "\ntraining would not start:", flush=True)
    for reason in reasons:
        print(f"  {reason}")
    return 2 if reasons else 0


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
