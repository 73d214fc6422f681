"""Compile the kernels in kernels/cpu/ with this machine's C++ compiler when they are first needed, and call them.

Compiling takes a few seconds. The library is kept in the user's cache folder under a name made of hashes: of its
sources, compiler and processor, and of its own bytes, so that a damaged file is compiled again. Without a compiler, on
a system other than Linux or macOS, or with GSPO_NATIVE=0, there are no kernels, and PyTorch's operators are used: every
kernel has such an equivalent, with which the tests compare it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from gspo.kernels.native_signatures import SIGNATURES

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
TYPES = (torch.float32, torch.bfloat16)
LIMIT = 120  # seconds for the compiler


def cpu_kernels_take(*tensors: Tensor) -> bool:
    """Return whether compiled kernels exist and take these tensors: plain ones on the CPU, of `TYPES`."""
    for x in tensors:
        if x.dtype not in TYPES or x.device.type != "cpu" or type(x) not in (Tensor, Parameter, FakeTensor):
            return False
    return library() is not None


def has_storage(x: Any) -> bool:
    """Return False for fake tensors, which have a shape but no memory."""
    return type(x) is not FakeTensor


def is_bf16(x: Tensor) -> bool:
    """Return the flag by which kernels know what a tensor of `TYPES` holds."""
    return x.dtype == torch.bfloat16


def call(kernel: str, **arguments: Any) -> None:
    """Run a kernel of native_signatures.py with PyTorch's number of threads; do nothing if a tensor has no storage."""
    signature = SIGNATURES[kernel]
    assert arguments.keys() == signature.keys(), (kernel, *arguments.keys() ^ signature.keys())
    if not all(map(has_storage, arguments.values())):
        return
    given = []
    for name, kind in signature.items():
        value = arguments[name]
        assert kind.fits(value), (kernel, name, value.dtype if isinstance(value, Tensor) else value)
        given.append(value.data_ptr() if isinstance(value, Tensor) else value)
    getattr(library(), kernel)(*given, torch.get_num_threads())


def tensor_array(*tensors: Tensor | None) -> ctypes.Array:
    """Return the tensors' addresses, null for None, as C reads an array."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def size_array(*values: int) -> ctypes.Array:
    """Return integers as C reads an array of int64."""
    return (ctypes.c_int64 * len(values))(*values)


@functools.lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, once a process; None without a compiler, or, with a line why, if compiling fails."""
    if os.environ.get("GSPO_NATIVE", "1") == "0" or sys.platform not in ("linux", "darwin"):
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    try:
        return _open(shlex.split(compiler))
    # RuntimeError: no home folder; ValueError: CXX cannot be split; AttributeError: a library without these kernels
    except (AttributeError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as e:
        _say(f"{_reason(e)}; PyTorch's own operators are used. CXX names a compiler, GSPO_NATIVE=0 does without.")
        return None


def _say(line: str) -> None:
    print(f"kernels/cpu: {line}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return next((line for line in said if "error" in line.lower()), said[0] if said else str(error))[:200]


def _open(compiler: list[str]) -> ctypes.CDLL:
    files = sorted(SOURCES.glob("*.cpp"))
    texts = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    what = "\0".join([*compiler, _run([*compiler, "--version"]), processor(), *flags()]).encode()
    name = f"kernels-{hashlib.sha256(texts + what).hexdigest()[:16]}"
    folder = cache_folder()
    _remove_leftovers(folder)
    found = [path for path in sorted(folder.glob(f"{name}-*.so")) if _is_ours(path) and path.stem == _named(name, path)]
    if not found:
        with tempfile.TemporaryDirectory(
            prefix=f"tmp-{_host()}-{os.getpid()}-", dir=folder
        ) as scratch:  # processes that start together may all compile
            _say("compiling, once on this machine")
            compiled = _compile(compiler, files, Path(scratch))
            found = [folder / f"{_named(name, compiled)}.so"]
            compiled.chmod(0o700)
            os.replace(compiled, found[0])
    library = ctypes.CDLL(str(found[0]))
    for kernel, signature in SIGNATURES.items():
        function = getattr(library, kernel)
        function.argtypes, function.restype = [*(kind.c_type for kind in signature.values()), ctypes.c_int], None
    return library


def cache_folder() -> Path:
    """Return the user's cache folder of this project, made if need be, ours alone: what lies in it runs.

    PermissionError where it is another user's; RuntimeError without a home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user, so kernels are not kept in it; set XDG_CACHE_HOME")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _is_ours(path: Path) -> bool:
    """Return whether a library is a plain file that only this user can have written: loading it runs its code."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _remove_leftovers(folder: Path) -> None:
    """Remove the scratch folders of compilations whose process was killed."""
    for scratch in folder.glob("tmp*"):
        _, host, pid, _ = (f"{scratch.name}---").split("-", 3)
        old = time.time() - scratch.lstat().st_mtime > 3 * LIMIT  # of another machine: its processes are not seen here
        killed = host == _host() and pid.isdecimal() and not Path(f"/proc/{pid}").exists()
        if old or (killed and sys.platform == "linux"):
            shutil.rmtree(scratch, ignore_errors=True)


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _named(name: str, path: Path) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def flags(machine: str | None = None) -> list[str]:
    """Return the compiler's flags, for this very processor: on ARM compilers have another name for that."""
    arm = (machine or platform.machine()) in ("aarch64", "arm64")
    return [*FLAGS, "-mcpu=native" if arm else "-march=native"]  # Apple's clang for ARM knows the former only


def openmp(system: str) -> tuple[list[str], list[str]]:
    """Return the flags that compile with OpenMP, and those that link it.

    On macOS Apple's clang takes OpenMP by another name. Header and library are PyTorch's own there, because a process
    with two of LLVM's libraries for threads is ended by them.
    """
    if system != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    folder = Path(torch.__file__).parent
    library = str(folder / "lib")
    return ["-Xclang", "-fopenmp", f"-I{folder / 'include'}"], [f"-L{library}", "-lomp", f"-Wl,-rpath,{library}"]


def _compile(compiler: list[str], files: list[Path], folder: Path) -> Path:
    """Compile and link, with OpenMP if there is one: PyTorch's own, whose threads this process has already."""
    try:
        return _compile_with(compiler, files, folder, *openmp(sys.platform))
    except (subprocess.CalledProcessError, OSError):
        library = _compile_with(compiler, files, folder, [], [])
    if torch.get_num_threads() > 1:
        _say(f"{compiler[0]} has no OpenMP that works here, so kernels run on one thread; CXX names another compiler")
    return library


def _compile_with(compiler: list[str], files: list[Path], folder: Path, threads: list[str], runtime: list[str]) -> Path:
    """Compile with the flags `threads`, link with `runtime` where need be, and return a library that can be loaded."""
    library, objects = folder / "kernels.so", [folder / f"{path.stem}.o" for path in files]
    _run(*([*compiler, *flags(), *threads, "-c", str(a), "-o", str(b)] for a, b in zip(files, objects, strict=True)))
    link = [*compiler, "-shared", *map(str, objects), "-o", str(library)]
    if sys.platform != "darwin":  # which wants to know where each symbol is
        _run(link)
        with contextlib.suppress(OSError):  # PyTorch's OpenMP is not visible, or is another one
            ctypes.CDLL(str(library))
            return library
    _run([*link, *runtime])
    ctypes.CDLL(str(library))
    return library


def _run(*commands: list[str]) -> str:
    """Run commands in parallel and return what the first printed. No process outlives the call, whatever happens."""
    jobs = []
    try:
        for command in commands:
            jobs.append(subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True,
            ))  # fmt: skip
        said = [job.communicate(timeout=LIMIT) for job in jobs]
        for job, (_, errors) in zip(jobs, said, strict=True):
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, job.args[0], stderr=errors)
        return said[0][0]
    finally:
        for job in jobs:
            if job.poll() is None:
                with contextlib.suppress(OSError):  # ended just now
                    os.killpg(job.pid, signal.SIGKILL)
                job.wait()


def processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        sysctl = shutil.which("sysctl")  # of macOS, where one home folder may meet several processors
        return platform.platform() + (_run([sysctl, "-n", "machdep.cpu.brand_string"]) if sysctl else "")
    wanted = ("flags", "Features", "model name", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))
