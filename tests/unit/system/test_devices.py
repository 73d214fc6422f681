"""Which device a process computes on, and what is said where the GPU that is there cannot be used."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.kernels import dispatch
from gspo.kernels.decode_attention import IMPLEMENTATIONS
from gspo.models.precision import choose_precision
from gspo.system import devices
from gspo.system.devices import choose_device, device_name

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Let torch see as many GPUs of a compute capability, or none although the driver is loaded."""
    driver = tmp_path / "version"
    driver.write_text("NVRM")
    monkeypatch.setattr(devices, "DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def there_are(count, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        supported = lambda including_emulation=True: including_emulation or capability >= (8, 0)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    return there_are


def test_a_torch_without_cuda_beside_a_card_is_said(gpu, monkeypatch, capsys):
    gpu(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device().type == "cpu"
    assert "is built without CUDA" in capsys.readouterr().out


def test_a_driver_that_is_too_old_is_said_in_torchs_words(gpu, monkeypatch, capsys):
    gpu(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def fails():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found 11040).", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", fails)
    assert choose_device().type == "cpu"
    assert "cannot use it: CUDA initialization: The NVIDIA driver on your system is too old" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_nothing_is_said_without_a_card_or_where_it_is_hidden(gpu, monkeypatch, capsys, hidden):
    gpu(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device().type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.DRIVER.unlink()
    assert choose_device().type == "cpu" and not capsys.readouterr().out


def test_more_processes_than_gpus_are_a_mistake_that_the_first_of_the_machine_says(gpu, monkeypatch, capsys):
    gpu(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for rank, local, printed in (("9", "1", 0), ("8", "0", 1), ("0", "0", 0)):  # program.py prints rank 0's
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(UserError, match="8 processes were started on this machine, and it has 2 GPUs"):
            choose_device()
        assert capsys.readouterr().err.count("error:") == printed


def test_a_process_takes_the_gpu_of_its_number(gpu, monkeypatch):
    gpu(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)


def test_a_gpu_before_turing_is_refused(gpu):
    gpu(1, (7, 0))
    with pytest.raises(UserError, match=r"compute capability 7\.0; 7\.5 \(Turing\) is the least"):
        choose_device()


def test_turing_computes_in_fp32_and_never_in_emulated_bf16(gpu):
    gpu(1, (7, 5))
    assert choose_device() == CUDA and choose_precision("auto", CUDA, None) == ("fp32", "")
    assert choose_precision("fp32", CUDA, None) == ("fp32", "")
    with pytest.raises(UserError, match="bf16: a GPU cannot compute in bf16"):
        choose_precision("bf16", CUDA, None)
    gpu(1, (8, 0))
    assert choose_precision("auto", CUDA, None) == choose_precision("bf16", CUDA, None) == ("bf16", "")


def test_turings_sampler_attends_by_pytorch_and_says_so(gpu, capsys):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=CUDA)
    for capability, kernel in (((7, 5), False), ((8, 0), True)):
        gpu(1, capability)
        dispatch._capability.cache_clear()
        dispatch._say_once.cache_clear()
        assert IMPLEMENTATIONS[0].serves(on_gpu) is kernel
        assert ("older than Ampere" in capsys.readouterr().err) is not kernel
    dispatch._capability.cache_clear()


LOOK = """
import importlib.abc, os, sys

class Look(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Look())
import {program}
"""


@pytest.mark.parametrize("program", ["train", "eval", "gspo.sample", "gspo.memory.__main__"])
def test_how_cuda_allocates_and_threads_wait_is_set_before_torch_is_imported(run_program, program, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    look = LOOK.format(program=program)
    assert run_program("-c", look).stdout.split() == ["expandable_segments:True", "3000"]
    own = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    assert run_program("-c", look, env=own).stdout.split() == ["None", "3000"]


def test_a_device_is_named_with_what_is_not_used(gpu, monkeypatch):
    gpu(1)
    assert device_name(CUDA) == "a GPU"
    gpu(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_name(torch.device("cpu")) == "CPU, 2 threads; an NVIDIA driver is installed, but torch sees no GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_name(torch.device("cpu")) == "CPU, 2 threads"


@pytest.mark.parametrize(
    ("names", "said"),
    [(["X 80GB"] * 8, "8 x X 80GB"), (["CPU, 1 thread"], "CPU, 1 thread"), (["X", "Y", "X"], "2 x X and Y")],
)
def test_the_devices_of_all_ranks_are_counted(monkeypatch, names, said):
    monkeypatch.setattr(World, "gather", lambda world, mine: names)
    assert World(0, len(names), torch.device("cpu"), None).devices() == said
