"""The linear log-prob on the CPU: float64 autograd, invariances, what is kept and what is not."""

import json
from pathlib import Path

import pytest
import torch
from logprob_cases import Case, cases, draw, outcome, too_far

from gspo.kernels import logprob, logprob_chunk
from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad, reference_linear_logprob


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of several blocks at the sizes of tests; memory nobody wrote is NaN."""
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(logprob.LEAST_WIDTH, "cpu", 128)
    monkeypatch.setattr(logprob, "LEAST_PIECE", 16)
    monkeypatch.setattr(logprob_chunk, "BLOCK", 2000)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.bf16)], ids=str
)
@pytest.mark.parametrize("known", [False, True], ids=["backward", "and_grad"])
def test_results_and_gradients_are_as_near_to_float64_as_plain_pytorch(dtype, known, kernels):
    wrong = [line for case in cases((dtype,)) if not case.autocast for line in too_far(case, known=known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.bf16
@pytest.mark.parametrize("known", [False, True], ids=["backward", "and_grad"])
def test_float32_tensors_under_autocast(known, kernels):
    wrong = [line for case in cases(()) for line in too_far(case, known=known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "temperature": 0.8, "scale": 1.5}], ids=["plain", "capped"])
def test_gradients_against_finite_differences(head):
    inputs = draw(Case(4, 3, 260, torch.float64, bias=True))

    def f(hidden, weight, bias):
        return linear_logprob(hidden, weight, inputs["targets"], bias=bias, **head)

    leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(f, leaves)


def test_a_hand_computed_value(kernels):
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]]).log1p()  # logits 0 and log 3
    value = linear_logprob(hidden, weight, torch.tensor([1]))
    assert value.item() == pytest.approx(-0.2876821)  # log 3/4
    value = linear_logprob(hidden, weight, torch.tensor([0]), temperature=0.5)
    assert value.item() == pytest.approx(-2.3025851)  # log 1/10: 3 squared against 1


def test_logits_far_from_zero_neither_overflow_nor_lose_digits(kernels):
    shift = torch.zeros(2, 300, dtype=torch.float64)
    shift[:, ::7] = torch.linspace(-3, 3, 43)
    targets = torch.tensor([7, 150])
    for offset in (-3e4, 3e4):
        hidden, weight = torch.eye(2), (shift + offset).T.float().contiguous().requires_grad_()
        value = linear_logprob(hidden, weight, targets)
        exact = weight.T.double().detach().requires_grad_()
        logprobs = exact.log_softmax(-1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(value.double(), chosen, rtol=1e-6, atol=1e-6)
        value.sum().backward()
        chosen.sum().backward()
        torch.testing.assert_close(weight.grad.T.double(), exact.grad, rtol=1e-5, atol=1e-8)


def test_chunk_widths_and_what_is_kept_change_nothing(monkeypatch, kernels):
    case = Case(50, 16, 900, torch.float32, temperature=0.8)
    inputs = draw(case)
    results = []
    for width, keep in ((128, 0), (128, 100_000), (256, 10**9), (1024, 0), (1024, 10**9)):
        monkeypatch.setitem(logprob.LEAST_WIDTH, "cpu", width)
        results.append(outcome(linear_logprob, case, inputs, torch.float32, keep=keep))
    for other in results[1:]:
        for key, x in results[0].items():
            torch.testing.assert_close(other[key], x, rtol=2e-5, atol=2e-6)


def test_only_what_needs_a_gradient_gets_one():
    inputs = draw(Case(20, 8, 300, torch.float32))
    for frozen, free in (("weight", "hidden"), ("hidden", "weight")):
        leaves = {k: inputs[k].clone().requires_grad_(k == free) for k in (frozen, free)}
        value = linear_logprob(leaves["hidden"], leaves["weight"], inputs["targets"])
        value.sum().backward()
        known = {k: inputs[k].clone().requires_grad_(k == free) for k in (frozen, free)}
        ones = lambda logprob, rows: torch.ones_like(logprob)  # noqa: E731
        linear_logprob_and_grad(known["hidden"], known["weight"], inputs["targets"], ones)[0].backward()
        plain = {k: inputs[k].clone().requires_grad_(k == free) for k in (frozen, free)}
        reference_linear_logprob(plain["hidden"], plain["weight"], inputs["targets"]).sum().backward()
        for result in (leaves, known):
            assert result[frozen].grad is None
            torch.testing.assert_close(result[free].grad, plain[free].grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_kept(monkeypatch):
    inputs, kept, workspace = draw(Case(64, 8, 2000, torch.float32)), [], logprob._workspace

    def watched(*args):
        work = workspace(*args)
        kept.append((work.kept, len(work.buffers)))
        return work

    monkeypatch.setattr(logprob, "_workspace", watched)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"]
    with torch.no_grad():
        value = linear_logprob(hidden, weight, inputs["targets"])
    assert value.grad_fn is None
    linear_logprob(hidden.detach(), weight, inputs["targets"])
    linear_logprob(hidden, weight, inputs["targets"], keep=64 * 128 * 4 * 3 + 5)
    linear_logprob(hidden, weight, inputs["targets"])
    assert kept == [(0, 1), (0, 1), (3, 4), (16, 16)]


def test_a_second_backward_gives_the_same_gradients():
    inputs = draw(Case(20, 8, 300, torch.float32))
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    value = linear_logprob(hidden, weight, inputs["targets"])
    first = torch.autograd.grad(value.sum(), [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(value.sum(), [hidden, weight])
    torch.testing.assert_close(first, second)
    surrogate, _ = linear_logprob_and_grad(hidden, weight, inputs["targets"], lambda logprob, rows: logprob)
    surrogate.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="used up"):
        surrogate.backward()


def test_a_slope_may_depend_on_the_log_prob():
    """A clipped ratio, and a squared distance to a reference: sums over tokens, so their slopes are known at once."""
    case = Case(70, 8, 300, torch.float32, temperature=0.9, keep=40_000)
    inputs = draw(case)
    noise = 0.1 * torch.randn(70, generator=torch.Generator().manual_seed(1))
    behaviour = reference_linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"]) + noise

    def loss(logprob, rows):
        ratio = (logprob - behaviour[rows]).exp()
        clipped = torch.minimum(ratio * inputs["slope"][rows], ratio.clamp(0.8, 1.28) * inputs["slope"][rows])
        return (0.5 * (logprob - behaviour[rows]) ** 2 - clipped).sum()

    def slope(logprob, rows):
        pieces.append((rows.start, rows.stop))
        with torch.enable_grad():
            leaf = logprob.requires_grad_()
            return torch.autograd.grad(loss(leaf, rows), leaf)[0]

    grads, pieces = [], []
    for known in (True, False):
        hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        if known:
            linear_logprob_and_grad(hidden, weight, inputs["targets"], slope, temperature=0.9, keep=case.keep)[
                0
            ].backward()
        else:
            value = reference_linear_logprob(hidden, weight, inputs["targets"], temperature=0.9)
            loss(value, slice(None)).backward()
        grads.append((hidden.grad, weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert pieces == [(0, 24), (24, 48), (48, 70)], "as many as fit 40,000 bytes: 33 rows of 300 floats, evenly"


def test_no_tokens():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    nobody = torch.zeros(0, dtype=torch.long)
    value = linear_logprob(hidden, weight, nobody)
    value.sum().backward()
    assert value.shape == (0,) and not weight.grad.any()
    surrogate, value = linear_logprob_and_grad(hidden, weight, nobody, lambda logprob, rows: logprob)
    surrogate.backward()
    assert surrogate == 0 and value.shape == (0,)


def test_one_weight_as_embedding_and_as_head():
    ids = torch.randint(300, (30,))
    grads = []
    for function in (linear_logprob, reference_linear_logprob):
        weight = (0.3 * torch.randn(300, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
        function(torch.nn.functional.embedding(ids[:-1], weight).tanh(), weight, ids[1:]).mean().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("name", ["linear_logprob", "linear_logprob_and_grad"])
@pytest.mark.parametrize("tokens, size, vocabulary", [(600, 16, 200_000), (2048, 896, 151_936)])
def test_memory_above_the_gradients_is_under_300_mb(run_program, name, tokens, size, vocabulary):
    """All logits would be 480 and 1,245 MB, and plain PyTorch holds three tensors like them."""
    sizes = ("--tokens", tokens, "--size", size, "--vocabulary", vocabulary)
    done = run_program("benchmarks/operations.py", "--device", "cpu", *sizes, "--only", name)
    assert done.returncode == 0, done.stderr[-2000:]
    extra = json.loads(done.stdout)["extra"]
    assert 20e6 < extra < 300e6, extra / 1e6


def test_a_sharded_weight_is_refused():
    class Sharded(torch.Tensor):
        device_mesh = None

    weight = torch.randn(10, 4).as_subclass(Sharded)
    with pytest.raises(AssertionError, match="sharded"):
        linear_logprob(torch.randn(2, 4), weight, torch.tensor([0, 1]))


def test_importing_the_package_needs_no_triton(run_program):
    code = "import sys; sys.modules['triton'] = None; from gspo.kernels import ops; print(ops.linear_logprob.__name__)"
    done = run_program("-c", code)
    assert done.returncode == 0 and done.stdout.strip() == "linear_logprob", done.stderr
