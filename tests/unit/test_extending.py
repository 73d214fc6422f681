"""Run every example of docs/extending.md: each must train a step, read rows, log a step, or compute."""

import json
import re

from repository import ROOT

FEW = ("--config", "configs/quick.yaml", "trainer.max_steps=1", "data.train_batch_size=8", "eval.round_prompts=0",
       "eval.before_and_after=false", "model.precision=fp32")  # fmt: skip


def example(name):
    """The code block of the page whose first line is `# name`."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", page, re.DOTALL)
    return code


def first_step(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_a_reward_is_one_file(run_program, tmp_path):
    reward = tmp_path / "my_reward.py"
    reward.write_text(example("my_reward.py"))
    done = run_program("train.py", *FEW, f"reward.path={reward}", f"trainer.output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    step = first_step(tmp_path / "quick")
    assert 0.9 * step["reward/right"] <= step["reward_mean"] < step["reward/right"] < 1.0
