"""Read a number, exactly, as people write it: `118 000`, `3 1/2`, `12万`, `三分之一`, `negative 7`, `5 m/s`, `20%`.

A text is a number only if all of it is understood: one number, and beside it units and words that do not change it.
`not 7`, `至少7`, `√2`, `7 or 8`, `3 + 4` and `2x` are no numbers.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from gspo.reward.answer_text import any_of
from gspo.reward.answer_units import take_scale, take_unit
from gspo.reward.number_words import read_words

MAX_DIGITS = 4_000
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+(?![\d,]| ?/)|\d+)(?:\.\d+|\.(?=\\overline))?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)}}])[-+] ?)?(?:(?P<whole>\d+) (?=\d+ ?/ ?\d))?(?P<above>{_DIGITS})"
    r"(?P<repeating>\\overline ?\{(?P<period>\d+)\}|\.{3}|…)?"
    rf"(?: ?/ ?(?P<below>{_DIGITS}))?"
    r"(?: ?\* ?10 ?\^ ?\{? ?(?P<power>[-+]?\d{1,3}) ?\}?|[eE](?P<e>[-+]?\d{1,3})(?!\w))?"
)
_CJK = r"\u4e00-\u9fff"
# ---- words before a number ----
# A text can be taken apart into words in one way only. With more, a text that fails would be tried in all of them:
# 2 ** 40 for 40 letters.
_WORDS_BEFORE = re.compile(
    rf"(?:[A-Za-z][a-z']+(?![a-z'])(?:-[a-z][a-z']*(?![a-z']))*|[IaA](?![a-z'])|[{_CJK}:,'\"“”€£¥￥\s])*"
)
# These change a number that follows at once.
_CHANGES_NEXT = re.compile(
    any_of(
        "but, times, twice, thrice, double, triple, half, plus, multiplied by, divided by, root, sqrt, square, squared,"
        "cube, least, most, than, over, under, above, below, beyond, exceeds?, exceeding, almost, nearly, before,"
        "between, from, until, up to, close to, next to, prior to, opposed to, per, pm, mod, modulo, log, ln, lg, exp,"
        "sin, cos, tan, cot, sec, csc, arcsin, arccos, arctan, abs, floor, ceil, max, min, gcd, lcm, pi",
        "[加减乘除的非近倍比] 除以 乘以 大于 小于 多于 少于 高于 低于 超过 不到 不足 不满 至少 至多 最多 最少 根号 "
        "平方根 立方根 分之 对数",
    )
    + r"\s*$",
    re.IGNORECASE,
)
# "of" does as well (half of 7, the square of 7), except after these: "a total of 7".
_OF = re.compile(r"(?:(\w+) )?of\s*$", re.IGNORECASE)
_QUANTITIES = re.compile(
    any_of(
        "total, amount, number, count, value, answer, result, cost, price, age, distance, length, width, height, depth,"
        "area, volume, rate, speed, weight, profit, loss, discount, probability, chance, score, average, mean, median,"
        "mode, maximum, minimum, temperature, duration, period, salary, income, balance, remainder, change, savings,"
        "perimeter, radius, diameter, angle, slope, ratio, percentage, increase, decrease, group, set, sum"
    ),
    re.IGNORECASE,
)
# These do wherever they stand before it or after it.
_DENIES = re.compile(
    any_of(
        "not, never, neither, nor, cannot, no more, no less, no fewer, except, other than, unlike, instead, without,"
        "wrong, incorrect, incorrectly, false, isn't, isnt, aren't, wasn't, doesn't, don't, can't, won't",
        "不是 不等于 不为 不可能 并非 不对 错 除了 ≠",
    ),
    re.IGNORECASE,
)
_MINUS = re.compile(r"(?:\b(?:negative|minus)|负|零下)\s*$", re.IGNORECASE)
_APPROXIMATELY = re.compile(r"^\s*\\approx\s*")
# ---- words after it ----
_CHANGES_BEFORE = re.compile(
    r"\s*"
    + any_of(
        "(?:more|less|fewer|greater|smaller|larger|higher|lower) than, (?:is|was|are) (?:not|wrong|incorrect|false),"
        "times (?!(?:a|per|as|in|each|every|the)\\b)[a-z]+, squared, cubed, factorial, plus, minus, mod, modulo, pi,"
        "to the power, raised, halves, thirds, fifths, sixths, sevenths, eighths, ninths, tenths, hundredths,"
        "thousandths",
        "[个人年月天岁倍]?多 余 的 次方 分之 开方 或",
    ),
    re.IGNORECASE,
)
# These do wherever they stand after it.
_BOUNDS = re.compile(
    any_of(
        "(?:or|and) (?:more|less|fewer|above|below|over|under|higher|lower|greater|smaller|so), at least,"
        "at most, below zero",
        "以上 以下 以内 以外 或更",
    ),
    re.IGNORECASE,
)
_WORDS_AFTER = re.compile(rf"(?:[A-Za-z{_CJK}.,:;'\"“”?\s-]|/(?=[A-Za-z]))*")
_ADJACENT_LETTER = re.compile(r"(?: ?[A-Za-z]\b(?<! a)(?<! I)|[A-Za-z])")
HALF = re.compile(r" and (?:a|one) (half|quarter|third)\b", re.IGNORECASE)
_HALVES = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}
_PERCENT = re.compile(r" ?(?:%|percentage points?\b|个?百分点)")
# A pound is written as one word, whether of gold or of flour.
_CURRENCY = {"dollars_before": "dollar", "€": "euro", "£": "lb", "¥": "yuan", "￥": "yuan"}
_CURRENCY_BEFORE = re.compile(r"dollars_before\s*$|[€£¥￥]\s*$")


@dataclass(frozen=True)
class Number:
    """An exact number as it was written: 20 % has value 20 and percent."""

    value: Fraction
    percent: bool = False
    unit: str = ""  # in one spelling; "" where there is none, or none that is known
    division: bool = False  # written as 48/2
    letter: bool = False  # its unit is a single letter at the number, which may be a variable: 12m
    name: str = ""  # the x of x = 1, where a list has several names


def same_number(gold: Number, given: Number) -> bool:
    """Return whether two numbers are the same. The sign % may be missing: 20 = 20%; or be worked in: 25% = 0.25."""
    if gold.name != given.name or (gold.letter and not given.unit):
        return False
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    if given.division and gold.value.denominator == 1 and not gold.percent:
        return False  # 48/2 is not yet 24
    if gold.percent != given.percent:
        if gold.unit or given.unit:
            return False
        percent, other = (gold.value, given.value) if gold.percent else (given.value, gold.value)
        return other in (percent, percent / 100)
    return gold.value == given.value


def read_number(text: str) -> Number | None:
    """Return the one number of a text that `answer_text.plain` has written; None where it is not that plain."""
    text = _APPROXIMATELY.sub("", _unwrapped(text.strip(" ,;:")))
    found = _NUMBER.search(text)
    if not found:
        return _number_in_words(text)
    value = _value(found)
    if value is None:
        return None
    before, unit = _without_currency(text[: found.start()])
    if before.endswith("-") and not found["sign"]:
        before, value = before[:-1], -value  # -$5
    if (sign := _sign(before)) == 0:
        return None
    number = _with_suffix(value, text[found.end() :], unit)
    division = bool(found["below"]) and not found["whole"]
    return number and replace(number, value=number.value * sign, division=division)


def _unwrapped(text: str) -> str:
    """Return `7` for `(7)`, `"7"` and `7.`."""
    text = text if text.endswith("...") else text.rstrip(". ")
    pairs = {"(": ")", '"': '"', "“": "”", "[": ""}
    while len(text) > 2 and pairs.get(text[0]) == text[-1] and not re.search(r"[(),]", text[1:-1]):
        text = text[1:-1].strip()
    return text


def _value(found: re.Match) -> Fraction | None:
    """Return the value of the digits found; None for a division by zero or too many digits."""
    if found.end() - found.start() > MAX_DIGITS:
        return None
    above = found["above"].replace(",", "").replace(" ", "")
    value = Fraction(above)
    if found["period"]:
        decimals = len(above.partition(".")[2])
        value += Fraction(int(found["period"]), 10**decimals * (10 ** len(found["period"]) - 1))
    elif found["repeating"]:  # 3.333...: the last digit goes on
        decimals = len(above.partition(".")[2])
        value += Fraction(int(above[-1]), 9 * 10**decimals) if decimals else 0
    below = Fraction((found["below"] or "1").replace(",", "").replace(" ", ""))
    if below == 0:
        return None
    value = int(found["whole"] or 0) + value / below
    value *= Fraction(10) ** int(found["power"] or found["e"] or 0)
    return -value if "-" in (found["sign"] or "") else value


def _without_currency(before: str) -> tuple[str, str]:
    """Return the text before a number without the currency at its end, and the currency."""
    found = _CURRENCY_BEFORE.search(before)
    return (before[: found.start()].rstrip(), _CURRENCY[found[0].strip()]) if found else (before, "")


def _sign(before: str) -> int:
    """Return 1 for words that do not change the number after them, -1 for `negative`, 0 for all else."""
    sign = 1
    if found := _MINUS.search(before):
        sign, before = -1, before[: found.start()]
    if not _WORDS_BEFORE.fullmatch(before) or _CHANGES_NEXT.search(before) or _DENIES.search(before):
        return 0
    of = _OF.search(before)
    return 0 if of and not _QUANTITIES.fullmatch(of[1] or "") else sign


def _with_suffix(value: Fraction, after: str, unit: str) -> Number | None:
    """Return the number with what follows it: scale, percent, unit, words; None where that changes it otherwise."""
    if found := HALF.match(after):
        value, after = value + _HALVES[found[1].lower()], after[found.end() :]
    scale, after = take_scale(after)
    value *= scale
    percent = _PERCENT.match(after)
    if percent:
        after = after[percent.end() :]
    in_brackets = re.match(r" ?\(([^()\d]*)\)", after)
    after = f" {in_brackets[1]} {after[in_brackets.end() :]}" if in_brackets else after
    written, rest = take_unit(after)
    if not written and _ADJACENT_LETTER.match(after):
        return None
    if _CHANGES_BEFORE.match(rest) or not _WORDS_AFTER.fullmatch(rest):
        return None
    if any(pattern.search(rest) for pattern in (_BOUNDS, _DENIES, HALF)):
        return None
    if re.search(r"(?<![A-Za-z'])[b-hj-zB-HJ-Z](?![A-Za-z'])", rest):
        return None  # a letter alone may be a variable
    letter = len(written) == 1 and after[:1] == written and written.isascii()
    return Number(value, bool(percent), written or unit, letter=letter)


def _number_in_words(text: str) -> Number | None:
    """Return the number of `seven`, `七个`, `三分之一`, `百分之五十`; None where there is none or several."""
    read = read_words(text)
    if read is None:
        return None
    before, value, percent, after = read
    sign = _sign(before)
    number = _with_suffix(value, after, "") if sign else None
    return number and replace(number, value=number.value * sign, percent=percent or number.percent)
