"""The kernels in kernels/cpu/, compiled by this machine's C++ compiler when they are first needed, in a few seconds.

What comes out is kept in the user's cache folder under a name that says which text, compiler and processor it is of,
and what is in it: a damaged file is compiled again. Without a compiler, on another system than Linux or macOS, or with
GSPO_NATIVE=0, there are no kernels, and PyTorch's own operators do the work: every kernel stands beside them, and is
compared with them in the tests.
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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
TYPES = (torch.float32, torch.bfloat16)
KERNELS = {  # what each is given, and the number of threads at the end
    "gspo_decode": "ippffi",
    "gspo_draw": "ippppfipppi",
    "gspo_gradient": "ippppffii",
    "gspo_lay_out": "ppnni",
    "gspo_linear": "ippppnnni",
    "gspo_norm": "iiippffppnni",
    "gspo_norm_back": "iiipppfpppnni",
    "gspo_rows": "ipppppffppi",
    "gspo_rows_back": "ippppppppffppppii",
    "gspo_stack": "ippppppppffi",
    "gspo_statistics": "ippppffii",
    "gspo_silu": "ipppni",
    "gspo_silu_back": "ipppppni",
    "gspo_rotate": "iiippppnpnnnnii",
}
KINDS = {"i": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
LIMIT = 120  # seconds for the compiler


def takes(*tensors: Tensor) -> bool:
    """Whether compiled kernels exist and take these tensors: on the CPU, whole, of `TYPES`."""
    for x in tensors:
        if x.dtype not in TYPES or x.device.type != "cpu" or type(x) not in (Tensor, Parameter, FakeTensor):
            return False
    return library() is not None


def stored(x: Any) -> bool:
    """False for tensors by which only shapes are found out."""
    return type(x) is not FakeTensor


def call(name: str, *args: Any) -> None:
    """Run a kernel, with as many threads as PyTorch has. Tensors without storage are let pass, and nothing is done."""
    if not all(map(stored, args)):
        return
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    getattr(library(), name)(*given, torch.get_num_threads())


@functools.lru_cache
def library() -> ctypes.CDLL | None:
    """Compiled or fetched from the cache, once a process; None where that cannot be, with a line why if it should."""
    if os.environ.get("GSPO_NATIVE", "1") == "0" or sys.platform not in ("linux", "darwin"):
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    try:
        return _open(shlex.split(compiler))
    # RuntimeError: there is no home folder; ValueError: CXX cannot be split; AttributeError: another library
    except (AttributeError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as e:
        _say(f"{_reason(e)}; PyTorch's own operators are used. CXX names a compiler, GSPO_NATIVE=0 does without.")
        return None


def pointers(*tensors: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def numbers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _say(line: str) -> None:
    print(f"kernels/cpu: {line}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return next((line for line in said if "error" in line.lower()), said[0] if said else str(error))[:200]


def _open(compiler: list[str]) -> ctypes.CDLL:
    files = sorted(SOURCES.glob("*.cpp"))
    texts = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    what = "\0".join([_run([*compiler, "--version"]), _processor(), *FLAGS]).encode()
    name = f"kernels-{hashlib.sha256(texts + what).hexdigest()[:16]}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo"
    found = [path for path in sorted(folder.glob(f"{name}-*.so")) if path.is_file() and path.stem == _named(name, path)]
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # processes that start together may all compile
            _say("compiling, once on this machine")
            compiled = _compile(compiler, files, Path(scratch))
            found = [folder / f"{_named(name, compiled)}.so"]
            os.replace(compiled, found[0])
    library = ctypes.CDLL(str(found[0]))
    for kernel, arguments in KERNELS.items():
        function = getattr(library, kernel)
        function.argtypes, function.restype = [KINDS[x] for x in arguments], None
    return library


def _named(name: str, path: Path) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _compile(compiler: list[str], files: list[Path], folder: Path) -> Path:
    """With OpenMP, if there is one: PyTorch's own, which is in the process already and has its threads."""
    objects = [folder / f"{path.stem}.o" for path in files]
    for threads in (["-fopenmp"], []):
        try:
            _run(
                *(
                    [*compiler, *FLAGS, *threads, "-c", str(a), "-o", str(b)]
                    for a, b in zip(files, objects, strict=True)
                )
            )
            break
        except subprocess.CalledProcessError:
            if not threads:
                raise
    library = folder / "kernels.so"
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = [*compiler, "-shared", *undefined, *map(str, objects), "-o", str(library)]
    _run(link)
    try:
        ctypes.CDLL(str(library))
    except OSError:  # PyTorch's OpenMP is hidden, or another one
        _run([*link, "-fopenmp"])
    return library


def _run(*commands: list[str]) -> str:
    """Run them side by side -> what the first printed. None is left behind, whatever happens."""
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
                with contextlib.suppress(OSError):  # it has just ended
                    os.killpg(job.pid, signal.SIGKILL)
                job.wait()


def _processor() -> str:
    """What -march=native sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))
