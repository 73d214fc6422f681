r"""Check the calculations that a response states: `48 / 2 = 24`, `x = 7 - 10 = -3`, `\frac{10-4}{2} = 3`.

Every `=` between two expressions of numbers is judged; what is in doubt is not: variables, percentages, powers,
remainders, factorials, rounded results, `a / b * c`, whatever else touches an expression.
"""

import functools
import operator
import re
from fractions import Fraction

from gspo.reward.answer_text import any_of

MAX_CALCULATION, MAX_NESTING, MAX_EQUATIONS = 120, 16, 300  # of a text, the last ones
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "∗": "*", "÷": "/", "。": ". ", "、": ", ", "…": "...", "\u00a0": " "}
)
_REWRITES = [  # what stands for an operator, a bracket or nothing
    (re.compile(r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])|\\[,;:! ()\[\]]|[$¥￥€£`]|\{,\}(?=\d{3})"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac(\d)(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\%|\bpercent\b"), "%"),
    (re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])"), ""),  # bold, while 2**3 stays
    (re.compile(r"(?<=\d) and (?=\d+/\d)"), " "),  # 1 and 1/4
    (re.compile(r"(?<=\d) ?[xX] ?(?=[\d(])"), "*"),
]
_FRACTION = re.compile(r"(?<![\d.})])(\s*)\\frac\{([^{}]*)\}\{([^{}]*)\}")
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")  # GSM8K: 48/2 = <<48/2=24>>24
_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\(?\d+[.)]|#+)[ \t]+", re.MULTILINE)
# Each character has one way to match, so a long run cannot make the search explode.
_ARITHMETIC = r"((?:[-+*/()\d \t]|[.,]\d)+)"
# `7 - 10` of "he has 7 - 10", nothing of "3x + 4": what touches an expression may belong to it.
_AT_END = re.compile(
    rf"(?:^|[\n;\[<]|(?<!\d):|[.,]\s|[一-鿿]|[a-z]{{2}}[ \t](?=[ \t]*[\d(])){_ARITHMETIC}$", re.IGNORECASE
)
# `24` of "24 clips in May", nothing of "24x", "24%" or "24 - x".
_AT_START = re.compile(
    rf"{_ARITHMETIC}(?=$|[\n;>\]]|!(?=\s|$)|,(?!\d)|\.(?=[\s')*\]]|$|[一-鿿])|[一-鿿]|(?<=[ \t(])[a-z]{{2}})",
    re.IGNORECASE,
)
# Words at an expression that make it another one, or its result a rounded or a partial one.
_CHANGED_BEFORE = re.compile(
    any_of(
        "of, times, twice, double, triple, half, plus, minus, by, root, sqrt, than, negative, mod, squared?",
        "除以 乘以 [加减乘除的负第]",
    )
    + r"\s*$",
    re.IGNORECASE,
)
_CHANGED_AFTER = re.compile(
    r"\W{0,3}"
    + any_of(
        "remainder, rem, R ?\\d+, with.{0,12}remaind?e?r?, and.{0,12}remaind?e?r?, left over, dozen, hundred, thousand,"
        "million, billion, pi, percent, cents?, (?:or|is)? ?(?:about|approximately|approx|rounded|rounds),"
        "(?:or )?(?:more|less|fewer)",
        "余 [万亿百] 千(?![米克瓦]) 约 取整 四舍五入",
    ),
    re.IGNORECASE,
)
_ROUNDED_SOON = re.compile(r"[^.\n=;]{0,60}(?:\bround|\bapprox|\bnearest|\bremain|四舍五入|取整|余)", re.IGNORECASE)
_OPERATOR = re.compile(r"[-+*/]")
_TOKEN = re.compile(rf"{_DIGITS}|\S")
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def verdicts(text: str) -> list[bool]:
    """Return for every stated calculation whether it holds; those in doubt are left out."""
    if "=" not in text:
        return []
    annotated = "\n".join(_ANNOTATION.findall(text))
    found = _judge(_ANNOTATION.sub("", text))
    return found + _judge(annotated) if annotated else found


def _judge(text: str) -> list[bool]:
    """Return the verdicts over one text."""
    text = text if text.isascii() else text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(3) if "\\frac" in text else ():
        text = _FRACTION.sub(r"\1((\2)/(\3))", text)
    sides = _BULLET.sub("", text).split("=")[-MAX_EQUATIONS:]
    judged = (_holds(left, right) for left, right in zip(sides[:-1], sides[1:], strict=True))
    return [verdict for verdict in judged if verdict is not None]


def _holds(left: str, right: str) -> bool | None:
    """Return whether what ends the left side equals what begins the right one; None where that is in doubt."""
    end, start = _AT_END.search(left[-2 * MAX_CALCULATION :]), _AT_START.match(right[: 2 * MAX_CALCULATION])
    if not end or not start:
        return None
    rest = right[start.end() : start.end() + MAX_CALCULATION]
    before = left[: -len(end[1])]
    if _CHANGED_BEFORE.search(before[-16:]) or _CHANGED_AFTER.match(rest):
        return None
    # The calculation first, its result second.
    stated = sorted((end[1].strip(), start[1].strip(" \t(")), key=lambda side: not _OPERATOR.search(side[1:]))
    if not _OPERATOR.search(stated[0][1:]):
        return None
    value, result = map(evaluate, stated)
    if value is None or result is None:
        return None
    if _is_close(value, result, stated[1]):
        return True
    # 5! is a factorial or an exclamation; "= 3, rounded down" is a rounded result.
    return None if rest.startswith("!") or (value.denominator > 1 and _ROUNDED_SOON.match(rest)) else False


def _is_close(value: Fraction, result: Fraction, written: str) -> bool:
    """Return whether a result is the value, or the value rounded; an integer has nothing to round."""
    if len(written.partition(".")[2]) >= 8:  # 14.999999999999998: floating point
        return abs(value - result) <= max(abs(value), 1) / 10**8
    slack = max(abs(value) / 100, Fraction(1, 100)) if value.denominator > 1 else 0
    return abs(value - result) <= slack


@functools.lru_cache(maxsize=4096)  # an annotation repeats the text before it
def evaluate(expression: str) -> Fraction | None:
    """Return the exact value of numbers with + - * / and parentheses; None for anything else, and for `a / b * c`."""
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
            if len(token) > 1 and token[0] == "0" and token[1].isdecimal():
                raise ValueError  # 0930 is a time
            value = -operand(2) if token == "-" else Fraction(token.replace(",", ""))
        before = ""
        while tokens and _BINDING.get(tokens[-1], 0) > binding:
            sign = tokens.pop()
            if before == "/" and sign == "*":
                raise ValueError  # some mean a / (b * c)
            value, before = _APPLY[sign](value, operand(_BINDING[sign])), sign
        return value

    try:
        value = operand(0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value
