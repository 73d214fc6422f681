"""Understand `device="cuda"` in calls of torch: factories, `.to`, `.cuda`, modules and autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from device import CPU, CUDA, DeviceTensor, convert, count_launch, on_device, record, seen, to_device, wait
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}  # factories that copy numbers of the host


def names_cuda(device: Any) -> bool:
    """Return whether a `device` argument is the GPU."""
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


class Functions(TorchFunctionMode):
    """Turn calls that name the GPU into calls on the CPU whose results are on the device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and not on_device(args[0]):
            return self._to(*args, **kwargs)
        if func is Tensor.cuda:
            return convert(args[0], CUDA, non_blocking=kwargs.get("non_blocking", False))
        if func in (Tensor.pin_memory, Tensor.is_pinned):
            return _pinned(func, args[0])
        if func is Tensor.type_as and on_device(args[1]) != on_device(args[0]):
            return convert(args[0], args[1])
        if func is F.scaled_dot_product_attention and kwargs.get("is_causal") and on_device(args[0]):
            kwargs |= {"is_causal": False, "attn_mask": _causal_mask(*args[:2])}  # C++ would make it on the CPU
        if "device" in kwargs and names_cuda(kwargs["device"]) and func is not Tensor.to:
            return self._make(func, args, kwargs)
        if kwargs.get("device") is not None and args and on_device(args[0]):
            return self._leave(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do `x.to(...)` of a CPU tensor, or of a sharded one."""
        if isinstance(x, DTensor):
            local = convert(x.to_local().detach(), *args, **kwargs)
            return DTensor(local, x._spec, requires_grad=False)  # its from_local would move it to the mesh's device
        named = [*args, *kwargs.values()]
        if not any(on_device(a) or (isinstance(a, str | torch.device) and names_cuda(a)) for a in named):
            return Tensor.to(x, *args, **kwargs)
        return convert(x, *args, **kwargs)

    @staticmethod
    def _make(func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a factory for a tensor of the device, and record it: a graph fills its memory again."""
        if func in FROM_HOST and not any(on_device(a) for a in args):
            wait("numbers of the host")
        if func is torch.as_tensor and on_device(args[0]):
            return convert(args[0], **kwargs)
        given = tuple(a.numbers if on_device(a) else a for a in args)
        elsewhere = {**kwargs, "device": CPU}
        out = func(*given, **elsewhere)
        seen[f"factory: {func.__name__}"] += 1
        if "empty" not in func.__name__:
            count_launch(func.__name__, out)
        if "empty" not in func.__name__ and func not in FROM_HOST:
            record(lambda: out.detach().copy_(func(*given, **elsewhere)))
        grad = kwargs.get("requires_grad", False)
        return to_device(out.detach()).requires_grad_() if grad else to_device(out)

    @staticmethod
    def _leave(func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a factory of the CPU that takes its shape from a tensor of the device."""
        return func(args[0].numbers, *args[1:], **kwargs)


def _pinned(func: Any, x: Tensor) -> Any:
    """Remember that a CPU tensor is pinned; its memory stays as it is."""
    if func is Tensor.pin_memory:
        x.is_rehearsed_as_pinned = True
        return x
    return getattr(x, "is_rehearsed_as_pinned", False)


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Return which keys a query of a causal attention sees, on the device: [L, K] bool."""
    return to_device(torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril())


# ---- modules ----

_moved = threading.local()  # parameters of the module that is being moved: what is tied stays tied


def apply_to_module(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do nn.Module._apply, for parameters that change their kind: they are replaced."""
    outermost = not hasattr(_moved, "parameters")
    if outermost:
        _moved.parameters = {}
    try:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for key, p in self._parameters.items():
            if p is not None:
                self._parameters[key] = _moved.parameters.setdefault(id(p), (_applied(p, fn), p))[0]
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
    finally:
        if outermost:
            del _moved.parameters
    return self


def _applied(p: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    if id(p) in _moved.parameters:
        return _moved.parameters[id(p)][0]
    with torch.no_grad():
        found = fn(p)
    if found is p:
        return p
    if type(p.data) is type(found) is Tensor and torch._has_compatible_shallow_copy_type(p, found):
        p.data = found
        return p
    made = nn.Parameter(found.detach(), p.requires_grad)
    if p.grad is not None:
        made.grad = fn(p.grad)
    return made


# ---- autocast ----


def install_autocast() -> None:
    """Let autocast and its queries for "cuda" mean the CPU's, which casts by the same lists for what models do."""
    kind = torch.amp.autocast_mode.autocast
    begin = kind.__init__

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)
        # Under autocast the CPU casts to bfloat16 and float16 alone, as CUDA does.

    kind.__init__ = init
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        original = getattr(torch, name)

        def asked(*args: Any, original: Callable = original) -> Any:
            return original(*("cpu" if a == "cuda" else a for a in args))

        setattr(torch, name, asked)


def install_backward() -> None:
    """Let backward passes, which PyTorch runs outside of the mode that called them, name the device as well."""
    run = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with Functions():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = run_backward


def install_functions() -> Functions:
    """Begin: from here on calls may name the device."""
    install_backward()
    nn.Module._apply = apply_to_module
    nn.Module.cuda = lambda self, device=None: self.to(CUDA)
    install_autocast()
    mode = Functions()
    mode.__enter__()
    return mode


__all__ = ["DeviceTensor", "Functions", "install_functions", "names_cuda"]
