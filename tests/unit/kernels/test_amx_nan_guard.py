"""No bfloat16 product sees memory that was never written: with all fresh memory NaN, and read as AMX reads it."""

import pytest
import torch
from architectures import tiny_model
from tile_reads import TileReads, tails
from tiny_sampler import prompts_of, sampler_for

from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.update import Updater, make_optimizer
from gspo.distributed.world import World
from gspo.kernels import logprob
from gspo.kernels.amx_nan_guard import whole_tiles
from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad, reference_linear_logprob
from gspo.packing.probe_head import measure_head
from gspo.read_config import load_config
from gspo.rollout.draw_tokens import Sampling
from gspo.types import Experience, Groups

ODD = {
    "llama": {"vocab_size": 333, "hidden_size": 44, "intermediate_size": 50, "head_dim": 10},
    "qwen2": {"vocab_size": 131, "hidden_size": 36, "intermediate_size": 47, "num_attention_heads": 2,
              "num_key_value_heads": 1},
    "phi": {"vocab_size": 97, "hidden_size": 36, "partial_rotary_factor": 0.5},  # heads of 9
    "gemma2": {"vocab_size": 257, "hidden_size": 36, "head_dim": 10},  # logits with a cap
    "deepseek_v3": {"vocab_size": 97, "hidden_size": 36},
    "mixtral": {"vocab_size": 97, "hidden_size": 40, "head_dim": 10},  # experts' products ask for multiples of 8
}  # fmt: skip


@pytest.mark.bf16
def test_the_mode_finds_what_amx_does():
    """The reproduction: a view of memory that holds NaN, and the same numbers without neighbours."""
    buffer = torch.full((40, 333 + 8), torch.nan, dtype=torch.bfloat16)
    a, b = buffer[:, :333], torch.randn(333, 24).bfloat16()
    a.copy_(torch.randn(40, 333))
    with TileReads() as mode:
        assert torch.mm(a, b).isnan().all() and torch.mm(b.t(), a.t()).isnan().all()
        assert torch.mm(a.contiguous(), b).isfinite().all()
    assert mode.products == 3 and len(mode.unsafe) == 2
    assert tails(a).shape == (40, 8) and tails(a.contiguous()) is None
    assert tails(buffer[:, :320]) is None, "rows of ten whole tiles"


@pytest.mark.bf16
@pytest.mark.parametrize("size", [63, 95, 97, 333])
def test_a_product_of_a_strided_view_on_this_machine(size):
    """Of what this processor does, with zeros behind the rows as our buffers have them."""
    pitch = -(-size // 32) * 32
    buffer = torch.full((40, pitch), torch.nan, dtype=torch.bfloat16)
    buffer[:, size:] = 0.0
    a, b = buffer[:, :size], torch.randn(size, 24).bfloat16()
    a.copy_(torch.randn(40, size))
    torch.testing.assert_close(torch.mm(a, b), torch.mm(a.contiguous(), b), rtol=2**-7, atol=2**-7)


@pytest.mark.bf16
@pytest.mark.usefixtures("poisoned", "kernels")
@pytest.mark.parametrize("keep", [None, 0, 40_000])
@pytest.mark.parametrize("known", [False, True], ids=["backward", "and_grad"])
@pytest.mark.parametrize("vocabulary", [333, 332, 97, 1000])
def test_the_log_prob_op_in_a_poisoned_workspace(monkeypatch, vocabulary, known, keep):
    """Finite gradients, and those of plain PyTorch to bfloat16's rounding: 2^-8 a number, 4 of them in a chain."""
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(logprob.LEAST_WIDTH, "cpu", 128)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 45, generator=g), torch.randn(vocabulary, 45, generator=g) / 2
    targets, slope = torch.randint(vocabulary, (37,), generator=g), torch.randn(37, generator=g)
    with TileReads() as mode:
        mine = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
        if known:
            linear_logprob_and_grad(*mine, targets, lambda _, rows: slope[rows], keep=keep)[0].backward()
        else:
            (linear_logprob(*mine, targets, keep=keep) * slope).sum().backward()
    assert mode.products > 2 and not mode.unsafe
    exact = [x.detach().double().requires_grad_() for x in mine]
    (reference_linear_logprob(*exact, targets) * slope).sum().backward()
    for x, y in zip(mine, exact, strict=True):
        assert x.grad.isfinite().all()
        assert (x.grad.double() - y.grad).norm() <= 4 * 2**-8 * y.grad.norm()


def test_a_copy_is_made_only_where_a_tile_would_leave_a_row():
    x = torch.zeros(2, 5, 3, 40, dtype=torch.bfloat16)
    safe = [x, x[..., :32], x[:, :2], x[..., :, :40].mT, x.float()[..., :33]]
    assert all(whole_tiles(y) is y for y in safe)
    cut = x[..., :33]
    assert whole_tiles(cut) is not cut and whole_tiles(cut).is_contiguous() and whole_tiles(cut).equal(cut)


@pytest.mark.bf16
@pytest.mark.parametrize("vocabulary", [333, 50_257 // 100, 130])
def test_rows_of_the_workspace_fill_whole_tiles(monkeypatch, vocabulary):
    """The layout itself: every chunk's pitch is a multiple of the tile, and zeros lie behind its rows."""
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(logprob.LEAST_WIDTH, "cpu", 128)
    seen, product = [], logprob._product

    def watched(*args):
        raw = product(*args)
        behind = tails(raw)
        seen.append(raw.stride(0) % 32 == 0 and (behind is None or not behind.any()))
        raw.fill_(1.0)  # the gradient is written here
        return raw

    monkeypatch.setattr(logprob, "_product", watched)
    x, weight = torch.randn(20, 16).bfloat16(), torch.randn(vocabulary, 16).bfloat16()
    with torch.no_grad():
        linear_logprob(x, weight, torch.zeros(20, dtype=torch.long))
    assert len(seen) > 1 and all(seen)


@pytest.mark.bf16
@pytest.mark.parametrize(("family", "whole"), zip(ODD, [False, True] * 3, strict=True))
@pytest.mark.usefixtures("poisoned", "kernels")
def test_a_rollout_and_a_step_with_all_fresh_memory_nan(family, whole):
    """Sampling in bf16, then reference, loss, gradient and optimizer step under autocast: all finite."""
    model = tiny_model(family, **ODD[family]).requires_grad_()
    sampler_model = tiny_model(family, **ODD[family]).bfloat16()
    cfg = load_config(None, [] if whole else ["optim.micro_batch_responses=3"])
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    head, world = measure_head(model), World(0, 1, torch.device("cpu"), None)
    with TileReads() as mode:
        sampler = sampler_for(sampler_model, max_slots=5, page=4)
        rollout = sampler.generate(prompts_of((3, 11, 1)), 4, Sampling(temperature=0.9, max_new_tokens=9))
        assert rollout.logprobs.isfinite().all() and rollout.entropy.isfinite().all()
        rewards = torch.tensor([[1.0, 0.0, 0.5, 0.0]] * 3)
        beats = preferences(rewards, 0.1)
        apart = forks(rollout.tokens, rollout.lengths)
        groups = Groups(rollout.logprobs, rewards, beats, apart, rollout.lengths)
        exp = Experience(rollout, groups, rollout.logprobs, [0, 1, 2], 3, int(beats.sum()))
        optimizer = make_optimizer(model, cfg)
        update = Updater(model, head, optimizer, cfg, world, autocast).run(exp, lr=1e-3)
    assert mode.products > 50 and not mode.unsafe, mode.unsafe
    assert update.logprobs.isfinite().all() and update.skipped == 0 and update.grad_norms[0] > 0
    assert all(p.isfinite().all() for p in model.parameters())
