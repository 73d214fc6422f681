"""Compiles the Triton kernels for sm_80 and sm_90a, without a GPU, and prints, as JSON, what ptxas says of each.

A program of its own: a kernel defined under TRITON_INTERPRET=1 cannot be compiled.
"""

import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo.kernels import logprob_chunk_triton

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
TARGETS = {"sm_80": 80, "sm_90a": 90}
KERNELS = (logprob_chunk_triton.statistics_kernel, logprob_chunk_triton.gradient_kernel)


def compile_kernel(kernel, capability: int, raw: str, capped: bool) -> str:
    """PTX, with the divisibility that `logprob_chunk_triton` gives at run time."""
    types = {"raw_ptr": f"*{raw}", "target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}
    values = {"CAPPED": capped, "BLOCK": logprob_chunk_triton.BLOCK}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in values else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name == "stride"
    }
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in values.items()}, divisible)
    warps = logprob_chunk_triton.warps(logprob_chunk_triton.BLOCK)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


def assemble(ptx: str, target: str) -> dict[str, int]:
    """What ptxas -v reports: registers a thread, bytes spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [PTXAS, "-v", f"--gpu-name={target}", path, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return {"registers": int(re.search(r"Used (\d+) registers", said).group(1)), "spilled": spilled}


def main() -> None:
    results = {}
    for kernel, (target, capability), raw in product(KERNELS, TARGETS.items(), ("bf16", "fp32")):
        for capped in (False, True):
            ptx = compile_kernel(kernel, capability, raw, capped)
            name = " ".join([kernel.__name__, target, raw, "capped" * capped]).strip()
            results[name] = assemble(ptx, target) | {"wide": len(re.findall(r"ld\.global\.v4\.b32", ptx))}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
