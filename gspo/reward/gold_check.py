"""Check that a reward function scores right answers above wrong ones, on rows whose right answer is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gspo.errors import UserError
from gspo.system.console import say
from gspo.types import Prompt, Scores

RENDERINGS = (r"\boxed{{{}}}", "#### {}", "The answer is {}", "答案：{}", "{}")
NO_ANSWER = "No idea."  # a response to a row whose right answer is not known
TOLERANCE = 1e-6  # of float32 rewards, relative
SHOWN = 5  # examples shown of each kind of problem
CHUNK = 256  # rows whose texts are scored together


class ScoresTexts(Protocol):
    """The part of gspo.reward.scorer.Scorer that is used here."""

    path: Any
    name: str
    correct_at: float  # a response is right from this reward on
    is_told: bool  # ... as it was configured
    ranks: bool  # rewards compare within a group only

    @property
    def of_each(self) -> "ScoresTexts":
        """Return what scores a response by itself, where there is such a function."""
        ...

    def score_texts(self, prompts: list[Prompt], texts: list[list[str]]) -> Scores: ...


@dataclass(frozen=True)
class Example:
    """One sampled row: its best right answer and, where there is one, its best wrong answer."""

    place: str
    gold: str
    gold_score: float
    wrong: str | None
    wrong_score: float
    unscored: bool = False  # every call on its wrong answers failed

    def __str__(self) -> str:
        said = f"{self.place}: {self.gold[-80:]!r} scores {self.gold_score:.3g}"
        return said + (f", the wrong {self.wrong!r:.80} {self.wrong_score:.3g}" if self.wrong is not None else "")


@dataclass(frozen=True)
class GoldCheck:
    """How the reward function scores right and wrong answers to the sampled rows."""

    function: str
    rows: int = 0
    full: int = 0  # rows whose right answer is right by its reward
    correct_at: float = 1.0  # ... which is at least this
    highest: float = 1.0  # reward of a right answer
    gold_mean: float = 0.0
    compared: int = 0  # rows for which there is a wrong answer
    above: int = 0  # of these, rows whose right answer scores higher
    wrong_mean: float = 0.0
    calls: int = 0
    faults: int = 0  # calls that raised or timed out
    first_fault: str = ""  # what the first of these did, and the call
    unscored: int = 0  # rows on whose wrong answers every call failed: what is left of them is no score
    not_full: tuple[Example, ...] = ()  # the first SHOWN rows whose right answer scores less than correct_at

    not_above: tuple[Example, ...] = ()  # ... not above a wrong one

    @property
    def refused(self) -> bool:
        """Return whether nothing can be learned: no right answer scores above a wrong one, or wrong ones fail."""
        return self.unscored > 0 or (self.compared > 0 and self.above == 0)

    def fault_lines(self, split: str) -> str:
        """Return what the function did where it failed, for the first lines of a report; "" where it did not."""
        if not self.faults:
            return ""
        said = (
            f"{split}: the reward function failed on {self.faults} of {self.calls} calls; the first {self.first_fault}"
        )
        return said + (f"\n{split}: it failed on every wrong answer to {self.unscored} rows" if self.unscored else "")

    def no_right_answer(self) -> str:
        """Return a note that the function was not checked, as no right answer is known; "" where one was."""
        if self.rows or not self.calls:
            return ""
        return (
            "note: whether the reward function tells right from wrong is not checked: the sampled rows have no ground "
            "truth that is a text, so no right answer is known. Give them a `solution`."
        )

    def verdict(self) -> str | None:
        """Return one paragraph that is an error where `refused`, else a warning; None where nothing is wrong."""
        if self.faults and self.faults == self.calls:
            return (
                f"the reward function {self.function} failed on every answer it was given before training: it "
                f"{self.first_fault}. Fix it; reward.check_rows=0 starts the run without this check."
            )
        failed = f" {self.faults} of its {self.calls} calls failed: it {self.first_fault}." if self.faults else ""
        if self.unscored:
            return (
                f"the reward function {self.function} failed on every wrong answer to {self.unscored} of {self.rows} "
                f"sampled rows; one call {self.first_fault}. It must score wrong answers, too; reward.check_rows=0 "
                "starts the run without this check."
            )
        if self.refused:
            return (
                f"the reward function {self.function} scores no right answer above a wrong one in {self.compared} "
                f"sampled rows; {self.not_above[0]}.{failed} Give the rows a `solution` that it scores higher, or fix "
                "the function; reward.check_rows=0 starts the run without this check."
            )
        if self.rows and not self.full:
            return (
                f"the reward function {self.function} gives none of {self.rows} sampled right answers "
                f"{self.correct_at:g} or more, so nothing counts as right: accuracy, pass@k and maj@k stay 0, and "
                "held-out reward alone says which checkpoint is the best. Set "
                f"reward.correct_at={self.highest:.6g}, or return `acc`; {self.not_full[0]}.{failed}"
            )
        if self.full < self.rows:
            return (
                f"the reward function {self.function} gives {self.rows - self.full} of {self.rows} sampled right "
                f"answers less than {self.correct_at:g}, so that they count as wrong (reward.correct_at); "
                f"{self.not_full[0]}.{failed}"
            )
        return f"of the reward function {self.function}{failed}" if failed else None


def gold_texts(prompt: Prompt) -> list[str]:
    """Return right answers: the row's `solution`, where there is one, and its ground truth in several forms."""
    solution, truth = prompt.extra_info.get("solution"), prompt.ground_truth
    given = [solution] if isinstance(solution, str) and solution.strip() else []
    return given + (renderings(truth) if isinstance(truth, str) else [])  # a list or an object: only the user knows


def renderings(truth: str) -> list[str]:
    """Return a ground truth as a final answer, in each way that answers are marked."""
    return [form.format(truth) for form in RENDERINGS]


def sample(count: int, rows: int | None, seed: int = 0) -> list[int]:
    """Return up to `rows` of `count` row numbers, in order and the same every time; None: all."""
    if rows is None or rows >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, rows, replace=False).tolist())


def check_gold(scorer: ScoresTexts, prompts: Sequence[Prompt], rows: int | None, seed: int = 0) -> GoldCheck:
    """Score right and wrong answers to a sample of the prompts (None: all).

    Where no right answer is known, a wrong one is scored to the first few, to see whether the function fails.
    """
    sampled = sample(len(prompts), rows, seed)
    places = [i for i in sampled if gold_texts(prompts[i])]
    if sampled and not places:
        scores = scorer.score_texts([prompts[i] for i in sampled[:SHOWN]], [[NO_ANSWER] * 2] * len(sampled[:SHOWN]))
        return GoldCheck(
            f"{scorer.path}: {scorer.name}",
            correct_at=correct_from(scorer, 1.0),
            calls=scores.calls,
            faults=scores.faults,
            first_fault=scores.first_fault,
        )
    first = prompts[places[0]].ground_truth if places else ""
    examples: list[Example] = []
    faults, calls, first_fault = 0, 0, ""
    for start in range(0, len(places), CHUNK):
        found, scores = _score(scorer, prompts, places[start : start + CHUNK], first)
        examples += found
        faults, calls = faults + scores.faults, calls + scores.calls
        first_fault = first_fault or scores.first_fault
    highest = max((e.gold_score for e in examples), default=1.0)
    correct_at = correct_from(scorer, highest)
    compared = [e for e in examples if e.wrong is not None and not e.unscored]
    not_full = [e for e in examples if e.gold_score < correct_at - TOLERANCE * abs(correct_at)]
    not_above = [e for e in compared if not e.gold_score > e.wrong_score]
    return GoldCheck(
        f"{scorer.path}: {scorer.name}",
        rows=len(examples),
        full=len(examples) - len(not_full),
        correct_at=correct_at,
        highest=highest,
        gold_mean=sum(e.gold_score for e in examples) / max(1, len(examples)),
        compared=len(compared),
        above=len(compared) - len(not_above),
        wrong_mean=sum(e.wrong_score for e in compared) / max(1, len(compared)),
        calls=calls,
        faults=faults,
        first_fault=first_fault,
        unscored=sum(e.unscored for e in examples),
        not_full=tuple(not_full[:SHOWN]),
        not_above=tuple(not_above[:SHOWN]),
    )


def correct_from(scorer: ScoresTexts, highest: float) -> float:
    """Return the reward from which on a response is right, when right answers get up to `highest`.

    It is the configured one, the top of the configured range, or `highest` where that is more than 1.
    """
    return scorer.correct_at if scorer.is_told or scorer.ranks else max(scorer.correct_at, highest)


def require_gold(scorer: ScoresTexts, prompts: Sequence[Prompt], rows: int) -> float:
    """Check the reward function before training; return the reward from which on a response is right.

    UserError where no right answer scores above a wrong one.
    """
    check = check_gold(scorer, prompts, rows)
    if unchecked := check.no_right_answer():
        say(unchecked)
    if check.refused:
        raise UserError(check.verdict())
    if check.verdict():
        say(f"warning: {check.verdict()}")
    return find_correct_at(scorer, prompts, rows, check)


def find_correct_at(scorer: ScoresTexts, prompts: Sequence[Prompt], rows: int, check: GoldCheck | None = None) -> float:
    """Return the reward from which on evaluation takes a response for right, and say it where that is not 1.

    `check` is the scorer's, where it was made already.
    """
    each = scorer.of_each
    if each.is_told or each.ranks:
        correct_at = each.correct_at
    else:
        check = check if check is not None and each is scorer else check_gold(each, prompts, rows)
        correct_at = check.correct_at if check.rows else each.correct_at
    if each.ranks:
        say("note: rank_responses compares within a group: no accuracy is shown, unless its scores have `acc`")
    elif correct_at != 1.0:
        say(f"note: a response is right from a reward of {correct_at:g} on (reward.correct_at), unless it has `acc`")
    return correct_at


def _score(
    scorer: ScoresTexts, prompts: Sequence[Prompt], places: list[int], first_truth: str
) -> tuple[list[Example], Scores]:
    """Return an example for each row at `places`: its best right and best wrong answer; and the scores of all texts.

    Wrong is another row's ground truth, or an empty response where there is no other. Right and wrong form one group,
    as a `rank_responses` scores them against each other.
    """
    chosen = [prompts[i] for i in places]
    truths = [p.ground_truth for p in chosen] + [first_truth]
    golds, wrongs, groups = [], [], []
    for k, prompt in enumerate(chosen):
        later = [t for t in truths[k + 1 :] + truths[:k] if isinstance(t, str) and t != prompt.ground_truth]
        golds.append(gold_texts(prompt))
        wrongs.append(renderings(later[0]) if later else [""])  # all truths are alike: an empty response is wrong
        both = golds[-1] + wrongs[-1]
        groups.append(both + both[-1:] * (1 + 2 * len(RENDERINGS) - len(both)))
    scores = scorer.score_texts(chosen, groups)
    examples = []
    for k, row in enumerate(scores.rewards.tolist()):
        split = len(golds[k])
        gold = max(range(split), key=row.__getitem__)
        wrong = max(range(split, split + len(wrongs[k])), key=row.__getitem__, default=None)
        place = prompts.place(places[k]) if hasattr(prompts, "place") else f"prompt {chosen[k].id}"
        wrong_and_score = (None, 0.0) if wrong is None else (groups[k][wrong], row[wrong])
        failed = scores.faulty is not None and bool(scores.faulty[k, split : split + len(wrongs[k])].all())
        examples.append(Example(place, groups[k][gold], row[gold], *wrong_and_score, failed))
    return examples, scores
