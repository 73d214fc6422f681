"""Run the CPU's compiled kernels for another processor, under an emulator, in place of this machine's.

As a plugin (`pytest -p emulated_kernels`) it lets whole test files call kernels that were compiled for the processor
that GSPO_EMULATED names: their Python runs here, `native.call` goes to a program under the emulator, with the memory
of every tensor, and what the kernel wrote comes back.
"""

import ctypes
import os
import shlex
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from repository import PROGRAMS
from torch import Tensor

from gspo.kernels import native
from gspo.kernels.native_signatures import FLAG, INT, NUMBER, SIGNATURES, SIZE

C_TYPES = {ctypes.c_int: "int", ctypes.c_int64: "int64_t", ctypes.c_float: "float", ctypes.c_void_p: "void*"}
FIELDS = {"int": "(int){}.whole", "int64_t": "{}.whole", "float": "{}.number", "void*": "{}.address"}
WHOLE = (FLAG, INT, SIZE)


def kernel_table() -> str:
    """Return C++ that declares every kernel of native_signatures.py, and calls one by its number."""
    declared, calls = [], []
    for number, (name, signature) in enumerate(SIGNATURES.items()):
        types = [*(C_TYPES[kind.c_type] for kind in signature.values()), "int"]
        given = [FIELDS[each].format(f"a[{i}]") for i, each in enumerate(types)]
        declared.append(f'extern "C" void {name}({", ".join(types)});')
        calls.append(f"    if (kernel == {number}) return {name}({', '.join(given)});")
    return "\n".join(
        [*declared, "inline void run(int64_t kernel, const Slot* a) {", *calls, "    std::exit(4);", "}\n"]
    )


def build(compiler: list[str], flags: list[str], folder: Path) -> Path:
    """Compile all kernels and the program that calls them, and return it: static, with all it needs."""
    (folder / "kernel_table.h").write_text(kernel_table())
    sources = [*sorted(native.SOURCES.glob("*.cpp")), PROGRAMS / "emulated_calls.cpp"]
    program = folder / "kernels"
    command = [*compiler, *flags, "-fopenmp", "-static", f"-I{folder}", *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


class Emulator:
    """A program of `build` under an emulator, which stays for the next call."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.known: dict[int, Tensor] = {}  # by address: what `tensor_array` was given

    def tensor_array(self, *tensors: Tensor | None) -> ctypes.Array:
        """Make what `native.tensor_array` makes, and remember the tensors behind the addresses."""
        self.known |= {x.data_ptr(): x for x in tensors if x is not None}
        return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))

    def call(self, kernel: str, **arguments: Any) -> None:
        """Run a kernel as `native.call` does."""
        signature = SIGNATURES[kernel]
        assert arguments.keys() == signature.keys(), (kernel, *arguments.keys() ^ signature.keys())
        if not all(map(native.has_storage, arguments.values())):
            return
        memory = _Memory(len(signature) + 1, self.known)
        for i, (name, kind) in enumerate(signature.items()):
            assert kind.fits(arguments[name]), (kernel, name)
            if kind in WHOLE:
                memory.slots[8 * i : 8 * i + 8] = struct.pack("<q", arguments[name])
            elif kind is NUMBER:
                memory.slots[8 * i : 8 * i + 4] = struct.pack("<f", arguments[name])
            else:
                memory.point(0, 8 * i, arguments[name])
        memory.slots[-8:] = struct.pack("<q", torch.get_num_threads())
        head = struct.pack("<q", list(SIGNATURES).index(kernel))
        try:
            self.process.stdin.write(head + memory.message())
            self.process.stdin.flush()
            memory.take(self.process.stdout)
        except (OSError, EOFError) as e:
            raise AssertionError(f"{kernel}: the emulated program ended with {self.process.wait(60)}") from e


class _Memory:
    """The buffers of a call: its arguments, the storages behind its tensors, its arrays."""

    def __init__(self, arguments: int, known: dict[int, Tensor]):
        self.slots, self.known = bytearray(8 * arguments), known
        self.buffers: list[Any] = [self.slots]  # bytes, or a tensor's storage as bytes
        self.places: dict[int, int] = {}  # the number of a storage, by its address
        self.addresses: list[tuple[int, int, int, int]] = []

    def point(self, buffer: int, at: int, x: Any) -> None:
        """Let the address at `at` of a buffer be that of a tensor or an array; of None it stays null."""
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            target = self.places.setdefault(storage.data_ptr(), len(self.buffers))
            if target == len(self.buffers):
                self.buffers.append(torch.empty(0, dtype=torch.uint8).set_(storage))
            self.addresses.append((buffer, at, target, x.storage_offset() * x.itemsize))
        elif x is not None:
            target = len(self.buffers)
            self.buffers.append(bytearray(x))
            self.addresses.append((buffer, at, target, 0))
            if x._type_ is ctypes.c_void_p:
                for i, address in enumerate(x):
                    self.buffers[target][8 * i : 8 * i + 8] = bytes(8)
                    self.point(target, 8 * i, None if address is None else self.known[address])

    def message(self) -> bytes:
        """Return the call as the program reads it."""
        parts = [struct.pack("<q", len(self.buffers))]
        for buffer in self.buffers:
            raw = buffer.numpy().tobytes() if isinstance(buffer, Tensor) else bytes(buffer)
            parts += [struct.pack("<q", len(raw)), raw]
        parts.append(struct.pack("<q", len(self.addresses)))
        return b"".join([*parts, *(struct.pack("<4q", *each) for each in self.addresses)])

    def take(self, answer: Any) -> None:
        """Read what the buffers hold after the call into the tensors."""
        for buffer in self.buffers:
            raw = answer.read(len(buffer))
            if len(raw) < len(buffer):
                raise EOFError
            if isinstance(buffer, Tensor) and len(raw):
                buffer.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


if "GSPO_EMULATED" in os.environ:  # before modules import what is replaced here
    emulator = Emulator(shlex.split(os.environ["GSPO_EMULATED"]))
    native.library = lambda: emulator
    native.call, native.tensor_array = emulator.call, emulator.tensor_array
