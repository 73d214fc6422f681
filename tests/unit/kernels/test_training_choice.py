"""Which kernels train on a CPU is measured once a machine and kept; either way the same numbers come out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from architectures import tiny_model
from repository import PROGRAM_ENV
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo.kernels import logprob_chunk_cpu, native, norm_gate_rotary_cpu, packed_attention_cpu, training_choice_cpu
from gspo.kernels.logprob import linear_logprob
from gspo.kernels.training_choice_cpu import kernel_wins, works
from gspo.models.attention_support import attention_implementation
from gspo.models.kernel_layers import install_layer_kernels
from gspo.packing.pack import pack
from gspo.packing.packed_attention import PACKED
from gspo.types import Prompt

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
KERNELS = {  # operation -> kernels that compute it
    "norm": {"gspo_norm", "gspo_norm_back"},
    "gate": {"gspo_silu", "gspo_silu_back"},
    "rotary": {"gspo_rotate"},
    "attention": {"gspo_rows", "gspo_rows_back"},
    "log-probs": {"gspo_statistics", "gspo_gradient"},
}


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """An empty cache folder, but for the compiled kernels of this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSPO_NATIVE", raising=False)
    training_choice_cpu._decide.cache_clear()
    yield tmp_path / "gspo" / "choices.json"
    training_choice_cpu._decide.cache_clear()


def measured_as(monkeypatch, slower=()):
    """Let measurements find our kernels twice as fast as PyTorch, those of `slower` half as fast."""
    found = {name: (2.0 if name in slower else 0.5, 1.0) for name in KERNELS}
    monkeypatch.setattr(training_choice_cpu, "measure", lambda dtype: found)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_what_is_timed_computes_the_same_by_both(dtype, slack):
    seen = []
    for name, ours, theirs in works(dtype, torch.Generator().manual_seed(0)):
        seen.append(name)
        for mine, wanted in zip(ours(), theirs(), strict=True):
            size = 1 + float(wanted.detach().abs().max())
            assert mine.shape == wanted.shape and (mine.double() - wanted).abs().max() <= slack * size, name
    assert seen == list(KERNELS)


def gradients(monkeypatch, dtype):
    """A tiny Llama's log-probs of a pack of two responses and their gradients, and the kernels that computed them."""
    called = set()
    for module in (logprob_chunk_cpu, norm_gate_rotary_cpu, packed_attention_cpu):
        monkeypatch.setattr(module, "call", lambda kernel, **given: called.add(kernel) or native.call(kernel, **given))
    model = install_layer_kernels(tiny_model("llama")).to(dtype)
    packed = pack(
        [Prompt(0, (5, 6, 7), "", "", "")], [0, 0], torch.tensor([[3, 4, 8], [9, 2, 3]]), torch.tensor([3, 2])
    )
    with attention_implementation(model.config, PACKED):
        hidden = model.model(input_ids=packed.ids, position_ids=packed.positions, pack=packed, use_cache=False)
    weight = model.lm_head.weight
    logprobs = linear_logprob(hidden.last_hidden_state[0], weight, packed.ids[0])
    return [logprobs, *torch.autograd.grad(logprobs.sum(), list(model.parameters()), allow_unused=True)], called


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(
    "slower", [(), *((name,) for name in KERNELS), tuple(KERNELS)], ids=lambda x: "+".join(x) or "none"
)
def test_a_kernel_that_lost_is_not_called_and_gradients_stay(unmeasured, monkeypatch, capsys, slower, dtype, slack):
    measured_as(monkeypatch)
    expected, _ = gradients(monkeypatch, dtype)
    unmeasured.unlink()
    training_choice_cpu._decide.cache_clear()
    measured_as(monkeypatch, slower)
    found, called = gradients(monkeypatch, dtype)
    assert called == set().union(*(kernels for name, kernels in KERNELS.items() if name not in slower))
    for mine, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            assert (mine - wanted).abs().max() <= slack * (1 + wanted.abs().max())
    chosen = f"PyTorch's for {', '.join(slower)} (" if slower else "ours are used ("
    lines = capsys.readouterr().err.splitlines()
    assert any(f"training in {str(dtype)[6:]}" in line and chosen in line for line in lines)


def test_what_was_found_first_stays(unmeasured, monkeypatch, capsys):
    measured_as(monkeypatch, ("gate",))
    assert not kernel_wins("gate", torch.float32) and kernel_wins("norm", torch.float32)
    training_choice_cpu._decide.cache_clear()  # as in another process
    measured_as(monkeypatch)
    assert not kernel_wins("gate", torch.float32)
    assert len(capsys.readouterr().err.splitlines()) == 1, "said once"
    assert kernel_wins("gate", torch.bfloat16), "another dtype, another measurement"
    assert len(json.loads(unmeasured.read_text())) == 2


def test_the_environment_chooses_without_a_measurement(unmeasured, monkeypatch):
    measured_as(monkeypatch, tuple(KERNELS))
    monkeypatch.setenv("GSPO_NATIVE", "1")
    assert kernel_wins("norm", torch.float32) and not unmeasured.exists()


def test_a_measurement_knows_nothing_of_the_modes_it_is_called_in(unmeasured):
    """Under fake tensors, autocast and without gradients real tensors are timed; random numbers stay as they were."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert type(kernel_wins("attention", torch.float32)) is bool
    assert torch.get_rng_state().equal(state) and torch.get_num_threads() == threads
    (kept,) = json.loads(unmeasured.read_text()).values()
    assert list(kept) == list(KERNELS)


ASK = """
import torch
from gspo.kernels.training_choice_cpu import kernel_wins
print([kernel_wins(name, torch.float32) for name in ("norm", "gate", "rotary", "attention", "log-probs")])
"""


@pytest.mark.slow
def test_of_processes_that_start_together_one_measures(unmeasured):
    """So the ranks of a run compute alike."""
    environment = {k: v for k, v in os.environ.items() if k != "GSPO_NATIVE"} | PROGRAM_ENV
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    told = [rank.communicate(timeout=600) for rank in ranks]
    assert len({said for said, _ in told}) == 1 and told[0][0].startswith("["), told
    assert "".join(errors for _, errors in told).count("training in float32") == 1
