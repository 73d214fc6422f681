"""Install the device that is not there, for the whole process; there is no way back."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def wanted() -> bool:
    """Return whether this process sees a GPU: CUDA_VISIBLE_DEVICES, set and empty, hides it, as from the driver."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


def install() -> None:
    """Begin. Import gspo before torch elsewhere, as programs do."""
    import torch._inductor.utils  # noqa: F401 -- optimizers import it, and it asks whether CUDA is there
    import torch._subclasses.fake_tensor as fake
    from cuda_module import install_cuda
    from functions import install_functions
    from operations import install_fsdp, install_kernels, install_operations

    install_cuda()
    install_operations()
    install_kernels()
    install_fsdp()
    for name in ("init_gpu_context", "init_cuda_context"):
        if hasattr(fake, name):
            setattr(fake, name, lambda *args: None)
    install_functions()
