r"""Find numbers and expansions too large to compute in a LaTeX text, before a library tries: `9^{9^{9^9}}`, `10^9!`.

The size of a text is bounded from above by reading it once: of sums, products, powers and factorials of numbers. A
letter counts as 1, so x^{2024} is small, and e and \pi as what they are.
"""

import math
import re

MAX_DIGITS = 10_000  # of a number, before or after the point
MAX_TERMS = 120  # of a power of a sum, multiplied out
_TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d*)?|\.\d+|\S")
_CLOSING = {"{": "}", "(": ")", "[": "]"}
_TERM_ENDS = frozenset("+-,=<>&|")
_CONSTANTS = {"e": math.log10(math.e), r"\pi": math.log10(math.pi)}
_EXPONENTIALS = (r"\exp", r"\sinh", r"\cosh")


def is_too_large(text: str) -> bool:
    """Return whether a text holds a number of more than MAX_DIGITS digits, or a power that becomes MAX_TERMS terms."""
    try:
        _Reader(text).sum("")
    except _TooLargeError:
        return True
    return False


class _TooLargeError(Exception):
    pass


class _Reader:
    """Read a text from left to right. Sizes are log10 of a bound of the absolute value, at least 0."""

    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(text)[::-1]  # the next one is the last
        self.terms = 1  # of the operand read last

    def sum(self, closing: str) -> float:
        """Return the size of everything up to the closing bracket, which is taken: the largest term times their
        number."""
        sizes, size, last = [], 0.0, 0.0  # of the terms so far, the present one without its last factor, that factor
        while self.tokens and (token := self.tokens.pop()) != closing:
            if token in _TERM_ENDS:
                sizes.append(size + last)
                size = last = 0.0
            elif token == "^":
                last = self.power(last, self.exponent())
            elif token == "!":
                last = _factorial(last)
            else:
                size, last = size + last, self.operand(token)
        sizes.append(size + last)
        self.terms = len(sizes)
        return _checked(max(sizes) + math.log10(len(sizes)))

    def operand(self, token: str | None = None) -> float:
        """Return the size of one operand, which begins with `token` or the next one."""
        token = token or (self.tokens.pop() if self.tokens else "")
        self.terms = 1
        if token in _CLOSING:
            return self.sum(_CLOSING[token])
        if token in (r"\frac", r"\binom"):
            above, below = self.operand(), self.operand()
            self.terms = 1
            return above + below if token == r"\frac" else _binomial(above, below)
        if token == r"\sqrt" and self.tokens and self.tokens[-1] == "[":
            return self.operand() + self.operand()
        if token in _EXPONENTIALS:
            return self.power(_CONSTANTS["e"], self.operand())
        if token == "_" or token == r"\sqrt":
            return self.operand()
        if token[-1:].isdecimal() or token[:-1].isdecimal():
            return max(0.0, math.log10(float(token) or 1.0))
        return _CONSTANTS.get(token, 0.0)

    def exponent(self) -> float:
        """Return the size of an exponent; of a tower, from the top down."""
        terms = self.terms
        size = self.operand()
        while self.tokens and self.tokens[-1] in "^!":
            size = self.power(size, self.exponent()) if self.tokens.pop() == "^" else _factorial(size)
        self.terms = terms
        return size

    def power(self, base: float, exponent: float) -> float:
        """Return the size of a power."""
        times = _value(exponent)
        if self.terms > 1 and math.comb(int(times) + self.terms - 1, self.terms - 1) > MAX_TERMS:
            raise _TooLargeError
        self.terms = 1
        return _checked(max(base, math.log10(2)) * times)


def _checked(size: float) -> float:
    """Return the size of a number unless it has too many digits."""
    if size > MAX_DIGITS:
        raise _TooLargeError
    return size


def _value(size: float) -> float:
    """Return the number of a size that serves as an exponent, or below a factorial."""
    if size > 2 * math.log10(MAX_DIGITS):
        raise _TooLargeError
    return 10.0**size


def _factorial(size: float) -> float:
    """Return the size of a factorial: n! is below n^n."""
    return _checked(_value(size) * size)


def _binomial(above: float, below: float) -> float:
    """Return the size of n over k, which is below n^k and below 2^n."""
    return _checked(min(10.0 ** min(below, 99.0) * above, 10.0 ** min(above, 99.0) * math.log10(2)))
