"""Reward functions as they come in real life: keyword arguments, processes of their own, parts with our names."""

import json

import pytest
import torch

from gspo.config import Reward
from gspo.errors import UserError
from gspo.metrics.trackers import SamplesFile
from gspo.reward.gold_check import require_gold
from gspo.reward.scorer import Scorer
from gspo.types import Prompt

PLAIN = "def compute_score(data_source, solution_str, ground_truth, extra_info=None{more}):\n    return 0.5\n"


@pytest.fixture()
def scorer(tmp_path):
    """Make a scorer from the text of a file."""
    made = []

    def scorer(text, file="my_reward.py", **settings):
        path = tmp_path / file
        path.write_text(text, encoding="utf-8")
        made.append(Scorer(Reward(path=str(path), **{"on_error": "stop", "workers": 1, "timeout_s": 60, **settings})))
        return made[-1]

    yield scorer
    for each in made:
        each.close()


def scores_of(scorer, *texts, truth="7", extra=None):
    """Score texts for one prompt -> (scores, what the first fault was)."""
    scores = scorer.score_texts([Prompt(0, (1,), "x?", truth, "a", extra or {})], [list(texts)])
    return scores.rewards[0].tolist(), scores.first_fault


# ---- keyword arguments ----


@pytest.mark.parametrize(
    ("text", "kwargs", "said"),
    [
        (PLAIN.format(more=""), {"k": 1}, "sets 'k', but compute_score of .* takes data_source, solution_str, ground"),
        (PLAIN.format(more=", bonus=1"), {"bonus": 1, "k": 1}, "sets 'k', but .* extra_info, bonus only"),
        (PLAIN.format(more=", **rest"), {"ground_truth": 1}, "sets 'ground_truth', which every call is given already"),
        (PLAIN.format(more=", **rest"), {"extra_info": {}}, "sets 'extra_info', which every call"),
        (PLAIN.format(more=", *, judge"), {}, "needs 'judge', but is called with .*reward.reward_kwargs.judge=VALUE"),
        ("def compute_score(response, truth=0):\n    return 1\n", {}, "takes response, truth only, so it does not see"),
        ("def compute_score(ground_truth):\n    return 1\n", {}, "Rename that argument to 'solution_str'"),
        ("def rank_responses(texts, ground_truth):\n    pass\n", {}, "Rename that argument to 'responses'"),
        ("def compute_score(solution_str, answer):\n    return 1\n", {}, "needs 'answer', but is called with"),
        ("compute_score = lambda: 1\n", {"k": 1}, "takes no keywords only"),
        ("async def compute_score(data_source, **rest):\n    return 1\n", {"data_source": 1}, "every call"),
        ("def rank_responses(responses, ground_truth, data_source):\n    pass\n", {"k": 1}, "but rank_responses of"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_an_error_before_the_first_call(scorer, text, kwargs, said):
    with pytest.raises(UserError, match=said):
        scorer(text, reward_kwargs=kwargs)


def test_the_default_function_takes_no_further_arguments():
    with pytest.raises(UserError, match="reward.reward_kwargs sets 'k', but compute_score of .*reward_func.py takes"):
        Scorer(Reward(reward_kwargs={"k": 1}, workers=1))


@pytest.mark.parametrize("more", [", k=0", ", **rest", ", *, k", ", k=None, **rest"])
def test_arguments_that_fit_are_given(scorer, more):
    given = "k" if "rest" not in more or "k=" in more else "rest['k']"
    assert scores_of(scorer(PLAIN.format(more=more).replace("0.5", given), reward_kwargs={"k": 0.25}), "") == (
        [0.25],
        "",
    )


@pytest.mark.parametrize(
    ("takes", "value"),
    [
        ("solution_str, ground_truth", "float(solution_str == ground_truth)"),
        ("ground_truth, solution_str", "float(solution_str == ground_truth)"),
        ("solution_str", "float(solution_str == '7')"),
        ("solution_str, extra_info", "float(extra_info['a'] + (solution_str == '8'))"),
        ("*, solution_str, k, **rest", "k * len(rest) / 3 * (solution_str == '7')"),
    ],
)
def test_a_function_gets_the_arguments_that_it_names(scorer, takes, value):
    text, kwargs = f"def compute_score({takes}):\n    return {value}\n", {"k": 1} if "k," in takes else {}
    assert scores_of(scorer(text, reward_kwargs=kwargs), "7", "8", extra={"a": 1}) == (
        [1.0, 2.0 if "extra" in takes else 0.0],
        "",
    )


def test_a_ranking_gets_the_arguments_that_it_names(scorer):
    mine = scorer(
        "def rank_responses(responses, extra_info):\n    return list(enumerate(extra_info['finish_reasons']))\n"
    )
    assert "returned [(0, 'stop'), (1, 'stop')]" in scores_of(mine, "a", "b")[1]


TRL = "def {name}({takes}**kwargs):\n    return [1.0 for _ in completions]\n"


@pytest.mark.parametrize(
    ("name", "takes", "said"),
    [
        ("compute_score", "completions, ", "Rename it to score_batch and add `def compute_score"),
        (
            "reward_len",
            "completions, ",
            r"has no function 'compute_score' .*it has reward_len. reward_len takes a batch",
        ),
        (
            "accuracy",
            "prompts, completions, solution, ground_truth, ",
            r", prompts=\[\.\.\.\], solution=\[extra_info\['solution'\]\], ground_truth=\[ground_truth\]\)\[0\]",
        ),
    ],
)
def test_a_function_of_trl_is_answered_with_what_to_add(scorer, name, takes, said):
    with pytest.raises(UserError, match=said):
        scorer(TRL.format(name=name, takes=takes))


TRL_OF_COLUMNS = """
def accuracy(completions, ground_truth, level, **kwargs):
    return [float(c[0]["content"] == g) + n for c, g, n in zip(completions, ground_truth, level)]
"""


def test_what_a_function_of_trl_is_answered_with_works(scorer):
    """Its message is followed to the letter: the line is added, and the setting left out."""
    with pytest.raises(UserError, match=r"where it reads texts\. Leave reward\.name out\.$") as error:
        scorer(TRL_OF_COLUMNS, name="accuracy")
    line = str(error.value).split("`")[3]
    assert scores_of(scorer(f"{TRL_OF_COLUMNS}\n{line}\n"), "7", "8", extra={"level": 2}) == ([3.0, 2.0], "")


# ---- multiprocessing ----

PARALLEL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
import beside

@dataclass
class Answer:
    text: str

def right(answer, queue=None):
    found = beside.GOLD == answer.text and Path(__file__).name == "my-reward.v2.py" and CHANGED == "no"
    if queue is not None:
        queue.put(found)
    return found

CHANGED = "no"

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    context = multiprocessing.get_context({method!r})
    {body}
"""
BODIES = {
    "executor": "with ProcessPoolExecutor(1, mp_context=context) as pool:\n"
    "        return float(pool.submit(right, Answer(solution_str)).result())",
    "pool": "with context.Pool(1) as pool:\n        return float(pool.map(right, [Answer(solution_str)])[0])",
    "process": "queue = context.Queue()\n"
    "    context.Process(target=right, args=(Answer(solution_str), queue)).start()\n    return float(queue.get())",
}


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("spawn", "executor"),
        ("forkserver", "executor"),
        ("fork", "pool"),
        pytest.param("spawn", "pool", marks=pytest.mark.slow),
        pytest.param("forkserver", "pool", marks=pytest.mark.slow),
        pytest.param("spawn", "process", marks=pytest.mark.slow),
        pytest.param("forkserver", "process", marks=pytest.mark.slow),
    ],
)
def test_a_function_may_start_processes_in_every_way(scorer, tmp_path, method, body):
    """They see the text that was read once, modules beside it, and the file's own name."""
    (tmp_path / "beside.py").write_text("GOLD = '7'\n")
    mine = scorer(PARALLEL.format(method=method, body=BODIES[body]), "my-reward.v2.py")
    (tmp_path / "my-reward.v2.py").write_text("CHANGED = 'yes'\ndef right(answer, queue=None):\n    return False\n")
    assert scores_of(mine, "7", "8") == ([1.0, 0.0], "")


# ---- parts with our names ----


def test_parts_whose_names_are_those_of_our_curves_are_kept_apart(scorer):
    parts = "{'score': 0.5, 'errors': 3, 'timeouts': 4, 'faults': 2, 'own_errors': 5, 'error': 6, 'own_right': 7"
    parts += ", 'batch_mean': 8, 'batch_max': 9, 'function': 1, 'model': 0}"
    mine = scorer(f"def compute_score(**given):\n    return {parts}\n")
    scores = mine.score_texts([Prompt(0, (1,), "x?", "7", "a")], [["a", "b"]])
    assert {name: values[0, 0].item() for name, values in scores.parts.items()} == {
        "own_errors": 3, "own_timeouts": 4, "own_faults": 2, "own_own_errors": 5, "error": 6, "own_right": 7,
        "own_batch_mean": 8, "own_batch_max": 9, "own_function": 1, "own_model": 0,
    }  # fmt: skip
    assert (scores.errors, scores.timeouts, scores.faults) == (0, 0, 0)


@pytest.mark.parametrize("acc", ["'yes'", "'1'", "[1]", "{'a': 1}"])
def test_an_accuracy_that_is_no_number_is_a_fault(scorer, acc):
    mine = scorer(f"def compute_score(**given):\n    return {{'score': 1.0, 'acc': {acc}}}\n")
    assert "its 'acc' must be true or false, or a number from 0 to 1" in scores_of(mine, "a")[1]


@pytest.mark.parametrize("acc", ["True", "0.5", "None", "float('nan')"])
def test_an_accuracy_may_be_unknown(scorer, acc):
    mine = scorer(f"def compute_score(**given):\n    return {{'score': 1.0, 'acc': {acc}}}\n")
    assert scores_of(mine, "a") == ([1.0], "")


# ---- ground truths that are no text, and half characters that a function makes ----


@pytest.mark.parametrize("truth", [["7", "seven"], {"target": "7"}, True, 7])
def test_a_ground_truth_reaches_the_function_as_it_is(scorer, truth):
    mine = scorer(f"def compute_score(ground_truth, **rest):\n    return float(ground_truth == {truth!r})\n")
    assert scores_of(mine, "a", "b", truth=truth) == ([1.0, 1.0], "")


def test_only_rows_with_a_known_right_answer_are_checked(scorer, capsys):
    mine = scorer("def compute_score(solution_str, **rest):\n    return float(solution_str == 'good')\n")
    odd = [Prompt(i, (1,), "x?", [str(i)], "a") for i in range(3)]
    require_gold(mine, odd, 16)
    assert "not checked: the sampled rows have no ground truth that is a text" in capsys.readouterr().out
    require_gold(mine, [*odd, Prompt(3, (1,), "x?", {"a": 1}, "a", {"solution": "good"})], 16)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="scores no right answer above a wrong one"):
        require_gold(mine, [*odd, *(Prompt(i, (1,), "x?", str(i), "a") for i in (3, 4))], 16)


def test_half_a_character_that_a_function_returns_reaches_the_samples(scorer, tmp_path):
    mine = scorer("def compute_score(**rest):\n    return {'score': 1.0, 'pred': '7\\ud83d'}\n")
    pred = mine.score_texts([Prompt(0, (1,), "x?", "7", "a")], [["a"]]).predictions[0][0]
    assert pred == "7\ud83d"
    samples = SamplesFile(tmp_path, None, 0)
    assert samples.samples(1, {0: {"pred": pred, "day": torch.Size([1])}}) is None
    assert json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))["pred"] == pred
