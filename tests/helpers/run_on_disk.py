"""A run's folder as train.py leaves it, written by the parts that write it, without training."""

from gspo.checkpoint.evaluations import write_evaluation
from gspo.config import dump
from gspo.metrics.trackers import MetricsFile, SamplesFile
from gspo.read_config import load_config


def write_run(folder, steps=6, rounds=2, samples=None, settings=(), accuracy=0.5):
    """A run of so many steps; samples: step -> rows of samples.jsonl."""
    folder.mkdir(parents=True)
    cfg = load_config(None, ["trainer.run_name=a", *settings])
    (folder / "config.yaml").write_text(dump(cfg), encoding="utf-8")
    metrics, groups = MetricsFile(folder, cfg, 0), SamplesFile(folder, cfg, 0)
    for step in range(1, steps + 1):
        row = {"reward_mean": step / steps, "kl_divergence": 0.01 * step, "round": float((step - 1) * rounds // steps)}
        metrics.metrics(step, row | {"reward/mine": 1.0, "time/step": 0.5})
        groups.samples(step, dict(enumerate((samples or {}).get(step, []))))
    for name, step, value in (("eval_before", 0, accuracy / 2), ("eval_after", steps, accuracy)):
        part = {"prompts": 4, "samples": 2, "greedy": value, "interval": {"greedy": [value - 0.1, value + 0.1]}}
        settings_of = {"rows": "r", "n": 2, "reward_function": "f"}
        write_evaluation(folder, name, step, settings_of, part | {"by_data_source": {"x": part}}, [])
    return folder


def group(prompt="2 + 2", responses=("is 4", "is 5", "is 4"), rewards=(1.0, 0.0, 1.0), pair=(0, 1), truth="4"):
    """A row of samples.jsonl."""
    chosen, rejected = (responses[i] for i in pair) if pair else (None, None)
    return {
        "prompt": prompt,
        "ground_truth": truth,
        "responses": [*responses],
        "rewards": [*rewards],
        "chosen": chosen,
        "rejected": rejected,
    }
