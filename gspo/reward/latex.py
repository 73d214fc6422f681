r"""Compare two answers written in LaTeX as mathematical objects: `equivalent(r"\frac{1}{2}", "0.5")` is True.

The library math-verify (optional) reads and compares, but leniently: to it `2(3)` is 5, `9\%` is 9, `2t` is 2, `A`
is `a`, (1, 2) is {1, 2}, 0.3333333 is 1/3, and 2x + 1 = 3 is 3. Rewarding a wrong answer harms more than missing a
right one. So a text with several readings is first rewritten to have one, and what the library would misread (an
unknown command, a word, a number in base 2) must be the same text. Lists, intervals and relations are compared here,
member by member, and only expressions by the library. The order of the two answers does not matter.

Numbers too large to compute are recognized first (latex_size.py): `9^{9^{9^9}}` would never end. Still, nothing here
has a time limit: call it in a process that can be killed.
"""

import logging
import re
from importlib.util import find_spec
from itertools import accumulate

from gspo.reward.latex_size import is_too_large

MAX_LENGTH, MAX_NESTING = 300, 10  # twelve nested parentheses take the parser seconds


def available() -> bool:
    """Return whether math-verify is installed; without it `equivalent` is always False."""
    return find_spec("math_verify") is not None


def equivalent(gold: str, given: str) -> bool:
    """Return whether both are the same object; False where one is too long or cannot be read."""
    try:
        return len(gold) <= MAX_LENGTH and len(given) <= MAX_LENGTH and available() and _equivalent(gold, given)
    except Exception:  # of any kind: the library's parser, sympy, the recursion limit
        return False


def _equivalent(gold: str, given: str) -> bool:
    """Compare two texts, unit by unit, word by word, or as objects; may raise."""
    (gold, gold_unit), (given, given_unit) = _split_unit(_tidy(gold)), _split_unit(_tidy(given))
    # 12 cm is taken for 12 but not for 12 m; 50% is neither 50 nor 0.5.
    if gold_unit != given_unit and ((gold_unit and given_unit) or "%" in gold_unit + given_unit):
        return False
    if gold == given or not gold or not given:
        return gold == given != ""
    if _WORD.search(gold + " " + given):
        return _as_words(gold) == _as_words(given)
    letters = set(re.findall(r"\\[A-Za-z]+|[A-Za-z]", gold + " " + given))
    if any(letter != letter.lower() in letters for letter in letters):
        return False  # R - r would be r - R: the library reads every letter as lower case
    alternatives = [bool(re.search(r"\bor\b", text)) for text in (gold, given)]
    gold, given = map(_one_reading, _without_names(*(re.sub(r",?\s*\b(and|or)\b", ",", t) for t in (gold, given))))
    if gold[0] != given[0] and gold[0] in "[(" and given[0] in "[(" and gold[-1] + given[-1] in ("])", ")]"):
        return False  # [2, 1] would be (2, 1)
    return _same(*map(_parse, (gold, given), alternatives))


# ---- text: one way to write what is the same ----

_CHARACTERS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "²": "^2"})
_CHARACTERS |= str.maketrans({"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "³": "^3"})
_TIDY = {
    r"(?<=\d)(?:,\\!|\{,\}|\\,)(?=\d{3}(?!\d))": ",",
    # 1,000 but not the pair (1,200)
    r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d|\s*(?:[)\]}]|\\[)\]}]))": lambda found: found[0].replace(",", ""),
    r"(?<!\\)(?:\\[,;:! ()\[\]]|~|\$)|\\q?quad\b|\\(?:left|right|displaystyle)(?![a-z])": " ",
    r"\\(?:mathrm|mathbf|mathit|text[a-z]+|mbox)(?=\s*\{)": r"\\text",
    r"\\text\s*\{\s*(,?\s*(?:and|or))\s*\}": r" \1 ",
    r"\\[dtc]frac": r"\\frac",
    r"\\varnothing": r"\\emptyset",
    r"\\(le|ge|ne)(?:q|qslant)(?![a-z])": r"\\\1",
    r"\binfinity\b": r"\\infty",
    r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])": r"\\\1 ",
    r"\\text\s*\{\s*\\?%\s*\}|\\?%": r"\\text{percent}",
    r"_\{(\w)\}": r"_\1",
    r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b": "°",
    r"((?:\\sin|\\cos|\\tan)[^,]*?)(\d+)\s*°": r"\1(\2\\cdot\\frac{\\pi}{180})",  # no unit: sin 30 is another number
    r"°(?:\s*(?:\\text\s*\{\s*)?([CF])\b\s*\}?)?": r"\\text{degrees \1}",
    r"\s+": " ",
    r"(?<!\w) | (?!\w)": "",
    r"\\\\(?=[A-Za-z])": r"\\\\ ",  # a new row of a matrix, no command
}
_UNITS = {
    name: names.split()[0]
    for names in (
        *("mm", "cm centimeter centimeters", "m meter meters", "km kilometer kilometers", "ft foot feet", "ml", "mph"),
        *("in inch inches", "yd yard yards", "mi mile miles", "s second seconds", "min minute minutes", "h hour hours"),
        *("day days", "week weeks", "month months", "year years", "kg kilogram kilograms", "g gram grams", "C", "F"),
        *("lb pound pounds", "l liter liters", "$ dollar dollars", "€", "£", "cent cents", "% percent", "/ per"),
        *("° degree degrees", "unit units", "^2 square sq 2", "^3 cubic 3"),
    )
    for name in names.split()
}
_UNIT = re.compile(r"(?:(?<=[\w)}])\\text\{([^{}]*)\}|(?<=[\d)}]) ?((?:[a-z]{2,}(?![a-z])[ /]?)+))(?:\^\{?([23])\}?)?$")
# What is compared as text: \text that is no unit, and words outside of commands and environments.
_WORD = re.compile(r"\\text|(?<![\\A-Za-z])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{4}")


def _tidy(text: str) -> str:
    """Write what is the same in one way: characters, spaces, commands."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _TIDY.items():
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(".")


def _split_unit(text: str) -> tuple[str, str]:
    r"""Return ("12", "^2 cm") of `12\text{ cm}^2`, ("18", "$") of `\$18`: the number and its unit, in one spelling."""
    currency = re.match(r"(-?)(\\\$|[€£])", text)
    if currency:
        return currency[1] + text[currency.end() :], currency[2].strip("\\")
    found = _UNIT.search(text)
    words = re.findall(r"[A-Za-z]+|[^A-Za-z ^]", found[1] or found[2] or "") if found else []
    if found and all(word in _UNITS for word in words):
        units = [_UNITS[word] for word in [*words, *filter(None, [found[3]])]]
        return text[: found.start()], " ".join(sorted(units, key=lambda unit: unit[0] != "^"))
    text = re.sub(r"\\text\{\(?([A-Za-z])\)?\}", r"\1", text)  # a choice, or an upright letter
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text), ""


def _as_words(text: str) -> str:
    """Return the words of a text, in lower case, for comparison as text."""
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).casefold().split())


# ---- formulas: one reading for what has several ----

_NAME = r"(?:[A-Za-z](?:_\w|_\{\w+\})?|\\[a-z]+|[A-Za-z]\([A-Za-z]\)|\([A-Za-z](?:,[A-Za-z])+\))"
_NAMED = re.compile(rf"(^|,)\s*({_NAME})(?:=|\\in(?![a-z]))")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|lt|gt)(?![a-z])")
_NUMERIC = r"\\(?:frac|binom)\{\d+\}\{\d+\}"


def _without_names(gold: str, given: str) -> tuple[str, str]:
    """`x = 3` is taken for `3`, but neither for `y = 3` nor for `2x + 1 = 7`, from which it follows."""
    (gold_name, gold_value), (given_name, given_value) = _split_name(gold), _split_name(given)
    if gold_name == given_name or (
        not (gold_name and given_name) and not _RELATION.search(given if gold_name else gold)
    ):
        return gold_value, given_value
    return gold, given


def _split_name(text: str) -> tuple[str, str]:
    """Return ("x", "1, 2") of "x = 1, x = 2", ("y", "2x") of "2x = y"; no name if there are several."""
    turned = re.fullmatch(rf"([^=]+)=({_NAME})", text)
    if turned and not re.fullmatch(_NAME, turned[1]):
        text = f"{turned[2]}={turned[1]}"
    names, value = {found[2] for found in _NAMED.finditer(text)}, _NAMED.sub(r"\1", text)
    name = names.pop() if len(names) == 1 else ""
    letters = re.sub(r"\\[a-z]+", lambda command: command[0] if command[0] == name else "", value)
    return (name, value) if name and not _RELATION.search(value) and name not in letters else ("", text)


def _decimal(found: re.Match) -> str:
    """Return the exact fraction of `0.1\\overline{6}` or `2.50`: in floating point, 0.3333333 would be 1/3."""
    whole, digits, repeated = found.groups(default="")
    start, scale = int(whole + digits or "0"), 10 ** len(digits)
    if not repeated:
        return rf"\frac{{{start}}}{{{scale}}}"
    return rf"\frac{{{int(whole + digits + repeated) - start}}}{{{scale * (10 ** len(repeated) - 1)}}}"


_READINGS = {
    r"(?<=\d)[eE](?=[-+]?\d)": r"\\cdot 10^",
    r"\*\*": "^",
    r"\^([-+]?\d*\.?\d+)|\^\(([^()]*)\)": r"^{\1\2}",
    r"\\sqrt ?(\w)|\\sqrt ?\(([^()]*)\)": r"\\sqrt{\1\2}",
    r"\\(frac|binom) ?(\w) ?(\w)(?!\d)": r"\\\1{\2}{\3}",
    r"\\frac ?(\w)(?=\{)": r"\\frac{\1}",
    r"\\frac(\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w)": r"\\frac\1{\2}",
    r"(?<![\w^./])(\d+) (\d+)/(\d+)(?![\d.])": r"\1\\frac{\2}{\3}",
    r"(?<![\d_^])(\d+) (?=[\d.])": r"\1?",  # 7 2 would be 9
    r"(?<![\d.])(\d*)\.(?=\d|\\overline)(\d*)(?:\\overline\{(\d+)\})?(?![\d.])": _decimal,
    r"(?<![\w^.}])(\d+)\\frac\{(\d+)\}\{(\d+)\}": r"(\1+\\frac{\2}{\3})",
    r"^([^,]*)\\pm([^,]*)$": r"\1+\2,\1-\2",
    # 2(3), (2)(3) and 2\binom{3}{2} would be sums.
    rf"((?<![\d_^])\d+|\)|{_NUMERIC})(?=\(|\\frac|\\binom)|(\)|{_NUMERIC})(?=\d)": r"\1\2\\cdot ",
    r"I|(?<![A-Za-z\\])i(?![A-Za-z])": "(I)",  # of I^2 the library drops the exponent
    ",": ", ",
}
# Other characters and commands; what the library would drop or guess: a number in a base, 1,00, 2{3}, the T of A^T,
# [3, \infty], 1/2x, [5], 5!!
_UNREADABLE = re.compile(
    r"[^\w\s+\-*/^=<>(){}\[\]|,!&\\]|(?<!\\)\\(?!(?:frac|sqrt|binom|cdot|times|div|pm|pi|infty|le|ge|ne|lt|gt|in|cup|cap|"
    r"setminus|emptyset|mathbb|begin|end|[lr]floor|[lr]ceil|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|"
    r"log|ln|exp|alpha|beta|gamma|[dD]elta|(?:var)?epsilon|theta|lambda|mu|nu|rho|sigma|tau|(?:var)?phi|[oO]mega)"
    r"(?![A-Za-z]))[A-Za-z]|\\begin\{(?![pb]?matrix)|"
    r"[\d)}]_|, 0\d|(?:^|(?<!_)\d)\{|\^\{?T|\\infty\s*\]|\[\s*-\\infty|"
    r"/\s*\w+ ?(?:[a-zA-Z(]|\\(?:pi|sqrt|frac))|^\[[^,]*\]$|!!",
    re.ASCII,
)


def _one_reading(text: str) -> str:
    """Rewrite a text with several readings to have one. Raise ValueError for what the library would misread, or
    compute for ever."""
    for pattern, replacement in _READINGS.items():
        text = re.sub(pattern, replacement, text)
    braces, brackets = (
        list(accumulate((character in pair[0]) - (character in pair[1]) for character in text))
        for pair in (("{", "}"), ("([{", ")]}"))
    )
    if (
        min(braces) < 0
        or braces[-1] != 0
        or max(brackets) > MAX_NESTING
        or _UNREADABLE.search(text)
        or is_too_large(text)
    ):
        raise ValueError(text)
    return text


# ---- objects: sympy is imported only here, since that takes a second ----


def _parse(text: str, alternatives: bool):
    """Return the sympy object; `alternatives`: the text says "or", so that inequalities unite their solutions."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    # Its units would drop the t of 2t, its repair of malformed operators would guess.
    plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="all")
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=plain)
    [read] = parse(rf"\boxed{{{text}}}", [config], "no_fallback", "first_match", parsing_timeout=None)
    return _solutions(read) if alternatives else read


def _solutions(read):
    """Return the set of an inequality, a chain, or a list of them; anything else as it is."""
    import sympy

    if isinstance(read, sympy.FiniteSet) and any(_is_inequality(member) for member in read.args):
        [_] = read.free_symbols  # in one unknown
        return sympy.Union(*(member.as_set() for member in read.args))
    return read.as_set() if _is_inequality(read) else read


def _is_inequality(read) -> bool:
    """Return whether this is a relation other than an equation, or a chain of them."""
    import sympy

    return isinstance(read, (sympy.core.relational.Relational, sympy.And)) and not isinstance(read, sympy.Eq)


def _same(a, b) -> bool:
    """Return whether two sympy objects are the same, member by member where they have members."""
    import sympy
    from math_verify import verify

    def both(*kinds) -> bool:
        return isinstance(a, kinds) and isinstance(b, kinds)

    a, b = _as_set(a, b), _as_set(b, a)
    if both(sympy.And) or both(sympy.FiniteSet):
        return _are_matched(*(list(getattr(each, "_unsorted_args", each.args)) for each in (a, b)))
    if both(sympy.core.relational.Relational):
        return _same_relation(a, b)
    if both(sympy.Tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if both(sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return ends and _same(a.start, b.start) and _same(a.end, b.end)
    if both(sympy.Set):
        a, b = a.doit(), b.doit()
        if both(sympy.FiniteSet) or both(sympy.Interval):
            return _same(a, b)
        return a == b or bool(a.symmetric_difference(b).is_empty)
    if both(sympy.MatrixBase, sympy.MatrixExpr):
        a, b = a.doit(), b.doit()
        return a.shape == b.shape and all(map(_same, a, b))
    if both(sympy.Expr):
        a, b = a.doit(), b.doit()
        # To the library a symbol is any product that spells its name.
        return a == b if a.is_Symbol or b.is_Symbol else verify(a, b, numeric_precision=50, timeout_seconds=None)
    return False


def _as_set(read, other):
    """Return the solutions of x < 1 where the other is a set, and the set of "x in S" where the other is about x."""
    import sympy

    if isinstance(read, sympy.Eq) and isinstance(read.rhs, sympy.Set) and read.lhs in other.free_symbols:
        return read.rhs
    is_set = isinstance(other, sympy.Set) or (isinstance(other, sympy.Eq) and isinstance(other.rhs, sympy.Set))
    return _solutions(read) if is_set and _is_inequality(read) else read


def _are_matched(left: list, right: list) -> bool:
    """Return whether each member of one list has its own partner in the other."""
    for member in left:
        partner = next((i for i, other in enumerate(right) if _same(member, other)), None)
        if partner is None:
            return False
        del right[partner]
    return not right


def _same_relation(a, b) -> bool:
    """Return whether two relations are the same, turned around or multiplied by a number."""
    import sympy

    if type(a) is not type(b):
        b = b.reversed
    if type(a) is not type(b):
        return False
    is_equation = isinstance(a, (sympy.Eq, sympy.Ne))
    if len(a.free_symbols | b.free_symbols) <= 1:  # x + 5 = 8 is no answer to itself
        turned = is_equation and _same(a.lhs, b.rhs) and _same(a.rhs, b.lhs)
        return turned or (_same(a.lhs, b.lhs) and _same(a.rhs, b.rhs))
    ratio = sympy.simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))  # y = 2x and 2y - 4x = 0
    return not ratio.free_symbols and bool(ratio.is_finite and (ratio.is_nonzero if is_equation else ratio.is_positive))
