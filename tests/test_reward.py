"""The user's reward function: how it is found and called, what it may return, and how its faults are told."""

import re

import pytest
import torch

from gspo import reward_func
from gspo.config import Reward
from gspo.errors import UserError
from gspo.reward import Scorer
from gspo.types import Prompt, Rollout

PROMPT = Prompt(0, (1,), "x + 5 = 12?", "7", "math_reasoning", {"index": 3})
SIGNATURE = "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"


@pytest.fixture()
def scorer(tmp_path):
    def scorer(body, signature=SIGNATURE, **settings):
        path = tmp_path / "my_reward.py"
        path.write_text(signature + "".join(f"    {line}\n" for line in body.splitlines()), encoding="utf-8")
        return Scorer(Reward(path=str(path), **settings))

    return scorer


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


def test_the_default_is_the_seeds_function():
    texts = ["#### 7", "3 + 4 = 8\n#### 7", "#### 5", "who knows"]
    scores = Scorer(Reward())(a_rollout(texts, texts[::-1]))
    assert scores.rewards.tolist() == [pytest.approx([1.0, 0.5, 0.1, 0.0]), pytest.approx([0.0, 0.1, 0.5, 1.0])]
    assert scores.rewards.dtype == torch.float32 and scores.parts == {}


def test_every_response_is_scored_with_its_own_prompt(scorer):
    other = Prompt(1, (1,), "y", "1", "verl", {})
    rollout = a_rollout(["7", "1"], ["7", "1"], prompts=[PROMPT, other])
    assert scorer("return float(solution_str == ground_truth)")(rollout).rewards.tolist() == [[1, 0], [0, 1]]


def test_it_is_called_by_keyword_with_all_that_is_known(scorer):
    ask = scorer(
        "assert (data_source, solution_str, ground_truth) == ('math_reasoning', 'seven', '7')\n"
        "assert extra_info == {'index': 3} and bonus == 0.25 and names == ['a']\n"
        "return bonus",
        "def compute_score(*, names, bonus, extra_info, ground_truth, solution_str, data_source):\n",
        reward_kwargs={"bonus": 0.25, "names": ["a"]},
    )
    assert ask.score(PROMPT, "seven") == (0.25, {})


def test_another_function_of_the_file_by_name(scorer):
    ask = scorer("return 1.0", "def compute_score(**_):\n    return 0.0\n\n\ndef judge(**_):\n", name="judge")
    assert ask.score(PROMPT, "") == (1.0, {})


def test_the_file_may_hold_dataclasses_and_import_the_default(scorer):
    head = "from dataclasses import dataclass\nfrom gspo.reward_func import correctness\n"
    head += "@dataclass\nclass R:\n    a: int\n"
    assert scorer("return correctness(solution_str, ground_truth)", head + SIGNATURE).score(PROMPT, "7") == (1.0, {})


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        ("1", 1.0),
        ("0", 0.0),
        ("0.5", 0.5),
        ("True", 1.0),
        ("np.float64(0.5)", 0.5),
        ("np.float32(0.5)", 0.5),
        ("np.int64(1)", 1.0),
        ("np.bool_(True)", 1.0),
        ("np.array(0.5)", 0.5),
        ("np.array([0.5])", 0.5),
        ("torch.tensor(0.5)", 0.5),
        ("{'score': 0.5}", 0.5),
        ("{'score': np.float32(0.5)}", 0.5),
    ],
)
def test_a_number_from_0_to_1_in_any_dress(scorer, value, reward):
    assert scorer(f"return {value}", "import numpy as np\nimport torch\n" + SIGNATURE).score(PROMPT, "") == (reward, {})


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


def test_a_missing_file_a_folder_and_a_file_that_is_no_python(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for name, said in {"no.py": "no such file", "": "no such file", "notes.txt": "is not a Python file"}.items():
        with pytest.raises(UserError) as e:
            Scorer(Reward(path=str(tmp_path / name)))
        assert f"reward.path = {str(tmp_path / name)!r}" in str(e.value) and said in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport not_there\n", "ModuleNotFoundError: No module named 'not_there' (line 2)"),
        ("\n\ndef f(:\n", "SyntaxError: invalid syntax (my_reward.py, line 3) (line 3)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero (line 1)"),
    ],
)
def test_a_file_that_does_not_import(tmp_path, text, said):
    path = tmp_path / "my_reward.py"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path} does not import: {said}")):
        Scorer(Reward(path=str(path)))


@pytest.mark.parametrize("name", ["judge", "NUMBER"])
def test_a_missing_function_and_one_that_is_none(scorer, name):
    with pytest.raises(UserError, match=f"my_reward.py has no function '{name}'.*reward.name"):
        scorer("return NUMBER", f"NUMBER = 1.0\n{SIGNATURE}", name=name)


def test_a_function_that_raises_tells_line_response_and_prompt(scorer):
    with pytest.raises(UserError) as e:
        scorer("tenth = 0.1\nreturn tenth * int(solution_str)")(a_rollout(["7", "seven"]))
    for part in ("my_reward.py", "ValueError: invalid literal", "(line 3)", "'seven'", "'x + 5 = 12?'", "'7'"):
        assert part in str(e.value)


def test_the_line_told_is_the_last_one_in_the_users_file(scorer):
    head = "import json\n\n\ndef read(text):\n    return json.loads(text)\n\n\n"
    with pytest.raises(UserError, match=r"JSONDecodeError: .* \(line 5\)"):
        scorer("return read(solution_str)", head + SIGNATURE).score(PROMPT, "{")


def test_a_path_relative_to_the_working_folder_tells_its_lines_too(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(SIGNATURE + "    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(line 2\)"):
        Scorer(Reward(path="./my_reward.py")).score(PROMPT, "")


def test_a_function_that_takes_other_names_is_told_by_the_name(scorer):
    with pytest.raises(UserError, match="TypeError: .*unexpected keyword argument 'data_source'"):
        scorer("return 1.0", "def compute_score(text, gold):\n").score(PROMPT, "")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("float('nan')", "nan"),
        ("float('inf')", "inf"),
        ("None", "None"),
        ("'0.5'", "'0.5'"),
        ("1.5", "1.5"),
        ("-0.1", "-0.1"),
        ("1.0000001", "1.0000001"),
        ("[1.0]", "[1.0]"),
        ("np.array([0.5, 0.5])", "array([0.5, 0.5])"),
        ("np.float64('nan')", "nan"),
        ("np.str_('best')", "'best'"),
        ("10**400", "1000"),
        ("1j", "1j"),
        ("{'score': 1.5}", "1.5"),
        ("{'score': None}", "None"),
        ("{'reward': 0.5}", "{'reward': 0.5}"),
        ("{}", "{}"),
    ],
)
def test_what_is_no_number_from_0_to_1_is_told_with_the_value(scorer, value, told):
    ask = scorer(f"return {value}", "import numpy as np\n" + SIGNATURE)
    with pytest.raises(UserError) as e:
        ask.score(PROMPT, "the response")
    said = re.search(
        r"my_reward\.py: compute_score returned (.*) for the response 'the response'; it must", str(e.value)
    )
    assert said and told in said[1]


def test_the_default_function_survives_what_a_model_may_write():
    texts = ["9**9**9**9", "\\boxed{" * 500, "#### " + "9" * 5000, "\ud7ff\x00\u2028", "((((" * 400, "=" * 3000]
    assert all(0.0 <= r <= 1.0 for r in Scorer(Reward())(a_rollout(texts)).rewards[0].tolist())


def test_the_default_file_may_be_given_by_path():
    assert Scorer(Reward(path=reward_func.__file__)).score(PROMPT, "#### 7") == (1.0, {})
