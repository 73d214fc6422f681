"""Failures that really happen on the embedded model are told; a healthy run is told nothing."""

import json
import re

import pytest
import torch

# Eight prompts, the same every step, so that a curve moves because the policy does.
ONE_STEP = [(f"Solve: x - {a} = {b}", a + b) for a, b in zip(range(21, 61, 5), range(7, 55, 6), strict=True)]
TWO_STEP = [
    (f"Solve for x: {k}x + {a} = {k * x + a}", x)
    for k, a, x in zip((2, 3, 4, 5, 6, 7, 8, 9), (6, 8, 3, 9, 4, 5, 7, 2), (-4, 5, -7, 3, 6, -2, 4, 8), strict=True)
]
HELD_OUT = [
    (f"Solve for x: {k}x + {a} = {k * x + a}", x) for k in (2, 5, 7, 9) for a, x in ((5, 4), (8, -3), (3, 7), (1, -6))
]
REWARDS = {
    "everything": "1.0",
    "digits 1": "0.8 * solution_str.count('1') / max(1, len(solution_str))",
    "length": "min(1.0, len(solution_str) / 200)",
    "minus signs": "{'score': float(said.startswith('-')), 'acc': float(said == ground_truth)}",
    "fails": "1.0 / solution_str.count('5')",
}
FUNCTION = """def compute_score(solution_str, ground_truth, **rest):
    said = solution_str.replace("\\uff1a", ":").split(":")[-1].strip()
    return {}
"""
# Updates that go on at full size where few pairs are left would get there another way.
ANCHORED = ("objective.anchor=opponent", "objective.after_fork=0.3", "objective.normalizer=constant")
# Updates that are far too large, on a reward that can be had by anything but thought.
GREEDY = ("optim.learning_rate=2e-3", "objective.kl_coef=0", "objective.margin=0", "rollout.n=8",
          "optim.epochs_per_rollout=3", *ANCHORED)  # fmt: skip
CUT_OFF = r"more than 10% of the responses|\d+% of the responses are cut off"  # at once where it is more than half
PROVOKED = {  # name: (steps, settings, reward, prompts, [(step at the latest, words told)])
    "the literal form": (
        3, ("objective.anchor=none", "objective.preference_beta=5"), None, None,
        [(2, "alarm", "pairs/gap_std is above 1.5")],
    ),
    "large steps": (
        5,
        ("optim.learning_rate=2e-3", "objective.kl_coef=0", *ANCHORED, "objective.after_fork=1",
         "data.train_batch_size=16", "health.patience=1"),  # batches are few: one speaks for all
        None, None,
        [(4, "warning", "the chosen responses have lost more than 0.2"), (3, "alarm", "kl_divergence is above 0.5")],
    ),
    "infinite steps": (
        2, ("optim.learning_rate=1e30",), None, None,
        [(1, "warning", "the loss or its gradient was not finite")],
    ),
    "nothing to choose, no room": (
        5,
        ("rollout.max_new_tokens=12",),
        "everything",
        None,
        [(5, "warning", "fewer than 20% of the prompts give a pair"), (5, "warning", CUT_OFF)],
    ),
    "a function that fails": (
        5,
        (),
        "fails",
        None,
        [(5, "warning", "more than 5% of the reward function's calls fail")],
    ),
}  # fmt: skip
SLOW = {
    "a reward for something else": (
        6,
        ("selfplay.rounds=3", "eval.round_prompts=16", "optim.learning_rate=4e-4", "optim.epochs_per_rollout=4",
         "rollout.n=8", *ANCHORED),
        "minus signs",
        TWO_STEP,
        [(6, "warning", "training reward rises and held-out accuracy falls")],
    ),
    "one token for ever": (
        12, GREEDY, "digits 1", ONE_STEP,
        [(12, "warning", "entropy is below 0.3"), (12, "warning", "responses are more than 1.5 times as long")],
    ),
    "a love of length": (
        10,
        (*GREEDY, "rollout.max_new_tokens=64"),
        "length",
        ONE_STEP,
        [(10, "warning", "responses are more than 1.5 times"), (10, "warning", CUT_OFF)],
    ),
}  # fmt: skip


def train(run_program, folder, steps, settings=(), reward=None, prompts=None):
    """-> (what was told, as (step, level, text); the rows of metrics.jsonl)."""
    settings = [*settings]
    if reward:
        (folder / "reward.py").write_text(FUNCTION.format(REWARDS[reward]))
        settings += [f"reward.path={folder}/reward.py", "reward.check_rows=0"]
    for key, rows in {"train": prompts, "val": HELD_OUT}.items() if prompts else ():
        rows = [{"prompt": p, "ground_truth": str(x), "data_source": "math"} for p, x in rows]
        (folder / f"{key}.json").write_text(json.dumps(rows))
        settings.append(f"data.{key}_files={folder}/{key}.json")
    defaults = ("selfplay.rounds=1", "eval.round_prompts=0", "eval.before_and_after=false", "trainer.save_freq=0",
                "data.train_batch_size=8", "optim.schedule=constant", "optim.warmup_steps=0")  # fmt: skip
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", *defaults, *settings, f"trainer.max_steps={steps}",
        f"trainer.output_dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(": ") for line in done.stdout.splitlines() if line.startswith(("warning, ", "alarm, "))]
    news = [(int(head.split()[2]), head.split(",")[0], text) for head, _, text in lines]
    return news, [json.loads(line) for line in (folder / "quick" / "metrics.jsonl").read_text().splitlines()]


def assert_warned(news, expected):
    for latest, level, words in expected:
        found = [step for step, given, text in news if given == level and re.match(words, text)]
        assert 1 <= len(found) <= 1 + words.count("|") and found[0] <= latest, (level, words, news)


LESS_OFTEN = {
    "large steps",
    "the literal form",
    "infinite steps",
    "nothing to choose, no room",
    "a function that fails",
}


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in PROVOKED if name not in LESS_OFTEN),
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, *sorted(LESS_OFTEN))),
    ],
)
def test_the_failure_is_provoked_and_the_warning_given(run_program, tmp_path, name):
    *made, expected = (PROVOKED | SLOW)[name]
    news, _ = train(run_program, tmp_path, *made)
    assert_warned(news, expected)


@pytest.mark.slow
def test_a_model_that_bf16_cannot_hold_gives_a_warning(run_program, tmp_path):
    """Attention logits of a hundred times the size: whom a token attends to hangs on the rounding."""
    from gspo.models.loading import load_model, load_tokenizer

    model = load_model(None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(100.0 if "q_proj" in name else 1.0)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(None).save_pretrained(tmp_path / "model")
    settings = [
        f"model.path={tmp_path}/model",
        "data.train_files=embedded",
        "rollout.temperature=1.5",
        "optim.learning_rate=1e-6",
    ]
    news, rows = train(run_program, tmp_path, 5, [*settings, "model.precision=bf16", "health.mismatch_max=0.02"])
    assert [text for _, _, text in news if text.startswith("sampler and trainer disagree") and "fp32" in text]
    assert all(row["mismatch"] > 0.02 for row in rows)


@pytest.mark.slow
def test_a_healthy_run_gives_no_warning(run_program, tmp_path):
    preset = ("selfplay.rounds=2", "optim.schedule=cosine", "optim.warmup_steps=5", "data.train_batch_size=16")
    news, rows = train(run_program, tmp_path, 5, preset)
    assert news == [] and len(rows) == 5
    assert all({"response/length_ratio", "entropy_ratio", "winner_logprob_drop"} <= row.keys() for row in rows)
