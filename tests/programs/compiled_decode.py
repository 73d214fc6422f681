"""Compiles the attention of decoding for sm_80 and sm_90a, without a GPU; prints, as JSON, what ptxas says of each."""

import json
import re
from itertools import product

import triton
from compiled_logprob import TARGETS, assemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo.kernels import decode_attention_triton

# query heads, KV heads, width of keys and of values, answers together, page: 0.5B, 8B, Gemma 2, 80 wide, DeepSeek's
SHAPES = {
    "prompt 14/2x64": (14, 2, 64, 64, 8, 512),
    "answer 14/2x64": (14, 2, 64, 64, 1, 64),
    "prompt 32/8x128": (32, 8, 128, 128, 16, 64),
    "answer 32/8x128": (32, 8, 128, 128, 1, 64),
    "prompt 8/4x256": (8, 4, 256, 256, 16, 128),
    "prompt 32/32x80": (32, 32, 80, 80, 12, 64),
    "prompt 16/16x192/128": (16, 16, 192, 128, 16, 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def compiled(kernel, capability: int, values: dict, types: dict, divisible: list[str], options: dict):
    """A compiled kernel, with `divisible` arguments, and all pointers, known to be multiples of 16."""
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in values else types.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names
    }
    known = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in divisible}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in values.items()}, known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def part(capability: int, shape: tuple[int, ...], dtype: str, capped: bool, window: bool):
    heads, kv_heads, width, value_width, members, page = shape
    group = heads // kv_heads
    values = decode_attention_triton.blocks(members * group, page, width, value_width, ITEMSIZE[dtype])
    options = {k: values.pop(k) for k in ("num_warps", "num_stages")}
    values |= {"MEMBERS": members, "KV_HEADS": kv_heads, "GROUP": group, "PAGE": page, "D": width, "DV": value_width}
    values |= {"SHARE": decode_attention_triton.SHARE, "CAPPED": capped, "WINDOW": window}
    types = {f"{x}_ptr": f"*{dtype}" for x in ("q", "keys", "values")}
    types |= {"out_ptr": "*fp32", "lse_ptr": "*fp32", "inner": "fp32", "outer": "fp32"}
    return compiled(decode_attention_triton.part_kernel, capability, values, types, ["q_slot", "q_head"], options)


def merge(capability: int, dtype: str):
    types = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "merged_ptr": f"*{dtype}"}
    values = {"DV": 128, "BLOCK_SPLITS": 16, "BLOCK_DV": 128}
    return compiled(decode_attention_triton.merge_kernel, capability, values, types, [], {"num_warps": 1})


def report(kernel, target: str) -> dict[str, int]:
    """Of ptxas; bytes of shared memory; how often tensor cores are called."""
    ptx = kernel.asm["ptx"]
    products = len(re.findall(r"mma\.sync|wgmma\.mma", ptx))
    return assemble(ptx, target) | {"shared": kernel.metadata.shared, "tensor cores": products}


def main() -> None:
    results = {}
    for (target, capability), dtype in product(TARGETS.items(), ("bf16", "fp32")):
        results[f"merge {target} {dtype}"] = report(merge(capability, dtype), target)
        for number, (name, shape) in enumerate(SHAPES.items()):
            for more in (False, True)[number > 1 :]:  # a cap and a window
                said = " ".join([name, target, dtype, "capped, window" * more]).strip()
                results[said] = report(part(capability, shape, dtype, more, more), target)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
