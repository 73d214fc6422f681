"""Answers in LaTeX: the table of pairs, the known misses, and input made to break the comparison."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latex_pairs import MISSES, PAIRS, REWARD_DIFFERS, REWARD_KNOWS
from repository import ROOT

from gspo.reward import latex
from gspo.reward.latex import MAX_LENGTH, available, equivalent
from gspo.reward.reward_func import compute_score, correctness
from gspo.reward.worker_pool import WorkerPool

needs_library = pytest.mark.skipif(not available(), reason="math-verify is not installed")
ALL = [(kind, *pair) for kind, pairs in PAIRS.items() for pair in pairs]


@needs_library
@pytest.mark.parametrize(("kind", "gold", "answer", "equal"), ALL)
def test_pairs_in_either_order(kind, gold, answer, equal):
    assert equivalent(gold, answer) is equal
    assert equivalent(answer, gold) is equal


@needs_library
@pytest.mark.parametrize(("gold", "answer", "equal", "why"), MISSES)
def test_known_misses_are_as_documented(gold, answer, equal, why):
    assert equivalent(gold, answer) is not equal
    assert equal, "a wrong answer taken for a right one is no miss but a mistake"


@needs_library
@pytest.mark.slow
def test_the_default_reward_over_the_same_pairs():
    differs = {pair[:2] for pair in REWARD_DIFFERS}
    for _, gold, answer, equal in ALL:
        right = correctness(f"so it is $\\boxed{{{answer}}}$", gold) == 1.0
        assert right is ((gold, answer) in differs) ^ equal, (gold, answer)
    for gold, answer, _, _ in MISSES:
        assert (correctness(f"#### {answer}", gold) == 1.0) is ((gold, answer) in REWARD_KNOWS), (gold, answer)


def test_every_miss_and_exception_is_in_the_docs():
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    for gold, answer, _, why in [*MISSES, *REWARD_DIFFERS]:
        assert f"| `{gold}` | `{answer}` | {why} |" in page, (gold, answer)


def test_the_table_is_what_it_says():
    pairs = [pair[:2] for pairs in PAIRS.values() for pair in pairs] + [miss[:2] for miss in MISSES]
    assert len(pairs) == len(set(pairs)) >= 260
    assert 0.4 < sum(equal for *_, equal in ALL) / len(ALL) < 0.6


JUNK = [
    *("{", "}", "}}}{{{", r"\frac{1}{", r"\frac", r"\left(", "(", "[1,2", r"\begin{pmatrix}", r"\end{pmatrix}", "\\"),
    *("=", "= 3", "x =", ",", ",,", "1,", ";", "^", "_", "x^", "x_", "!", "%", "$", "$$", r"\$", "°", r"\text{", "&"),
    *(
        r"\boxed{3}",
        r"\boxed{",
        "3}",
        r"3} \boxed{4",
        "\x00",
        "\n",
        "\ud800",
        "²",
        "½",
        "四",
        "😀",
        "nan",
        "1/0",
        "0/0",
    ),
    *("{" * 100, "(" * 140 + "1" + ")" * 140, "x" * 10_000, "1" * 10_000, r"\frac{" * 2_000, "9" * MAX_LENGTH),
]


@pytest.mark.parametrize("text", JUNK)
def test_junk_is_no_answer(text):
    for other in ("7", "x + y", text[:-1]):
        assert equivalent(text, other) is equivalent(other, text) is False


# Too few to write a number that takes for ever.
PIECES = [*r"0123456789xyi+-*/^_=<>(){}[]|,.%$&\ ", r"\frac", r"\text{", r"\pm", r"\sqrt", r"\cup", r"\{", r"\}", "12"]


@settings(max_examples=200, deadline=None, derandomize=True)  # a few odd ones would take long
@given(st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=5).map("".join))
def test_nothing_raises(text):
    for other in ("7", text):
        assert equivalent(other, text) in (True, False)
        assert equivalent(text, other) in (True, False)


def test_long_answers_are_not_compared():
    fits = "1" * MAX_LENGTH
    assert equivalent(fits, fits) is available()
    assert equivalent(fits + "1", fits + "1") is False


@needs_library
@pytest.mark.timeout(60)
def test_a_long_word_after_a_number_is_no_unit_and_is_read_once():
    """... not in every way in which 60 letters can be taken apart into words, which would never end."""
    assert latex._split_unit("7 " + "a" * 60 + "=") == ("7 " + "a" * 60 + "=", "")
    assert latex._split_unit("7 cubic meters") == ("7", "^3 m")


def test_without_the_library_nothing_is_equivalent(monkeypatch):
    monkeypatch.setattr(latex, "find_spec", lambda name: None)
    assert not available()
    assert equivalent("7", "7") is False


def run(code: str, seconds: float) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)


def test_importing_is_cheap_until_something_is_compared():
    code = "import sys, gspo.reward.latex; assert not {'sympy', 'math_verify', 'antlr4', 'torch'} & set(sys.modules)"
    assert run(code, 60).returncode == 0


HOSTILE = ["9**9**9**9", "9^{9^{9^9}}", r"\binom{10^9}{5^9}", "(10^9)!"]


@needs_library
@pytest.mark.parametrize("text", [HOSTILE[0], *(pytest.param(x, marks=pytest.mark.slow) for x in HOSTILE[1:])])
def test_a_comparison_that_never_ends_can_be_killed(text):
    """Whether it hangs is the library's affair; it must not be equal, and its process must be killable."""
    try:
        done = run(f"from gspo.reward.latex import equivalent; print(equivalent({text!r}, '7'))", 4)
    except subprocess.TimeoutExpired:
        return
    assert done.stdout.strip() == "False", done.stderr


@needs_library
def test_a_hostile_answer_ends_its_process_and_scores_as_wrong_and_the_next_is_compared(monkeypatch):
    outcomes, submit = [], WorkerPool.submit
    monkeypatch.setattr(WorkerPool, "submit", lambda pool, call: outcomes.append(submit(pool, call)) or outcomes[-1])
    hostile = "".join(f"({a})^{{60}}" for a in ("x+1", "x+2", "x+3", "x+y", "y+z", "z+1"))  # each factor is small
    assert compute_score("", rf"\boxed{{{hostile} + 1}}", "(x+1)^{119}") == 0.1
    assert outcomes[0].result().fault, "its comparison did not end by itself"
    assert compute_score("", r"\boxed{\frac{35}{\sqrt{7}}}", r"5\sqrt{7}") == 1.0
    assert outcomes[1].result().fault == ""
