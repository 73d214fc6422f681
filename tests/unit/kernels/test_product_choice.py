"""Which products sample on a CPU is measured once a machine and kept; either way the same tokens come out."""

import json

import pytest
import torch
from architectures import tiny_model
from tiny_sampler import prompts_of, sampler_for

from gspo.kernels import product_choice_cpu
from gspo.kernels.native import library
from gspo.kernels.product_choice_cpu import Shape, panels_win
from gspo.rollout import cpu_weight_layout
from gspo.rollout.draw_tokens import Sampling

LARGE = (Shape(4096, 4096, 2),)
pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """An empty cache folder, and [(seconds of ours, of oneDNN's), ...] that the next measurements find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSPO_NATIVE", raising=False)
    product_choice_cpu._decide.cache_clear()
    results = []
    monkeypatch.setattr(product_choice_cpu, "measure", lambda *args: results.pop(0))
    yield results
    product_choice_cpu._decide.cache_clear()


def another_process():
    product_choice_cpu._decide.cache_clear()


@pytest.mark.parametrize(("ours", "wins"), [(1.0, True), (1.49, True), (1.51, False)])
def test_the_faster_is_chosen_and_said_once(measured, capsys, ours, wins):
    measured.append((ours, 1.0))
    for _ in range(3):
        assert panels_win(LARGE, torch.bfloat16, 60) is wins
        another_process()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"our products {2 * 64 * 2 * 4096**2 / ours / 1e9:.0f} GFLOP/s" in line
    assert ("uses ours" if wins else "uses those") in line


def test_a_single_layer_has_no_call_to_save(measured):
    measured += [(1.09, 1.0), (1.11, 1.0)]
    assert panels_win((Shape(4096, 4096, 1),), torch.bfloat16, 64)
    assert not panels_win((Shape(4096, 4096, 1),), torch.float32, 64)


def test_the_first_choice_on_a_machine_stays_and_others_have_their_own(measured, tmp_path):
    measured += [(1.0, 2.0), (4.0, 1.0)]
    assert panels_win(LARGE, torch.bfloat16, 64)
    another_process()
    assert panels_win(LARGE, torch.bfloat16, 64), "not measured again"
    assert not panels_win(LARGE, torch.bfloat16, 128), "other rows, another measurement"
    kept = json.loads((tmp_path / "gspo" / "choices.json").read_text())
    assert sorted(found["products"] for found in kept.values()) == [False, True]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3', '{"KEY": true}', "\ud800".encode("utf-8", "surrogatepass")])
def test_a_damaged_file_is_measured_again(measured, tmp_path, text):
    (tmp_path / "gspo").mkdir()
    (tmp_path / "gspo" / "choices.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    measured.append((4.0, 1.0))
    assert not panels_win(LARGE, torch.float32, 8)


def test_a_folder_that_cannot_be_written_costs_a_measurement_a_process(measured, tmp_path):
    (tmp_path / "gspo").write_text("a file")
    measured.append((4.0, 1.0))
    assert not panels_win(LARGE, torch.float32, 8)


def test_small_models_and_the_environment_need_no_measurement(measured, monkeypatch):
    assert panels_win((Shape(64, 64, 10),), torch.float32, 8)
    monkeypatch.setenv("GSPO_NATIVE", "1")
    assert panels_win(LARGE, torch.bfloat16, 8)


def test_a_measurement_times_both():
    ours, theirs = product_choice_cpu.measure((Shape(64, 32, 3), Shape(32, 64, 1)), torch.float32, 4)
    assert 0 < ours < 60 and 0 < theirs < 60


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_choices_draw_the_same_tokens(monkeypatch, family):
    found = []
    for wins in (True, False):
        monkeypatch.setattr(cpu_weight_layout, "panels_win", lambda *args, wins=wins: wins)
        torch.manual_seed(0)
        sampler = sampler_for(tiny_model(family), max_slots=5)
        found.append(sampler.generate(prompts_of((3, 9, 1)), 3, Sampling(1.0, max_new_tokens=12)))
    assert found[0].tokens.equal(found[1].tokens)
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=1e-4, atol=1e-5)


def test_a_size_that_occurs_once_is_decided_by_itself(monkeypatch):
    model, asked = tiny_model("llama", tie_word_embeddings=False), []
    monkeypatch.setattr(cpu_weight_layout, "panels_win", lambda shapes, *_: asked.append(shapes) or len(shapes) > 1)
    with cpu_weight_layout.laid_out_weights(model, 4) as ours:
        assert set(ours) == {m for m in model.model.modules() if type(m) is torch.nn.Linear}, "all but the head"
    assert sorted(map(len, asked))[0] == 1 and model.lm_head.weight.shape == asked[0][0][:2]
