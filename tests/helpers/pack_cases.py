"""Packs of every shape that training meets, and random queries, keys and values for them."""

import torch

from gspo.packing import packed_attention as attention
from gspo.packing.pack import pack
from gspo.types import Prompt

# prompt lengths, whose response each row is, response lengths
PACKS = {
    "ragged groups": ([9, 1, 14], [0, 0, 0, 1, 1, 2, 2], [3, 12, 1, 8, 1, 2, 5]),
    "one response": ([7], [0], [9]),
    "ends of sequence behind one token": ([1], [0, 0], [1, 1]),
    "nothing but single tokens": ([1, 1], [0, 1], [1, 1]),
    "one row of a group that was cut": ([6, 4], [0, 1, 1], [5, 7, 1]),
    "responses longer than prompts": ([2, 3], [0, 0, 1], [11, 20, 16]),
}
LARGE = (
    [130, 1, 257],
    [0] * 8 + [1] * 3 + [2] * 5,
    [1, 64, 65, 127, 128, 129, 200, 3, 70, 1, 150, 33, 256, 90, 2, 300],
)


def a_pack(shape, device="cpu", alphabet=10**9):
    """Tokens of a small alphabet give responses that begin alike; of 10^9, none."""
    prompts, owners, lengths = shape
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, alphabet, (len(owners), max(lengths)), generator=g).to(device)
    prompts = [Prompt(i, (5,) * n, "", "", "") for i, n in enumerate(prompts)]
    return pack(prompts, owners, tokens, torch.tensor(lengths, device=device))


def draw(packed, heads, kv_heads, width, value_width=None, seed=0):
    """Query [T, H, D], key [T, Hk, D], value [T, Hk, Dv] and the gradient of the output [T, H, Dv], in float64."""
    g = torch.Generator().manual_seed(seed)
    tokens, value_width = packed.ids.shape[1], value_width or width
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    return [torch.randn(tokens, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def outcome(attend, tensors):
    """[output, dquery, dkey, dvalue] of attend(query, key, value), all as [T, H, D]."""
    *inputs, grad = (x.detach() for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


SCALE = 0.4


KINDS = {
    "full": {},
    "softcap": {"softcap": 1.5},
    "window of one": {"window": 1},
    "window within prompts": {"window": 4, "softcap": 1.5},
    "window across": {"window": 10},
    "window over all": {"window": 50},
}


def by_rows(packed, **kind):
    def attend(q, k, v):
        return attention._padded_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), packed, SCALE, **kind)[0]

    return attend
