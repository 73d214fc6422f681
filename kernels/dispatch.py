"""Choose how an operation is computed: by the first implementation in its table that takes the tensors at hand.

A table lists the fastest first: a Triton kernel on CUDA, compiled C++ on a CPU, plain PyTorch. Each operation has its
table beside its formulas, as `IMPLEMENTATIONS`.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Implementation(NamedTuple):
    """One way to compute an operation. Both functions are called with what `choose` is called with."""

    serves: Callable[..., bool]  # whether it takes these tensors
    load: Callable[..., Any]  # the function (or module, or object) that computes it; None where it is not installed


def choose(implementations: tuple[Implementation, ...], *arguments: Any) -> Any:
    """Return the first implementation that serves these arguments and can be loaded, None where there is none."""
    for each in implementations:
        if each.serves(*arguments) and (found := each.load(*arguments)) is not None:
            return found
    return None


def always(*arguments: Any) -> bool:
    """Return True: the condition of an implementation that takes everything."""
    return True


def on_cuda(x: Tensor, *arguments: Any) -> bool:
    """Return whether x is what Triton kernels take: on CUDA, and not in float64."""
    return x.is_cuda and x.dtype != torch.float64


def on_tensor_cores(x: Tensor, *arguments: Any) -> bool:
    """Return whether x is what Triton kernels with matrix products take: Triton uses the tensor cores of Ampere on.

    On older GPUs such kernels spill registers and ask for more shared memory than there is; a line says so, once.
    """
    if not on_cuda(x):
        return False
    if torch.version.hip is None and _capability(x.device) < (8, 0):
        _say_once("this GPU is older than Ampere, so attention in the sampler is PyTorch's own, which is slower.")
        return False
    return True


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_kernel(module: str, function: str | None = None) -> Callable[..., Any]:
    """Make the `load` of a Triton kernel: `function` of kernels/`module`.py, or the module itself.

    Nothing is imported before the first call. Without Triton that call returns None and says so, once a process.
    """

    def load(*arguments: Any) -> Any:
        found = _import(module)
        return found if found is None or function is None else getattr(found, function)

    return load


@functools.cache
def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"gspo.kernels.{module}")
    except ImportError as e:
        _say_once(
            f"Triton cannot be imported ({e}), so PyTorch's own operators are used on CUDA, which is slower and takes "
            "more memory. Install the `triton` that belongs to your torch."
        )
        return None


@functools.cache
def _say_once(line: str) -> None:
    print(f"kernels: {line}", file=sys.stderr, flush=True)
