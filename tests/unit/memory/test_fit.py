"""Settings with which a run fits: found by the forecast, and none that would change what is learned."""

import json
import re

import pytest

from gspo.config import Config, flatten, to_dict
from gspo.errors import UserError
from gspo.memory.__main__ import main
from gspo.memory.fit import RULES, find_fitting
from gspo.memory.footprint import CHANGE, GIB
from gspo.memory.plan import fit_settings
from gspo.read_config import load_config

ALIKE = {  # settings that cost time and change no result: docs/memory.md
    "model.gradient_checkpointing",
    "model.reshard_after_forward",
    "optim.micro_batch_tokens",
    "optim.gradient_reduction",
    "optim.offload",
    "reference.param_offload",
    "rollout.max_slots",
    "rollout.tensor_model_parallel_size",
    "trainer.async_save",
}
SMALL = ["data.train_batch_size=8", "optim.micro_batch_tokens=4096", "trainer.async_save=true", "rollout.max_slots=8"]
LARGE = [*SMALL, "data.train_batch_size=32", "optim.micro_batch_tokens=16384", "model.gradient_checkpointing=false"]


def peak(settings, device, ranks=1):
    return fit_settings(load_config(None, settings), ranks, device, "fp32", 2**62)[1].peak


@pytest.mark.parametrize(("device", "settings"), [("cpu", SMALL), pytest.param("cuda", LARGE, marks=pytest.mark.slow)])
def test_it_fits_with_what_is_printed(device, settings):
    free = int(0.7 * peak(settings, device))
    changes, _, report = find_fitting(load_config(None, settings), 1, device, "fp32", free)
    assert report.peak <= free and changes and changes.keys() <= ALIKE
    again = [*settings, *(f"{key}={value}" for key, value in changes.items())]
    assert fit_settings(load_config(None, again), 1, device, "fp32", free)[1].peak == report.peak


def test_what_fits_is_left_as_it_is():
    assert find_fitting(load_config(None, SMALL), 1, "cpu", "fp32", 2**62)[0] == {}


@pytest.mark.slow
def test_where_nothing_fits_the_search_ends():
    changes, _, report = find_fitting(load_config(None, SMALL), 1, "cpu", "fp32", 2**20)
    assert report.peak > 2**20 and changes["optim.micro_batch_tokens"] == 256 and changes["trainer.async_save"] is False


def test_rules_are_of_parts_that_the_report_has():
    assert RULES.keys() <= CHANGE.keys() and flatten(to_dict(Config())).keys() >= ALIKE


def test_the_command_prints_settings_to_paste(monkeypatch, capsys):
    have = 0.7 * peak(LARGE, "cuda") / GIB
    monkeypatch.setattr(
        "sys.argv", ["memory", "--fit", "--on", "cuda", "--have", f"{have}", *LARGE, "model.precision=fp32"]
    )
    main()
    said = capsys.readouterr().out
    assert re.search(r"\nwith (\w+\.\w+=\w+ ?)+\n", said) and "it fits" in said


def test_the_command_says_where_nothing_fits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory", "--fit", "--on", "cpu", "--have", "0.001", *SMALL])
    with pytest.raises(UserError, match="--fit: no settings that leave the results as they are fit in 0.001 GiB"):
        main()
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rollout.max_new_tokens=10000000", "max_new_tokens = 10,000,000, but this model has 2,048 positions"),
        ("rollout.engine=vllm", "rollout.engine = 'vllm' is no engine"),
        ("rollout.trunks=3", "rollout.n = 8 is no multiple of rollout.trunks = 3"),
    ],
)
def test_what_training_would_refuse_is_refused(monkeypatch, setting, says):
    monkeypatch.setattr("sys.argv", ["memory", "--on", "cuda", "--have", "80", setting])
    with pytest.raises(UserError, match=says):
        main()


def test_settings_that_change_nothing_or_are_given_twice_are_said(monkeypatch, capsys):
    given = ["rollout.n=4", "rollout.n=8", "gradient_checkpointing_kwargs={a: 1}", "rollout.trunks=3"]
    monkeypatch.setattr("sys.argv", ["memory", *given, "--have", "80"])
    with pytest.raises(UserError):
        main()
    said = capsys.readouterr().out
    assert "rollout.n is given twice; 8 counts, not 4" in said and "gradient_checkpointing_kwargs" in said


@pytest.mark.slow
def test_seven_billion_parameters_on_two_gpus_of_80_gb(tmp_path):
    model = {"model_type": "qwen2", "max_position_embeddings": 32768, "hidden_size": 3584, "intermediate_size": 18944,
             "num_hidden_layers": 28, "vocab_size": 152064, "num_attention_heads": 28, "num_key_value_heads": 4,
             "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(model))
    cfg = load_config("configs/standard.yaml", [f"model.path={tmp_path}"])
    changes, _, report = find_fitting(cfg, 2, "cuda", "bf16", 80 * GIB)
    assert report.peak <= 80 * GIB and changes.keys() <= ALIKE, (changes, report.summary())
