"""The numbers of the table: against enumeration, published intervals and hand counts."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo.config import Reward
from gspo.distributed.world import World
from gspo.metrics.evaluation import (
    Answers,
    answer,
    bootstrap,
    correct_of,
    finals_of,
    majority_reward,
    pass_at_k,
    report,
    summarise,
    table,
    wilson,
)
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt, Rollout, Scores


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval_as_published(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_is_the_same_every_time_and_near_the_normal_interval():
    values = np.random.default_rng(7).normal(0.4, 0.2, 400)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values.copy())
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap(np.full(5, 0.25)) == (0.25, 0.25)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low <= 0.5 <= high for low, high in (bootstrap(rng.random(60), 400) for _ in range(300))]
    assert abs(np.mean(hits) - 0.95) < 0.04


@pytest.mark.parametrize(
    ("rewards", "final", "expected"),
    [
        ([1, 1, 0], ["7", "7", "5"], 1.0),
        ([1, 0, 0], ["7", "5", "5"], 0.0),
        ([1, 0], ["7", "5"], 0.5),  # a tie: half the time the right one is taken
        ([1, 1, 0, 0, 0], ["7", "7", "5", "5", "3"], 0.5),
        ([1, 0, 0], ["7", "5", "3"], 1 / 3),
        ([1, 0], ["7", "7"], 0.5),  # the same answer, right once (a calculation was wrong in the other)
        ([0.5, 0.1, 0.1], ["", "", "7"], 0.3),
    ],
)
def test_majority_by_hand(rewards, final, expected):
    assert majority_reward(np.array(rewards, float), final) == pytest.approx(expected)


ANSWERS = Answers(
    sources=["en", "zh", "en"],
    rewards=np.array([[1.0, 1.0, 0.1, 0.0], [1.0, 0.5, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]),
    correct=np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool),
    greedy=np.array([True, False, False]),
    final=[["7", "7", "5", "?"], ["1", "1", "2", "2"], ["a", "b", "c", "d"]],
)


def test_summary_by_hand():
    s = summarise(ANSWERS)
    assert (s["prompts"], s["samples"], s["greedy"]) == (3, 4, pytest.approx(1 / 3))
    assert s["pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert s["pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert s["pass@4"] == pytest.approx(2 / 3)
    assert s["maj@4"] == pytest.approx((1 + (0.5 + 0) / 2 + 0) / 3)
    assert s["reward_mean"] == pytest.approx((2.1 + 1.7 + 0) / 12)
    assert set(s["interval"]) == {"greedy", "pass@1", "pass@2", "pass@4", "maj@4", "reward_mean"}
    assert s["interval"]["greedy"] == pytest.approx(wilson(1, 3))
    for name, (low, high) in s["interval"].items():
        assert low <= s[name] <= high


def test_a_reward_just_below_full_is_not_correct():
    assert correct_of(Scores(torch.tensor([[0.99, 1.0 - 1e-9, 1.0]]))).tolist() == [[False, True, True]]


def test_acc_goes_before_the_reward_where_the_function_gives_it():
    acc = {"acc": torch.tensor([[1.0, 0.0, math.nan]])}
    assert correct_of(Scores(torch.tensor([[0.3, 1.0, 1.0]]), acc)).tolist() == [[True, False, True]]


def test_pred_goes_before_our_reading_of_the_answer():
    none = torch.zeros(1, 2)
    rollout = Rollout([], none, none, none, none, none, [["#### 7", "#### 5"]])
    assert finals_of(Scores(none, predictions=[["seven", None]]), rollout) == [["seven", "5"]]


def test_answers_end_to_end_with_acc_pred_and_a_fault(tokenizer, embedded_model, tmp_path, capfd):
    """A function that calls every second answer right whatever its reward, and fails on the rest of one prompt."""
    (tmp_path / "r.py").write_text(
        "def compute_score(solution_str, ground_truth, **_):\n"
        "    if ground_truth == '3': raise ValueError\n"
        "    return {'score': 0.5, 'acc': ground_truth == '1', 'pred': 'p' + ground_truth}\n"
    )
    prompts = [Prompt(i, tuple(tokenizer("x + 1 = 2")["input_ids"]), "", str(i), f"s{i % 2}") for i in range(1, 4)]
    sampler = Sampler(embedded_model, tokenizer, torch.device("cpu"))
    scorer = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1))
    world = World(0, 1, torch.device("cpu"), None)
    got = answer(sampler, scorer, prompts, 2, Sampling(max_new_tokens=4), world)
    assert got.sources == ["s1", "s0", "s1"] and got.rewards.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    assert got.correct.tolist() == [[True, True], [False, False], [False, False]]
    assert got.greedy.tolist() == [True, False, False] and got.final[:2] == [["p1", "p1"], ["p2", "p2"]]
    assert got.faults == 3 and report(got)["reward_faults"] == 3
    row = got.rows[0]
    assert (row["model_input"], row["ground_truth"], row["rewards"]) == ("x + 1 = 2", "1", [0.5, 0.5])
    assert (row["predictions"], row["correct"], row["reward_parts"]) == (
        ["p1", "p1"],
        [True, True],
        {"acc": [1.0, 1.0]},
    )
    assert all(1 <= n <= 4 for n in row["lengths"]) and set(row["finish_reasons"]) <= {"stop", "length"}
    assert (row["greedy"]["correct"], row["greedy"]["predictions"]) == ([True], ["p1"]) and "prompt" not in row[
        "greedy"
    ]
    assert [row["ground_truth"] for row in got.rows] == ["1", "2", "3"] and got.rows[2]["correct"] == [False, False]


def test_each_answer_is_read_once(tokenizer, embedded_model, tmp_path, monkeypatch):
    """However many prompts there are: reading all of them for each made an evaluation take five times as long."""
    read = []
    monkeypatch.setattr("gspo.metrics.evaluation.extract_answer", lambda text: read.append(text) or text)
    (tmp_path / "r.py").write_text("def compute_score(solution_str, **_):\n    return 1.0\n")
    prompts = [Prompt(i, tuple(tokenizer("x + 1 = 2")["input_ids"]), "", "1", "s") for i in range(5)]
    scorer = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1))
    world = World(0, 1, torch.device("cpu"), None)
    sampler = Sampler(embedded_model, tokenizer, torch.device("cpu"))
    answer(sampler, scorer, prompts, 2, Sampling(max_new_tokens=4), world)
    assert len(read) == 5 * (2 + 1)  # two samples and a greedy answer


def test_report_by_data_source_is_the_summary_of_its_rows():
    r = report(ANSWERS)
    assert list(r["by_data_source"]) == ["en", "zh"]
    en, zh = r["by_data_source"].values()
    rows = [0, 2]
    assert en == summarise(
        Answers(
            ["en"] * 2,
            ANSWERS.rewards[rows],
            ANSWERS.correct[rows],
            ANSWERS.greedy[rows],
            [ANSWERS.final[i] for i in rows],
        )
    )
    assert (en["prompts"], en["pass@4"], en["greedy"]) == (2, 0.5, 0.5)
    assert (zh["prompts"], zh["pass@4"], zh["maj@4"], zh["reward_mean"]) == (1, 1.0, 0.25, pytest.approx(1.7 / 4))
    assert r["correct_counts"] == [2, 1, 0]
    assert {k: v for k, v in r.items() if k not in ("by_data_source", "correct_counts", "cut_off")} == summarise(
        ANSWERS
    )


def test_one_source_is_not_listed_twice():
    assert "by_data_source" not in report(replace(ANSWERS, sources=["en"] * 3))


def test_the_table_holds_every_value_in_aligned_columns():
    r = report(ANSWERS)
    columns = {"all": r, **r["by_data_source"]}
    lines = table(columns).splitlines()
    assert lines[0].split() == list(columns)
    assert [line.split()[0] for line in lines[1:]] == list(r["interval"])
    starts = [lines[0].index(name) for name in columns]
    for line in lines[1:]:
        name = line.split()[0]
        for start, column in zip(starts, columns.values(), strict=True):
            low, high = column["interval"][name]
            assert line[start:].startswith(f"{column[name]:.3f} [{low:.3f}, {high:.3f}]")


def test_a_metric_that_one_column_lacks_leaves_its_cell_empty():
    fewer = summarise(Answers(["x"], np.array([[1.0]]), np.array([[True]]), np.array([True]), [["7"]]))
    lines = table({"many": summarise(ANSWERS), "few": fewer}).splitlines()
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert by_name["pass@1"].count("[") == 2 and by_name["pass@4"].count("[") == 1
    assert by_name["pass@1"].rindex("1.000 [1.000, 1.000]") == lines[0].index("few")
