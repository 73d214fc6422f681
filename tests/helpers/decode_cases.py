"""Steps of decoding, shared by the CPU's tests, the interpreter's and the GPU's, and how far off the attention is.

The measure is a softmax in float64 over each slot's own keys, taken one by one. An error may be what plain PyTorch
makes in the same dtype, plus a little.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.decode_attention import decode_attention, plain_decode_attention
from gspo.kernels.decode_types import Pool, Readers

SLACK = {torch.float64: 1e-14, torch.float32: 4e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}

MARGIN = 4  # two right orders of summation differ by less in any draw, a lost digit by more
THREE_PARTS = 4e-6  # float32 on tensor cores, as three TF32 products


class Case(NamedTuple):
    dtype: torch.dtype
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    page: int = 16
    prompt_page: int = 16
    softcap: float | None = None
    window: int | None = None
    prompts: tuple[tuple[int, int], ...] = ((37, 3), (0, 1), (16, 1), (90, 1))  # tokens, answers
    members: int = 3
    longest: int = 40  # tokens of an answer

    def name(self) -> str:
        parts = [str(self.dtype)[6:], f"{self.heads}/{self.kv_heads}x{self.width}/{self.value_width}"]
        parts += [f"pages of {self.prompt_page} and {self.page}"]
        parts += [f"{k} {v}" for k, v in (("softcap", self.softcap), ("window", self.window)) if v is not None]
        return ", ".join(
            [*parts, f"{len(self.prompts)} prompts", f"{self.members} together", f"longest {self.longest}"]
        )


class Drawn(NamedTuple):
    q: Tensor  # [S, H, D], heads as slices of a wider tensor
    prompts: Pool
    answers: Pool
    positions: Tensor
    keys: list[Tensor]  # of each slot, [L, Hk, D], prompt and answer
    values: list[Tensor]


def draw(case: Case, device: str = "cpu", seed: int = 0) -> Drawn:
    """Pages scattered over a pool of which the rest is NaN; lengths from one token to the longest."""
    g = torch.Generator().manual_seed(seed)
    sizes = [size for size, count in case.prompts for _ in range(count)]
    slots = len(sizes)
    lengths = torch.randint(1, case.longest + 1, (slots,), generator=g)
    lengths[0], lengths[-1] = 1, case.longest
    prompts = [_tokens(case, size, g) for size, _ in case.prompts]
    answers = [_tokens(case, int(length), g) for length in lengths]
    tiles, members, slot = [], [], 0
    for number, (_, count) in enumerate(case.prompts):
        for first in range(0, count, case.members):
            here = range(slot + first, slot + min(first + case.members, count))
            tiles.append(number)
            members.append([*here, *[-1] * (case.members - len(here))])
        slot += count
    none = torch.zeros(len(tiles), dtype=torch.long)
    pools = (
        _pool(case, case.prompt_page, prompts, tiles, members, none, g),
        _pool(case, case.page, answers, list(range(slots)), [[s] for s in range(slots)], torch.tensor(sizes), g),
    )
    q = torch.randn(slots, 2 * case.heads, case.width, generator=g).to(case.dtype)[:, : case.heads]
    positions = (torch.tensor(sizes) + lengths - 1).int()
    owner = [number for number, (_, count) in enumerate(case.prompts) for _ in range(count)]
    keys, values = (
        [torch.cat([prompts[owner[s]][i], answers[s][i]]).to(device) for s in range(slots)] for i in range(2)
    )
    moved = [Pool(p.keys.to(device), p.values.to(device), Readers(*(x.to(device) for x in p.readers))) for p in pools]
    return Drawn(q.to(device), *moved, positions.to(device), keys, values)


def _tokens(case: Case, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    draw = lambda width: torch.randn(size, case.kv_heads, width, generator=g).to(case.dtype)  # noqa: E731
    return draw(case.width), draw(case.value_width)


def _pool(
    case: Case, page: int, held: list[tuple[Tensor, Tensor]], sequences: list[int], members: list[list[int]],
    starts: Tensor, g: torch.Generator,
) -> Pool:  # fmt: skip
    sizes = [len(keys) for keys, _ in held]
    wide = max(1, max(-(-size // page) for size in sizes)) + 1
    free = torch.randperm(wide * len(held) + 3, generator=g).tolist()
    keys, values = (
        torch.full((len(free), case.kv_heads, page, width), torch.nan, dtype=case.dtype)
        for width in (case.width, case.value_width)
    )
    tables = torch.full((len(held), wide), -7)
    for number, (k, v) in enumerate(held):
        for nth, at in enumerate(range(0, len(k), page)):
            tables[number, nth] = free.pop()
            for pages, x in ((keys, k), (values, v)):
                part = x[at : at + page]
                pages[tables[number, nth], :, : len(part)] = part.transpose(0, 1)
    tables = tables[sequences]
    numbers = tables, torch.tensor(members), torch.tensor(sizes)[sequences], starts
    return Pool(keys, values, Readers(*(x.int().contiguous() for x in numbers)))


def exactly(case: Case, drawn: Drawn) -> Tensor:
    """Slot by slot in float64."""
    out = []
    for q, position, keys, values in zip(drawn.q, drawn.positions.tolist(), drawn.keys, drawn.values, strict=True):
        first = 0 if case.window is None else max(0, position + 1 - case.window)
        k, v = (x[first:].double().repeat_interleave(case.heads // case.kv_heads, 1) for x in (keys, values))
        scores = torch.einsum("hd,lhd->hl", q.double(), k) * case.width**-0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        out.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(out)


def too_far(case: Case, device: str = "cpu") -> list[str]:
    """What is further from float64 than plain PyTorch in the case's dtype is, in words."""
    drawn = draw(case, device)
    exact = exactly(case, drawn)
    arguments = (drawn.positions, case.width**-0.5, case.softcap, case.window)
    ours = decode_attention(drawn.q, drawn.prompts, drawn.answers, *arguments)
    clean = [p._replace(keys=p.keys.nan_to_num(), values=p.values.nan_to_num()) for p in drawn[1:3]]
    plain = plain_decode_attention(drawn.q, *clean, *arguments)
    wrong = []
    for what, norm in (("largest", torch.inf), ("mean square", 2)):
        size = exact.norm(norm)
        mine, theirs = ((x.double() - exact).norm(norm) / size for x in (ours, plain))
        slack = THREE_PARTS if device == "cuda" and case.dtype == torch.float32 else SLACK[case.dtype]
        if not mine <= MARGIN * theirs + slack:
            wrong.append(f"{case.name()}, {what}: {mine:.2e} > {theirs:.2e}")
    return wrong


def cases() -> list[Case]:
    """What makes a path of its own: dtypes, heads, widths, pages, windows, caps, and members by the block."""
    half, all_of_it = torch.bfloat16, {"heads": 7, "kv_heads": 1, "window": 20, "softcap": 1.5}
    cut = {"heads": 6, "page": 64, "prompt_page": 64, "prompts": ((130, 3), (3, 1)), "members": 2, "softcap": 3.0}
    return [
        Case(torch.float32),
        Case(torch.float32, heads=2, window=1),
        Case(torch.float32, **all_of_it),
        Case(torch.float32, kv_heads=4, width=24, value_width=16, page=5, prompt_page=48, window=33),
        Case(torch.float32, **cut),
        Case(torch.float32, heads=36, kv_heads=2, prompts=((20, 4), (0, 1)), members=4, longest=20),
        Case(half, **all_of_it),
        Case(half, kv_heads=4, width=24, value_width=16, page=5, prompt_page=48, window=33),
        Case(half, **cut),
        Case(torch.float16, **all_of_it),
    ]
