"""The lint before training: what it counts, what it shows, and when it says that training would not start."""

import json

import numpy as np
import pytest
import torch

from gspo.check_data import TITLES, Found, Report, main, show
from gspo.errors import UserError
from gspo.reward.gold_check import check_gold, gold_texts, renderings, sample
from gspo.system.cells import width
from gspo.system.language import word
from gspo.types import Prompt, Scores


def prompts(*truths, **extra):
    return [Prompt(i, (i,), f"p{i}", t, "sums", extra) for i, t in enumerate(truths)]


class Scorer:
    """A reward function of (prompt, text), without processes."""

    path, name, correct_at, is_told, ranks = "mine.py", "compute_score", 1.0, False, False

    def __init__(self, function, faults=0):
        self.function, self.faults, self.seen = function, faults, []

    @property
    def of_each(self):
        return self

    def score_texts(self, prompts, texts):
        assert len({len(group) for group in texts}) == 1
        self.seen += texts
        rewards = [[self.function(p, t) for t in group] for p, group in zip(prompts, texts, strict=True)]
        return Scores(torch.tensor(rewards), errors=self.faults)


def exact(prompt, text):
    return float(text == f"#### {prompt.ground_truth}")


# ---- the gold check ----


def test_right_answers_are_the_solution_and_renderings_of_the_truth():
    assert gold_texts(prompts("72")[0]) == [r"\boxed{72}", "#### 72", "The answer is 72", "答案：72", "72"]
    assert gold_texts(prompts("{x}", solution="so it is")[0])[:2] == ["so it is", r"\boxed{{x}}"]
    for nothing in (None, " ", 5, ["a"]):
        assert gold_texts(prompts("7", solution=nothing)[0]) == renderings("7")


def test_the_best_right_answer_counts_against_the_best_wrong_one():
    check = check_gold(Scorer(exact), prompts("1", "2", "2", "3"), 16)
    assert (check.rows, check.full, check.compared, check.above, check.faults) == (4, 4, 4, 4, 0)
    assert (check.gold_mean, check.wrong_mean) == (1.0, 0.0)
    assert check.verdict() is None and not check.refused


def test_wrong_answers_are_another_rows_truth():
    scorer = Scorer(exact)
    check_gold(scorer, prompts("1", "2", "2", "3", solution="s"), 16)
    assert [group[-1] for group in scorer.seen] == ["2", "3", "3", "1"]
    assert all(len(group) == 11 and group[0] == "s" for group in scorer.seen)


def test_a_function_that_gives_everything_full_marks_is_refused():
    check = check_gold(Scorer(lambda p, t: 1.0), prompts("1", "2", "3"), 2, seed=1)
    assert check.refused and (check.rows, check.full, check.compared, check.above) == (2, 2, 2, 0)
    text = check.verdict()
    assert "mine.py: compute_score scores no right answer above a wrong one in 2 sampled rows" in text
    assert "scores 1, the wrong" in text and "`solution`" in text and "reward.check_rows=0" in text and "\n" not in text


def test_a_solution_may_be_the_only_text_with_full_marks():
    check = check_gold(Scorer(lambda p, t: float(t == "proof")), prompts("1", "2", solution="proof"), 16)
    assert check.verdict() is None and check.above == 2


def test_some_right_answers_below_full_marks_are_a_warning_with_the_first():
    check = check_gold(Scorer(lambda p, t: 0.5 * exact(p, t) * (1 + (p.id != 1))), prompts("1", "2", "3"), 16)
    assert (check.full, check.above, check.refused) == (2, 3, False)
    assert (
        "gives 1 of 3 sampled right answers less than 1, so that they count as wrong (reward.correct_at); "
        "prompt 1: '#### 2' scores 0.5" in check.verdict()
    )


def test_calls_that_failed_are_reported():
    check = check_gold(Scorer(lambda p, t: 0.0, faults=7), prompts("1", "2"), 16)
    assert check.faults == 7 and check.refused and "7 of its 0 calls failed" in check.verdict()


@pytest.mark.parametrize("truth", ["1", ""])
def test_where_all_truths_are_alike_right_answers_must_score_above_an_empty_one(truth):
    check = check_gold(Scorer(exact), prompts(truth, truth), 16)
    assert (check.compared, check.above, check.verdict()) == (2, 2, None)
    for constant in (0.0, 1.0):
        check = check_gold(Scorer(lambda p, t, c=constant: c), prompts(truth), 16)
        assert check.refused and f"the wrong '' {constant:g}" in check.verdict()


def test_many_rows_go_in_chunks_and_every_one_is_compared():
    scorer = Scorer(exact)
    check = check_gold(scorer, prompts(*map(str, range(257))), None)
    assert (check.rows, check.compared, check.above) == (257, 257, 257)


def test_the_sample_is_the_same_every_time():
    assert sample(5, 9) == sample(5, None) == [0, 1, 2, 3, 4]
    places = sample(10**6, 100)
    assert places == sample(10**6, 100) == sorted(set(places)) and len(places) == 100
    assert places != sample(10**6, 100, seed=1) and np.mean(places) == pytest.approx(5e5, rel=0.2)


# ---- the program ----


@pytest.fixture()
def check(tmp_path, capsys):
    """Run the program on rows; returns exit code and the table as {split: {column: cell}}, and the text."""

    def check(splits, *argv, reward=None):
        overrides = []
        for name, rows in splits.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
            overrides.append(f"data.{name}_files={path}")
        if reward:
            (tmp_path / "mine.py").write_text(reward)
            overrides.append(f"reward.path={tmp_path / 'mine.py'}")
        code = main(["--config", "configs/quick.yaml", *overrides, *argv])
        out = capsys.readouterr().out
        lines = [line for line in out.split("\n\n")[0].splitlines() if not line.startswith("reading")]
        titles = [t for t in lines[0].split("  ") if t.strip()]
        table = {}
        for line in lines[1:]:
            name, *cells = [c.strip() for c in line.split("  ") if c.strip()]
            table[name] = dict(zip([t.strip() for t in titles], cells, strict=False))
        return code, table, out

    return check


def rows(first, count):
    return [{"prompt": f"Solve: x + 1 = {i}", "ground_truth": str(i - 1)} for i in range(first, first + count)]


def test_good_data(check):
    code, table, out = check({"train": rows(0, 30), "val": rows(100, 5), "test": rows(200, 7)})
    assert code == 0 and out.endswith("training would start\n")
    common = {"bad": "0", "long": "0", "twice": "0", "gold": "1.000", "right": "1.000", "above": "1.000"}
    for name, count, in_train in (("train", "30", "-"), ("val", "5", "0"), ("test", "7", "0")):
        assert table[name].items() >= {**common, "rows": count, "in train": in_train}.items()


def test_each_kind_of_problem_is_counted_and_shown_with_its_place(check, tmp_path):
    good = rows(0, 10)
    train = [*good, "{", {"prompt": "no truth"}, {**good[0], "prompt": "x" * 600}, good[3], *["5"] * 6]
    code, table, out = check(
        {"train": train, "val": [rows(50, 1)[0], good[2]], "test": rows(60, 2)}, "data.max_prompt_length=500"
    )
    assert code == 2
    assert table["train"].items() >= {"rows": "20", "bad": "8", "long": "1", "twice": "1"}.items()
    assert table["val"]["in train"] == "1" and table["test"]["in train"] == "0"
    file = tmp_path / "train.jsonl"
    assert f"{file}, line 11 is not valid JSON" in out and f"{file}, line 12: field 'ground_truth'" in out
    assert f"{file}, line 13: the prompt has 602 tokens" in out
    assert f"{file}, line 14 repeats {file}, line 4" in out
    assert f"{tmp_path / 'val.jsonl'}, line 2 is {file}, line 3" in out
    assert out.count("a row must be an object") == 3  # five bad rows are shown
    assert "would not start:\n  train: 8 bad rows\n  train: 1 prompts are too long" in out


def test_dropped_and_doubled_prompts_do_not_keep_training_from_starting(check):
    train = [*rows(0, 5), *rows(0, 2), {"prompt": "x" * 600, "ground_truth": "1"}]
    code, table, _ = check({"train": train}, "data.max_prompt_length=500", "data.overlong=drop")
    assert code == 0 and table["train"].items() >= {"rows": "8", "long": "1", "twice": "2"}.items()
    code, _, out = check({"train": train[-1:]}, "data.max_prompt_length=500", "data.overlong=drop")
    assert code == 2 and "train: no prompts in" in out


def test_a_setting_that_is_given_twice_is_said(check):
    _, _, out = check({"train": rows(0, 3)}, "rollout.n=6", "rollout.n=8")
    assert "rollout.n is given twice; 8 counts, not 6" in out


def test_prompts_with_different_truths_are_counted_and_shown(check, tmp_path):
    file = tmp_path / "train.jsonl"
    code, _, out = check({"train": [*rows(0, 3), {**rows(1, 1)[0], "ground_truth": "9"}]})
    assert code == 0 and "train: 1 prompts with different ground truths" in out
    assert f"  {file}, line 2 has '0' and {file}, line 4 has '9'" in out


def test_the_first_five_of_a_kind_are_shown_in_the_files_order(check, tmp_path):
    _, table, out = check({"train": [*rows(0, 9), *rows(0, 9)[::-1]]})
    shown = [line.split(" repeats ")[0] for line in out.splitlines() if " repeats " in line]
    assert table["train"]["twice"] == "9" and shown == [
        f"  {tmp_path / 'train.jsonl'}, line {n}" for n in range(10, 15)
    ]


def test_prompts_beyond_the_models_positions(check):
    code, _, out = check({"train": rows(0, 3)}, "rollout.max_new_tokens=2045")
    assert code == 2 and "2048 positions" in out


def test_a_function_that_does_not_tell_right_from_wrong(check):
    always = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    code, table, out = check({"train": rows(0, 5)}, reward=always)
    assert code == 2 and table["train"]["above"] == "0.000" and "scores no right answer above a wrong" in out
    assert check({"train": rows(0, 5)}, "reward.check_rows=0", reward=always)[0] == 0


def test_an_empty_ground_truth_keeps_training_from_starting(check):
    code, _, out = check({"train": [{"prompt": "Say it.", "ground_truth": ""}]})
    assert code == 2 and "training would not start" in out and "field 'ground_truth' is empty" in out


def test_a_function_that_ranks_a_group_is_asked_about_right_and_wrong_together(check):
    ranks = "def rank_responses(responses, ground_truth, data_source):\n"
    ranks += "    good = [r == ground_truth for r in responses]\n"
    ranks += "    return [(i, float(g) if any(good) else 1.0) for i, g in enumerate(good)]\n"
    code, table, _ = check({"train": rows(0, 5)}, reward=ranks)
    assert code == 0 and table["train"]["above"] == "1.000"


def test_a_function_that_fails_is_named_first_with_the_call_that_failed(check):
    """... and where it fails on wrong answers training would not start, though right ones score above what is left."""
    head = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
    fails = head + "    return 1.0 if solution_str == ground_truth else {}['x']\n"
    code, _, out = check({"train": rows(0, 5)}, reward=fails)
    first, second = [line for line in out.splitlines() if not line.startswith("reading")][:2]
    assert code == 2 and "training would not start" in out and "would start\n" not in out
    assert first.startswith("train: the reward function failed on ") and "KeyError: 'x' (line 2), on the" in first
    assert "(ground truth '" in first and second == "train: it failed on every wrong answer to 5 rows"


def test_rows_without_a_known_right_answer_are_checked_as_far_as_they_can_be(check):
    """Columns of one's own, whose answer nobody has named: the function gets None, and that it fails on it is said."""
    own = [{"text": f"Send {i} cups.", "order": f"cups={i}"} for i in range(3)]
    half = "def compute_score(solution_str, ground_truth):\n    return float(solution_str.endswith(ground_truth))\n"
    takes_none = "def compute_score(solution_str, ground_truth):\n    return float(ground_truth is None)\n"
    code, _, out = check({"train": own}, "data.prompt_key=text", reward=takes_none)
    assert code == 0 and "no right answer is known" in out and "name that field by data.truth_key" in out
    assert "train  3     0    0" in out and "failed" not in out
    code, _, out = check({"train": own}, "data.prompt_key=text", reward=half)
    assert "train: the reward function failed on 6 of 6 calls; the first raised TypeError" in out
    code, table, out = check({"train": own}, "data.prompt_key=text", "data.truth_key=order", reward=half)
    assert code == 0 and table["train"]["rows"] == "3" and "no right answer" not in out


def test_a_right_answer_that_would_be_cut_off_is_named(check, tmp_path):
    """The embedded tokenizer has a token a character and one for the end."""
    train = [{"prompt": f"Say {i}", "ground_truth": str(i)} for i in (7, 123456789, 12)]
    code, _, out = check({"train": train}, "rollout.max_new_tokens=9")
    file = tmp_path / "train.jsonl"
    assert code == 0 and f"note: {file}, line 2: the ground truth has 10 tokens, its end included" in out
    assert "are cut off after 9: to say it whole takes a larger rollout.max_new_tokens" in out
    assert "to say it whole" not in check({"train": train}, "rollout.max_new_tokens=10")[2]


def test_only_what_training_reads_is_looked_at(check):
    splits = {"train": rows(0, 3), "val": [*rows(50, 2), "{"]}
    assert check(splits, "eval.round_prompts=2", "eval.prompts=1")[0] == 0
    assert check(splits, "eval.round_prompts=3", "eval.prompts=1")[0] == 2


def test_the_sample_is_as_large_as_asked(check):
    for argv in (["--rows", "1"], ["--all"]):
        assert check({"train": rows(0, 5)}, *argv)[0] == 0
    with pytest.raises(UserError, match="--rows 0"):
        check({"train": rows(0, 5)}, "--rows", "0")


def test_the_program(run_program, tmp_path):
    with pytest.raises(UserError, match="no.json"):
        main(["data.train_files=no.json"])
    (tmp_path / "t.json").write_text("[5]")
    assert main([f"data.train_files={tmp_path / 't.json'}"]) == 2
    (tmp_path / "t.json").write_text(json.dumps(rows(0, 3)))
    done = run_program("-m", "gspo.check_data", f"data.train_files={tmp_path / 't.json'}")
    assert done.returncode == 0 and "training would start" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_table_of_a_large_file_fits_into_80_columns(monkeypatch, lang):
    """Thousands of rows, prompts of up to 9,999 tokens."""
    monkeypatch.setenv("GSPO_LANG", lang)
    cells = ["7473", "12", "345", "95 / 1412", "14", "12", "1.000", "1.000", "0.100", "1.000"]
    titles, row = show([Report("train", cells, Found(), [])]).splitlines()
    assert width(titles) <= 80 and width(row) <= 80
    starts = [width(titles[: titles.index(word(title), 5)]) for title in TITLES[1:]]
    assert [row[start : start + len(cell)] for start, cell in zip(starts, cells, strict=True)] == cells
