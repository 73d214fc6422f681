"""Which implementation of an operation runs: by tables of numbers, and by the real tables with a GPU that is absent."""

import pytest
import torch

from gspo.kernels import decode_attention, dispatch, draw_token, logprob, logprob_chunk, pairwise
from gspo.kernels.dispatch import Implementation, choose

TABLES = {  # an operation, and what its table is asked with for a tensor x
    "decode": (decode_attention, lambda x: (x,)),
    "logprob": (logprob, lambda x: (x, x.dtype)),
    "pairwise": (pairwise, lambda x: (x,)),
    "sampling": (draw_token, lambda x: (x, False)),
}


def test_the_first_that_serves_and_is_installed_is_chosen():
    table = (
        Implementation(lambda x: x > 2, lambda x: "fast"),
        Implementation(lambda x: x > 1, lambda x: None),  # not installed
        Implementation(lambda x: x > 0, lambda x: "plain"),
    )
    assert [choose(table, x) for x in (3, 2, 1, 0)] == ["fast", "plain", "plain", None]


@pytest.fixture()
def a_gpu(monkeypatch):
    """Set the compute capability of the GPU that is absent; it is an Ampere at first."""

    def a_gpu(*capability):
        monkeypatch.setattr(dispatch, "_capability", lambda device: capability)

    a_gpu(8, 0)
    return a_gpu


@pytest.mark.parametrize("name", TABLES)
def test_only_tensors_on_cuda_go_to_triton_and_no_doubles(name, a_gpu):
    module, asked = TABLES[name]
    triton_serves = module.IMPLEMENTATIONS[0].serves
    with torch._subclasses.FakeTensorMode():
        single, double = (torch.empty(2, 3, 4, dtype=x, device="cuda") for x in (torch.float32, torch.float64))
        assert triton_serves(*asked(single)) and not triton_serves(*asked(double))
    assert not triton_serves(*asked(torch.zeros(2, 3, 4)))


@pytest.mark.skipif(torch.version.hip is not None, reason="capabilities are NVIDIA's")
def test_before_ampere_only_the_sampler_s_attention_is_pytorch_s_and_a_line_says_so(a_gpu, capsys):
    a_gpu(7, 5)
    dispatch._say_once.cache_clear()
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda")
        serves = [module.IMPLEMENTATIONS[0].serves(*asked(x)) for module, asked in TABLES.values()]
    assert serves == [False, True, True, True]
    assert "older than Ampere" in capsys.readouterr().err


def test_a_missing_triton_is_said_once_and_pytorch_takes_over(monkeypatch, a_gpu, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    dispatch._import.cache_clear()
    dispatch._say_once.cache_clear()
    try:
        with torch._subclasses.FakeTensorMode():
            x = torch.empty(2, 3, 4, device="cuda")
        found = {name: choose(module.IMPLEMENTATIONS, *asked(x)) for name, (module, asked) in TABLES.items()}
    finally:
        dispatch._import.cache_clear()
    plain = {
        "decode": decode_attention.plain_decode_attention,
        "logprob": logprob_chunk,
        "pairwise": pairwise.plain_pairwise_loss,
    }
    assert found == {**plain, "sampling": None}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("kernels: Triton cannot be imported (No module named 'triton')")
