"""How the CPU's kernels are compiled, found again, and gone without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

from gspo.kernels import native

needed = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")

PROBE = """
import torch
from gspo.kernels.native import library
from gspo.kernels.norm_gate_rotary import silu_product
if library() is not None:
    x = torch.linspace(-9, 9, 200).bfloat16()
    assert torch.allclose(silu_product(x, x).float(), torch.nn.functional.silu(x.float()) * x.float(), rtol=1e-2)
print("yes" if library() else "no")
"""


def probe(tmp_path, **environment):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0], done.stderr


def compiler(tmp_path, body):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\n{body}\n")
    path.chmod(0o755)
    return str(path)


def calls(tmp_path):
    return (tmp_path / "calls").read_text().count("called") if (tmp_path / "calls").exists() else 0


COMPILING = "kernels/cpu: compiling, once on this machine\n"


@pytest.mark.slow
@needed
def test_kernels_are_compiled_once_and_kept(tmp_path):
    cxx = compiler(tmp_path, 'exec c++ "$@"')
    assert probe(tmp_path, CXX=cxx) == ("yes", COMPILING)
    first = calls(tmp_path)
    assert probe(tmp_path, CXX=cxx) == ("yes", "") and calls(tmp_path) == first + 1, "only its version was asked for"
    assert len(list((tmp_path / "cache" / "gspo").iterdir())) == 1


@needed
@pytest.mark.slow
def test_kernels_are_compiled_again_where_the_file_is_damaged(tmp_path):
    assert probe(tmp_path) == ("yes", COMPILING)
    (file,) = (tmp_path / "cache" / "gspo").iterdir()
    with file.open("r+b") as f:  # a library that ends early would end the process
        f.truncate(40_000)
    assert probe(tmp_path) == ("yes", COMPILING) and file.stat().st_size > 40_000


def runs(pid):
    """Whether a process is there that is not only waiting for someone to hear of its end (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needed
def test_no_compiler_outlives_the_one_who_waits_for_it(tmp_path, monkeypatch):
    cxx = compiler(tmp_path, f'[ "$1" = --version ] && exit; sleep 60 & echo $! >> {tmp_path}/pids; wait')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "LIMIT", 3)
    with pytest.raises(subprocess.TimeoutExpired):
        native._open([cxx])
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert pids and not any(map(runs, pids))
    assert not list((tmp_path / "gspo").iterdir())


@needed
@pytest.mark.slow
def test_what_is_compiled_for_any_x86_64_gives_the_same_numbers(tmp_path):
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("-march=x86-64 is for others")
    body = 'for x in "$@"; do shift; [ "$x" = -march=native ] && x=-march=x86-64; set -- "$@" "$x"; done; exec c++ "$@"'
    assert probe(tmp_path, CXX=compiler(tmp_path, body)) == ("yes", COMPILING)


@needed
@pytest.mark.slow
def test_a_compiler_with_other_flags_has_a_library_of_its_own(tmp_path):
    for cxx in ("c++", "c++ -DOTHER"):
        assert probe(tmp_path, CXX=cxx) == ("yes", COMPILING)
    assert len(list((tmp_path / "cache" / "gspo").glob("*.so"))) == 2


@needed
@pytest.mark.slow
def test_a_compiler_without_openmp_compiles_for_one_thread_and_a_line_says_so(tmp_path):
    """As Apple's clang is where PyTorch brings no header for it: it does not know the flag."""
    refuse = 'for x in "$@"; do case "$x" in *openmp) echo "error: unsupported option" >&2; exit 1;; esac; done'
    cxx = compiler(tmp_path, f'{refuse}; exec c++ "$@"')
    said, errors = probe(tmp_path, CXX=cxx, OMP_NUM_THREADS="2")
    assert said == "yes" and errors.startswith(COMPILING)
    (line,) = errors.removeprefix(COMPILING).splitlines()
    assert "one thread" in line and cxx in line and "CXX" in line


def test_a_processor_is_named_as_its_compilers_do():
    assert "-mcpu=native" in native.flags("arm64") and "-march=native" not in native.flags("aarch64")
    assert "-march=native" in native.flags("x86_64")


def test_on_macos_threads_are_pytorchs_own():
    """A process with two of LLVM's OpenMP libraries is ended by them."""
    compile_flags, link_flags = native.openmp("darwin")
    folder = Path(torch.__file__).parent
    assert "-fopenmp" not in link_flags and f"-L{folder / 'lib'}" in link_flags
    assert compile_flags[:2] == ["-Xclang", "-fopenmp"] and compile_flags[2] == f"-I{folder / 'include'}"


@pytest.mark.parametrize("environment", [{"GSPO_NATIVE": "0"}, {"CXX": "", "PATH": ""}])
def test_without_them_nothing_is_said(environment, tmp_path):
    assert probe(tmp_path, **environment) == ("no", "")


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_of_once(tmp_path):
    said, errors = probe(tmp_path, CXX=compiler(tmp_path, "echo no such instruction >&2; exit 1"))
    assert said == "no" and errors.count("\n") == 1 and "kernels/cpu: no such instruction" in errors
    for cxx in (str(tmp_path / "missing"), "c++ 'x"):
        said, errors = probe(tmp_path, CXX=cxx)
        assert said == "no" and errors.count("\n") == 1 and "CXX" in errors and "GSPO_NATIVE=0" in errors


@needed
def test_a_folder_that_cannot_be_written_is_told_of(tmp_path):
    (tmp_path / "cache").write_text("a file")
    said, errors = probe(tmp_path)
    assert said == "no" and errors.count("\n") == 1 and "kernels/cpu" in errors


@needed
def test_a_call_is_checked_against_its_signature():
    x = torch.zeros(4)
    call = {"bf16": False, "gate": x, "up": x, "out": x, "count": 4}
    native.call("gspo_silu", **call)
    for argument in ({"gate": x.double()}, {"count": 4.0}, {"bf16": 0}, {"up": None}, {"more": 1}):
        with pytest.raises(AssertionError, match=next(iter(argument))):
            native.call("gspo_silu", **call | argument)
    with pytest.raises(AssertionError, match="count"):
        native.call("gspo_silu", bf16=False, gate=x, up=x, out=x)
