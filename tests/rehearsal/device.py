"""Pretend that a CUDA device is there: tensors that say `cuda:0` and keep their numbers on the CPU.

An operation on such a tensor is refused where a GPU would refuse it, and computed by the CPU otherwise:

- tensors of two devices in one operation (a CPU scalar without dimensions is allowed, as on a GPU);
- fused optimizers whose state is on the CPU while their parameters are not;
- `.numpy()` without `.cpu()`; a CPU kernel or a Triton kernel that is given a tensor of the other device;
- while a graph is captured, or under `torch.cuda.set_sync_debug_mode("error")`: whatever lets the host wait for the
  device (`.item()`, `.tolist()`, `.cpu()`, indexing by a mask, copies from pageable memory).

Graphs record the operations of a capture and play them again over the same memory, so a number that the host had put
into one stays what it was. Weights that FSDP has freed become NaN. Triton kernels and FlashAttention are single
operations here, computed by their plain formulas.

What it cannot see: the numbers of a real card, races, the order of streams (all work is done at once), private pools
that reuse memory, cuBLAS, the real Triton kernels and FlashAttention, NCCL and more than one rank, asynchronous
copies that are read too early, memory, speed. What passes here may still fail on a GPU; what fails here will.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
seen: Counter[str] = Counter()  # operation -> how often it ran on the device; "wait ...": how often the host waited
launches: Counter[str] = Counter()  # operation -> kernels that a GPU would launch for it
traffic: Counter[str] = Counter()  # operation -> bytes of the tensors that its kernels read and write


class Recorder:
    """What is under way: the graph that records (None: none does), and what a wait of the host leads to."""

    operations: list[Callable[[], None]] | None = None
    written: list[tuple[Tensor, Tensor]] = []  # what a capture wrote to, as it was before: a capture computes nothing
    sync_mode: int = 0  # 1: a warning, 2: an error

    @classmethod
    def begin(cls) -> None:
        assert cls.operations is None, "a capture inside a capture"
        cls.operations, cls.written = [], []

    @classmethod
    def end(cls) -> list[Callable[[], None]]:
        """Undo what the capture wrote, and return its operations."""
        operations, cls.operations = cls.operations, None
        for numbers, before in reversed(cls.written):
            numbers.copy_(before)
        return operations

    @classmethod
    def writes(cls, tensors: Any) -> None:
        """Remember tensors as they are before an operation writes to them."""
        if cls.operations is not None:
            cls.written += [(x.numbers, x.numbers.clone()) for x in tree_leaves(tensors) if isinstance(x, DeviceTensor)]


def wait(what: str) -> None:
    """Count a wait of the host for the device; refuse it where a GPU would."""
    seen[f"wait: {what}"] += 1
    if Recorder.operations is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    if Recorder.sync_mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
    if Recorder.sync_mode == 1:
        warnings.warn(f"called a synchronizing CUDA operation ({what})", stacklevel=3)


def record(operation: Callable[[], None]) -> None:
    """Add an operation to the graph that is being captured, if any is."""
    if Recorder.operations is not None:
        Recorder.operations.append(operation)


class DeviceTensor(Tensor):
    """A tensor of the device that is not there; `numbers` has its values, on the CPU."""

    numbers: Tensor
    is_cuda = True
    is_cpu = False
    device = property(lambda self: CUDA)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=CPU,
        )  # fmt: skip
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it calls again with its local tensors
        return run(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return convert(self, *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return convert(self, CPU)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Tensor:
        return self

    def tolist(self) -> Any:
        wait("tolist")
        return self.numbers.tolist()

    def __format__(self, spec: str) -> str:
        wait("format")
        return format(self.numbers, spec)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: DeviceTensor) -> None:
        assert other.shape == self.shape and other.dtype == self.dtype and other.stride() == self.stride()
        self.numbers = other.numbers

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict) -> Tensor:
        made = DeviceTensor(self.numbers.detach().clone())
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a tensor of the device is pickled: what goes to files and other ranks is copied to the CPU first"
        )

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.numbers!r})"


def on_device(x: Any) -> bool:
    return isinstance(x, DeviceTensor)


def numbers_of(x: Any) -> Any:
    """Return what the CPU computes with instead of x."""
    if isinstance(x, DeviceTensor):
        return x.numbers
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def to_device(x: Any) -> Any:
    """Return x as it comes back from the device."""
    return DeviceTensor(x) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


class Move(torch.autograd.Function):
    """Copy a tensor from one device to the other; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.numbers.clone() if on_device(x) else DeviceTensor(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Move.apply(grad)


def convert(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do `x.to(...)`, with every form of its arguments."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    rest = {"copy": kwargs.get("copy", False), "memory_format": kwargs.get("memory_format", torch.preserve_format)}
    blocks = not kwargs.get("non_blocking", False)
    for k, value in enumerate(args):
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            blocks, rest["copy"] = (not value, rest["copy"]) if k == 1 + (dtype is not None) else (blocks, value)
        elif value is not None:
            device = value
    moves = device is not None and (torch.device(device).type == "cuda") != on_device(x)
    if moves:
        move_checked(x, blocks)
        x = Move.apply(x)
        rest["copy"] = False
    same = {"dtype": dtype} if dtype is not None else {}
    return Tensor.to(x, **same, **rest) if same or rest["copy"] else x


def move_checked(x: Tensor, blocks: bool) -> None:
    """Refuse a copy between the devices that waits where no wait is allowed."""
    pageable = not on_device(x) and not x.is_pinned()
    if blocks or pageable:
        wait("copy to the CPU" if on_device(x) else "copy from the CPU")
    if Recorder.operations is not None:
        raise RuntimeError("CUDA error: a copy between devices inside a capture is not rehearsed; use copy_")


# ---- what a GPU refuses ----

WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
MIXED = {aten.copy_.default, aten._to_copy.default, *INDEXED}  # take tensors of two devices
FUSED = {
    getattr(aten, name).default for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_", "_fused_adagrad_")
    if hasattr(aten, name)
}  # fmt: skip
NOT_RECORDED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}
NOT_LAUNCHED = {*NOT_RECORDED, "lift_fresh", "is_pinned"}
EMULATED: dict[Any, Callable] = {}  # operations that the CPU has in another form, or not at all


def refuse(func: Any, args: tuple, kwargs: dict, leaves: list[Any]) -> None:
    """Raise RuntimeError where a GPU would; count a wait of the host."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    elsewhere = [x for x in tensors if not on_device(x)]
    if func in FUSED and elsewhere:
        raise RuntimeError(f"Expected all tensors to be on the same device, but a state is on the CPU ({func})")
    if func not in MIXED and any(x.dim() for x in elsewhere):
        shapes = [tuple(x.shape) for x in elsewhere if x.dim()]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}, on the CPU: {shapes})"
        )
    if func in WAITS:
        wait(str(func))
    elif func is aten.copy_.default and on_device(args[0]) != on_device(args[1]):
        asynchronous = (args[2:] or (False,))[0] and (on_device(args[1]) or args[1].is_pinned())
        if not asynchronous:
            wait("copy_ between devices")
    elif func in INDEXED:
        refuse_index(func, *args[:3])
    elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        wait("repeat_interleave without output_size")


def refuse_index(func: Any, x: Tensor, indices: list[Tensor | None], value: Tensor | None = None) -> None:
    """Check x[indices], or x[indices] = value."""
    given = [i for i in indices if i is not None]
    if not on_device(x) and any(map(on_device, given)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):
        wait("index by a mask")
    elif on_device(x) and not all(map(on_device, given)):
        wait("index by a tensor on the CPU")
    if isinstance(value, Tensor) and on_device(x) != on_device(value) and value.dim():
        raise RuntimeError(f"{func}: the value is on another device than the tensor it is put into")


# ---- what is computed ----


def count_launch(name: str, *values: Any, kernels: int = 1) -> None:
    """Count the launch of a kernel, or of several, with the bytes of all tensors given and returned."""
    launches[name] += kernels
    traffic[name] += sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Compute one operation of the device: refuse it, or let the CPU do it, and record it."""
    leaves = tree_leaves((args, kwargs))
    seen[str(func)] += 1
    refuse(func, args, kwargs, leaves)
    if func is aten.is_pinned.default:
        return False
    compute = EMULATED.get(func, func)
    Recorder.writes([x for x, argument in _given(func, args, kwargs) if _is_written(argument)])
    inner_args, inner_kwargs = tree_map(numbers_of, (args, kwargs))
    out = compute(*inner_args, **inner_kwargs)
    name = func._schema.name.split("::")[1]
    if not func.is_view and name not in NOT_LAUNCHED:
        count_launch(name, inner_args, inner_kwargs, out if not written_arguments(func) else ())
    if Recorder.operations is not None and not func.is_view and name not in NOT_RECORDED:
        record(replayed(compute, args, kwargs, out))
    if func is aten.copy_.default:
        return args[0]
    written = written_arguments(func)
    if written:
        return args[written[0]] if isinstance(written[0], int) else kwargs[written[0]]
    known = {id(x.numbers): x for x in leaves if on_device(x)}
    return tree_map(lambda x: known.get(id(x)) or to_device(x) if isinstance(x, Tensor) else x, out)


def _given(func: Any, args: tuple, kwargs: dict) -> list[tuple[Any, Any]]:
    """Return each argument of a call with its description."""
    described = {argument.name: argument for argument in func._schema.arguments}
    return [*zip(args, func._schema.arguments, strict=False), *((x, described[name]) for name, x in kwargs.items())]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@functools.cache
def written_arguments(func: Any) -> tuple[int | str, ...]:
    """Return the argument that an in-place operation, or one with a single `out`, writes to and returns."""
    returns = func._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return ()
    names = returns[0].alias_info.before_set
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == names:
            return (argument.name,) if argument.kwarg_only else (k,)
    return ()


def replayed(compute: Callable, args: tuple, kwargs: dict, out: Any) -> Callable[[], None]:
    """Return a function that computes again and writes to the same memory. CPU scalars stay what they were."""
    kept_args, kept_kwargs = tree_map(_kept, (args, kwargs))
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]

    def again() -> None:
        found = [x for x in tree_leaves(compute(*kept_args, **kept_kwargs)) if isinstance(x, Tensor)]
        for mine, new in zip(results, found, strict=True):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)

    return again


def _kept(x: Any) -> Any:
    """Return what a graph keeps of an argument: memory of the device, or the value of a scalar."""
    return x.clone() if isinstance(x, Tensor) and not on_device(x) and not x.dim() else numbers_of(x)
