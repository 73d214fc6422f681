"""What eval.py is given: which model, which limits, and what is refused before anything is sampled."""

import shutil
import sys

import pytest
from saved_run import ALONE, a_run

import eval as evaluation
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.loading import load_tokenizer


def evaluate(monkeypatch, *given):
    """Run eval.py, which must not come to sampling."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, given)])
    monkeypatch.setattr(evaluation, "evaluate", lambda name, cfg, world: pytest.fail(f"sampled: {name}"))
    evaluation.run_evaluation(evaluation.options(), ALONE)


@pytest.mark.parametrize("limit", ["-1", "0"])
def test_a_limit_below_one_is_refused(monkeypatch, limit):
    with pytest.raises(UserError, match=rf"--limit {limit}: it must be at least 1"):
        evaluate(monkeypatch, "--limit", limit)


@pytest.mark.parametrize("place", ["MODEL", "--compare"])
def test_a_model_that_is_not_there_is_named_by_its_place_before_anything_is_sampled(monkeypatch, place):
    given = ["nosuchdir"] if place == "MODEL" else ["--compare", "nosuchdir"]
    with pytest.raises(UserError, match=rf"{place} = 'nosuchdir' is no folder here"):
        evaluate(monkeypatch, *given)


@pytest.mark.parametrize("place", ["MODEL", "--compare"])
def test_the_word_embedded_is_the_embedded_model(monkeypatch, place):
    """As gspo.sample has it, and as the data are named."""
    asked = []
    monkeypatch.setattr(sys, "argv", ["eval.py", *(["--compare"] * (place == "--compare")), "embedded"])
    monkeypatch.setattr(evaluation, "check_model", lambda name, place: asked.append((name, place)))
    with pytest.raises(pytest.fail.Exception, match="sampled: None"):
        monkeypatch.setattr(evaluation, "evaluate", lambda name, cfg, world: pytest.fail(f"sampled: {name}"))
        evaluation.run_evaluation(evaluation.options(), ALONE)
    assert asked == ([] if place == "MODEL" else [(str(MODEL_DIR), "--compare")])


def test_the_folder_of_a_run_is_evaluated_by_its_newest_checkpoint(monkeypatch, tmp_path, tokenizer):
    run = a_run(tmp_path, tokenizer)
    run.save(4)
    shutil.copytree(MODEL_DIR, run.folder / "checkpoints" / "step_000004", dirs_exist_ok=True)
    for folder in (run.folder, run.folder.parent, run.folder / "checkpoints"):
        with pytest.raises(pytest.fail.Exception, match="sampled: .*step_000004"):
            evaluate(monkeypatch, folder)


def configured(monkeypatch, *given, model=None):
    monkeypatch.setattr(sys, "argv", ["eval.py", *given])
    return evaluation.configure(evaluation.options(), model)


def test_settings_stand_among_flags_and_change_what_is_evaluated(monkeypatch, capsys):
    given = ["data.system_prompt=You are terse = short", "--data", "embedded", "rollout.top_k=5", "--n", "3"]
    more = ["data.chat_template_kwargs.enable_thinking=false", "max_prompt_length=99", "temperature=0.5"]
    cfg = configured(monkeypatch, *given, *more)
    assert (cfg.data.system_prompt, cfg.data.test_files) == ("You are terse = short", ["embedded"])
    assert (cfg.rollout.top_k, cfg.eval.n, cfg.rollout.temperature) == (5, 3, 0.5)
    assert cfg.data.chat_template_kwargs == {"enable_thinking": False} and cfg.data.max_prompt_length == 99
    assert configured(monkeypatch, "rollout.max_new_tokens=7").rollout.max_new_tokens == 7
    assert configured(monkeypatch).rollout.max_new_tokens == 64, "the embedded task's"
    assert configured(monkeypatch, "data.test_files=[x.json]", model=MODEL_DIR).data.test_files == ["x.json"]


def test_the_model_that_a_run_would_train_is_evaluated_by_the_file_of_that_run(monkeypatch, tmp_path, tokenizer):
    """... before it begins: what can the model do already?"""
    text = "model: {path: %s}\ndata: {%s, system_prompt: Be brief., truth_key: gold}\nrollout: {max_new_tokens: 9}\n"
    files = "train_files: [t.json], val_files: [v.json]"
    (file := tmp_path / "mine.yaml").write_text(text % (MODEL_DIR, files))
    with pytest.raises(pytest.fail.Exception, match=f"sampled: {MODEL_DIR}"):
        evaluate(monkeypatch, "--config", file)
    cfg = configured(monkeypatch, "--config", str(file), "--n", "3", "data.system_prompt=null", model=MODEL_DIR)
    assert (cfg.data.test_files, cfg.data.truth_key, cfg.data.system_prompt) == (["v.json"], "gold", None)
    assert (cfg.rollout.max_new_tokens, cfg.eval.n) == (9, 3)
    file.write_text(text % (MODEL_DIR, files + ", test_files: [x.json]"))
    assert configured(monkeypatch, "--config", str(file), model=MODEL_DIR).data.test_files == ["x.json"]
    assert configured(monkeypatch, "--config", str(file), "--data", "y", model=MODEL_DIR).data.test_files == ["y"]
    file.write_text(text % (MODEL_DIR, "train_files: [t.json]"))
    with pytest.raises(UserError, match="give --data FILE"):
        configured(monkeypatch, "--config", str(file), model=MODEL_DIR)
    step = a_run(tmp_path, tokenizer).save(4)
    with pytest.raises(
        UserError, match=rf"--config {file}: .*step_000004 is a checkpoint of a run.* Leave --config out"
    ):
        configured(monkeypatch, "--config", str(file), model=step)


def test_a_setting_goes_before_the_runs_own(monkeypatch, tmp_path, tokenizer):
    run = a_run(tmp_path, tokenizer, "data.system_prompt=long")
    step = run.save(4)
    assert configured(monkeypatch, model=step).data.system_prompt == "long"
    assert configured(monkeypatch, "data.system_prompt=short", model=step).data.system_prompt == "short"


def test_a_chat_template_is_the_files_or_the_runs_for_both_models(monkeypatch, tmp_path, tokenizer, capsys):
    """The run's is read from its checkpoint: the file may have changed since, or be gone."""
    asked = []
    monkeypatch.setattr(evaluation, "answer", lambda sampler, scorer, prompts, *rest: asked.append(prompts[0].ids))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}Q: {{ m.content }}{% endfor %}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 1?", "ground_truth": "2"}')
    given = ["data.test_files=" + str(tmp_path / "p.jsonl"), f"data.chat_template={tmp_path / 't.jinja'}"]

    def ask(name, cfg):
        evaluation.evaluate(None if name is None else str(name), cfg, ALONE)
        return tokenizer.decode(asked[-1])

    cfg = configured(monkeypatch, *given)
    assert ask(None, cfg) == "Q: 1 + 1?"
    shaped = load_tokenizer(None, str(tmp_path / "t.jinja"))
    step = a_run(tmp_path / "out", shaped, given[1]).save(4)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}Other: {{ m.content }}{% endfor %}")
    cfg = configured(monkeypatch, given[0], model=step)
    assert ask(step, cfg) == ask(None, cfg) == "Q: 1 + 1?"
    assert ask(step, configured(monkeypatch, *given, model=step)) == "Other: 1 + 1?"
    (tmp_path / "t.jinja").unlink()
    assert ask(step, configured(monkeypatch, given[0], model=step)) == "Q: 1 + 1?"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["rollout.n=4"], "rollout.n has no effect on an evaluation; the number of responses is eval.n"),
        (
            ["actor_rollout_ref.rollout.val_kwargs.top_p=0.5"],
            "no effect on an evaluation; it samples with rollout.top_p",
        ),
        (
            ["actor_rollout_ref.rollout.val_kwargs.do_sample=true"],
            "no effect on an evaluation; greedy answers are always",
        ),
        (["optim.lr=4"], "optim.learning_rate has no effect on an evaluation; leave it out"),
        (["data.train_files=[a]"], r"data.train_files has no effect on an evaluation; the prompts are data.test_files"),
        (["data.sistem_prompt=x"], "unknown key 'data.sistem_prompt'; did you mean 'data.system_prompt'"),
        (["--n", "3", "eval.n=4"], "--n and eval.n are the same; leave one of the two out"),
    ],
)
def test_a_setting_that_changes_nothing_or_is_unknown_is_refused(monkeypatch, given, says):
    with pytest.raises(UserError, match=says):
        configured(monkeypatch, *given)


@pytest.mark.parametrize("flag", ["--json", "--answers"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_sampled(monkeypatch, flag, tmp_path):
    with pytest.raises(UserError, match=f"{flag} .*/no/x: the folder .*/no does not exist"):
        evaluate(monkeypatch, flag, tmp_path / "no" / "x")
