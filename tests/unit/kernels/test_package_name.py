"""`import kernels` is Hugging Face's package where it is installed, and transformers gets it; ours is gspo.kernels."""

import pytest
from repository import ROOT

# What transformers asks of the package (integrations/hub_kernels.py).
PACKAGE = """
class Anything:
    def __init__(self, *args, **kwargs): pass

class CUDAProperties(Anything): pass
class ROCMProperties(Anything): pass
class Device(Anything): pass
class KernelizeFallback(Anything): pass
class LayerRepository(Anything): pass
class LocalLayerRepository(Anything): pass

class Mode:
    TRAINING, INFERENCE = "training", "inference"

def register_kernel_mapping(*args, **kwargs): pass
def use_kernel_mapping(*args, **kwargs): pass
def replace_kernel_forward_from_hub(cls, layer_name): pass
def get_kernel(*args, **kwargs): raise FileNotFoundError("no hub here")
def kernelize(model, **kwargs): return model
def use_kernel_forward_from_hub(layer_name): return lambda cls: cls
def use_kernelized_func(*names): return lambda cls: cls
"""
LOOK = """
import gspo.models.loading, gspo.kernels.ops, gspo.kernels.native
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
print(gspo.kernels.ops.__file__, is_kernels_available(), getattr(hub_kernels, "CUDAProperties", type(None)).__module__)
import kernels
print(kernels.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of packages in which Hugging Face's `kernels` is, as far as transformers looks."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(PACKAGE)
    (folder / "kernels-0.18.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    (folder / "kernels-0.18.2.dist-info" / "METADATA").write_text(metadata)
    return folder


@pytest.mark.slow
def test_transformers_gets_the_package(installed, run_program):
    done = run_program("-c", LOOK, env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{ROOT / 'kernels' / 'ops.py'} True kernels"
    assert second == str(installed / "kernels" / "__init__.py")


@pytest.mark.slow
def test_without_the_package_there_is_none(run_program):
    done = run_program("-c", LOOK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{ROOT / 'kernels' / 'ops.py'} False builtins", "None"]


PROGRAMS = {
    "train.py": ["train.py", "--check", "--config", "configs/quick.yaml"],
    "eval.py": ["eval.py", "--help"],
    "gspo.memory": ["-m", "gspo.memory", "--config", "configs/quick.yaml"],
    "gspo.check_data": ["-m", "gspo.check_data", "--help"],
    "gspo.sample": ["-m", "gspo.sample", "--help"],
    "benchmarks": ["benchmarks/rollout.py", "--help"],
}


@pytest.mark.parametrize("name", ["train.py", *(pytest.param(x, marks=pytest.mark.slow) for x in list(PROGRAMS)[1:])])
def test_programs_run_with_the_package(name, installed, run_program):
    done = run_program(*PROGRAMS[name], env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "gspo.memory"])
def test_programs_run_without(name, run_program):
    done = run_program(*PROGRAMS[name])
    assert done.returncode == 0, done.stderr
