"""Compute what only CUDA has: Triton kernels, FlashAttention, products with another result dtype, FSDP's storages.

Each is one operation of the device: its tensors must all be there, and a graph records it as a whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from device import EMULATED, Recorder, aten, count_launch, numbers_of, on_device, record, seen, to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

KERNELS = {"decode_attention": 3}  # launches of a launcher, where it is not one


def one_operation(name: str, plain: Callable, kernels: int = 1) -> Callable:
    """Return a function that computes `plain` on the device, in the place of the launcher of a Triton kernel, or of
    several."""

    def launched(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not all(map(on_device, tensors)):
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}")
        seen[f"kernel: {name}"] += 1
        Recorder.writes(tensors)
        args, kwargs = tree_map(numbers_of, (args, kwargs))
        out = plain(*args, **kwargs)
        count_launch(name, args, kwargs, out, kernels=kernels)

        def again() -> None:
            for mine, new in zip(tree_leaves(out), tree_leaves(plain(*args, **kwargs)), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(new)

        record(again)
        return tree_map(to_device, out)

    return launched


def install_kernels() -> None:
    """Put the plain formulas in the place of the launchers of kernels/*_triton.py, and refuse the CPU's kernels."""
    from gspo.kernels import decode_attention, logprob_chunk, native, pairwise, plain_norm_gate_rotary, write_tokens
    from gspo.rollout import draw_tokens

    def sample(logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, *truncation: Any) -> Any:
        uniforms = None if temperature == 0 else draw_tokens.uniforms(keys, positions)
        return draw_tokens.choose(logits, uniforms, draw_tokens.Sampling(temperature, *truncation))

    plain = {
        ("decode_attention_triton", "decode_attention"): decode_attention.plain_decode_attention,
        ("draw_token_triton", "sample"): sample,
        ("logprob_chunk_triton", "add_statistics"): logprob_chunk.add_statistics,
        ("logprob_chunk_triton", "to_gradient"): logprob_chunk.to_gradient,
        ("pairwise_triton", "pairwise_loss"): pairwise.plain_pairwise_loss,
        ("write_tokens_triton", "write_tokens"): write_tokens.plain_write_tokens,
    }
    for name in ("norm", "norm_back", "add_norm", "add_norm_back", "silu", "silu_back", "rotate"):
        plain["norm_gate_rotary_triton", name] = getattr(plain_norm_gate_rotary, name)
    for (module, name), formula in plain.items():
        launcher = one_operation(name, formula, KERNELS.get(name, 1))
        launcher.__module__ = f"gspo.kernels.{module}"
        setattr(importlib.import_module(launcher.__module__), name, launcher)

    call = native.call

    def cpu_kernel(kernel: str, **arguments: Any) -> None:
        if any(map(on_device, arguments.values())):
            raise RuntimeError(f"the CPU's kernel {kernel} is given a tensor of the GPU")
        call(kernel, **arguments)

    native.call = cpu_kernel


# ---- operations that the CPU has in another form ----


def _check_out_dtype(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None, total: Tensor | None = None) -> None:
    """Check what the CUDA operators check of `out_dtype`."""
    assert a.dtype == b.dtype, "mat1 and mat2 must have the same dtype"
    assert dtype == a.dtype or (dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)), dtype
    assert out is None or out.dtype == dtype, (out.dtype, dtype)
    assert total is None or total.dtype in (dtype, a.dtype), (total.dtype, dtype)


def mm_dtype(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    _check_out_dtype(a, b, dtype, out)
    found = a.float() @ b.float()
    return found.to(dtype) if out is None else out.copy_(found)


def addmm_dtype(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: float = 1, alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_out_dtype(a, b, dtype, out, total)
    found = beta * total.float() + alpha * (a.float() @ b.float())
    return found.to(dtype) if out is None else out.copy_(found)


def _rule(queries: Tensor, keys: Tensor, longest: tuple, causal: bool, options: dict) -> Any:
    from gspo.kernels.segment_attention import Rule, Segments

    left = options.get("window_size_left")
    window = None if left in (None, -1) else left + 1
    return Rule(Segments(queries, keys, *longest, causal, window), options["scale"])


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, longest_q: int, longest_k: int, dropout: float,
    causal: bool, return_debug_mask: bool, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    from gspo.kernels.segment_attention import Plain

    assert q.dtype in (torch.float16, torch.bfloat16) and q.is_contiguous() and k.is_contiguous() and not dropout
    rule = _rule(queries, keys, (longest_q, longest_k), causal, options)
    out, lse = Plain().forward(q.float(), k.float(), v.float(), rule)
    return out.to(q.dtype), lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Tensor, keys: Tensor,
    longest_q: int, longest_k: int, dropout: float, causal: bool, *seeds: Tensor, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    from gspo.kernels.segment_attention import Plain

    assert lse.is_contiguous() and grad.dtype == q.dtype
    rule = _rule(queries, keys, (longest_q, longest_k), causal, options)
    found = Plain().backward(grad.float(), q.float(), k.float(), v.float(), out.float(), lse, rule)
    return tuple(x.to(q.dtype) for x in found)


def install_operations() -> None:
    """Tell the device how to compute what the CPU has in another form."""
    EMULATED.update({
        aten.mm.dtype: mm_dtype, aten.mm.dtype_out: mm_dtype,
        aten.addmm.dtype: addmm_dtype, aten.addmm.dtype_out: addmm_dtype,
        aten._flash_attention_forward.default: flash_forward,
        aten._flash_attention_backward.default: flash_backward,
        aten.histc.default: lambda x, *a, **k: torch.histc(x.float(), *a, **k).to(x.dtype),
    })  # fmt: skip


# ---- FSDP on one rank ----


def install_fsdp() -> None:
    """Let gloo stand for NCCL, and NaN for weights that FSDP has freed."""
    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param, _fsdp_param_group

    begin = dist.init_process_group
    dist.init_process_group = lambda backend=None, **more: begin(backend.replace("nccl", "gloo"), **more)
    allocate, free = _fsdp_param.alloc_storage, _fsdp_param.free_storage

    def free_storage(x: Tensor) -> None:
        if not on_device(x):
            free(x)
        elif x.is_floating_point():
            x.numbers.detach().fill_(float("nan"))

    def alloc_storage(x: Tensor) -> None:
        if not on_device(x):
            allocate(x)

    for module in (_fsdp_param, _fsdp_param_group):
        module.alloc_storage, module.free_storage = alloc_storage, free_storage
    _fsdp_init._move_states_to_device = lambda params, buffers, device: None  # gspo has moved them itself
