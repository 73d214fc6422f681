"""Compile every Triton kernel for GPUs that are not there, and write what each takes of a chip into docs/gpu.md.

    TRITON_INTERPRET=0 python benchmarks/compiled_kernels.py [--write] [--short] [--targets sm_90a] [--only part_kernel]

Triton and ptxas compile without a GPU; no time is measured. For each kernel, shape and type of kernel_cases.py:
bytes of shared memory (CHIPS has the limits), registers a thread, bytes that spilled to memory, and how often tensor
cores are called. One JSON line a kernel; --write puts the rows that were compiled into the tables of docs/gpu.md and
docs/zh/gpu.md. --short takes the cases that the tests compile.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_cases import Case, all_cases

ROOT = Path(__file__).resolve().parent.parent
KIB = 1024
CHIPS = {  # target -> compute capability, KiB of shared memory that a program may take, chips
    "sm_80": (80, 163, "A100"),
    "sm_86": (86, 99, "RTX 30, A10"),
    "sm_89": (89, 99, "RTX 40, L4, L40S"),
    "sm_90a": (90, 227, "H100, H200"),
    "sm_100a": (100, 227, "B200"),
    "sm_120a": (120, 99, "RTX 50"),
}
PAGES = {
    "docs/gpu.md": ("kernel", "KiB of shared memory (bytes spilled)", "limit"),
    "docs/zh/gpu.md": ("内核", "共享内存 KiB（溢出字节数）", "上限"),
}
BEGIN, END = "<!-- by benchmarks/compiled_kernels.py --write -->", "<!-- end of the table -->"


def compile_case(case: Case, target: str) -> dict:
    """Return what Triton and ptxas say of one kernel on one chip."""
    names, values = case.kernel.arg_names, case.values
    signature = {
        n: "constexpr" if n in values else case.types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in values and (n.endswith("_ptr") or n in case.divisible)
    }
    source = ASTSource(case.kernel, signature, {(names.index(k),): v for k, v in values.items()}, aligned)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        made = triton.compile(source, target=GPUTarget("cuda", CHIPS[target][0], 32), options=case.options)
    said, ptx = log.getvalue(), made.asm["ptx"]
    return {
        "row": case.row,
        "variant": case.variant,
        "target": target,
        "shared": made.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "tensor cores": len(re.findall(r"mma\.sync|wgmma\.mma|tcgen05\.mma", ptx)),
        "accesses": len(re.findall(r"(?:ld|st)\.global", ptx)),
        "wide": len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v4\.b32", ptx)),  # 16 bytes each
    }


def sweep(cases: list[Case], targets: list[str]) -> Iterator[dict]:
    """Compile all cases for all targets; what was compiled before is not read back, as ptxas would say nothing."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    for case in cases:
        for target in targets:
            yield compile_case(case, target)


def cells(results: list[dict]) -> dict[str, list[str]]:
    """Return row -> for each chip `34.0`, or `34.0 (16)` where a variant spills 16 bytes."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        found[result["row"]][result["target"]].append(result)

    def cell(variants: list[dict]) -> str:
        spilled = max(v["spilled"] for v in variants)
        return f"{max(v['shared'] for v in variants) / KIB:.1f}" + f" ({spilled})" * bool(spilled)

    return {row: [cell(by[target]) for target in CHIPS] for row, by in found.items()}


def rows_of(page: str) -> dict[str, list[str]]:
    """Return row -> its cells, as a page has them."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    parts = ([part.strip() for part in line.strip("| ").split("|")] for line in lines)
    return {row: found for row, *found in parts if row.startswith("`")}


def read_table(page: str) -> dict[str, dict[str, tuple[float, int]]]:
    """Return row -> target -> (KiB, bytes spilled) as a page says."""

    def numbers(cell: str) -> tuple[float, int]:
        kib, spilled = re.fullmatch(r"([\d.]+)(?: \((\d+)\))?", cell).groups()
        return float(kib), int(spilled or 0)

    return {row: dict(zip(CHIPS, map(numbers, found), strict=True)) for row, found in rows_of(page).items()}


def write(results: list[dict]) -> None:
    """Put rows into the tables of the pages, in the order of the cases; rows that were not compiled stay."""
    for name, (kernel, title, limit) in PAGES.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        known = rows_of(page) | cells(results)
        lines = [
            f"| {kernel}: {title} | " + " | ".join(f"{t} ({chips})" for t, (_, _, chips) in CHIPS.items()) + " |",
            "|---|" + "---:|" * len(CHIPS),
            f"| **{limit}** | " + " | ".join(f"**{most}**" for _, most, _ in CHIPS.values()) + " |",
            *(f"| {row} | " + " | ".join(known[row]) + " |" for row in dict.fromkeys(c.row for c in all_cases())),
        ]
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        assert begin and end, f"{name} has no place for the table"
        (ROOT / name).write_text("\n".join([before + begin, "", *lines, "", end + after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables of the documentation")
    parser.add_argument("--short", action="store_true", help="only the cases that the tests compile")
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", default="", help="rows that contain this")
    args = parser.parse_args()
    cases = [c for c in all_cases() if args.only in c.row and (c.telling or not args.short)]
    results = []
    for result in sweep(cases, args.targets):
        results.append(result)
        print(json.dumps(result), flush=True)
    over = [r for r in results if r["shared"] > CHIPS[r["target"]][1] * KIB]
    spilled = sum(r["spilled"] > 0 for r in results)
    print(f"{len(results)} compiled, {len(over)} over a chip's limit, {spilled} spill", file=sys.stderr)
    if args.write:
        assert not args.short and len(args.targets) == len(CHIPS), "--write takes whole rows"
        write(results)
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
