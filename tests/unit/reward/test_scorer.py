"""The user's reward function: how it is found and called, what it may return, and how its faults are reported."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gspo.config import Reward
from gspo.errors import UserError
from gspo.reward import reward_func
from gspo.reward.gold_check import require_gold
from gspo.reward.scorer import Scorer
from gspo.types import Prompt, Rollout

PROMPT = Prompt(0, (1,), "x + 5 = 12?", "7", "math_reasoning", {"index": 3})
SIGNATURE = "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"


@pytest.fixture()
def scorer(tmp_path):
    """Make a scorer from the body of a function; faults raise, unless `on_error` says otherwise."""
    made = []

    def scorer(body, signature=SIGNATURE, **settings):
        path = tmp_path / "my_reward.py"
        path.write_text(signature + "".join(f"    {line}\n" for line in body.splitlines()), encoding="utf-8")
        made.append(Scorer(Reward(path=str(path), **{"on_error": "stop", "workers": 1, **settings})))
        return made[-1]

    yield scorer
    for each in made:
        each.close()


def ask(scorer, text, prompt=PROMPT):
    """One response -> (reward, {name: number})."""
    scores = scorer(a_rollout([text], prompts=[prompt]))
    return scores.rewards.item(), {name: part.item() for name, part in scores.parts.items()}


def a_rollout(*texts, prompts=None):
    """Groups of responses."""
    n = len(texts[0]) if texts else 2
    shape = torch.zeros(len(texts), n)
    return Rollout(
        prompts or [PROMPT] * len(texts),
        shape[..., None].long(),
        shape.long() + 1,
        shape[..., None],
        shape[..., None],
        shape == 0,
        [list(group) for group in texts],
    )


# ---- how it is called, what comes back ----


def test_the_default_is_compute_score():
    texts = ["#### 7", "3 + 4 = 8\n#### 7", "#### 5", "who knows"]
    scores = Scorer(Reward())(a_rollout(texts, texts[::-1]))
    assert scores.rewards.tolist() == [pytest.approx([1.0, 0.5, 0.1, 0.0]), pytest.approx([0.0, 0.1, 0.5, 1.0])]
    assert scores.rewards.dtype == torch.float32
    assert {name: part[0].tolist() for name, part in scores.parts.items()} == {
        "acc": [1.0, 1.0, 0.0, 0.0],
        "correct": [1.0, 1.0, 0.0, 0.0],
        "reasoning": [1.0, 0.0, 1.0, 1.0],
        "format": [1.0, 1.0, 1.0, 0.0],
    }


def test_a_response_that_was_cut_off_is_said_to_the_function_and_its_last_number_is_no_answer():
    whole = a_rollout(["so 7", "#### 7", "so 7"])
    cut = replace(whole, finished=torch.tensor([[True, True, False]]))
    scorer = Scorer(Reward())
    assert scorer(whole).rewards.tolist() == [[1.0, 1.0, 1.0]]
    assert scorer(cut).rewards.tolist() == [[1.0, 1.0, 0.0]]


def test_every_response_is_scored_with_its_own_prompt(scorer):
    other = Prompt(1, (1,), "y", "1", "verl", {})
    rollout = a_rollout(["7", "1"], ["7", "1"], prompts=[PROMPT, other])
    assert scorer("return float(solution_str == ground_truth)")(rollout).rewards.tolist() == [[1, 0], [0, 1]]


def test_it_is_called_by_keyword_with_all_that_is_known(scorer):
    my = scorer(
        "assert (data_source, solution_str, ground_truth) == ('math_reasoning', 'seven', '7')\n"
        "assert extra_info == {'index': 3, 'finish_reason': 'stop'} and bonus == 0.25 and names == ['a']\n"
        "return bonus",
        "def compute_score(*, names, bonus, extra_info, ground_truth, solution_str, data_source):\n",
        reward_kwargs={"bonus": 0.25, "names": ["a"]},
    )
    assert ask(my, "seven") == (0.25, {})


def test_another_function_of_the_file_by_name(scorer):
    my = scorer("return 1.0", "def compute_score(**_):\n    return 0.0\n\n\ndef judge(**_):\n", name="judge")
    assert ask(my, "") == (1.0, {})


def test_the_file_may_hold_dataclasses_and_import_the_default(scorer):
    head = "from dataclasses import dataclass\nfrom gspo.reward.reward_func import correctness\n"
    head += "@dataclass\nclass R:\n    a: int\n"
    assert ask(scorer("return correctness(solution_str, ground_truth)", head + SIGNATURE), "7") == (1.0, {})


GOOD = {
    "1": 1.0,
    "0": 0.0,
    "0.5": 0.5,
    "True": 1.0,
    "np.float64(0.5)": 0.5,
    "np.float32(0.5)": 0.5,
    "np.int64(1)": 1.0,
    "np.bool_(True)": 1.0,
    "np.array(0.5)": 0.5,
    "np.array([0.5])": 0.5,
    "torch.tensor(0.5)": 0.5,
    "{'score': 0.5}": 0.5,
    "{'score': np.float32(0.5)}": 0.5,
    "-1": -1.0,
    "2.5": 2.5,
    "{'score': -0.5, 'acc': True}": -0.5,
    "-100": -100.0,
}


def test_a_finite_number_of_any_type(scorer):
    values = f"import numpy as np\nimport torch\nVALUES = {{{', '.join(f'{v!r}: {v}' for v in GOOD)}}}\n"
    my = scorer("return VALUES[solution_str]", values + SIGNATURE)
    assert my.score_texts([PROMPT], [list(GOOD)]).rewards.tolist() == [list(GOOD.values())]


def test_the_numbers_beside_the_score_become_parts(scorer):
    body = "right, n = solution_str == '7', len(solution_str)\n"
    body += "return {'score': 0.5, 'acc': right, 'length': n, 'pred': 'x', 'f': np.float32(2)}"
    scores = scorer(body, "import numpy as np\n" + SIGNATURE)(a_rollout(["7", "eight"]))
    assert scores.rewards.tolist() == [[0.5, 0.5]]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "acc": [[1.0, 0.0]],
        "length": [[1.0, 5.0]],
        "f": [[2.0, 2.0]],
    }


def test_a_part_that_only_some_responses_have_is_nan_elsewhere(scorer):
    scores = scorer("return {'score': 1, 'bonus': 2} if solution_str else 0.0")(a_rollout(["7", ""]))
    assert scores.rewards.tolist() == [[1.0, 0.0]]
    assert scores.parts["bonus"][0, 0] == 2 and scores.parts["bonus"][0, 1].isnan()


# ---- its faults ----


def test_a_missing_file_a_folder_and_a_file_that_is_not_python(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for name, said in {"no.py": "no such file", "": "is a folder", "notes.txt": "is not a Python file"}.items():
        with pytest.raises(UserError) as e:
            Scorer(Reward(path=str(tmp_path / name)))
        assert f"reward.path = {str(tmp_path / name)!r}" in str(e.value) and said in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport not_there\n", "ModuleNotFoundError: No module named 'not_there' (line 2)"),
        ("\n\ndef f(:\n", "SyntaxError: invalid syntax (line 3)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero (line 1)"),
    ],
)
def test_a_file_that_does_not_import(tmp_path, text, said):
    path = tmp_path / "my_reward.py"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path} does not import: {said}")):
        Scorer(Reward(path=str(path)))


@pytest.mark.parametrize("name", ["judge", "NUMBER"])
def test_a_missing_function_and_a_name_that_is_not_a_function(scorer, name):
    with pytest.raises(
        UserError, match=rf"my_reward.py has no function '{name}' \(reward.name\); it has compute_score"
    ):
        scorer("return NUMBER", f"NUMBER = 1.0\n{SIGNATURE}", name=name)


def test_a_function_that_raises_is_reported_with_line_response_and_prompt(scorer):
    with pytest.raises(UserError) as e:
        scorer("tenth = 0.1\nreturn tenth * int(solution_str)")(a_rollout(["7", "seven"]))
    for part in ("my_reward.py", "ValueError: invalid literal", "(line 3)", "'seven'", "'x + 5 = 12?'", "'7'"):
        assert part in str(e.value)


def test_the_line_reported_is_the_last_one_in_the_users_file(scorer):
    head = "import json\n\n\ndef read(text):\n    return json.loads(text)\n\n\n"
    with pytest.raises(UserError, match=r"JSONDecodeError: .* \(line 5\)"):
        ask(scorer("return read(solution_str)", head + SIGNATURE), "{")


def test_lines_are_reported_for_a_path_relative_to_the_working_folder_too(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(SIGNATURE + "    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(line 2\)"):
        ask(Scorer(Reward(path="./my_reward.py", on_error="stop")), "")


def test_a_function_that_takes_other_keywords_is_an_error_that_names_one(scorer):
    said = "of data_source, .* that it takes, but takes text, gold only, so .* Rename that argument to 'solution_str'"
    with pytest.raises(UserError, match=said):
        scorer("return 1.0", "def compute_score(text, gold):\n")


BAD = {
    "float('nan')": "nan",
    "float('inf')": "inf",
    "None": "None",
    "'0.5'": "'0.5'",
    "1e300": "1e+300",
    "{'score': True}": "True",
    "[1.0]": "[1.0]",
    "np.array([0.5, 0.5])": "array([0.5, 0.5])",
    "np.float64('nan')": "nan",
    "np.str_('best')": "'best'",
    "10**400": "1000",
    "1j": "1j",
    "{'score': float('inf')}": "inf",
    "{'score': None}": "None",
    "{'reward': 0.5}": "{'reward': 0.5}",
    "{}": "{}",
}


def test_a_result_that_is_not_a_finite_number_is_reported_with_its_value(scorer):
    values = f"import numpy as np\nVALUES = {{{', '.join(f'{v!r}: {v}' for v in BAD)}}}\n"
    my = scorer("return VALUES[solution_str]", values + SIGNATURE)
    for value, warning in BAD.items():
        with pytest.raises(UserError) as e:
            ask(my, value)
        said = re.search(r"my_reward\.py: compute_score returned (.*); it must return a finite number", str(e.value))
        assert said and warning in said[1]


def test_the_default_function_survives_what_a_model_may_write():
    texts = ["9**9**9**9", "\\boxed{" * 500, "#### " + "9" * 5000, "\ud7ff\x00\u2028", "((((" * 400, "=" * 3000]
    assert all(0.0 <= r <= 1.0 for r in Scorer(Reward())(a_rollout(texts)).rewards[0].tolist())


def test_the_default_file_may_be_given_by_path():
    assert ask(Scorer(Reward(path=reward_func.__file__)), "#### 7") == (1.0, {})


# ---- on_error: what a response without a score gets ----

MIXED = "if solution_str == 'bad':\n    raise ValueError(ground_truth)\nreturn float(solution_str)"


def test_zero_scores_the_response_0_counts_it_and_warns_once_of_each_kind(scorer, capfd):
    my = scorer(MIXED, on_error="zero")
    scores = my(a_rollout(["1", "bad", "0.5"], ["bad", "bad", "x"]))
    assert scores.rewards.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert (scores.calls, scores.errors, scores.timeouts, scores.faults, scores.skipped) == (6, 4, 0, 4, [])
    warning = capfd.readouterr().err
    assert warning.count("warning:") == 2 and "(line 3)" in warning and "(line 4)" in warning, "two lines, two kinds"
    assert "'bad'" in warning and "Traceback" not in warning and "raise ValueError(ground_truth)" in warning
    my(a_rollout(["bad", "x"]))
    assert capfd.readouterr().err == ""


def test_skip_group_leaves_the_whole_group_without_contrast(scorer):
    scores = scorer(MIXED, on_error="skip_group")(a_rollout(["1", "bad"], ["1", "0.5"]))
    assert scores.rewards.tolist() == [[0.0, 0.0], [1.0, 0.5]] and scores.skipped == [0]


def test_stop_names_the_response(scorer):
    with pytest.raises(UserError, match="ValueError: 7 .line 3., on the response 'bad' to the prompt 'x . 5 = 12"):
        scorer(MIXED, on_error="stop")(a_rollout(["1", "bad"]))


def test_a_call_that_hangs_is_counted_and_reported_with_the_cure(scorer, capfd):
    my = scorer("while solution_str == 'bad':\n    pass\nreturn 1.0", on_error="zero", timeout_s=0.3)
    scores = my(a_rollout(["1", "bad", "1"]))
    assert scores.rewards.tolist() == [[1.0, 0.0, 1.0]] and (scores.errors, scores.timeouts) == (0, 1)
    warning = capfd.readouterr().err
    assert re.search(r"took longer than 0.3 s \(line [23]\)", warning) and "reward.timeout_s" in warning


def test_stop_comes_at_the_first_fault_and_not_after_the_last(scorer, tmp_path):
    begun = tmp_path / "begun"
    my = scorer(f"import time\nopen({str(begun)!r}, 'a').write('x')\ntime.sleep(600)", on_error="stop", timeout_s=0.2)
    with pytest.raises(UserError, match="took longer than 0.2 s"):
        my(a_rollout(["x"] * 100))
    assert len(begun.read_text()) < 100, "the last calls never began"


def test_a_function_that_hangs_on_everything_ends_the_run(scorer):
    my = scorer("import time\ntime.sleep(600)", on_error="zero", timeout_s=0.02, workers=2)
    with pytest.raises(UserError, match=r"given up after 32 calls in a row that took longer than 0.02 s.*timeout_s"):
        my(a_rollout(["x"] * 200))


@pytest.mark.slow
def test_a_hang_now_and_then_does_not(scorer):
    my = scorer(
        "import time\nif solution_str == 'x':\n    time.sleep(600)\nreturn 1.0", on_error="zero", timeout_s=0.02
    )
    scores = my(a_rollout(["x"] * 20 + ["y"] + ["x"] * 20))
    assert (scores.timeouts, scores.calls) == (40, 41)


def test_the_check_before_training_gives_up_sooner_and_is_silent(scorer, capfd):
    my = scorer("import time\nprint('hello')\ntime.sleep(600)", on_error="stop", timeout_s=0.1)
    scores = my.score_texts([PROMPT], [["x"] * 50])
    assert scores.timeouts == 50 and scores.first_fault.startswith("took longer than 0.1 s (line ")
    assert capfd.readouterr().out == ""


def test_the_check_before_training_stops_at_the_third_call_that_ends_its_process(scorer, tmp_path):
    """Each such call costs two starts of a process."""
    body = f"import os\nopen({str(tmp_path / 'log')!r}, 'a').write('x')\nos._exit(3)"
    with pytest.raises(UserError, match="failed on every answer .* it ended its process with exit code 3"):
        require_gold(scorer(body), [replace(PROMPT, id=i, ground_truth=str(i)) for i in range(8)], 8)
    assert len((tmp_path / "log").read_text()) < 40, "of 176 starts for 88 calls"


def test_in_training_every_call_that_ends_its_process_is_counted(scorer):
    my = scorer("import os\nif 'x' in solution_str:\n    os._exit(3)\nreturn 1.0", on_error="zero")
    scores = my(a_rollout(["x"] * 5 + ["y"]))
    assert scores.errors == 5 and scores.rewards.tolist() == [[0.0] * 5 + [1.0]]


def test_an_error_message_of_several_lines_is_printed_on_one(scorer):
    with pytest.raises(UserError, match="raised ValueError: one two .line 2."):
        ask(scorer("raise ValueError('one\\n  two')"), "")


def test_what_the_function_prints_is_shown_and_cut(scorer, capfd):
    my = scorer("print('seen', solution_str)\nreturn 1.0")
    my(a_rollout([str(i) for i in range(80)]))
    shown = capfd.readouterr().out.splitlines()
    assert shown[0] == "reward function: seen 0" and shown[49] == "reward function: seen 49"
    assert len(shown) == 51 and "the rest is not shown" in shown[50]


# ---- what was begun while others were sampled ----


def test_groups_begun_early_are_not_scored_again(scorer, tmp_path):
    log = tmp_path / "calls"
    body = "import time\ntime.sleep(0.03)\n"
    my = scorer(f"{body}open({str(log)!r}, 'a').write(solution_str + ' ')\nreturn float(solution_str)")
    my(a_rollout(["1"] * 5))  # long enough to be worth it
    my.begin(1, PROMPT, ["0.25", "0.75"], ["stop", "stop"])
    assert list(my.begun) == [1]
    assert my(a_rollout(["0", "1"], ["0.25", "0.75"])).rewards.tolist() == [[0, 1], [0.25, 0.75]]
    assert sorted(log.read_text().split()[5:]) == ["0", "0.25", "0.75", "1"]
    my(a_rollout(["0", "1"], ["0.5", "0.5"]))
    assert log.read_text().split()[9:] == ["0", "1", "0.5", "0.5"], "nothing of the last rollout is left"


def test_short_calls_wait_until_sampling_is_over(scorer, monkeypatch):
    monkeypatch.setattr("gspo.reward.scorer.WORTH_OVERLAPPING_S", 60.0)  # beside other work no call is short
    my = scorer("return float(solution_str)")
    my(a_rollout(["1"] * 200))
    my.begin(0, PROMPT, ["0.25", "0.75"], ["stop", "stop"])
    assert my.begun == {} and my(a_rollout(["0.25", "0.75"])).rewards.tolist() == [[0.25, 0.75]]


# ---- a ranking of the user's ----

RANKS = "def rank_responses(responses, ground_truth, data_source):\n"


def test_a_rank_responses_in_the_file_scores_whole_groups(scorer):
    """The longest is best: no response has a score of its own."""
    my = scorer(
        "order = sorted(range(len(responses)), key=lambda i: -len(responses[i]))\n"
        "return [(i, 1.0 - place / len(order)) for place, i in enumerate(order)]",
        "def compute_score(**_):\n    raise SystemError\n\n\n" + RANKS,
    )
    my.begun[1] = my._submit(PROMPT, ["aaaa", "b"], ["stop", "stop"])
    scores = my(a_rollout(["a", "bbb"], ["aaaa", "b"]))
    assert scores.rewards.tolist() == [[0.5, 1.0], [1.0, 0.5]] and scores.calls == 2


def test_a_ranking_gets_extra_info_and_kwargs_where_it_takes_them(scorer):
    head = "def rank_responses(responses, ground_truth, data_source, extra_info, bonus):\n"
    my = scorer("return [(0, bonus), (1, extra_info['index'] / 4)]", head, reward_kwargs={"bonus": 0.125})
    assert my(a_rollout(["a", "b"])).rewards.tolist() == [[0.125, 0.75]]


NO_RANKING = "[(0, 1)] | [(0, 1), (0, 0.5)] | [(0, 1), (2, 0.5)] | [(0, 1e300), (1, 0)] | None | [1.0, 0.5]"
NO_RANKING += "| [(0, 1), (1, 0), (1, 0)] | [(0, None), (1, 1)] | [(0, float('nan')), (1, 1)]"


@pytest.mark.parametrize("value", NO_RANKING.split("|"))
def test_a_ranking_that_misses_or_doubles_a_response_is_a_fault(scorer, value):
    my = scorer(f"return {value}", RANKS, on_error="skip_group")
    scores = my(a_rollout(["a", "b"]))
    assert (scores.errors, scores.skipped) == (1, [0])


def test_a_copy_of_the_default_file_scores_each_response_by_its_own_compute_score(tmp_path):
    source = Path(reward_func.__file__).read_text(encoding="utf-8")
    changed = source.replace(
        'return score_parts(data_source, solution_str, ground_truth, extra_info)["score"]', "return 0.25"
    )
    assert changed != source
    (tmp_path / "copy.py").write_text(changed, encoding="utf-8")
    my = Scorer(Reward(path=str(tmp_path / "copy.py"), workers=1))
    assert not my.pool.scores_groups and ask(my, "#### 7") == (0.25, {})


# ---- for evaluation ----


def test_pred_is_kept_as_the_answer_that_was_read(scorer):
    my = scorer("return {'score': 1, 'pred': 7 if solution_str else None, 'acc': False}")
    scores = my(a_rollout(["a", ""]))
    assert scores.predictions == [["7", None]] and scores.parts["acc"].tolist() == [[0.0, 0.0]]
