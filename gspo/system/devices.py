"""Choose the device of this process, and say at the start why the GPU that is there is not the one, or cannot be."""

import os
import sys
import warnings
from pathlib import Path

import torch

from gspo.errors import UserError
from gspo.system import torchrun
from gspo.system.console import say

DRIVER = Path("/proc/driver/nvidia/version")  # there where NVIDIA's driver is loaded
OLDEST = (7, 5)  # compute capability of Turing; torch's wheels for CUDA 13 hold nothing for older ones


def choose_device() -> torch.device:
    """Return this process's GPU, or the CPU where none can be used: a line says why if there is one all the same.

    UserError where more processes were started on this machine than it has GPUs, or the GPU is too old.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = next((str(w.message) for w in caught if "CUDA" in str(w.message)), "")
        if note := unused_gpu(why):
            say(note)
        return torch.device("cpu")
    _check_count(torch.cuda.device_count())
    device = torch.device("cuda", torchrun.local_rank())
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and (major, minor) < OLDEST:
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; 7.5 (Turing) is the least, "
            "and 8.0 (Ampere) the least that computes in bf16. Hide it with CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return device


def device_name(device: torch.device) -> str:
    """Return what a device is: a GPU's name, or the CPU's threads and whether there is a GPU that is not used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    unused = "; an NVIDIA driver is installed, but torch sees no GPU" if unused_gpu("") else ""
    return f"CPU, {threads} thread{'s' * (threads != 1)}{unused}"


def unused_gpu(why: str) -> str:
    """Return a line about an NVIDIA GPU that torch cannot use, "" where there is none or it is hidden on purpose.

    why: torch's own warning, or "".
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if hidden or not DRIVER.exists() or torch.version.hip is not None:
        return ""
    if torch.version.cuda is None:
        cause = f"torch {torch.__version__} is built without CUDA; install its CUDA build from https://pytorch.org"
    elif why:
        cause = f"torch {torch.__version__} cannot use it: {' '.join(why.split())[:300]}"
    else:
        cause = (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds none: look at nvidia-smi and at "
            "CUDA_VISIBLE_DEVICES"
        )
    return (
        f"warning: this machine has an NVIDIA driver, and yet the CPU computes. {cause}. (CUDA_VISIBLE_DEVICES= says "
        "that the CPU is meant.)"
    )


def _check_count(gpus: int) -> None:
    """Raise UserError where this machine has fewer GPUs than processes of the run; its first process prints it."""
    processes = torchrun.local_world_size()
    if processes <= gpus:
        return
    text = (
        f"{processes} processes were started on this machine, and it has {gpus} GPU{'s' * (gpus != 1)} that "
        f"CUDA_VISIBLE_DEVICES shows. Start {gpus} (./train.sh --n_gpus {gpus}, torchrun --nproc_per_node={gpus})."
    )
    if torchrun.local_rank() == 0 and not torchrun.is_main():  # rank 0 of the run, on another machine, sees no error
        print(f"error: {text}", file=sys.stderr, flush=True)
    raise UserError(text)
