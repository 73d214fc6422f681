"""The card of an exported model: what its run was, and nothing that is nobody's business."""

import json
import shutil

import pytest
import yaml
from run_on_disk import write_run

from gspo.checkpoint import fingerprints
from gspo.embedded import MODEL_DIR
from gspo.export import export, main
from gspo.model_card import model_card

SETTINGS = [
    "model.path=Qwen/Qwen2.5-0.5B-Instruct",
    "data.train_files=[/home/someone/secret plan/rows.jsonl,data/more.jsonl]",
    "data.system_prompt=Be `brief` | <b>now</b>",
    "reward.path=../mine/my_reward.py",
    "reward.reward_kwargs.api_key=sk-123",
    "rollout.n=6",
    "rollout.max_slots=64",
    "objective.algorithm=grpo",
    "trainer.project_name=hidden",
]


@pytest.fixture()
def run(tmp_path):
    """A run of six steps whose second checkpoint is its best, and whose last is exported."""
    folder = write_run(tmp_path / "outputs" / "mine", settings=SETTINGS, accuracy=0.8)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["heldout/accuracy"] = 0.75
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fingerprints.write(folder, {"data.train_files": "1200 rows abc"})
    for step in (2, 6):
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(MODEL_DIR, checkpoint, ignore=shutil.ignore_patterns("README.md"))
        (checkpoint / "trainer").mkdir()
        (checkpoint / "trainer" / "state.json").write_text("{}")
    (folder / "checkpoints" / "best").symlink_to("step_000002")
    return folder


def test_the_card_says_what_the_run_was(run):
    card = model_card(run / "checkpoints" / "step_000006")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert "# `mine`, step 6\n" in card and "`Qwen/Qwen2.5-0.5B-Instruct` after 6 steps" in card
    assert '| training prompts | `["rows.jsonl", "data/more.jsonl"] (1200 rows)` |' in card
    assert "| reward function | `my_reward.py` |" in card and "| responses a prompt | `6` |" in card
    assert "| `greedy` | 0.400 [0.300, 0.500] | 0.800 [0.700, 0.900] |" in card
    assert "python train.py --config standard" in card and "objective.algorithm=grpo" in card
    assert "rollout.max_slots" not in card and "trainer.project_name" not in card, "of a machine"
    assert "begun from" not in card


def test_the_card_of_another_step_has_its_held_out_accuracy_and_no_table(run):
    card = model_card(run / "checkpoints" / "step_000002")
    assert "| held-out accuracy at this step | `0.750` |" in card and "Before and after" not in card


def test_a_branch_of_another_run_is_called_one(run):
    """Its command alone would not make it again."""
    steps = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(steps[2:]) + "\n")
    card = model_card(run / "checkpoints" / "step_000006")
    assert "| begun from | `a checkpoint of another run, step 2; what follows is of the steps from there on` |" in card


def test_the_card_gives_no_folder_and_no_secret_away(run):
    card = model_card(run / "checkpoints" / "step_000006")
    assert not [word for word in ("/home", "someone", "secret", "sk-123", "..", "hidden", str(run)) if word in card]


def test_what_a_stranger_set_is_text(run):
    card = model_card(run / "checkpoints" / "step_000006")
    assert "| system prompt | `Be 'brief' \\| <b>now</b>` |" in card
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["system_prompt"] = "x\n```\n<script>\x1b[2J\n"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = model_card(run / "checkpoints" / "step_000006")
    assert "| system prompt | `x ''' <script>\\x1b[2J ` |" in card and "\x1b" not in card
    assert card.rstrip().endswith("\n````") and card.count("````") == 2, "its fence is not its own text's"


def test_an_export_has_the_card_and_offers_the_best(run, tmp_path, monkeypatch, capsys):
    for name, step in ((str(run), 6), (str(run / "best"), 2)):
        monkeypatch.setattr("sys.argv", ["export", name, str(tmp_path / f"out{step}")])
        for manifest in run.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
        monkeypatch.setattr("gspo.export.manifest.find_damage", lambda *args, **kwargs: "")
        main()
        said = capsys.readouterr().out
        assert (tmp_path / f"out{step}" / "README.md").read_text().splitlines()[7] == f"# `mine`, step {step}"
        offered = f"the best on held-out prompts is step_000002: give {run / 'checkpoints' / 'best'}"
        assert (offered in said) == (step == 6) and "read it before you publish it" in said


def test_what_is_no_runs_checkpoint_or_cannot_be_read_is_exported_without(run, tmp_path, capsys):
    assert model_card(MODEL_DIR) is None
    (run / "metrics.jsonl").write_text("x\n")
    assert model_card(run / "checkpoints" / "step_000006") is None
    assert "no model card is written" in capsys.readouterr().out
    shutil.copy(MODEL_DIR / "README.md", run / "checkpoints" / "step_000006" / "README.md")
    shutil.rmtree(run / "checkpoints" / "step_000006" / "trainer")
    export(run / "checkpoints" / "step_000006", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == (MODEL_DIR / "README.md").read_bytes(), "the model's own"
