"""Measure one part of benchmarks/gpu_day.sh, or gather what all its parts have left.

    python benchmarks/gpu_parts.py rates|decode|model FOLDER|report FOLDER [--tiny]

A part prints each number as soon as it has it, in a line `RESULT {...}`: what a time limit cuts off is lost, and
nothing else.
"""

import argparse
import datetime
import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import rollout_cuda
from benchmarks.common import table
from benchmarks.packed_step import HALF_B, bare_rate
from gspo.models.loading import load_tokenizer
from gspo.rollout.sampler import Sampler

SLOTS = (64, 256, 1024)
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PROFILED = 15  # kernels of a profile
SHOWN = ("time/rollout", "time/reference", "time/update", "mismatch", "memory/peak_gib")  # metrics of a run
FORECAST = re.compile(r"memory of each rank: ([\d.]+) GiB at most")


def result(**numbers: float | str) -> None:
    print("RESULT", json.dumps(numbers), flush=True)


def rates(tiny: bool) -> None:
    """Versions, the rate of matrix products and that of copies."""
    name, packages = torch.cuda.get_device_name(), ("torch", "transformers", "triton")
    result(device=name, python=platform.python_version(), cuda=torch.version.cuda, **{p: version(p) for p in packages})
    size = 64 if tiny else 8192
    result(matmul_bf16_tflops=bare_rate(size, size, size, torch.bfloat16, "cuda") / 1e12)
    result(copy_gb_per_s=rollout_cuda.bandwidth(2**10 if tiny else 2**31) / 1e9)


def decode(tiny: bool) -> None:
    """The time of a decoding step of 0.5B and 1.5B shapes, and of its kernels."""
    sizes, slots, prompt = rollout_cuda.ARCHITECTURES, SLOTS, 256
    if tiny:
        sizes, slots, prompt = {"tiny": TINY}, (8,), 4
        rollout_cuda.ARCHITECTURES, rollout_cuda.STEPS, rollout_cuda.GROWN = sizes, 8, 8
    for name in sizes:
        model = rollout_cuda.random_model(name)
        sampler = Sampler(model, load_tokenizer(None), torch.device("cuda"))
        sampler.end_ids = set()
        for count in slots:
            rollout_cuda.SLOTS = count
            taken, read = rollout_cuda.step(sampler, prompt, model.config.vocab_size)
            result(model=name, slots=count, step_ms=1000 * taken, tokens_per_s=count / taken, gib_read=read / 2**30)
        if not tiny:
            with torch.profiler.profile() as profile:
                rollout_cuda.STEPS = 16
                rollout_cuda.step(sampler, prompt, model.config.vocab_size)
            print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=PROFILED), flush=True)


def write_model(folder: Path, tiny: bool) -> None:
    """Write a model of Qwen2.5-0.5B's shape with random weights and the embedded tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = load_tokenizer(None)
    shape = {**TINY, "num_key_value_heads": 2, "vocab_size": 500} if tiny else HALF_B
    config = Qwen2Config(**shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


def report(folder: Path) -> dict:
    """Gather the parts' exit codes, their results, tests, and the metrics of runs -> gpu_day.json."""
    gathered: dict = {"parts": [], "results": {}, "tests": {}, "runs": {}}
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, code, taken, limit = line.split("\t")
        part = {"name": name, "exit_code": int(code), "seconds": int(taken), "limit": int(limit)}
        gathered["parts"].append(part | {"in_time": int(code) not in (124, 137)})
    for log in sorted(folder.glob("*.log")):
        text = log.read_text(errors="replace")
        if found := re.findall(r"^RESULT (\{.*\})$", text, re.MULTILINE):  # whole lines only
            gathered["results"][log.stem] = [json.loads(line) for line in found]
        if outcomes := re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", text, re.MULTILINE):
            gathered["tests"][log.stem] = {name: outcome for outcome, name in outcomes}
        metrics = folder / log.stem.removesuffix("-first") / "run" / "metrics.jsonl"
        if metrics.exists():
            gathered["runs"][log.stem] = {"steps": [json.loads(line) for line in metrics.read_text().splitlines()]}
            if forecast := FORECAST.search(text):
                gathered["runs"][log.stem]["forecast_gib"] = float(forecast[1])
    return gathered


def page(gathered: dict) -> str:
    """Return the report as a Markdown page."""
    by_part = gathered["results"]
    first = {name: value for found in by_part.get("rates", []) for name, value in found.items()}
    names = {name: first.get(name, "-") for name in ("device", "python", "torch", "cuda", "transformers", "triton")}
    lines = [
        "# A day on a GPU\n",
        f"{datetime.date.today()}, " + ", ".join(f"{name} {value}" for name, value in names.items()) + "; made by",
        "`benchmarks/gpu_day.sh`. 124 and 137: cut off by its limit, 125: no time was left.\n",
    ]
    parts = [[p["name"], str(p["exit_code"]), f"{p['seconds']} / {p['limit']}"] for p in gathered["parts"]]
    lines.append(table(["part", "exit code", "seconds / limit"], parts))
    for name, found in by_part.items():
        numbers = [", ".join(f"{key} {_short(value)}" for key, value in each.items()) for each in found]
        lines.append(table([name], [[text] for text in numbers]))
    outcomes = [
        [name, *(str(list(tests.values()).count(kind)) for kind in ("PASSED", "FAILED", "ERROR"))]
        for name, tests in gathered["tests"].items()
    ]
    if outcomes:
        lines.append(table(["tests", "passed", "failed", "errors"], outcomes))
    runs = [
        [name, *(_short(run["steps"][-1].get(key, "-")) for key in SHOWN), _short(run.get("forecast_gib", "-"))]
        for name, run in gathered["runs"].items()
    ]
    if runs:
        lines.append(table(["last step of a run", *SHOWN, "forecast, GiB"], runs))
    return "\n".join(lines)


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rates", "decode", "model", "report"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true", help="shapes for a rehearsal")
    args = parser.parse_args()
    if args.part in ("rates", "decode"):
        {"rates": rates, "decode": decode}[args.part](args.tiny)
    elif args.part == "model":
        write_model(args.folder, args.tiny)
    else:
        file = args.folder / "gpu_day.json"
        gathered = report(args.folder)
        file.write_text(json.dumps(gathered, indent=1))
        (args.folder / "gpu.md").write_text(page(gathered))
        print(file)


if __name__ == "__main__":
    main()
