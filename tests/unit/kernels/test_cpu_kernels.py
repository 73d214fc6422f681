"""The CPU's compiled kernels against float64, and which modules they may stand for."""

import numpy as np
import pytest
import sampling_cases
import torch
import torch.nn.functional as F
from architectures import tiny_model
from pack_cases import LARGE, PACKS, a_pack, draw, outcome

from gspo.kernels import draw_token_cpu, logprob_chunk, logprob_chunk_cpu, native
from gspo.kernels.decode_attention_cpu import Pool, Sequences, decode_step
from gspo.kernels.decoder_layers_cpu import LayerPages, LayerWeights, Sizes, Stack
from gspo.kernels.logprob_chunk import LogitTransform
from gspo.kernels.norm_gate_rotary import rms_norm, rotate, silu_product
from gspo.kernels.packed_attention_cpu import rows_attention, rows_kernel_takes
from gspo.kernels.panel_linear_cpu import can_lay_out, laid_out_linear, lay_out
from gspo.models.kernel_layers import install_layer_kernels, is_gated_mlp, layer_kernels_enabled, norm_offset
from gspo.packing.packed_attention import _padded_attention
from gspo.rollout.decoder_stack import stack_serves
from gspo.rollout.draw_tokens import Sampling

needed = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
HALF, FULL = torch.bfloat16, torch.float32
SLACK = {FULL: 3e-6, HALF: 2e-2}  # of the largest number


def near(found, exact, dtype=FULL):
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found.double() - exact.double()).abs().max() <= SLACK[dtype] * (1 + exact.double().abs().max())


# ---- attention over packs ----


SETTINGS = [(None, None), (None, 5), (2.0, None), (2.0, 3)]  # cap and window
HEADS = [(4, 2, 16, 16), (3, 3, 8, 12), (6, 1, 20, 16)]  # heads, KV heads, widths


@needed
@pytest.mark.parametrize("softcap, window", SETTINGS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("alphabet", [10**9, 2])
@pytest.mark.parametrize("shape", PACKS.values(), ids=PACKS)
def test_rows_attend_as_padded_rows_in_float64(shape, alphabet, heads, softcap, window):
    compare_rows(shape, alphabet, heads, softcap, window)


@pytest.mark.slow
@needed
def test_long_rows_do_so_too():
    compare_rows(LARGE, 2, HEADS[2], 2.0, 70)


def compare_rows(shape, alphabet, heads, softcap, window):
    heads, kv_heads, width, value_width = heads
    packed = a_pack(shape, alphabet=alphabet)
    tensors = draw(packed, heads, kv_heads, width, value_width)

    def padded(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return _padded_attention(q, k, v, packed, 0.3, softcap, window)[0]

    exact = outcome(padded, tensors)
    found = outcome(
        lambda q, k, v: rows_attention(q, k, v, packed.rows, 0.3, softcap, window), [x.float() for x in tensors]
    )
    for mine, wanted in zip(found, exact, strict=True):
        near(mine, wanted)
    halves = [x.to(HALF) for x in tensors]
    exact = outcome(padded, [x.double() for x in halves])
    found = outcome(lambda q, k, v: rows_attention(q, k, v, packed.rows, 0.3, softcap, window), halves)
    for mine, wanted in zip(found, exact, strict=True):
        near(mine, wanted, HALF)


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_rows_take_any_strides_and_the_same_gradient_comes_twice(dtype):
    packed = a_pack(PACKS["ragged groups"])
    q, k, v, grad = (x.to(dtype) for x in draw(packed, 6, 3, 16))
    wide = [torch.cat([x, x[..., :1]], -1)[..., :16].requires_grad_() for x in (q, k, v)]
    other = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    results = []
    for tensors in (wide, other, other):
        out = rows_attention(*tensors, packed.rows, 0.25)
        results.append([out, *torch.autograd.grad(out, tensors, grad)])
    assert all(a.equal(b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@needed
def test_what_rows_do_not_take():
    x = torch.randn(5, 2, 8)
    assert rows_kernel_takes(x, x, x) and rows_kernel_takes(*[x.to(HALF)] * 3)
    for refused in ([x.double()] * 3, [x, x, x.to(HALF)], [x.to("meta")] * 3):
        assert not rows_kernel_takes(*refused)
    assert not rows_kernel_takes(*[x[..., :7].to(HALF)] * 3), "pairs need an even width"


# ---- a step of decoding ----


def pages_of(sequences, page, kv_heads, width, dtype, g):
    """Sequences [L, Hk, D] in pages dealt out at random -> [n, Hk, page, D], page numbers and their counts."""
    counts = np.array([-(-len(x) // page) for x in sequences])
    order = torch.randperm(int(counts.sum()) + 2, generator=g)[: counts.sum()].numpy()
    memory = torch.full((len(order) + 2, kv_heads, page, width), 7.0).to(dtype)
    for x, pages in zip(sequences, np.split(order, counts.cumsum()[:-1]), strict=True):
        for i, number in enumerate(pages):
            part = x[i * page : (i + 1) * page]
            memory[number, :, : len(part)] = part.transpose(0, 1)
    return memory, order, counts


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("softcap, window", [(None, None), (None, 9), (3.0, 40)])
@pytest.mark.parametrize(
    "heads, kv_heads, width, value_width, page", [(6, 2, 16, 16, 16), (3, 1, 12, 20, 4), (60, 1, 8, 8, 96)]
)
def test_a_step_attends_to_prompt_and_answer(dtype, softcap, window, heads, kv_heads, width, value_width, page):
    g = torch.Generator().manual_seed(0)
    sizes, which, lengths = [1, 70, 130], np.array([1, 0, 1, 2, 1]), [1, 5, 33, 2, 70]
    q = torch.randn(5, heads, width, generator=g).to(dtype)

    def tokens(counts, width):
        return [torch.randn(n, kv_heads, width, generator=g).to(dtype) for n in counts]

    keys, values = tokens(sizes, width), tokens(sizes, value_width)
    own_keys, own_values = tokens(lengths, width), tokens(lengths, value_width)
    far = [sizes[w] + n - (window or 10**6) for w, n in zip(which, lengths, strict=True)]  # first position seen
    pools = []
    for k, v, reads, hidden in (
        (keys, values, which, np.array(far)),
        (own_keys, own_values, np.arange(5), np.array(far) - np.array(sizes)[which]),
    ):
        seed = int(torch.randint(1000, (1,), generator=g))
        memory, order, counts = pages_of(k, page, kv_heads, width, dtype, torch.Generator().manual_seed(seed))
        other, _, _ = pages_of(v, page, kv_heads, value_width, dtype, torch.Generator().manual_seed(seed))
        every = np.array([len(x) for x in k])
        pools.append(Pool(memory, other, Sequences.of(order, counts, every, reads, hidden.clip(min=0))))
    last = pools[1].sequences.first_page[1:].long() - 1
    page_of = pools[1].sequences.pages[last].long()
    offset = (torch.tensor(lengths) - 1) % page
    new = [torch.stack([x[-1] for x in y]) for y in (own_keys, own_values)]
    for memory in (pools[1].keys, pools[1].values):  # the new token is not there yet
        memory[page_of, :, offset] = 5.0
    found = decode_step(q, *new, *pools, page_of, offset, 0.3, softcap)
    for s in range(5):
        k, v = (torch.cat([x[which[s]], y[s]]).double() for x, y in ((keys, own_keys), (values, own_values)))
        scores = torch.einsum("hd,khd->hk", q[s].double(), k.repeat_interleave(heads // kv_heads, 1)) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores[:, : max(0, far[s])] = -torch.inf
        near(found[s], torch.einsum("hk,khd->hd", scores.softmax(-1), v.repeat_interleave(heads // kv_heads, 1)), dtype)
    assert pools[1].keys[page_of, :, offset].equal(new[0]) and pools[1].values[page_of, :, offset].equal(new[1])


# ---- a step through all layers ----


def layers_of(count, dtype, g):
    """Weights of layers of 40 numbers, 4 heads, 2 of keys, of 16 and 12 numbers; the first without optional parts."""
    n, heads, kv, width, value, between = 40, 4, 2, 16, 12, 50

    def weight(outputs, inputs):
        return (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(dtype)

    for i in range(count):
        matrices = {
            "q": weight(heads * width, n), "k": weight(kv * width, n), "v": weight(kv * value, n),
            "o": weight(n, heads * value), "gate": weight(between, n), "up": weight(between, n),
            "down": weight(n, between),
        }  # fmt: skip
        sizes = {"norm": n, "mlp_norm": n, "q_norm": width, "k_norm": width} | {
            f"{name}_bias": len(matrices[name]) for name in "qkvo"
        }
        vectors = {name: 1 + 0.3 * torch.randn(size, generator=g) for name, size in sizes.items()}
        optional = {"q_norm", "k_norm", *(f"{name}_bias" for name in "qkvo")} if i == 0 else set()
        yield matrices | {name: None if name in optional else x for name, x in vectors.items()}


def through_layer(x, w, cos, sin, prompt_keys, prompt_values):
    """A layer in float64: x [S, 40] of one new token a slot behind a prompt of keys [P, 2, 16], values [P, 2, 12]."""
    w = {name: None if y is None else y.double() for name, y in w.items()}

    def norm(y, weight):
        return y if weight is None else F.rms_norm(y, (y.shape[-1],), weight, 1e-5)

    def heads(name, count):
        return F.linear(norm(x, w["norm"]), w[name], w[f"{name}_bias"]).view(len(x), count, -1)

    def turned(y):
        low, high = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    q, k = turned(norm(heads("q", 4), w["q_norm"])), turned(norm(heads("k", 2), w["k_norm"]))
    attended = []
    for s in range(len(x)):
        keys, values = torch.cat([prompt_keys, k[s, None]]), torch.cat([prompt_values, heads("v", 2)[s, None]])
        scores = torch.einsum("hd,khd->hk", q[s], keys.repeat_interleave(2, 1)) * 0.3
        attended.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values.repeat_interleave(2, 1)).flatten())
    x = x + F.linear(torch.stack(attended), w["o"], w["o_bias"])
    n = norm(x, w["mlp_norm"])
    return x + F.linear(F.silu(F.linear(n, w["gate"])) * F.linear(n, w["up"]), w["down"])


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_a_token_goes_through_all_layers_as_in_float64(dtype):
    g, slots, prompt = torch.Generator().manual_seed(0), 5, 7
    weights = list(layers_of(3, dtype, g))
    x, cos, sin = (torch.randn(slots, size, generator=g) for size in (40, 16, 16))
    pages, wanted = [], x.double()
    for w in weights:
        keys, values = (torch.randn(prompt, 2, size, generator=g).to(dtype) for size in (16, 12))
        page = [torch.full((1, 2, 8, size), 7.0).to(dtype) for size in (16, 12)]
        page[0][0, :, :prompt], page[1][0, :, :prompt] = keys.transpose(0, 1), values.transpose(0, 1)
        pages.append(LayerPages(*page, *(torch.full((slots, 2, 4, size), 7.0).to(dtype) for size in (16, 12))))
        wanted = through_layer(wanted, w, cos.double(), sin.double(), keys.double(), values.double())
    layers = [
        LayerWeights(**{name: lay_out(y) if y is not None and y.ndim == 2 else y for name, y in w.items()})
        for w in weights
    ]
    every, none = np.arange(slots), np.zeros(slots, dtype=int)
    shared = Sequences.of(none[:1], np.array([1]), np.array([prompt]), none, none)
    own = Sequences.of(every, none + 1, none + 1, every, none)
    stack = Stack(layers, pages, Sizes(4, 2, 16, 12, 40, 50), 0.3, 1e-5)
    found = stack(x[:, None], cos[:, None], sin[:, None], (shared, own), torch.arange(slots), torch.zeros(slots).long())
    assert (found[:, 0] - wanted).abs().max() <= SLACK[dtype] * (1 + wanted.abs().max())


# ---- the draw of a token ----


@needed
def test_draws_are_pytorchs_but_for_those_between_two_tokens():
    cases = [c for c in sampling_cases.cases() if not c.sampling.truncates and c.dtype in native.TYPES]
    wrong = [line for case in cases for line in sampling_cases.differences(case, sample=draw_token_cpu.sample)]
    assert len(cases) == 13 and not wrong, "\n".join(wrong)


@needed
def test_tokens_are_drawn_as_often_as_softmax_has_them():
    seen, expected = sampling_cases.observed(600, Sampling(0.9), 50_000, sample=draw_token_cpu.sample)
    common = expected >= 5
    statistic = ((seen - expected)[common].square() / expected[common]).sum() + (
        (seen[~common].sum() - expected[~common].sum()).square() / expected[~common].sum()
    )
    freedom = int(common.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_a_draw_does_not_depend_on_other_rows_or_on_where_it_lies(dtype):
    logits = (3 * torch.randn(9, 1000)).to(dtype)
    keys, positions = sampling_cases.keys_of(9)
    together = draw_token_cpu.sample(logits, keys, positions, 0.8)
    alone = [draw_token_cpu.sample(logits[[i]], keys[[i]], positions[[i]], 0.8) for i in range(9)]
    spread = draw_token_cpu.sample(logits.T.contiguous().T, keys, positions, 0.8)
    for found, one, other in zip(together, zip(*alone, strict=True), spread, strict=True):
        assert found.equal(torch.cat(one)) and found.equal(other)


@needed
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_of_nan_is_told_by_its_log_prob(temperature):
    logits = torch.randn(3, 300)
    logits[1, 270] = torch.nan
    tokens, logprobs, entropies = draw_token_cpu.sample(logits, *sampling_cases.keys_of(3), temperature)
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]
    assert ((tokens >= 0) & (tokens < 300)).all()


# ---- between the products of a log-prob ----


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [1, 16, 37, 2500])
def test_a_chunk_of_logits_gives_what_pytorch_makes_of_it(dtype, softcap, width):
    """Statistics over chunks, and gradients; rows end where they like, and what lies behind them stays."""
    g = torch.Generator().manual_seed(0)
    memory = (20 * torch.randn(7, 2 * width + 5, generator=g)).to(dtype)
    memory[3, : width // 2] = -torch.inf
    targets = torch.tensor([0, width - 1, width, 2 * width - 1, 0, width // 2, 1])
    transform = LogitTransform.of(0.7, softcap, 0.9)
    outcomes = []
    for module in (logprob_chunk, logprob_chunk_cpu):
        both, stats = memory.clone(), logprob_chunk.new_stats(7, memory)
        chunks = both[:, :width], both[:, width : 2 * width]
        for i, raw in enumerate(chunks):
            module.add_statistics(raw, i * width, targets, stats, transform)
        m, s, _ = stats
        rows = torch.stack([m, s.log(), torch.randn(7, generator=torch.Generator().manual_seed(1))])
        for i, raw in enumerate(chunks):
            module.to_gradient(raw, i * width, targets, rows, transform)
        assert both[:, 2 * width :].equal(memory[:, 2 * width :])
        outcomes.append((stats, both))
    (stats, gradient), (mine, ours) = outcomes
    finite = stats.isfinite()  # 0 times minus infinity in PyTorch's
    assert finite[:2].all() and mine.isfinite().all()
    torch.testing.assert_close(mine[finite], stats[finite], rtol=3e-6, atol=3e-6)
    known = gradient.isfinite()
    torch.testing.assert_close(ours[known], gradient[known], rtol=2e-5 if dtype == FULL else 2e-2, atol=2e-6)


# ---- linear layers, norms, gates, rotary positions ----


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize(
    "m, n, k",
    [(1, 48, 16), (3, 5, 2), (8, 96, 64), (21, 100, 34), (64, 49, 576), *((m, 97, 64) for m in range(2, 34))],
)
@pytest.mark.parametrize("bias", [False, True])
def test_laid_out_weights_multiply_as_linear_layers(dtype, m, n, k, bias):
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, m, k), (n, k), (n,)))
    b = b if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    near(laid_out_linear(lay_out(weight), n, b, x), exact, dtype)


@needed
@pytest.mark.parametrize("dtype, pair", [(FULL, 1), (HALF, 2)])
def test_what_a_panel_holds(dtype, pair):
    weight = torch.arange(50 * 38.0).view(50, 38).to(dtype)
    padded = F.pad(weight, (0, 0, 0, 46))
    assert lay_out(weight).equal(padded.view(2, 48, 38 // pair, pair).transpose(1, 2))


@needed
def test_odd_inputs_cannot_be_laid_out_in_pairs():
    assert can_lay_out(torch.randn(4, 3)) and not can_lay_out(torch.randn(4, 3).to(HALF))


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("rows, width", [(1, 5), (7, 16), (70, 576), (3, 33)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(dtype, rows, width, offset):
    g = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=g).to(dtype) for shape in ((rows, width), (width,), (rows, width)))
    x = x * torch.logspace(-4, 2, rows)[:, None].to(dtype)  # eps counts in some, and is lost in others
    exact = outcome(lambda a, w: F.rms_norm(a, (width,), w + offset, 1e-5), [y.double() for y in (x, weight, dy)])
    for mine, wanted in zip(outcome(lambda a, w: rms_norm(a, w, 1e-5, offset), (x, weight, dy)), exact, strict=True):
        near(mine, wanted, dtype)


@needed
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(3,), (5, 16), (70, 1000)])
def test_gates(dtype, shape):
    g = torch.Generator().manual_seed(0)
    gate, up, dout = ((6 * torch.randn(shape, generator=g)).to(dtype) for _ in range(3))
    gate.view(-1)[:2] = torch.tensor([-200.0, 200.0])
    exact = outcome(lambda a, b: F.silu(a) * b, [y.double() for y in (gate, up, dout)])
    for mine, wanted in zip(outcome(silu_product, (gate, up, dout)), exact, strict=True):
        near(mine, wanted, dtype)


@needed
@pytest.mark.parametrize("dtype, angles", [(FULL, FULL), (HALF, FULL), (HALF, HALF)])
@pytest.mark.parametrize("batch, heads, tokens, width", [(1, 3, 5, 16), (4, 2, 1, 6), (2, 1, 600, 64)])
def test_rotary_positions(dtype, angles, batch, heads, tokens, width):
    g = torch.Generator().manual_seed(0)
    x, dy, k = (torch.randn(batch, tokens, heads, width, generator=g).to(dtype).transpose(1, 2) for _ in range(3))
    cos, sin = torch.randn(2, batch, tokens, width, generator=g).to(angles)
    low, high = x.double().chunk(2, -1)
    exact = x.double() * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]
    wider = torch.promote_types(dtype, angles)
    x = x.detach().requires_grad_()
    found, _ = rotate(x, k, cos, sin)
    near(found.detach(), exact, wider)
    if wider == FULL:  # the transposed map: <dy, turn(x)> = <turned back(dy), x>
        back = torch.autograd.grad(found, x, dy.float())[0].double()
        torch.testing.assert_close(
            (back * x).sum(), (dy.double() * exact).sum(), rtol=1e-2, atol=1e-2 * exact.abs().max()
        )


# ---- which modules are what ----

USUAL = ["llama", "qwen2", "qwen3", "mistral"]


@needed
@pytest.mark.parametrize("family", [*USUAL, "granite", "gemma2", "olmo2", "cohere", "phi3"])
def test_only_layers_that_compute_what_the_kernel_does_are_taken(family):
    """Granite multiplies its residuals by a number of the configuration; Mistral's window is seen by its attention."""
    model = tiny_model(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    assert stack_serves(model) == (family in USUAL)


@needed
@pytest.mark.parametrize(
    "family, offset, gated",
    [("llama", 0.0, True), ("gemma2", 1.0, False), ("olmo2", 0.0, True), ("cohere", None, True), ("phi", None, False)],
)
def test_norms_and_gates_are_found_by_what_they_compute(family, offset, gated):
    model = tiny_model(family)
    norms = {norm_offset(m) for name, m in model.named_modules() if name.endswith(("layernorm", "norm"))}
    assert norms == {offset}
    assert any(is_gated_mlp(m) for m in model.modules()) == gated


@needed
def test_by_itself_a_model_stays_transformers_own():
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8]])
    plain = model(input_ids=ids).logits
    install_layer_kernels(model)
    assert model(input_ids=ids).logits.equal(plain)
    with layer_kernels_enabled():
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-4)
