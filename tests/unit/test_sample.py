"""The public way to sample: from Python and from the command line, as docs/rollout.md shows it."""

import json
import re

import pytest
import torch
from saved_run import a_run

from gspo.errors import UserError
from gspo.models.loading import load_model, load_tokenizer
from gspo.rollout.draw_tokens import Sampling
from gspo.sample import main, sample

PROMPTS = ["Solve: x + 5 = 12", [{"role": "user", "content": "解方程：3x - 4 = 20"}]]


def test_answers_are_the_models_own_and_say_how_they_ended():
    seen = {}
    groups = sample(None, PROMPTS, 5, Sampling(0.9, max_new_tokens=24), on_group=seen.__setitem__)
    model, tokenizer = load_model(None), load_tokenizer(None)
    assert [len(group) for group in groups] == [5, 5]
    assert seen == {place: [answer.text for answer in group] for place, group in enumerate(groups)}
    for group, prompt in zip(groups, PROMPTS, strict=True):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for answer in group:
            logits = model(input_ids=torch.tensor([ids + answer.tokens])).logits[0, len(ids) - 1 : -1] / 0.9
            logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(answer.tokens)[:, None])
            assert abs(logprobs.sum().item() - answer.logprob) < 1e-3
            ended = answer.tokens[-1] == tokenizer.eos_token_id
            assert answer.finish_reason == ("stop" if ended else "length") and (ended or len(answer.tokens) == 24)
            assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_a_loaded_model_gives_what_its_folder_gives():
    settings = Sampling(0.9, max_new_tokens=12, stop=("=",))
    mine = sample(load_model(None), PROMPTS, 2, settings, tokenizer=load_tokenizer(None), max_slots=1)
    assert mine == sample(None, PROMPTS, 2, settings)


def test_a_model_without_its_tokenizer_and_an_empty_prompt_are_errors():
    with pytest.raises(UserError, match="pass tokenizer"):
        sample(load_model(None), PROMPTS)
    with pytest.raises(UserError, match="prompt 2: field 'prompt' must be a text that is not empty"):
        sample(None, ["x", ""])


def test_the_command_writes_every_row_with_its_answers(run_program, tmp_path):
    rows = [{"prompt": prompt, "ground_truth": str(i)} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--n", 3, "--temperature", 0.9, "--max_new_tokens", 12, "--stop", "=")
    done = run_program("-m", "gspo.sample", "embedded", tmp_path / "p.jsonl", tmp_path / "a.jsonl", *args)
    assert done.returncode == 0 and "2 prompts, 3 responses each" in done.stdout, done.stderr
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    expected = sample(None, PROMPTS, 3, Sampling(0.9, max_new_tokens=12, stop=("=",)))
    for row, out, group in zip(rows, written, expected, strict=True):
        assert {key: out[key] for key in row} == row
        assert [a["tokens"] for a in out["answers"]] == [a.tokens for a in group]


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """Rejection sampling with the embedded model, as written there."""
    from repository import ROOT

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/rollout.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/rollout.md", "exec"), {})
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(kept) <= 2 and all(set(row) == {"prompt", "response"} for row in kept)


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--n", 0), "n = 0: at least 1"),
        (("--temperature", -1), "temperature = -1.0: it must be 0"),
        (("--top_k", -3), "top_k = -3"),
        (("--top_p", 0), "top_p = 0.0: it must be above 0"),
        (("--min_p", 2), "min_p = 2.0"),
        (("--max_new_tokens", 0), "max_new_tokens = 0"),
    ],
)
def test_impossible_settings_are_named_and_existing_answers_stay(flags, says, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "a.jsonl").write_text("answers\n")
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", *flags)
    with pytest.raises(UserError, match=re.escape(says)):
        main()
    assert (tmp_path / "a.jsonl").read_text() == "answers\n" and not (tmp_path / "a.jsonl.part").exists()


def command(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["sample", "embedded", *map(str, args)])


def test_an_empty_model_is_a_variable_that_is_not_set_and_no_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["sample", "", str(tmp_path / "p.jsonl"), str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="MODEL is an empty text .* `embedded`"):
        main()


def sampled(monkeypatch, tmp_path, *given):
    """The texts that were written, and what the models were given."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "x + 5 = 12"}\n')
    monkeypatch.setattr("sys.argv", ["sample", *map(str, given)])
    main()
    row = json.loads((tmp_path / "a.jsonl").read_text())
    return [answer["text"] for answer in row["answers"]], row["model_input"]


def test_settings_change_the_prompt_and_the_sampling(monkeypatch, tmp_path):
    """As the same things said in Python and by flags."""
    given = ["embedded", tmp_path / "p.jsonl", "data.system_prompt=5 + 5", tmp_path / "a.jsonl", "eval.n=2"]
    texts, seen = sampled(monkeypatch, tmp_path, *given, "rollout.max_new_tokens=6", "--temperature", 0)
    expected = sample(None, ["x + 5 = 12"], 2, Sampling(0.0, max_new_tokens=6), system_prompt="5 + 5")
    assert texts == [answer.text for answer in expected[0]] and "5 + 5" in seen and "x + 5 = 12" in seen


def test_a_runs_checkpoint_is_given_its_runs_system_prompt(monkeypatch, tmp_path, tokenizer, capsys):
    step = a_run(tmp_path / "out", tokenizer, "data.system_prompt=5 + 5").save(4)
    given = [step, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--n", 1, "--max_new_tokens", 2]
    assert "5 + 5" in sampled(monkeypatch, tmp_path, *given)[1]
    assert "data.system_prompt is the run's: '5 + 5'" in capsys.readouterr().out
    seen = sampled(monkeypatch, tmp_path, *given, "data.system_prompt=6 + 6")[1]
    assert "6 + 6" in seen and "5 + 5" not in seen


def test_a_chat_template_is_the_files_or_the_runs(monkeypatch, tmp_path):
    """The run's lies in its checkpoint: the file may be gone."""
    file, given = tmp_path / "t.jinja", [tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--n", 1, "--max_new_tokens", 2]
    file.write_text("{% for m in messages %}Q: {{ m.content }}{% endfor %}")
    assert sampled(monkeypatch, tmp_path, "embedded", *given, f"data.chat_template={file}")[1] == "Q: x + 5 = 12"
    step = a_run(tmp_path / "out", load_tokenizer(None, str(file)), f"data.chat_template={file}").save(4)
    file.unlink()
    assert sampled(monkeypatch, tmp_path, step, *given)[1] == "Q: x + 5 = 12"


def scored(monkeypatch, tmp_path, row, *given):
    """The row that is written with --score."""
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--score", "--n", 2, "--max_new_tokens", 3, *given)
    main()
    return json.loads((tmp_path / "a.jsonl").read_text())


def test_a_function_of_ones_own_scores_rows_without_a_truth_as_in_training(monkeypatch, tmp_path, capsys):
    source = "def compute_score(solution_str, ground_truth):\n    return float(ground_truth is None)"
    (tmp_path / "r.py").write_text(source)
    own = ("--reward_func", tmp_path / "r.py")
    row = scored(monkeypatch, tmp_path, {"prompt": "1 + 1?", "length": 3}, *own)
    assert row["rewards"] == [1.0, 1.0] and row["length"] == 3
    said = capsys.readouterr().out
    assert "p.jsonl, line 1: there is no ground truth; the reward function gets None" in said
    assert "'length' (first: " in said and "go into extra_info" in said
    assert scored(monkeypatch, tmp_path, {"prompt": "1 + 1?", "ground_truth": [2]}, *own)["rewards"] == [0.0, 0.0]
    for row, says in (
        ({"prompt": "1 + 1?"}, "field 'ground_truth' must be"),
        ({"prompt": "1 + 1?", "ground_truth": [2]}, "the default reward function compares texts"),
        ({"prompt": "1 + 1?", "ground_truth": " "}, "'ground_truth' is empty"),
    ):
        with pytest.raises(UserError, match=says):
            scored(monkeypatch, tmp_path, row)


def test_fields_are_named_as_in_training_and_written_as_they_were(monkeypatch, tmp_path, capsys):
    row = {"q": "1 + 1?", "a": "2"}
    keys = ("data.prompt_key=q", "data.truth_key=a")
    assert scored(monkeypatch, tmp_path, row, *keys).items() >= row.items()
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--n", 1, "--max_new_tokens", 3, keys[0])
    main()
    written = json.loads((tmp_path / "a.jsonl").read_text())
    assert written.items() >= row.items() and "1 + 1?" in written["model_input"]
    with pytest.raises(UserError, match="the row has no field 'b' .data.truth_key."):
        scored(monkeypatch, tmp_path, row, keys[0], "data.truth_key=b")
    row = {"sentence": "1 + 1?"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--n", 1, "--max_new_tokens", 3)
    with pytest.raises(UserError, match=r"p.jsonl, line 1: field 'prompt' .* has 'sentence'; data.prompt_key names"):
        main()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--reward_func", "r.py"], "--reward_func has no effect without --score or --pairs"),
        (["reward.reward_kwargs.k=3"], "reward.reward_kwargs.k=3 has no effect without --score"),
        (["--margin", "0", "--score"], "--margin has no effect without --pairs"),
        (["margin=0.2"], "margin=0.2 has no effect without --pairs"),
        (["--score", "--pairs"], "--score and --pairs write different rows"),
        (["--pairs", "eval.n=1"], "--pairs with 1 response per prompt makes no pair"),
    ],
)
def test_what_would_have_no_effect_is_refused(monkeypatch, tmp_path, given, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", *given)
    with pytest.raises(UserError, match=says):
        main()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.learning_rate=1", "optim.learning_rate has no effect on sampling"),
        ("rollout.n=3", r"the number of responses is eval.n \(--n\)"),
        ("eval.n=3", "--n and eval.n are the same"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(setting, says, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    command(monkeypatch, tmp_path / "p.jsonl", tmp_path / "a.jsonl", "--n", 2, setting)
    with pytest.raises(UserError, match=says):
        main()


def test_prompts_are_not_overwritten_and_a_missing_folder_is_an_error(monkeypatch, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    for answers, says in ((prompts, "replace their own prompts"), (tmp_path / "no" / "a.jsonl", "cannot be written")):
        command(monkeypatch, prompts, answers)
        with pytest.raises(UserError, match=says):
            main()
    assert prompts.read_text() == '{"prompt": "x"}\n' and list(tmp_path.iterdir()) == [prompts]


def test_a_model_that_is_not_there_is_named_by_its_place(monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setattr("sys.argv", ["sample", "nosuchdir", str(tmp_path / "p.jsonl"), str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="MODEL = 'nosuchdir' is no folder here"):
        main()
