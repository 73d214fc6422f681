"""`model.precision`: fp32 and bf16 are taken as they are; `auto` is measured where it matters, once a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import tiny_model

from gspo.models import precision
from gspo.models.kernel_layers import install_layer_kernels, layer_kernels_enabled
from gspo.models.precision import allow_tf32, bf16_speedup, choose_precision

CPU = torch.device("cpu")


def a_config(width):
    config = SimpleNamespace(hidden_size=width)
    config.get_text_config = lambda: config
    return config


@pytest.mark.parametrize("named", ["fp32", "bf16"])
def test_a_named_precision_is_not_measured(named):
    assert choose_precision(named, CPU, None) == (named, "")


@pytest.mark.parametrize(("width", "times", "expected"), [(896, 2.0, "bf16"), (896, 1.2, "fp32"), (128, 9.0, "fp32")])
def test_auto_on_a_cpu(monkeypatch, width, times, expected):
    monkeypatch.setattr(precision, "bf16_speedup", lambda _: times)
    chosen, why = choose_precision("auto", CPU, a_config(width))
    assert chosen == expected and (f"{times:.1f} times" in why) == (width >= 512)


def test_both_precisions_are_timed():
    """bf16 by itself: the same products, so neither can be a thousand times the other's."""
    assert 1e-3 < bf16_speedup(64) < 1e3


@pytest.mark.parametrize(("capability", "wanted", "allowed"), [((9, 0), True, True), ((9, 0), False, False),
                                                               ((7, 5), True, False)])  # fmt: skip
def test_tf32_is_allowed_on_ampere_and_later_alone(capability, wanted, allowed, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    allow_tf32(wanted, torch.device("cuda", 0))
    assert found == ["high" if allowed else "highest"]
    assert ("changes nothing" in capsys.readouterr().out) == (wanted and not allowed)
    allow_tf32(True, CPU)
    assert len(found) == 1 and "changes nothing" in capsys.readouterr().out, "a CPU's products stay as they are"


@pytest.mark.slow
def test_a_run_keeps_its_first_measurement(run_program, tmp_path):
    """A checkpoint made in bf16 goes on in bf16, whatever would be measured now."""
    command = ["train.py", "--config", "configs/quick.yaml", f"trainer.output_dir={tmp_path}", "eval.round_prompts=0",
               "eval.before_and_after=false", "data.train_batch_size=4", "rollout.max_new_tokens=8"]  # fmt: skip
    assert run_program(*command, "trainer.max_steps=1").returncode == 0
    checkpoint = tmp_path / "quick" / "checkpoints" / "step_000001"
    state = checkpoint / "trainer" / "state.json"
    saved = json.loads(state.read_text())
    assert saved["precision"] == "fp32"
    state.write_text(json.dumps(saved | {"precision": "bf16"}))
    (checkpoint / "manifest.json").unlink()  # it would know
    goes_on = (f"trainer.resume={checkpoint}", "trainer.run_name=more")
    done = run_program(*command, "trainer.max_steps=2", *goes_on)
    assert done.returncode == 0 and "model.precision" not in done.stdout
    before, after = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("quick", "more"))
    assert before["mismatch"] < 1e-5 < 5e-5 < after["mismatch"]  # bf16 shows


def test_under_autocast_a_layers_norm_is_rounded_once_and_the_last_norm_is_not():
    """What follows in a layer are products, which would each round a copy."""
    model, x = install_layer_kernels(tiny_model("llama")), torch.randn(3, 7, tiny_model("llama").config.hidden_size)
    inner, last = model.model.layers[0].input_layernorm, model.model.norm
    exact = [norm(x) for norm in (inner, last)]
    with torch.autocast("cpu", torch.bfloat16), layer_kernels_enabled():
        found = [norm(x) for norm in (inner, last)]
    assert [y.dtype for y in found] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(found[0].float(), exact[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(found[1], exact[1])
