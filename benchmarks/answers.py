"""Compare the default reward with math-verify and verl's rules on the cases of the tests, and their speeds.

    python benchmarks/answers.py [--verl FOLDER]        (make bench-reward)

math-verify is called as verl calls it: the gold answer in a box, numbers and LaTeX read from the response. verl's rules
are read from its package where it is installed (pip install --no-deps verl), or from the folder of an unpacked wheel.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from answer_cases import CASES, CUT_OFF
from answer_exploits import EXPLOITS

from benchmarks.common import table
from gspo.reward.latex import available
from gspo.reward.reward_func import score_parts

Rule = Callable[[str, str], bool]  # (response, gold answer) -> whether it is right
OURS = "this project"


def ours(response: str, gold: str) -> bool:
    """Say whether the default reward takes the answer for right."""
    return score_parts("", response, gold)["acc"] == 1.0


def math_verify(response: str, gold: str) -> bool:
    """Say whether math-verify does, called as verl calls it."""
    from math_verify.grader import verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, parse

    golds = parse(rf"\boxed{{{gold}}}", (LatexExtractionConfig(),))
    answers = parse(response, (ExprExtractionConfig(), LatexExtractionConfig()))
    return any(verify(g, a) for g in golds for a in answers)


def verl_rules(folder: Path | None) -> dict[str, Rule]:
    """Return verl's rules for GSM8K and MATH; none where verl is not there."""
    if folder is None:
        spec = importlib.util.find_spec("verl")
        folder = Path(spec.submodule_search_locations[0]) if spec else None
    if folder is None:
        return {}

    def module(name: str):
        file = folder / "utils" / "reward_score" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"verl_{name}", file)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    gsm8k, math = module("gsm8k"), module("math_reward")
    return {
        "verl gsm8k, strict": lambda r, g: gsm8k.compute_score(r, g) == 1.0,
        "verl gsm8k, flexible": lambda r, g: gsm8k.compute_score(r, g, method="flexible") == 1.0,
        "verl math": lambda r, g: math.compute_score(r, g) == 1.0,
    }


def cases() -> dict[str, list[tuple[str, str, bool]]]:
    """Return {kind: [(gold, response, whether its answer is right)]}, with the exploits as a kind."""
    found = {}
    for kind, rows in CASES.items():
        half_is_right = kind == "calculations"  # the answer is, beside a false calculation
        found[kind] = [(gold, text, score == 1.0 or (half_is_right and score == 0.5)) for gold, text, score in rows]
    found["exploits"] = [(gold, text, False) for gold, texts in EXPLOITS.items() for text in texts]
    return found


def agreement(rules: dict[str, Rule]) -> str:
    """Return the table: of each kind, the cases that each rule decides rightly."""
    rows, totals, count = [], dict.fromkeys(rules, 0), 0
    for kind, found in cases().items():
        right = {
            name: sum(safely(rule, text, gold) == truth for gold, text, truth in found) for name, rule in rules.items()
        }
        rows.append([kind, str(len(found)), *map(str, right.values())])
        totals = {name: totals[name] + n for name, n in right.items()}
        count += len(found)
    rows.append(["all", str(count), *map(str, totals.values())])
    return table(["kind", "cases", *rules], rows)


def safely(rule: Rule, response: str, gold: str) -> bool:
    """Return what a rule says; an exception is a no."""
    try:
        return rule(response, gold)
    except Exception:
        return False


def speeds(rules: dict[str, Rule]) -> str:
    """Return the table of milliseconds for one answer: to a plain number, to a formula, after a bomb."""
    prose = "48 / 2 = 24 clips in May, and 48 + 24 = 72 in both months. "
    texts = {
        "a plain number": [(f"In case {i}, {prose}\n#### {72 + i}", str(72 + i)) for i in range(300)],
        "a formula": [
            (rf"{prose}So \boxed{{\frac{{{i}}}{{\sqrt{{3}}}}}}", rf"\frac{{{i}\sqrt{{3}}}}{{3}}") for i in range(2, 40)
        ],
    }
    bombs = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000!}", r"\boxed{10^{10^{10}}}"]
    rows = []
    for name, rule in rules.items():
        safely(rule, *texts["a formula"][0])  # imports
        cells = [name]
        for found in texts.values():
            times = [timed(rule, *pair) for pair in found]
            cells += [f"{statistics.median(times):.2f}", f"{max(times):.1f}"]
        after = []
        for bomb in bombs:
            at_bomb = timed(rule, bomb, "7")
            after.append((at_bomb, timed(rule, *texts["a plain number"][0])))
        rows.append([*cells, f"{max(t for t, _ in after):.1f}", f"{max(t for _, t in after):.2f}"])
    titles = [
        "ms",
        "number: median",
        "worst",
        "formula: median",
        "worst",
        "a bomb: worst",
        "the answer after it: worst",
    ]
    return table(titles, rows)


def timed(rule: Rule, response: str, gold: str) -> float:
    """Return how many milliseconds a rule takes."""
    began = time.perf_counter()
    safely(rule, response, gold)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, help="the folder `verl` of an unpacked wheel")
    args = parser.parse_args()
    rules: dict[str, Rule] = (
        {OURS: ours} | ({"math-verify": math_verify} if available() else {}) | verl_rules(args.verl)
    )
    print(agreement(rules))
    print(f"{len(CUT_OFF)} more cases are of responses that were cut off, which no other rule is told.\n")
    print(speeds({name: rule for name, rule in rules.items() if not name.startswith("verl")}))


if __name__ == "__main__":
    main()
