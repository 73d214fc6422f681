"""What the default reward must say, by hand-computed cases, invented solutions and the embedded task."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gspo.embedded.equations import split_equations, worked_solution
from gspo.reward import reward_func
from gspo.reward.answer_text import MAX_RESPONSE
from gspo.reward.reward_func import (
    compute_score,
    correctness,
    extract_answer,
    format_quality,
    get_preference_pairs,
    rank_responses,
    reasoning_quality,
)

CASES = {
    # gold: {score: responses}
    "72": {
        1.0: [
            *("72", "72.", "72.0", "$72", "+72", "７２", "0072", "**72**", "72 clips", "x = 72", "#### 72"),
            *("72 pieces", "Answer: 72km", r"\boxed{72^\circ}", "it is on page 72", r"\boxed{72}"),
            *(r"\boxed{\boxed{72}}", r"\boxed{72\text{ clips}}", r"\boxed{72\%}"),
            *("The answer is 72 clips.", "**Answer:** 72", "Answer:\n72", "答案是72", "答案为72个夹子。", "答案：７２"),
            "Answer: Natalia sold 72 clips altogether in April and May.",
            "<think>The answer is 5, no, \\boxed{6}.</think>It is 72.",
            "She needs 48 and 24, which makes 72",
            "The answer is 5. No, wait. The answer is 72.",
            "\\boxed{5}? No: \\boxed{72}",
            "#### 5\n#### 72",
        ],
        0.5: ["48 + 24 = 71\n#### 72", "48/2 = <<48/2=25>>25\n#### 72"],
        0.1: [
            *("#### 7", "答案：-72", "144/2", "Answer: 72 million", "Answer: 72x", "Answer: half of 72"),
            *("The answer is not 72.", "72 or 73", "Answer: 72/0", "Answer: 7 2", r"\boxed{\pm 72}"),
            *("Answer: at least 72", "Answer: 72 or more", "Answer: more than 72", "Answer: 2x = 72"),
            "It says 72 above. The answer is 5.",
            "The answer is 72, so \\boxed{5}",
            "#### 72\nBut then \\boxed{5}",
            "48 + 24 = 72\n#### 5",
        ],
        0.0: [
            "it is on pages 70-72",
            "",
            "I do not know",
            "72, no, 5",
            "She gets 72x",
            "She has 72 million",
            "\\boxed{}",
            "Answer:",
        ],
    },
    "1000": {1.0: ["1,000", "$1,000.00", r"\boxed{1{,}000}", r"\boxed{1,\!000}"], 0.1: ["#### 1,00", "#### 1,0000"]},
    "2": {0.1: ["Answer: x + 2", "Answer: 2 + x", "Answer: 2 x^3", "#### x + 1 = 2", "#### \\tan x = 2"]},
    "x = 2": {1.0: ["2", "x = 2", "X=2", "#### x = 4 / 2 = 2"], 0.1: ["#### y = 2", "#### x_1 = 2"]},
    r"\pm 2": {1.0: [r"\boxed{\pm2}", r"\boxed{-2, 2}", "#### 2 or -2"], 0.1: ["#### 2", "#### +2"]},
    "2, 2, 3": {1.0: ["3, 2, 2"], 0.5: ["2, 3"], 0.1: ["2, 3, 3", "2, 2, 2, 3"]},
    r"\{1,200\}": {1.0: ["1, 200", r"\boxed{\{200, 1\}}"], 0.1: ["1200", "1,200"]},
    r"\sqrt{49}": {1.0: ["7", r"\boxed{\sqrt{49}}", r"\boxed{|-7|}"], 0.1: ["#### -7", r"\boxed{\sqrt{50}}"]},
    r"\frac{\sqrt{3}}{2}": {
        1.0: [r"\boxed{\frac{\sqrt3}2}", r"答案：$\sqrt{3}/2$", r"The answer is \(\dfrac{3}{2\sqrt{3}}\)."],
        0.1: [r"\boxed{\frac{\sqrt{2}}{3}}", "#### 0.866", r"\boxed{\frac{\sqrt3}2} or \boxed{1}"],
    },
    "R - r": {1.0: ["#### R-r"], 0.1: ["#### r - R"]},
    "(B)": {1.0: ["(B)", "#### (b)", r"\boxed{\text{(B)}}"], 0.1: ["#### (C)"]},
    "": {0.0: ["", r"\boxed{}"]},
    "7/2": {
        1.0: ["3.5", "7 / 2", r"\frac{7}{2}", r"\boxed{\dfrac72}", "3 1/2", r"\boxed{3\frac{1}{2}}"],
        0.1: ["31/2"],
    },
    "0.5": {1.0: [".5", "1/2", "Answer: .5.", "50%"], 0.1: ["5", "#### 50"]},
    "50%": {1.0: ["50 %", "Answer: 50 percent", r"\boxed{50\%}", "50", "#### 0.5"], 0.1: ["5", "500%"]},
    "-9": {1.0: ["-9", "−9", "答案：－9", "Answer: -$9", "x = -9"], 0.1: ["9", "答案：9"]},
    "3, 5": {
        1.0: ["5, 3", "3、5", "x = 3 or x = 5", "x = 3 or 5", "3 或 5", r"\boxed{\{3, 5\}}", "Answer: 3 and 5."],
        0.5: ["3", "Answer: x = 5"],
        0.1: ["4", "3, 4", "3, 5, 7"],
    },
    "1, 2, 3": {0.5: ["3, 1"], 0.1: ["2"], 0.0: ["perhaps it is 2"]},
    "x = 1, y = 2": {1.0: ["y = 2, x = 1"], 0.1: ["x = 2, y = 1"]},
    "(1, 2)": {1.0: ["(1,2)", r"\boxed{(1, 2)}"], 0.1: ["(2, 1)", "#### 1 2"]},
    "Paris": {
        1.0: ["Paris.", "The answer is paris", r"\boxed{\text{Paris}}"],
        0.1: ["Answer: London"],
        0.0: ["London"],
    },
    "2x + 1": {1.0: ["Answer: y = 2x+1"], 0.1: ["Answer: 2x", "Answer: 21"]},
}


@pytest.mark.parametrize(
    ("gold", "score", "response"),
    [(gold, score, text) for gold, levels in CASES.items() for score, texts in levels.items() for text in texts],
)
def test_scores(gold, score, response):
    assert compute_score("any", response, gold, extra_info={"index": 1}) == score


FALSE = "\n1 + 1 = 3"  # judged beside a text, it gives 0.5 if the text holds, 0.0 if it is false or not judged


@pytest.mark.parametrize(
    "text",
    [
        *("48/2 = 24", "12 - 5 = 7", "-3 * 3 = -9", "48 × 2 = 96", "7 · 2 ÷ 4 = 3.5", "0.2 x 50 = $10", "24 = 48/2"),
        *("5 - (-3) = 8", "6 * (2 + 1) = 18", "2 + 3 * 4 = 14", "9 - 4 - 3 = 2", "８ / ２ = ４", "- 48/2 = 24 clips"),
        *("$1,000 * 2 = $2,000.", r"48 \times 2 = 96", r"\frac{48}{2} = 24", "**48/2 = 24**", "2. 48/2 = 24"),
        *("10/3 = 3.33", "2/3 = 0.67", "1/200 = 0.01", "x / 3 = 7 - 10 = -3", "共48/2=24个", "she sold 48 / 2 = 24"),
        *("first 12, 3 + 4 = 7", "48/2 = <<48/2=24>>24, and 5 + 5 = 10", "100/7 = 14.2", "48/2 = 24 (clips)"),
    ],
)
def test_a_true_calculation_is_seen_to_hold(text):
    assert reasoning_quality(text) == 1.0
    assert 0.5 <= reasoning_quality(text + FALSE) < 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("12 - 5 = 8", "48/2 = 24.1", "10/3 = 3", "2 + 3 * 4 = 20", "9 - 4 - 3 = 8", "8 / 4 / 2 = 4", "-3 * 3 = 9"),
        *("25 = 48/2", "x = 7 - 10 = 3", "共48/2=25个", "she sold 48 / 2 = 25 clips", "48/2 = <<48/2=25>>25"),
        *("first 12, 3 + 4 = 8", "(2 + 3) * 4 = 14", "1/200 = 0.02", "100/7 = 14"),
    ],
)
def test_a_false_calculation_is_seen(text):
    assert reasoning_quality(text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        *("x + 5 = 12", "3x + 4 = 19", "x - 5 = 3", "20% of 50 + 3 = 13", "half of 48 + 2 = 26", "Twice 5 + 3 = 13"),
        *("12 = 3x", "12 / 4 = 3x", "12 / 4 = 1.2y", "192 / 1.2 = 1.2Y / 1.2", "2**3 + 1 = 9", "2^3 + 1 = 9", "5 = 15"),
        *("f(3) + 2 = 9", "2(3) = 5", "4 * 3 = 1 dozen", "Is 5 + 3 = 9?", "3 apples + 5 = 8", "5 + 3 >= 7", "1/0 = 5"),
        *("12 x 1 and 1/4 = 15", "50% + 1 = 3", "5 + = 8", "12 / 4 = 3xy", "8 apples - 5 + 1 = 4", "√9 + 1 = 4"),
        *("= 5 =", "<think>5 + 3 = 9</think>"),
        *("(" * 50 + "1 + 1" + ")" * 50 + " = 3", "1" + " + 1" * 100 + " = 3", "9" * 150 + " + 1 = 2"),
    ],
)
def test_calculations_in_doubt_are_left_out(text):
    assert reasoning_quality(text) == 1.0
    assert reasoning_quality(text + FALSE) == 0.0


def test_reasoning_quality_is_the_share_that_holds():
    assert reasoning_quality("1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6\n4 + 4 = 9") == 0.75
    assert reasoning_quality("2 * 3 = 3 + 3 = 7") == 0.5


MARKED = [
    *("5", "x = 5", "5 clips", "3, 5", r"so \boxed{5}", "so\n#### 5", "so the answer is 5", "答案：5", "那么答案为5"),
]
UNMARKED = ["", "so 5", "5 + 3 = 8", "x is 5", r"so \boxed{}", "so\n####", "so the answer is", "5 is less than 8"]


def test_format_quality():
    assert [text for text in MARKED + UNMARKED if format_quality(text) == 1.0] == MARKED
    assert [text for text in MARKED + UNMARKED if format_quality(text) == 0.0] == UNMARKED


def test_extract_answer_gives_it_as_written():
    texts = ["so 5.", r"\boxed{1,000}", "The answer is .5. Good.", "<think>4</think> 答案：Paris。", "#### 7 clips"]
    assert [extract_answer(text) for text in texts] == ["5", "1,000", ".5", "Paris", "7 clips"]


SOLUTIONS = [  # in the manner of GSM8K, our own
    ("A crate holds 12*4 = <<12*4=48>>48 jars.\nHalf of them, 48/2 = <<48/2=24>>24, are full.\n#### 24", "24"),
    ("The train covers 60 x 2.5 = <<60*2.5=150>>150 miles.\n25% of 200 + 5 is 55.\n#### 150", "150"),
    ("She pays $3.50 * 4 = $<<3.5*4=14>>14.\nHer change is $20 - $14 = $<<20-14=6>>6.\n#### 6", "6"),
    ("Each of the 7 shares is 100/7 = <<100/7=14.29>>14.29 dollars, or $14 in coins.\n#### 14", "14"),
    ("If y is the price then 1.2y = 1,200,000, so y = 1,200,000 / 1.2 = 1,000,000 dollars.\n#### 1,000,000", "1000000"),
    ("The bill is 40 + 40*.15 = <<40+40*.15=46>>46 dollars.\n#### 46", "46"),
]


@pytest.mark.parametrize("i", range(len(SOLUTIONS)))
def test_worked_solutions(i):
    (text, gold), (_, other) = SOLUTIONS[i], SOLUTIONS[i - 1]
    assert compute_score("gsm8k", text, gold) == 1.0
    assert compute_score("gsm8k", text, other) == 0.1
    assert compute_score("gsm8k", text.replace("#### ", "so "), other) == 0.0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_embedded_solutions(language):
    rng = random.Random(language)
    seen = Counter()
    for equation in rng.sample(split_equations()["warm"], 400):
        gold = str(equation.answer)
        assert compute_score("equations", worked_solution(equation, language, rng, mistakes=False), gold) == 1.0
        text = worked_solution(equation, language, rng, mistakes=True)
        is_right = text.replace("：", ": ").endswith(f": {gold}")
        score = compute_score("equations", text, gold)
        assert score in ((1.0, 0.5) if is_right else (0.1,))
        seen[score] += 1
    assert seen[1.0] > 50 and seen[0.1] > 50


ENDLESS = [  # dear when evaluated, read without a limit, or matched by a careless pattern
    *("9**9**9**9 = 5", "9^9^9^9 = 5", "1e999999999", "2" + "*9999999999" * 100_000 + " = 1"),
    *("so " + "1 " * 5_000 + "!= 1", "((((1+1)" * 100_000 + " = 2", "1 + " * 300_000 + "= 1", "- " * 500_000 + "1 = 1"),
    *("\\boxed{" * 100_000, "1" * 1_000_000, "1,111" * 200_000 + "x", "1 1/" * 250_000, "=" * 1_000_000),
    *("\n" * 1_000_000, " " * 1_000_000 + "=", "个" * 1_000_000, "ab " * 300_000 + "1", "a=" * 500_000 + "1"),
    *("<<1" * 300_000, "\\text{" * 200_000, "answer is " * 100_000, "answer" + " " * 1_000_000),
]


def test_odd_responses_cost_little_in_any_thread():
    with ThreadPoolExecutor(2) as pool:
        alone = pool.map(lambda text: compute_score("any", text, "72"), ENDLESS)
        answered = pool.map(lambda text: compute_score("any", text + "\nAnswer: 72", "72"), ENDLESS)
    assert set(alone) <= {0.0, 0.1}
    assert set(answered) <= {1.0, 0.5}  # the end of the longest response is read
    assert correctness("72", 72) == 1.0
    assert correctness("3, 5" + ", 5" * 99, "3, 5") == 0.0  # so long a list is no answer
    assert correctness("9" * 5_000, "9" * 5_000) == 1.0
    assert correctness("9" * 5_000, "9" * 4_999 + "8") == 0.0


def test_only_the_end_is_read_from_a_line_start():
    end = "\n#### 72"
    cut = "x" * (MAX_RESPONSE - len("2 + 5 = 17\n" + end))
    assert compute_score("any", "12 + 5 = 17\n" + cut + end, "72") == 1.0
    assert compute_score("any", "12 + 5 = 71\n" + cut + end, "72") == 1.0
    assert compute_score("any", "12 + 5 = 71\n" + cut[1:] + end, "72") == 0.5


def test_ranking_is_by_score_then_index():
    responses = ["I pass", "#### 72", "#### 5", "1+1=3\n#### 72", "\\boxed{72}", "dunno"]
    assert rank_responses(responses, "72", "any") == [(1, 1.0), (4, 1.0), (3, 0.5), (2, 0.1), (0, 0.0), (5, 0.0)]


def test_pairs_by_hand():
    responses = ["I pass", "#### 72", "#### 5", "1+1=3\n#### 72", "\\boxed{72}"]
    none, right, marked, half, boxed = responses
    pairs = get_preference_pairs(responses, "72", "any", margin=0.4)
    assert [pair[:2] for pair in pairs] == [
        *[(right, none), (boxed, none), (right, marked), (boxed, marked)],
        *[(right, half), (boxed, half), (half, none)],
    ]
    assert [pair[2] for pair in pairs] == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.5, 0.5, 0.5])
    default = get_preference_pairs(responses, "72", "any")
    assert default == get_preference_pairs(responses, "72", "any", margin=0.1)
    assert len(default) == 8 and (marked, none) not in [pair[:2] for pair in default]  # 0.1 is not more than 0.1


@given(st.lists(st.integers(0, 10), max_size=8), st.integers(-2, 10), st.randoms(use_true_random=False))
@example([10, 9], 1, random.Random(0))
@example([8, 7], 1, random.Random(0))
@example([3, 3], -2, random.Random(0))
def test_pairs_are_all_gaps_wider_than_the_margin(tenths, margin, rng):
    """Scores k/10 written as the responses themselves, so that every gap is known in whole numbers."""
    expected = Counter((str(high), str(low)) for high in tenths for low in tenths if high - low > max(margin, 0))
    shuffled = rng.sample(tenths, len(tenths))
    with mock.patch.object(reward_func, "compute_score", lambda source, text, gold: int(text) / 10):
        for order in (tenths, shuffled):
            pairs = get_preference_pairs([str(k) for k in order], "gold", "any", margin / 10)
            assert Counter(pair[:2] for pair in pairs) == expected
            assert [gap for *_, gap in pairs] == sorted((gap for *_, gap in pairs), reverse=True)
            assert all(gap == pytest.approx((int(high) - int(low)) / 10) for high, low, gap in pairs)
