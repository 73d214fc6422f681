"""List every Triton kernel with the block sizes and types that runs of real models give it.

A new kernel gets a function that yields its cases, and a line in `all_cases`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import triton

from gspo.kernels import (
    decode_attention_triton,
    draw_token_triton,
    logprob_chunk_triton,
    norm_gate_rotary_triton,
    pairwise_triton,
    write_tokens_triton,
)
from gspo.kernels.pair_settings import PARTS

DTYPES = {"bf16": 2, "fp32": 4}  # bytes
HEADS = {  # query heads / KV heads x width of keys (/ of values): some of the models that have them
    "14/2 x 64": (14, 2, 64, 64),  # Qwen2.5-0.5B
    "32/8 x 64": (32, 8, 64, 64),  # Llama-3.2-1B
    "32/32 x 80": (32, 32, 80, 80),  # Phi-2
    "32/32 x 96": (32, 32, 96, 96),  # Phi-3-mini
    "28/4 x 128": (28, 4, 128, 128),  # Qwen2.5-7B
    "32/8 x 128": (32, 8, 128, 128),  # Llama-3.1-8B, Qwen3-4B
    "16/16 x 192/128": (16, 16, 192, 128),  # DeepSeek-V2-Lite
    "8/4 x 256": (8, 4, 256, 256),  # Gemma-2-2B
    "4/1 x 256": (4, 1, 256, 256),  # Gemma-3-1B
}
IN_FP32 = ("14/2 x 64", "32/8 x 128", "16/16 x 192/128", "8/4 x 256")
VOCABULARIES = {"262k": 262_144, "32k": 32_000}  # from 131k to 262k kernels are the same
ONE_TERM = {"weights_ptr": None, "LENGTH_NORM": "sum", "NORMALIZER": "constant", "RANKING": False, "NLL": False}
EVERYTHING = {"LENGTH_NORM": "mean", "NORMALIZER": "sqrt", "RANKING": True, "NLL": True}


@dataclass(frozen=True)
class Case:
    """One kernel with everything that is known when it is compiled."""

    row: str  # of the table
    variant: str  # within the row
    kernel: Any
    values: dict[str, Any]  # of constexpr arguments, None for a tensor that is left out
    types: dict[str, str]  # of the other arguments; those not named are int32, and pointers to float32
    options: dict[str, int]
    divisible: tuple[str, ...] = ()  # numbers that are multiples of 16, as all pointers are
    telling: bool = field(default=False, compare=False)  # belongs to the short sweep of the tests


def all_cases() -> list[Case]:
    """Return the cases of all kernels, in the order of the table."""
    layers = [*norm_cases(), *gate_cases(), *rotate_cases(), *write_cases()]
    return [*decode_cases(), *merge_cases(), *draw_cases(), *logprob_cases(), *pairwise_cases(), *layers]


def decode_cases() -> Iterator[Case]:
    """The attention of decoding: `members` responses read a prompt together, one its own pages.

    Pages are those of the engine: of prompts 512 tokens, or 16 where everything is short, of responses 64 or 16. In
    fp32 a program takes 16 queries and 16 keys whatever reads together, so there is one shape for each padded width.
    """
    reads = {"16 read a prompt": (16, 512), "response": (1, 64)}
    more_reads = {"4 read a prompt": (4, 512), "8 read a prompt": (8, 512)}
    more_reads |= {"16 read a short prompt": (16, 16), "short response": (1, 16)}
    telling = {  # the largest tiles, and those that have spilled
        ("32/8 x 128", "bf16", "8 read a prompt"), ("16/16 x 192/128", "bf16", "16 read a prompt"),
        ("8/4 x 256", "bf16", "16 read a prompt"), ("32/8 x 128", "fp32", "16 read a prompt"),
    }  # fmt: skip
    kinds = [("bf16", *kind) for kind in product(HEADS, (reads | more_reads).items())]
    kinds += [("fp32", *kind) for kind in product(IN_FP32, reads.items())]
    for dtype, heads, (read, (members, page)) in kinds:
        shape = HEADS[heads]
        shaped = shape in (HEADS["32/8 x 128"], HEADS["8/4 x 256"]) and read in ("16 read a prompt", "response")
        for more in ("", ", cap and window", ", TF32")[: 1 + shaped * (1 + (dtype == "fp32"))]:
            values, options = _decode_values(shape, members, page, DTYPES[dtype])
            values |= {"CAPPED": "cap" in more, "WINDOW": "cap" in more}
            values |= {"PRECISION": "tf32"} if "TF32" in more else {}
            types = {f"{x}_ptr": f"*{dtype}" for x in ("q", "keys", "values")}
            types |= {f"{x}_ptr": "*i32" for x in ("pages", "members", "sizes", "starts", "positions")}
            types |= {"inner": "fp32", "outer": "fp32"}
            variant = read + more
            kernel = decode_attention_triton.part_kernel
            told = (heads, dtype, variant) in telling
            row = f"`part_kernel` {heads} {dtype}"
            yield Case(row, variant, kernel, values, types, options, ("q_slot", "q_head"), told)


def _decode_values(shape: tuple[int, ...], members: int, page: int, itemsize: int) -> tuple[dict, dict]:
    heads, kv_heads, width, value_width = shape
    group = heads // kv_heads
    values = decode_attention_triton.blocks(members * group, page, width, value_width, itemsize)
    options = {k: values.pop(k) for k in ("num_warps", "num_stages")}
    values |= {"MEMBERS": members, "KV_HEADS": kv_heads, "GROUP": group, "PAGE": page, "D": width, "DV": value_width}
    return values | {"SHARE": decode_attention_triton.SHARE}, options


def merge_cases() -> Iterator[Case]:
    """The merge of the parts of that attention, of long sequences and of few very long ones."""
    kernel, warps = decode_attention_triton.merge_kernel, decode_attention_triton.merge_warps
    for width, splits in product((64, 256), (16, 64)):
        values = {"DV": width, "BLOCK_SPLITS": splits, "BLOCK_DV": width}
        options = {"num_warps": warps(splits, width)}
        variant = f"{splits} parts, {width} bf16"
        yield Case("`merge_kernel`", variant, kernel, values, {"merged_ptr": "*bf16"}, options)


def draw_cases() -> Iterator[Case]:
    """The draw of a token, greedy or not, with and without truncation."""
    k, blocks = draw_token_triton, {"PER_CHUNK": draw_token_triton.PER_CHUNK, "BLOCK": draw_token_triton.BLOCK}
    kernels = {
        "sums_kernel": (k.sums_kernel, 8, {"TRUNCATED": False} | blocks),
        "sums_kernel truncated": (k.sums_kernel, 8, {"TRUNCATED": True} | blocks),
        "least_kernel": (k.least_kernel, 8, {"TOP_K": True, "TOP_P": True, "PIECE": k.PIECE}),
        "pick_kernel": (k.pick_kernel, 4, {"GREEDY": False, "TRUNCATED": True} | blocks),
        "pick_kernel greedy": (k.pick_kernel, 4, {"GREEDY": True, "TRUNCATED": False} | blocks),
    }
    types = {f"{name}_ptr": "*i64" for name in ("keys", "positions", "tokens")}
    types |= dict.fromkeys(("temperature", "top_p", "log_min_p"), "fp32")
    for (size, entries), dtype, (name, (kernel, warps, values)) in product(
        VOCABULARIES.items(), DTYPES, kernels.items()
    ):
        chunks = triton.next_power_of_2(triton.cdiv(entries, k.PER_CHUNK * k.BLOCK))
        low = {"LOW_BITS": {"bf16": 16, "fp32": 0}[dtype]} if kernel is k.least_kernel else {}
        told = (size, dtype, name) == ("262k", "bf16", "pick_kernel")
        values, given = values | low | {"CHUNKS": chunks}, types | {"logits_ptr": f"*{dtype}"}
        row, variant = f"`{name.split()[0]}`", f"{name} {dtype}, {size} tokens"
        yield Case(row, variant, kernel, values, given, {"num_warps": warps}, ("size", "stride"), told)


def logprob_cases() -> Iterator[Case]:
    """The two passes over a chunk of logits in training, with a soft cap."""
    k = logprob_chunk_triton
    types = {"target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}
    for kernel, dtype in product((k.statistics_kernel, k.gradient_kernel), DTYPES):
        values, given = {"CAPPED": True, "BLOCK": k.BLOCK}, types | {"raw_ptr": f"*{dtype}"}
        row, options = f"`{kernel.__name__}`", {"num_warps": k.warps(k.BLOCK)}
        told = (kernel, dtype) == (k.gradient_kernel, "bf16")
        yield Case(row, dtype, kernel, values, given, options, ("stride",), told)


def pairwise_cases() -> Iterator[Case]:
    """The pairwise loss of groups of N responses."""
    types = {"weights_ptr": "*fp64", "beats_ptr": "*u8", "forks_ptr": "*i64", "lengths_ptr": "*i64"}
    types |= dict.fromkeys(("beta", "after", "share", "divisor", "ranking_coef", "nll_coef"), "fp32")
    for n, (name, terms) in product((4, 8, 16, 64), {"one term": ONE_TERM, "all terms": EVERYTHING}.items()):
        layout = pairwise_triton.blocks(n)
        options = {"num_warps": layout.pop("num_warps")}
        values = terms | layout | {"COLUMNS": len(PARTS)}
        told = (n, name) == (64, "all terms")
        yield Case(f"`pairwise_kernel` N {n}", name, pairwise_triton.pairwise_kernel, values, types, options, (), told)


def norm_cases() -> Iterator[Case]:
    """RMSNorm of heads and of hidden states, with the sum before it; float32 beside bf16, as under autocast."""
    m, moves = norm_gate_rotary_triton, ("width", "inner", "x_outer", "x_inner")
    for width, x in ((128, "bf16"), (896, "fp32"), (8192, "fp32"), (8192, "bf16")):
        blocks, add = m.norm_blocks(width), width > 128
        options = {"num_warps": blocks.pop("num_warps")}
        half = dict.fromkeys(("y_ptr", "dy_ptr", "branch_ptr", "dbranch_ptr"), "*bf16")
        types = dict.fromkeys(("x_ptr", "weight_ptr", "total_ptr", "dx_ptr", "dtotal_ptr"), f"*{x}") | half
        types |= {"eps": "fp32", "offset": "fp32"}
        unused = {} if add else {"branch_ptr": None, "total_ptr": None}
        unused_back = {} if add else {"dtotal_ptr": None, "dbranch_ptr": None}
        variant, told = f"{width} {x}" + " add" * add, (width, x) == (8192, "fp32")
        values = {"ADD": add, **blocks}
        yield Case("`norm_kernel`", variant, m.norm_kernel, values | unused, types, options, moves)
        values |= {"TWICE": add and x == "fp32", **unused_back}
        yield Case("`norm_back_kernel`", variant, m.norm_back_kernel, values, types, options, moves, told)


def gate_cases() -> Iterator[Case]:
    """SiLU x gate."""
    m, names = norm_gate_rotary_triton, ("gate", "up", "out", "dout", "dgate", "dup")
    for dtype, kernel in product(DTYPES, (m.silu_kernel, m.silu_back_kernel)):
        types, values = {f"{name}_ptr": f"*{dtype}" for name in names}, {"BLOCK": m.GATES}
        row, moves = f"`{kernel.__name__}`", ("width", "gate_row", "up_row")
        yield Case(row, dtype, kernel, values, types, {"num_warps": 4}, moves)


def rotate_cases() -> Iterator[Case]:
    """Rotary positions of a token's queries and keys, of few heads and of many."""
    m = norm_gate_rotary_triton
    strides = tuple(n for n in m.rotate_kernel.arg_names if not n.endswith("_ptr") and n != "tokens")
    for heads, dtype, back in (((14, 2, 64), "bf16", False), ((8, 4, 256), "bf16", True), ((64, 8, 128), "fp32", True)):
        blocks = m.rotate_blocks(*heads)
        options = {"num_warps": blocks.pop("num_warps")}
        types = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "q_to", "k_to")}
        variant = f"{heads[0]}/{heads[1]} x {heads[2]} {dtype}"
        values = {"BACK": back, **blocks}
        told = heads[0] == 64
        yield Case("`rotate_kernel`", variant, m.rotate_kernel, values, types, options, strides, told)


def write_cases() -> Iterator[Case]:
    """The new keys and values on their way to pages."""
    kernel = write_tokens_triton.write_kernel
    types = dict.fromkeys(("key_pages_ptr", "value_pages_ptr", "keys_ptr", "values_ptr"), "*bf16")
    values = {"HEADS": 8, "D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128}
    strides = ("key_token", "key_head", "value_token", "value_head")
    yield Case("`write_kernel`", "bf16", kernel, values, types | {"places_ptr": "*i64"}, {"num_warps": 1}, strides)
