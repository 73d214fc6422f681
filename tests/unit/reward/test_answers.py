"""Answers as people write them: every kind of docs/answers.md, and strings made to score without an answer."""

import pytest
from answer_cases import CASES, CUT_OFF
from answer_exploits import EXPLOITS
from repository import ROOT

from gspo.reward.answer_numbers import read_number
from gspo.reward.latex import available
from gspo.reward.reward_func import compute_score, score_parts

ALL = [(kind, *case) for kind, cases in CASES.items() for case in cases]
needs_library = pytest.mark.skipif(not available(), reason="math-verify is not installed")


def is_as_expected(score: float, expected: float) -> bool:
    return score <= 0.1 if expected == 0.1 else score == expected


@needs_library
@pytest.mark.parametrize(("kind", "gold", "response", "score"), ALL)
def test_an_answer_scores_by_the_rule_of_its_kind(kind, gold, response, score):
    assert is_as_expected(compute_score("any", response, gold), score), (kind, compute_score("any", response, gold))


@pytest.mark.parametrize(("gold", "response", "score"), CUT_OFF)
def test_half_an_answer_at_the_end_of_a_cut_off_response_does_not_count(gold, response, score):
    assert is_as_expected(compute_score("any", response, gold, {"finish_reason": "length"}), score)
    assert compute_score("any", response, gold, {"finish_reason": "stop"}) == 1.0


def test_every_kind_has_six_cases_right_and_wrong():
    for kind, cases in CASES.items():
        assert len(cases) >= 6, kind
        assert any(score == 1.0 for *_, score in cases) and any(score < 1.0 for *_, score in cases), kind
        assert any(not (gold + response).isascii() for gold, response, _ in cases), f"{kind}: none in Chinese"


def test_accuracy_is_about_the_answer_alone():
    parts = score_parts("any", "1 + 1 = 3\n#### 7", "7")
    assert (parts["score"], parts["acc"]) == (0.5, 1.0)
    assert score_parts("any", "#### 3", "3, 5")["acc"] == 0.0


EXPLOIT_PAIRS = [(gold, text) for gold, texts in EXPLOITS.items() for text in texts]


@pytest.mark.parametrize(("gold", "text"), EXPLOIT_PAIRS)
def test_no_exploit_scores(gold, text):
    assert compute_score("any", text, gold) <= 0.1


def test_there_are_many_exploits_in_both_languages():
    texts = [text for _, text in EXPLOIT_PAIRS]
    assert len(set(EXPLOIT_PAIRS)) == len(EXPLOIT_PAIRS) >= 150
    assert sum(not text.isascii() for text in texts) >= 30


def test_the_table_of_the_docs_counts_these_cases():
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    counts = {kind: len(cases) for kind, cases in CASES.items()} | {"exploits": len(EXPLOIT_PAIRS)}
    for kind, count in counts.items():
        name = f"{kind} (is the answer right)" if kind == "calculations" else kind
        assert f"| {name} | {count} | {count} |" in page, kind
    assert f"has {len(EXPLOIT_PAIRS)} strings" in page


@pytest.mark.timeout(30)
@pytest.mark.parametrize("words", ["a" * 70, "so on " * 12, "是" * 70, "an apple " * 12, "It's far-off. " * 8])
@pytest.mark.parametrize("form", ["7 {}_", "{}_ 7"])
def test_words_beside_a_number_that_are_no_answer_are_read_once(form, words):
    """... not in every way in which 70 letters can be taken apart into words, which would never end."""
    text = form.format(words)
    assert read_number(text) is None
    assert compute_score("any", text, "8") == 0.0


@pytest.mark.parametrize(
    ("text", "is_seven"),
    [
        ("I am a 7", True),
        ("it's the far-off 7", True),
        ("x 7", False),
        ("a-b 7", False),
        ("7 is it/", False),
        ("7 cups, 'of' tea? 是", True),
    ],
)
def test_which_words_may_stand_beside_a_number(text, is_seven):
    assert (read_number(text) is not None) == is_seven
