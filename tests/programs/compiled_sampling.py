"""Compiles the draw of a token for sm_80 and sm_90a, without a GPU; prints, as JSON, what ptxas says of each kernel."""

import json
from itertools import product

from compiled_decode import compiled
from compiled_logprob import TARGETS, assemble

from gspo.kernels import draw_token_triton as kernels
from gspo.kernels.draw_token_triton import BLOCK, PER_CHUNK

TYPES = {f"{name}_ptr": "*fp32" for name in ("least", "tops", "totals", "bends", "sums", "logprobs", "entropies")}
TYPES |= {f"{name}_ptr": "*i64" for name in ("keys", "positions", "tokens")}
TYPES |= dict.fromkeys(("temperature", "top_p", "log_min_p"), "fp32")
ROW = {"CHUNKS": 64}  # 152,000 entries
BLOCKS = {"PER_CHUNK": PER_CHUNK, "BLOCK": BLOCK}
VARIANTS = {
    "sums": (kernels.sums_kernel, 8, {"TRUNCATED": False} | BLOCKS),
    "sums again": (kernels.sums_kernel, 8, {"TRUNCATED": True} | BLOCKS),
    "least": (kernels.least_kernel, 8, {"TOP_K": True, "TOP_P": True, "PIECE": kernels.PIECE}),
    "pick": (kernels.pick_kernel, 4, {"GREEDY": False, "TRUNCATED": True} | BLOCKS),
    "greedy": (kernels.pick_kernel, 4, {"GREEDY": True, "TRUNCATED": False} | BLOCKS),
}


def main() -> None:
    results = {}
    for (target, capability), (dtype, low) in product(TARGETS.items(), (("bf16", 16), ("fp32", 0))):
        for name, (kernel, warps, values) in VARIANTS.items():
            values = values | ROW | ({"LOW_BITS": low} if name == "least" else {})
            types = TYPES | {"logits_ptr": f"*{dtype}"}
            made = compiled(kernel, capability, values, types, ["stride"], {"num_warps": warps})
            results[f"{name} {target} {dtype}"] = assemble(made.asm["ptx"], target)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
