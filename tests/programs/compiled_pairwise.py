"""Compiles the pairwise kernel for sm_80 and sm_90a, without a GPU, and prints, as JSON, what ptxas says of each."""

import json
from itertools import product

import triton
from compiled_logprob import TARGETS, assemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo.kernels.pair_settings import PARTS
from gspo.kernels.pairwise_triton import blocks, pairwise_kernel

FLOATS = ("beta", "after", "share", "divisor", "ranking_coef", "nll_coef")
TYPES = {"weights_ptr": "*fp64", "beats_ptr": "*u8", "forks_ptr": "*i64", "lengths_ptr": "*i64"}
ONE_TERM = {"weights_ptr": None, "LENGTH_NORM": "sum", "NORMALIZER": "constant", "RANKING": False, "NLL": False}
EVERYTHING = {"LENGTH_NORM": "mean", "NORMALIZER": "sqrt", "RANKING": True, "NLL": True}


def compile_kernel(capability: int, n: int, options: dict) -> str:
    """PTX of groups of n, with the types and the divisibility of a run."""
    layout = blocks(n)
    warps = layout.pop("num_warps")
    names = pairwise_kernel.arg_names
    values = options | layout | {"COLUMNS": len(PARTS)}
    types = TYPES | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(values, "constexpr")
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(pairwise_kernel, signature, {(names.index(k),): v for k, v in values.items()}, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


def main() -> None:
    results = {}
    for (target, capability), n in product(TARGETS.items(), (2, 8, 64)):
        for name, options in {"one term": ONE_TERM, "everything": EVERYTHING}.items():
            results[f"{target} {n} {name}"] = assemble(compile_kernel(capability, n, options), target)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
