"""Read numbers written as words: `七`, `一百二十`, `三分之一`, `百分之五十`, `seven`, `two thirds`, `forty-two`."""

import re
from fractions import Fraction

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_SCALES = {"万": 10**4, "亿": 10**8}
_NUMERAL = "[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+)?"
# In these a numeral counts nothing.
_OTHER_USES = re.compile("一共|一定|一般|一样|一直|一起|统一|唯一|第一|万一|十分|百分比")
_CHINESE = re.compile(
    rf"(?:(?P<whole>{_NUMERAL})又)?(?P<below>{_NUMERAL}|\d+)分之(?P<above>{_NUMERAL}|\d+)|"
    rf"(?P<number>{_NUMERAL})|(?P<half>一?半)"
)
_TO_NINETEEN = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen"
)
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_WORDS = {word: i for i, word in enumerate(_TO_NINETEEN.split("|"))}
_WORDS |= {word: 10 * i for i, word in enumerate(_TENS.split("|"), 2)}
_BIG = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_PARTS |= {"halves": 2} | {f"{word}s": n for word, n in _PARTS.items()}
_WORD = "|".join(sorted([*_WORDS, *_BIG], key=len, reverse=True))
_ENGLISH = re.compile(
    r"(?P<before>(?:(?:exactly|about|approximately|negative|minus|only|just) )*)"
    rf"(?P<number>(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*)\b"
    rf"(?:(?: |-)(?P<part>{'|'.join(sorted(_PARTS, key=len, reverse=True))})\b)?|(?:an? |one[- ])?(?P<half>half)\b",
    re.IGNORECASE,
)
_NUMBER_WORD = re.compile(rf"\b(?:{_WORD})\b", re.IGNORECASE)


def read_words(text: str) -> tuple[str, Fraction, bool, str] | None:
    """Return (text before, value, whether it is a percentage, text after) of the one number written as words."""
    if len(text) > 120:
        return None
    return _english(text) if text.isascii() else _chinese(_OTHER_USES.sub("共", text))


def _chinese(text: str) -> tuple[str, Fraction, bool, str] | None:
    """Read the one Chinese numeral of a text."""
    found = list(_CHINESE.finditer(text))
    if len(found) != 1:
        return None
    [one] = found
    before, after = text[: one.start()], text[one.end() :]
    if one["half"]:
        return before, Fraction(1, 2), False, after
    if one["number"]:
        value = _chinese_value(one["number"])
        return None if value is None else (before, value, False, after)
    parts = [_chinese_value(one[name] or "零") for name in ("whole", "above", "below")]
    if None in parts or parts[2] == 0:
        return None
    if one["below"] == "百" and not one["whole"]:
        return before, parts[1], True, after
    return before, parts[0] + parts[1] / parts[2], False, after


def _chinese_value(numeral: str) -> Fraction | None:
    """Return the value of `十二`, `一百零五`, `三万`, `二点五`, `二〇二四`; None for what is no numeral."""
    if numeral.isdigit() and numeral.isascii():
        return Fraction(numeral)
    whole, _, decimals = numeral.partition("点")
    by_digits = all(c in _DIGITS for c in whole)
    total = int("".join(str(_DIGITS[c]) for c in whole)) if by_digits else _with_places(whole)
    tail = Fraction(int("".join(str(_DIGITS[c]) for c in decimals)), 10 ** len(decimals)) if decimals else 0
    return None if total is None else Fraction(total) + tail


def _with_places(numeral: str) -> int | None:
    """Return the value of a numeral with 十, 百, 千, 万, 亿."""
    total, section, digit = 0, 0, None
    for c in numeral:
        if c in _DIGITS:
            if digit:
                return None  # 二三十 means "twenty or thirty"
            digit = _DIGITS[c]
        elif c in _PLACES:
            section, digit = section + (1 if digit is None else digit) * _PLACES[c], None
        else:
            total, section, digit = (total + section + (digit or 0)) * _SCALES[c], 0, None
    return total + section + (digit or 0)


def _english(text: str) -> tuple[str, Fraction, bool, str] | None:
    """Read a number in English words with which a text begins."""
    found = _ENGLISH.match(text)
    if not found:
        return None
    after = text[found.end() :]
    if _NUMBER_WORD.search(after):
        return None
    if found["half"]:
        return "", Fraction(1, 2), False, after
    total = section = 0
    for word in re.findall(r"[a-z]+", found["number"].lower()):
        if word in _WORDS:
            section += _WORDS[word]
        elif word == "hundred":
            section = (section or 1) * 100
        elif word != "and":
            total, section = total + (section or 1) * _BIG[word], 0
    value = Fraction(total + section)
    if found["part"]:
        value /= _PARTS[found["part"].lower()]
    return found["before"], value, False, after
