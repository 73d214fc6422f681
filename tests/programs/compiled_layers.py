"""Compiles the Triton kernels of layers for GPUs, without one, and prints, as JSON, what ptxas says of each: registers,
spills, and loads and stores of 16 bytes. The sizes are those of real models."""

import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
from compiled_logprob import TARGETS, assemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo.kernels import norm_gate_rotary_triton, write_tokens_triton
from gspo.kernels.norm_gate_rotary_triton import GATES, norm_blocks, rotate_blocks

FLOATS = ("eps", "offset")
FULL, HALF = "fp32", "bf16"
WIDTHS = (64, 128, 896, 4096, 8192)  # of norms: over a head, and of hidden states
HEADS = ((14, 2, 64), (32, 8, 128), (8, 4, 256), (64, 8, 128))  # heads, KV heads, width


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, pointers that are not float32, and what is constant."""
    m = norm_gate_rotary_triton
    for width, (x, other), add in product(WIDTHS, [(FULL, HALF), (HALF, HALF)], [False, True]):
        named = f"{width} {x} {other}{' add' * add}"
        types = {"x_ptr": x, "total_ptr": x, "branch_ptr": HALF, "weight_ptr": x, "y_ptr": HALF}
        yield f"norm {named}", m.norm_kernel, types, {"ADD": add, **norm_blocks(width)}
        back = {"x_ptr": x, "dx_ptr": x, "dtotal_ptr": x, "dbranch_ptr": HALF, "weight_ptr": x, "dy_ptr": HALF}
        twice = {"ADD": add, "TWICE": add and x != HALF, **norm_blocks(width)}
        yield f"norm back {named}", m.norm_back_kernel, back, twice
    for dtype in (FULL, HALF):
        gates = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr", "dout_ptr", "dgate_ptr", "dup_ptr"), dtype)
        yield f"silu {dtype}", m.silu_kernel, gates, {"BLOCK": GATES, "num_warps": 4}
        yield f"silu back {dtype}", m.silu_back_kernel, gates, {"BLOCK": GATES, "num_warps": 4}
    for heads, dtype, back in product(HEADS, (FULL, HALF), (False, True)):
        types = dict.fromkeys(("q_ptr", "k_ptr", "q_to_ptr", "k_to_ptr"), dtype)
        yield f"rotate {heads} {dtype}{' back' * back}", m.rotate_kernel, types, {"BACK": back, **rotate_blocks(*heads)}
    pages = dict.fromkeys(("key_pages_ptr", "value_pages_ptr", "keys_ptr", "values_ptr"), HALF) | {"places_ptr": "i64"}
    sizes = {"HEADS": 8, "D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, "num_warps": 1}
    yield "write", write_tokens_triton.write_kernel, pages, sizes


def compile_kernel(kernel: Any, capability: int, types: dict[str, str], values: dict[str, Any]) -> Any:
    """The compiled kernel, as a run has it: strides and widths are multiples of 16, what is 1 or None is constant."""
    values, names = dict(values), kernel.arg_names
    warps = values.pop("num_warps")
    counts = ("rows", "tiles", "blocks", "tokens", "inner")
    if not values.get("ADD", True):
        values |= dict.fromkeys({"total_ptr", "branch_ptr", "dtotal_ptr"} & set(names))
    if "inner" in names and values["BLOCK"] > 128:  # not a norm over heads
        values["inner"] = 1
    kinds = {name: f"*{types.get(name, FULL)}" if name.endswith("_ptr") else "i32" for name in names}
    kinds |= dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(values, "constexpr")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kinds[name] != "constexpr" and kinds[name] != "fp32" and name not in counts
    }
    source = ASTSource(
        kernel, {name: kinds[name] for name in names}, {(names.index(k),): v for k, v in values.items()}, divisible
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def main() -> None:
    step, results = int(sys.argv[1]), {}
    for (target, capability), case in list(product(TARGETS.items(), kernels()))[::step]:
        name, kernel, types, values = case
        compiled = compile_kernel(kernel, capability, types, values)
        ptx = compiled.asm["ptx"]
        wide = len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v4\.b32", ptx))
        every = len(re.findall(r"(?:ld|st)\.global", ptx))
        results[f"{name} {target}"] = assemble(ptx, target) | {
            "wide": wide, "accesses": every, "shared": compiled.metadata.shared,
        }  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
