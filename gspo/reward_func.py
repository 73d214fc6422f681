"""The default reward: is the final answer right, do the stated calculations hold, is the answer marked?

| the response                                                                      | score |
|-----------------------------------------------------------------------------------|-------|
| answer right, and every stated calculation holds                                  | 1.0   |
| answer right, but a stated calculation is false; or the gold answer is a list and | 0.5   |
| at least half of it is given, nothing wrong beside it                             |       |
| answer wrong (or less than half of a list), but clearly marked                    | 0.1   |
| otherwise                                                                         | 0.0   |

Copy this file, change `compute_score`, and pass it with `--reward_func ./my_reward.py`. Standard library only;
no `eval`, no signals, no state: any thread may call it. A response, however long or odd, costs milliseconds,
because only its last `MAX_RESPONSE` characters are read and every pattern below is linear in them.
"""

import re
from fractions import Fraction

MAX_RESPONSE, MAX_ANSWER, MAX_CALCULATION, MAX_NESTING = 16_000, 200, 120, 16


# ---- the seed's three functions ----


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1.0, 0.5, 0.1 or 0.0, by the table above."""
    correct = correctness(solution_str, ground_truth)
    if correct == 1.0 and reasoning_quality(solution_str) == 1.0:
        return 1.0
    return 0.5 if correct > 0.0 else 0.1 * format_quality(solution_str)


def rank_responses(responses: list[str], ground_truth: str, data_source: str) -> list[tuple[int, float]]:
    """[(index, score), ...], best first, equal scores in the order given."""
    scores = [compute_score(data_source, response, ground_truth) for response in responses]
    return sorted(enumerate(scores), key=lambda ranked: -ranked[1])


def get_preference_pairs(
    responses: list[str], ground_truth: str, data_source: str, margin: float = 0.1
) -> list[tuple[str, str, float]]:
    """[(chosen, rejected, score_diff), ...] for every two scores more than `margin` apart, widest gap first."""
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
    """The final answer as written, whitespace and a closing period apart: what a majority vote counts."""
    return _final_answer(_clean(solution_str))[0].strip(" .\n")


# ---- the three components ----


def correctness(solution_str: str, ground_truth: str) -> float:
    """1.0 if the final answer is the gold one, 0.5 if it is at least half of a gold list, else 0.0."""
    gold, given = _parts(_clean(str(ground_truth))), _parts(_final_answer(_clean(solution_str))[0])
    if not given:
        return 0.0
    if given == gold:
        return 1.0
    return 0.5 if given < gold and 2 * len(given) >= len(gold) else 0.0


def reasoning_quality(solution_str: str) -> float:
    """The share of the stated calculations (`48 / 2 = 24`, `x = 7 - 10 = -3`) that hold; 1.0 when none is stated."""
    verdicts = _verdicts(_clean(solution_str))
    return sum(verdicts) / len(verdicts) if verdicts else 1.0


def format_quality(solution_str: str) -> float:
    r"""1.0 if the answer is marked (`\boxed{}`, `####`, "answer is", 答案：) or all there is, else 0.0."""
    answer, marked = _final_answer(_clean(solution_str))
    return float(marked and bool(_parts(answer)))


# ---- reading the answer ----

_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width ！ to ～
_CHARACTERS |= str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "。": ". ", "、": ", "})
_CHARACTERS |= str.maketrans("", "", "$¥￥€£`")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[,;:! ]|\\left\b|\\right\b|\\[()\[\]]", ""),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r" \1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\frac\{([-\d.]+)\}\{([\d.]+)\}", r" \1/\2"),
        (r"\\times|\\cdot", "*"),
        (r"\\div", "/"),
        (r"\\%|\bpercent\b", "%"),
        (r"\{,\}", ","),
        (r"(?<![\w)])\*\*|\*\*(?![\w(])", ""),  # bold, while 2**3 stays
    )
]
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?:(?<![\w)])[-+] ?)?)(?:(\d+) (?=\d+ ?/))?({_DIGITS})(?: ?/ ?({_DIGITS}))?( ?%)?")
_MARK = re.compile(r"(?:\banswers?|答案)\s*(?:is\b|are\b|[:=是为])[\s:]*", re.IGNORECASE)
_BARE = re.compile(r"\s*(?:[a-z] ?= ?)?[-+.\d]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_SEPARATOR = re.compile(r"[;或和]|,(?!\d{3}(?!\d))|\bor\b|\band\b")
# What may stand beside a number without changing it: words, but no single letter, which may be a variable.
_WORDS_BEFORE = re.compile(r"(?:[a-z]{2,} |[一-鿿] ?)*")
_WORDS_AFTER = re.compile(r"(?: [a-z]{2,}| ?[一-鿿])*")
# ... and the words that do change it.
_OPERATORS = ("of", "times", "twice", "double", "half", "plus", "minus", "by", "root", "sqrt", "not", *"以加减乘除的之")
_SCALES = re.compile(r" ?(?:dozen|hundred|thousand|million|billion|trillion|pi\b|[万亿百]|千(?![米克瓦]))")


def _clean(text: str) -> str:
    """What is judged: the end of the response, without thoughts, markdown, currency signs and LaTeX dressing."""
    if len(text) > MAX_RESPONSE:
        tail = text[-MAX_RESPONSE:]
        text = tail.partition("\n")[2] or tail  # a calculation cut in half could look false
    text = text.rpartition("</think>")[2].translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _final_answer(text: str) -> tuple[str, bool]:
    """(the answer, whether it is marked): the last box, else the last ####, "answer is" or number."""
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
    if _BARE.match(text) and _values(text):
        return text, True
    numbers = [found.group() for found in _NUMBER.finditer(text)]
    return (numbers[-1] if numbers else text), False


def _boxed(text: str) -> str | None:
    start, depth = text.rfind(r"\boxed{"), 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def _parts(answer: str) -> set[str]:
    """The answer as a set of comparable texts: its numbers where it is a list of numbers, else the one text."""
    return _values(answer) or {"".join(answer.casefold().rpartition("=")[2].split()).strip(".")} - {""}


def _values(answer: str) -> set[str] | None:
    """{"1", "7/2"} for "x = 1 or x = 3.5"; {"x=1", "y=2"} for "x = 1, y = 2"; None unless all are numbers."""
    if len(answer) > MAX_ANSWER:
        return None
    values, names = [], []
    for part in _SEPARATOR.split(" ".join(answer.casefold().split()).strip(" .\\{}")):
        name, _, value = part.strip().rpartition("=")
        values.append(_number(value.strip()))
        names.append(name.strip(" _{}0123456789"))
    if None in values:
        return None
    if len({*names} - {""}) < 2:
        return {*values}
    return {f"{name}={value}" for name, value in zip(names, values, strict=True)}


def _number(text: str) -> str | None:
    """The one number of `text`, exact ("7/2" for 3.5, "50%" apart from "50"); None if it is not that plain."""
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if not _WORDS_BEFORE.fullmatch(before) or not _WORDS_AFTER.fullmatch(after) or _changed(before, after):
        return None
    sign, whole, numerator, denominator, percent = found[0].groups()
    if whole and not denominator:
        return None
    try:
        value = Fraction(whole or 0) + _fraction(numerator) / _fraction(denominator or "1")
    except ZeroDivisionError:
        return None
    return f"{-value if '-' in sign else value}{'%' if percent else ''}"


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _changed(before: str, after: str) -> bool:
    """Whether a word beside a number makes it another one: `half of 6`, `3 million`."""
    return before.rstrip().endswith(_OPERATORS) or bool(_SCALES.match(after))


# ---- checking the calculations ----

_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")  # GSM8K: 48/2 = <<48/2=24>>24
_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+", re.MULTILINE)
_LETTER_TIMES = re.compile(r"(?<=\d) ?x ?(?=\d)")
_ARITHMETIC = "0123456789.,+-*/() \t"
_CLAUSE = re.compile(r"[.,]\s")
_TOKEN = re.compile(rf"{_DIGITS}|\S")


def _verdicts(text: str) -> list[bool]:
    """For every `=` between two pure-number expressions: does it hold? Whatever is in doubt is left out."""
    text = "\n".join(_ANNOTATION.findall(text)) or text
    sides = _LETTER_TIMES.sub("*", _BULLET.sub("", text)).split("=")
    verdicts = []
    for left, right in zip(sides, sides[1:]):
        stated = [_expression_at_end(left), _expression_at_start(right)]
        stated.sort(key=_is_bare)  # the calculation first, its result second
        if _is_bare(stated[0]):
            continue
        value, result = _evaluate(stated[0]), _evaluate(stated[1])
        if value is not None and result is not None:
            # A rounded result holds, an integer has nothing to round.
            slack = max(abs(value) / 100, Fraction(1, 100)) if value.denominator > 1 else 0
            verdicts.append(abs(value - result) <= slack)
    return verdicts


def _expression_at_end(text: str) -> str:
    """`7 - 10` of "so he has 7 - 10"; "" where what stands before may belong to it, as in "3x + 4"."""
    before = text.rstrip(_ARITHMETIC)
    clauses = _CLAUSE.split(text[len(before) :])
    run, apart = clauses[-1], len(clauses) > 1
    if run.count("(") > run.count(")"):
        run, apart = run.partition("(")[2], True
    if apart or not before or before[-1] in "\n:;[<":
        return run.strip()
    a_word = re.search(r"(?:[a-z]{2}|[一-鿿])$", before[-2:], re.IGNORECASE)
    touching = run[:1] not in (" ", "\t") and before[-1].isascii()
    if not a_word or touching or run.lstrip()[:1] in ("+", "-") or _changed(before, ""):
        return ""
    return run.strip()


def _expression_at_start(text: str) -> str:
    """`24` of "24 clips in May"; "" where what follows may belong to it, as in "24x" or "24%"."""
    after = text.lstrip(_ARITHMETIC)
    clauses = _CLAUSE.split(text[: len(text) - len(after)])
    run = clauses[0]
    if run.count(")") > run.count("("):
        return run.rpartition(")")[0].strip()
    if len(clauses) > 1 or not after or after[0] in "\n;!>]":
        return run.strip().rstrip(".,")
    a_word = re.match(r"[a-z]{2}|[一-鿿]", after, re.IGNORECASE)
    touching = run[-1:] not in (" ", "\t") and after[0].isascii()
    return "" if not a_word or touching or _changed("", after) else run.strip()


def _is_bare(expression: str) -> bool:
    return not any(sign in expression.lstrip("-") for sign in "+-*/")


def _evaluate(expression: str) -> Fraction | None:
    """The exact value of numbers under + - * / and parentheses; None for anything else."""
    if len(expression) > MAX_CALCULATION or expression.count("(") > MAX_NESTING:
        return None
    tokens = _TOKEN.findall(expression)[::-1]  # the next one is the last

    def total() -> Fraction:
        value = product()
        while tokens and tokens[-1] in "+-":
            value = value + product() if tokens.pop() == "+" else value - product()
        return value

    def product() -> Fraction:
        value = factor()
        while tokens and tokens[-1] in "*/":
            value = value * factor() if tokens.pop() == "*" else value / factor()
        return value

    def factor() -> Fraction:
        token = tokens.pop()
        if token == "-":
            return -factor()
        if token != "(":
            return _fraction(token)
        value = total()
        if tokens.pop() != ")":
            raise ValueError
        return value

    try:
        value = total()
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value
