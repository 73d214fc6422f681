"""Score a response where the user names no function: by its final answer, its stated calculations and its form.

| the response                                                                      | score |
|-----------------------------------------------------------------------------------|-------|
| answer right, and every stated calculation holds                                  | 1.0   |
| answer right, but a stated calculation is false; or the gold answer is a list and | 0.5   |
| at least half of it is given, nothing wrong beside it                             |       |
| answer wrong (or less than half of a list), but clearly marked                    | 0.1   |
| otherwise                                                                         | 0.0   |

Copy this file, change `compute_score`, and pass it with `--reward_func ./my_reward.py`. No `eval`, no signals: any
thread may call it. A response, however long or odd, costs milliseconds, because only its last `MAX_RESPONSE` characters
are read and every pattern below is linear in them. The one thing that may hang, comparing LaTeX by math-verify, runs in
a process that is ended after `LATEX_S`; without math-verify (pip install 'math-verify[antlr4_13_2]') LaTeX is compared
as text.
"""

import functools
import operator
import os
import re
import threading
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_RESPONSE, MAX_ANSWER, MAX_CALCULATION, MAX_NESTING = 16_000, 200, 120, 16
LATEX_S, LEAST_LATEX_S = 3.0, 0.25  # limit for one comparison; halved with each of the last 32 that reached it


# ---- the functions that the original description names ----


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Return 1.0, 0.5, 0.1 or 0.0, by the table above."""
    return score_parts(data_source, solution_str, ground_truth, extra_info)["score"]


def score_parts(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None
) -> dict[str, float]:
    """Return the score and its components: {"score", "correct", "reasoning", "format"}."""
    correct = correctness(solution_str, ground_truth)
    reasoning, marked = reasoning_quality(solution_str), format_quality(solution_str)
    score = 0.5 if correct > 0.0 else 0.1 * marked
    if correct == 1.0 and reasoning == 1.0:
        score = 1.0
    return {"score": score, "correct": correct, "reasoning": reasoning, "format": marked}


def rank_responses(responses: list[str], ground_truth: str, data_source: str) -> list[tuple[int, float]]:
    """Return [(index, score), ...], best first, equal scores in the order given."""
    scores = [compute_score(data_source, response, ground_truth) for response in responses]
    return sorted(enumerate(scores), key=lambda ranked: -ranked[1])


def get_preference_pairs(
    responses: list[str], ground_truth: str, data_source: str, margin: float = 0.1
) -> list[tuple[str, str, float]]:
    """Return [(chosen, rejected, score_diff), ...] for every two scores more than `margin` apart, widest gap first."""
    ranking = rank_responses(responses, ground_truth, data_source)
    pairs = [
        (responses[better], responses[worse], high - low)
        for place, (better, high) in enumerate(ranking)
        for worse, low in ranking[place + 1 :]
        # In floats 0.8 - 0.7 > 0.1 but 1.0 - 0.9 < 0.1; the slack makes a gap of exactly `margin` no pair in both.
        if high - low > max(margin, 0.0) + 1e-6
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def extract_answer(solution_str: str) -> str:
    """Return the final answer as written, without outer whitespace and closing period: what a majority vote counts."""
    return _final_answer(_clean(solution_str))[0].strip().rstrip(".")


# ---- the three components ----


def correctness(solution_str: str, ground_truth: str) -> float:
    """Return 1.0 if the final answer is the gold one, 0.5 if it is at least half of a gold list, else 0.0."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, str | int | float | Decimal):
        raise TypeError(
            f"ground_truth is a {type(ground_truth).__name__} ({ground_truth!r:.60}), but this function compares texts "
            "and numbers: write it as text, or use another reward function"
        )
    gold_text, answer = _clean(str(ground_truth)), _final_answer(_clean(solution_str))[0]
    gold, given = _parts(gold_text), _parts(answer)
    if not given:
        return 0.0
    if {_variable(gold_text), _variable(answer)} - {""} > {_variable(gold_text)}:
        return 0.0  # y = 3 for x = 3
    if given == gold:
        return 1.0
    decided = _numbers(gold_text) is not None and _numbers(answer) is not None  # numbers are exact already
    if not decided and _same_mathematics(str(ground_truth), _final_answer(_end(solution_str).translate(_WIDE))[0]):
        return 1.0
    return 0.5 if given < gold and 2 * given.total() >= gold.total() else 0.0


def reasoning_quality(solution_str: str) -> float:
    """Return the share of the stated calculations (`48 / 2 = 24`, `x = 7 - 10 = -3`) that hold; 1.0 for none."""
    verdicts = _verdicts(_clean(solution_str))
    return sum(verdicts) / len(verdicts) if verdicts else 1.0


def format_quality(solution_str: str) -> float:
    r"""Return 1.0 if the answer is marked (`\boxed{}`, `####`, "answer is", 答案：) or is the whole text, else 0.0."""
    answer, marked = _final_answer(_clean(solution_str))
    return float(marked and bool(_parts(answer)))


# ---- reading the answer ----

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width ！ to ～
_CHARACTERS = _WIDE | str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "。": ". ", "、": ", "})
_CHARACTERS |= str.maketrans("", "", "$¥￥€£`")
_REWRITES = {
    r"\\[,;:! ]|\\left\b|\\right\b|\\[()\[\]]|\^\\circ|\^\{\\circ\}|°": "",
    r"\\(?=[{}])": "",
    r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}": r" \1",
    r"\\[dt]frac": r"\\frac",
    r"\\frac\{([-\d.]+)\}\{([\d.]+)\}(?!\d)": r" \1/\2",
    r"\\frac(\d)(\d)(?!\d)": r" \1/\2",
    r"(?<=\d) and (?=\d+/\d)": " ",
    r"\\times|\\cdot": "*",
    r"\\div": "/",
    r"\\%|\bpercent\b": "%",
    r"\{,\}": ",",
    r"(?<![\w)])\*\*|\*\*(?![\w(])": "",  # bold, while 2**3 stays
}
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# sign, the 3 of 3 1/2, numerator, denominator, percent
_NUMBER = re.compile(rf"((?:(?<![\w)])[-+] ?)?)(?:(\d+) (?=\d+ ?/ ?\d))?({_DIGITS})(?: ?/ ?({_DIGITS}))?( ?%)?")
_MARK = re.compile(r"(?:\banswers?|答案)\s*(?:is\b|are\b|[:=是为])[\s:]*", re.IGNORECASE)
_LIST = re.compile(r"(?=[-+.\d]|[a-z] ?=)(?:\b[a-z] ?=|[^=])*$", re.IGNORECASE)  # "3 clips", "x = 1 or x = 2"
_PROSE = re.compile(r"[^\W\d_]{2}|[=\n]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_VARIABLE = re.compile(r"[a-z](?:_?\{?\w{1,4}\}?)?", re.IGNORECASE)
_LONE_LETTER = re.compile(r"(?<![a-z])(?!a [a-z]{2})[a-z](?![a-z])", re.IGNORECASE)
_SEPARATOR = re.compile(r"[;或和]|,(?!\d{3}(?!\d))|\bor\b|\band\b")
# Words may stand beside a number, but no single letter, which may be a variable, and none that changes it.
_WORDS_BEFORE = re.compile(r"(?:[a-z]{2,} |[一-鿿] ?)*")
_WORDS_AFTER = re.compile(r"(?:[ckm]m|[km]g|ml)?(?: [a-z]{2,}| ?[一-鿿])*")
_OPERATORS = (
    "of",
    "times",
    "twice",
    "double",
    "half",
    "plus",
    "minus",
    "by",
    "root",
    "sqrt",
    "not",
    "least",
    "most",
    "than",
    "pm",
    *"以加减乘除的",
)
_SCALES = re.compile(
    r" ?(?:or (?:more|less|fewer)\b|"
    r"dozen|hundred|thousand|million|billion|trillion|pi\b|[万亿百]|千(?![米克瓦]))|[a-z]\b",
    re.IGNORECASE,
)
_SCALED_NUMBER = re.compile(f"{_NUMBER.pattern}(?:{_SCALES.pattern})?", re.IGNORECASE)


def _clean(text: str) -> str:
    """Return the end of the response, without thoughts, markdown, currency signs and LaTeX formatting."""
    text = _end(text).translate(_CHARACTERS)
    for pattern, replacement in _REWRITES.items():
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _end(text: str) -> str:
    """Return the end of a long response, after its thoughts."""
    if len(text) > MAX_RESPONSE:
        tail = text[-MAX_RESPONSE:]
        text = tail.partition("\n")[2] or tail  # a calculation cut in half could look false
    return text.rpartition("</think>")[2]


def _final_answer(text: str) -> tuple[str, bool]:
    """Return (the answer, whether it is marked): the last box, else the last ####, "answer is" or number."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed, True
    _, hashes, line = text.rpartition("####")
    if hashes:
        text = line.strip().partition("\n")[0]
    marks = list(_MARK.finditer(text))
    if marks:
        text = text[marks[-1].end() :]
    if hashes or marks:
        return _SENTENCE_END.split(text, maxsplit=1)[0], True
    if not _PROSE.search(text) or (_LIST.match(text) and _numbers(text)):
        return text, True
    found = [number.group() for number in _SCALED_NUMBER.finditer(text)]
    return (found[-1] if found else text), False


def _boxed(text: str) -> str | None:
    """Return the content of the last box, braces matched."""
    start, depth = text.rfind(r"\boxed{"), 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def _parts(answer: str) -> Counter[str]:
    """Return the answer as comparable texts: its numbers where it is a list of numbers, else the one text."""
    text = " ".join(_fold(answer).split()).rstrip(" .")
    if (numbers := _numbers(text)) is not None:
        return numbers
    name, _, value = text.rpartition("=")
    return Counter({re.sub(r"(?<!\w) | (?!\w)", "", text if _is_algebra(name) else value)} - {""})


def _fold(text: str) -> str:
    r"""Return the text in lower case, unless case tells letters apart: `R - r`, `\Delta`."""
    letters = set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", text))
    if any(letter.swapcase() in letters for letter in letters):
        return text
    return re.sub(r"(\\[a-zA-Z]+)|[^\\]+", lambda found: found[0] if found[1] else found[0].casefold(), text)


def _numbers(text: str) -> Counter[str] | None:
    """Return {"1", "7/2"} for "x = 1 or x = 3.5"; {"x=1", "y=2"} for "x = 1, y = 2"; None unless all are numbers."""
    if len(text) > MAX_ANSWER:
        return None
    if re.fullmatch(r"\s*\{.*\}\s*", text):
        text = text.replace(",", ";")  # of the set {1,200} it separates, of 1,200 not
    equations = [part.strip().rpartition("=") for part in _SEPARATOR.split(text.strip(" {}")) if part.strip()]
    names = [name.strip(" _{}0123456789") for name, _, _ in equations]
    numbers = [None if _is_algebra(name) else _number(value.strip()) for name, _, value in equations]
    if None in numbers or not numbers:
        whole = _number(text)  # the "and" of "72 clips in April and May"
        return Counter({whole}) if whole else None
    if len({*names} - {""}) > 1:
        numbers = [f"{name}={number}" for name, number in zip(names, numbers, strict=True)]
    # The 2, 2, 3 of a factorization are three; x = 2 or x = 2 is one.
    return Counter({*numbers} if re.search(r"\bor\b|或", text) else numbers)


def _is_algebra(side: str) -> bool:
    """Return whether the left side makes an equation to solve: `2x + 1`, but not `x`, `cost`, `3 * 4`."""
    side = _LETTER_TIMES.sub("*", side.strip().rpartition("=")[2])
    return not _VARIABLE.fullmatch(side.strip()) and bool(_LONE_LETTER.search(side))


def _variable(text: str) -> str:
    """Return the x of an answer `x = 3`, in lower case."""
    name = text.partition("=")[0].strip().casefold() if text.count("=") == 1 else ""
    return name if _VARIABLE.fullmatch(name) else ""


def _number(text: str) -> str | None:
    """Return the one number of `text`, exact ("7/2" for 3.5, "50%" is not "50"); None where it is not that plain."""
    found = _NUMBER.search(text)
    if not found:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if not _WORDS_BEFORE.fullmatch(before) or not _WORDS_AFTER.fullmatch(after) or _is_changed(before, after):
        return None
    sign, whole, numerator, denominator, percent = found.groups()
    value = _evaluate(f"{whole or 0} + {numerator} / {denominator or 1}")
    if value is None:
        return None
    return f"{-value if '-' in sign else value}{'%' if percent else ''}"


def _is_changed(before: str, after: str) -> bool:
    """Return whether a word beside a number makes it another one: `half of 6`, `3 million`."""
    return before.rstrip().casefold().endswith(_OPERATORS) or "\\" in before or bool(_SCALES.match(after))


# ---- LaTeX ----

_LATEX = re.compile(r"[\\^_({\[=<>|√π∞≤≥∪!+*]|\d ?[a-z]", re.IGNORECASE)
_lock = threading.Lock()
_overdue: deque[bool] = deque(maxlen=32)  # whether each of the last comparisons reached its time limit


def _same_mathematics(gold: str, given: str) -> bool:
    """Return whether math-verify, used as in gspo/reward/latex.py, finds the two equal; False where in doubt."""
    if len(given) > MAX_ANSWER or not (_LATEX.search(gold) or _LATEX.search(given)):
        return False
    with _lock:
        return _compare_latex(gold, given, os.getpid())


@functools.lru_cache(maxsize=4096)  # responses of a group often give the same answer
def _compare_latex(gold: str, given: str, process: int) -> bool:
    """Return whether the two are equal; `process` is the caller's, as a fork needs a pool of its own."""
    pool = _latex_pool(process)
    if pool is None:
        return False
    outcome = pool.submit({"gold": gold, "given": given}).result()
    if outcome.fault == "timeout" and sum(_overdue) == 3:
        print("LaTeX answers that take seconds to compare: until they end, each gets a fraction of a second")
    _overdue.append(outcome.fault == "timeout")
    pool.timeout_s = max(LATEX_S / 2 ** sum(_overdue), LEAST_LATEX_S)
    return outcome.reply.get("score") == 1.0


@functools.lru_cache(maxsize=1)
def _latex_pool(process: int) -> Any:
    """Return the pool of one process that compares LaTeX; None where gspo or math-verify is not installed."""
    try:
        from gspo.reward import latex
        from gspo.reward.worker_handle import Settings
        from gspo.reward.worker_pool import WorkerPool
    except ImportError:
        return None
    if not latex.available():
        return None
    first = {"gold": "x^{2}+1", "given": "1+x^{2}"}
    settings = Settings(latex.__file__, "equivalent", LATEX_S, 2.0, imports=("math_verify",), warm_up=first)
    return WorkerPool(settings, 1, spare=True)


# ---- checking the calculations ----

_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")  # GSM8K: 48/2 = <<48/2=24>>24
_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+", re.MULTILINE)
_LETTER_TIMES = re.compile(r"(?<=\d) ?x ?(?=\d)")
# Each character has one way to match, so a long run cannot make the search explode.
_ARITHMETIC = r"((?:[-+*/()\d \t]|[.,]\d)+)"
# `7 - 10` of "he has 7 - 10", nothing of "3x + 4": what touches an expression may belong to it.
_AT_END = re.compile(rf"(?:^|[\n:;\[<]|[.,]\s|[一-鿿]|[a-z]{{2}}[ \t](?=[ \t]*[\d(])){_ARITHMETIC}$", re.IGNORECASE)
# `24` of "24 clips in May", nothing of "24x", "24%" or "24 - x".
_AT_START = re.compile(rf"{_ARITHMETIC}(?=$|[\n;!>\]]|[,.](?!\d)|[一-鿿]|(?<=[ \t])\(?[a-z]{{2}})", re.IGNORECASE)
_TOKEN = re.compile(rf"{_DIGITS}|\S")
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _verdicts(text: str) -> list[bool]:
    """Return for every `=` between two number expressions whether it holds; those in doubt are left out."""
    text = "\n".join(_ANNOTATION.findall(text)) or text
    sides = _LETTER_TIMES.sub("*", _BULLET.sub("", text)).split("=")
    verdicts = []
    for left, right in zip(sides[:-1], sides[1:], strict=True):
        end, start = _AT_END.search(left), _AT_START.match(right)
        if not end or not start or _is_changed(left[: end.start(1)], right[start.end() :]):
            continue
        # The calculation first, its result second.
        stated = sorted((end[1].strip(), start[1].strip()), key=lambda side: not re.search(r"[-+*/]", side[1:]))
        value, result = map(_evaluate, stated)
        if value is None or result is None or not re.search(r"[-+*/]", stated[0][1:]):
            continue
        # A rounded result holds, but an integer has nothing to round.
        slack = max(abs(value) / 100, Fraction(1, 100)) if value.denominator > 1 else 0
        verdicts.append(abs(value - result) <= slack)
    return verdicts


def _evaluate(expression: str) -> Fraction | None:
    """Return the exact value of numbers with + - * / and parentheses; None for anything else."""
    if len(expression) >= MAX_CALCULATION or expression.count("(") > MAX_NESTING:
        return None
    tokens = _TOKEN.findall(expression)[::-1]  # the next one is the last

    def operand(binding: int) -> Fraction:
        """Return the value up to the first operator that binds no tighter than `binding`."""
        token = tokens.pop()
        if token == "(":
            value = operand(0)
            if tokens.pop() != ")":
                raise ValueError
        else:
            value = -operand(2) if token == "-" else Fraction(token.replace(",", ""))
        while tokens and _BINDING.get(tokens[-1], 0) > binding:
            sign = tokens.pop()
            value = _APPLY[sign](value, operand(_BINDING[sign]))
        return value

    try:
        value = operand(0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value
