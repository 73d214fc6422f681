"""Checks on the device that is not there, of itself and of what uses it; test_rehearsal.py runs them in a process."""

import threading

import pytest
import torch
from architectures import tiny_model
from cuda_module import graphs
from device import Recorder, seen
from tiny_sampler import Tokens, prompts_of
from torch import nn
from transformers import GenerationConfig

from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.distributed.world import process_group
from gspo.read_config import load_config
from gspo.rollout.cuda_graphs import Replay, no_waiting
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt, Rollout

X = torch.arange(6.0).view(2, 3)


def test_tensors_say_where_they_are():
    x, layer = X.to("cuda"), nn.Linear(3, 2).cuda()
    assert x.is_cuda and x.device == torch.device("cuda", 0) and not x.cpu().is_cuda
    assert torch.zeros(2, device=x.device).is_cuda and torch.zeros_like(x).is_cuda and x.new_zeros(2).is_cuda
    assert (
        torch.zeros(2).to(x).is_cuda
        and not x.to(torch.zeros(2)).is_cuda
        and x.to("cpu", torch.float64).dtype == torch.float64
    )
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.is_cuda
    layer(x).sum().backward()
    assert layer.weight.grad.is_cuda and layer.weight.grad.cpu().equal(X.sum(0).expand(2, 3))


def test_gradients_cross_between_the_devices():
    w = X.clone().requires_grad_()
    (w.to("cuda") * 2).sum().backward()
    assert not w.grad.is_cuda and w.grad.eq(2).all()


def test_tied_weights_stay_tied_when_a_model_is_moved():
    model = tiny_model("llama", tie_word_embeddings=True).to("cuda")
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.is_cuda


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: x + X, "at least two devices"),
        (lambda x: torch.cat([x, X]), "at least two devices"),
        (lambda x: nn.Linear(3, 2)(x), "at least two devices"),
        (lambda x: X[x.long()], "indices should be"),
        (lambda x: x.index_put_((x[0].long(),), torch.ones(3)), "another device"),
        (lambda x: x.numpy(), "Use Tensor.cpu"),
        (lambda x: x.pin_memory(), "cannot pin"),
    ],
)
def test_a_mix_of_devices_is_refused(use, says):
    with pytest.raises((RuntimeError, TypeError), match=says):
        use(X.to("cuda"))


def test_a_scalar_of_the_cpu_may_be_mixed():
    assert (X.to("cuda") * torch.tensor(2.0)).cpu().equal(2 * X)


def test_a_fused_optimizer_refuses_a_step_on_the_cpu():
    layer = nn.Linear(3, 2).cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        layer(X.to("cuda")).sum().backward()
        optimizer.step()
    optimizer.state[layer.weight]["step"] = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()


@pytest.mark.parametrize(
    "use",
    [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 2], lambda x: x.nonzero(),
     lambda x: bool(x.any()), lambda x: x.copy_(X), lambda x: torch.tensor([1], device="cuda"), lambda x: X.to("cuda"),
     lambda x: x[0].repeat_interleave(x[0].long()), lambda x: torch.cuda.synchronize()],
)  # fmt: skip
def test_a_wait_of_the_host_is_an_error_where_none_is_allowed(use):
    x = X.to("cuda")
    use(x)
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        use(x)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        use(x)
    assert Recorder.operations is None and Recorder.sync_mode == 0


def test_a_graph_replays_over_the_same_memory_and_keeps_numbers_of_the_host():
    x, total, amount, graph = X.to("cuda"), torch.zeros(2, 3, device="cuda"), torch.tensor(10.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(x * amount + torch.ones(3, device="cuda"))
    x.mul_(2)
    amount.fill_(1000.0)
    graph.replay()
    assert total.cpu().equal(20 * X + 1), "a capture computes nothing"


def test_all_sizes_are_captured_on_one_stream():
    """Each stream has a cuBLAS workspace of its own, 32 MiB on Hopper, that is never freed."""
    x, first = torch.zeros(8, device="cuda"), len(graphs)
    for replay in (Replay(torch.device("cuda", 0)), Replay(torch.device("cuda", 0))):
        for size in (8, 4, 8, 4, 8):
            replay(lambda n: x[:n].add_(1), size)
    made = graphs[first:]
    assert len(made) == 4 and len({id(g.stream) for g in made}) == 1 and x.cpu().tolist() == [10.0] * 4 + [6.0] * 4


def test_a_rank_beside_a_gpu_has_its_share_of_the_cores(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1; packing, casts and an offloaded optimizer run on the CPU."""
    monkeypatch.setattr("gspo.system.torchrun.cpu_cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with process_group() as world:
        assert world.device == torch.device("cuda", 0) and torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(("offload", "gathers"), [("true", 1), ("false", 0)], ids=["offloaded", "resident"])
def test_an_offloaded_reference_comes_over_once_for_all_micro_batches(offload, gathers, monkeypatch):
    """Its weights are gathered, which is a copy from the CPU, in the first forward, and freed after the last."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    cfg = load_config(None, ["optim.micro_batch_tokens=10", f"reference.param_offload={offload}"])
    gather, gathered, forwards = FSDPParam.to_unsharded, [], []
    monkeypatch.setattr(FSDPParam, "to_unsharded", lambda p: gathered.append(p) or gather(p))
    with process_group() as world:
        models = SelfPlayModels(cfg, world)
        model = models.frozen["opponent"]
        model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
        gathered.clear()
        found = models.logprobs_under(model, (rollout := a_rollout(world.device)))
        weights = len(list(model.parameters()))
        assert len(forwards) == 4 and len(gathered) == gathers * weights
        assert found.isfinite().all() and all(p.is_cuda == (offload == "false") for p in model.parameters())
        models.logprobs_under(model, rollout)
        assert len(gathered) == 2 * gathers * weights, "it left the device in between"


def a_rollout(device):
    tokens = torch.randint(4, 60, (2, 2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    zeros, lengths = torch.zeros(2, 2, 16, device=device), torch.full((2, 2), 16, device=device)
    prompts = [Prompt(k, (5, 6, 7), "", "", "") for k in range(2)]
    return Rollout(prompts, tokens, lengths, zeros, zeros, lengths > 0, [["", ""]] * 2)


def test_a_thread_decodes_what_the_device_has_sampled_and_this_one_hands_it_over(monkeypatch):
    decoders, told = set(), []
    decode = lambda tokens, ids, **_: decoders.add(threading.current_thread()) or str(ids)  # noqa: E731
    monkeypatch.setattr(Tokens, "decode", decode)
    model = tiny_model("llama").to("cuda")
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    sampler = Sampler(model, Tokens(), torch.device("cuda", 0), max_slots=8)

    def on_group(place, prompt, texts, reasons):
        told.append((place, threading.current_thread()))
        assert len(texts) == len(reasons) == 3

    rollout = sampler.generate(prompts_of((3, 5, 2)), 3, Sampling(1.0, max_new_tokens=9), on_group=on_group)
    assert sorted(place for place, _ in told) == [0, 1, 2] and {t for _, t in told} == {threading.main_thread()}
    assert len(rollout.texts) == 3
    assert len(decoders) == 1 and threading.main_thread() not in decoders


def test_weights_that_fsdp_has_freed_are_nan_and_a_cpu_kernel_takes_nothing_of_the_device():
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    from gspo.kernels import native

    x = X.to("cuda")
    with pytest.raises(RuntimeError, match="tensor of the GPU"):
        native.call("any", x=x)
    _fsdp_param.free_storage(x)
    assert x.isnan().all() and seen["aten.isnan.default"]
