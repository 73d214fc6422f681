r"""Write answers in one way before they are read: characters, spaces, markdown, LaTeX formatting.

`end_of` is what is read of a response; `plain` writes an answer for reading numbers, letters and words: `\dfrac{1}{2}`
becomes `1/2`, `１２％` becomes `12%`, `\textbf{(B)}\ 12` becomes `(B) 12`.
"""

import re

MAX_RESPONSE = 16_000  # characters that are read of a response, from its end

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width ！ to ～
_WIDE |= str.maketrans({"　": " ", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "【": "【", "．": "."})
_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "∗": "*", "。": ". ", "、": ", ", "²": "^2", "³": "^3"}
    | {"≈": r"\approx ", "≠": r"\ne ", "√": r"\sqrt ", "’": "'", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "‰": r"\permil"}
)
# A doubled backslash before a command is one; in a matrix it begins a row.
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z]{2}|[(){}\[\]%$,;! ])")
_ROWS = re.compile(r"\\begin ?\{(?:[a-z]*matrix|array|cases|align)")
_NUMERAL = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*)\.?\d+"
# Each rule is (what it writes in another way, what is written instead), applied in this order.
_RULES = [
    # Formatting: fonts, spacing, sizes of brackets, display style, delimiters of formulas.
    (r"\\(?:textbf|textit|textrm|text|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname|mbox|bf|rm)\b\*?", " "),
    (r"\\(?:left|right|displaystyle|limits|big|Big|bigg|Bigg)(?![a-zA-Z])", ""),
    (r"\\!", ""),
    (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\space(?![a-zA-Z])", " "),
    (r"\\[()\[\]]", ""),
    (r"\\\$", " dollars_before "),
    (r"[$`]|(?<![\w)])\*\*|\*\*(?![\w(])", ""),  # markdown's bold, while 2**3 stays
    # Operators and signs.
    (r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|\\ast(?![a-zA-Z])", "*"),
    (r"\\div(?![a-zA-Z])", "÷"),
    (r"\\?%|\bpercent\b|\bper cent\b", "%"),
    (r"\^ ?\{? ?\\circ ?\}?|\\degrees?(?![a-zA-Z])|°", " degrees "),
    (r"\{,\}", ","),
    (r"\\(?:approx|simeq|doteq)(?![a-zA-Z])", r"\\approx "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    # Fractions of two numbers.
    (r"\\[dtc]?frac(?![a-zA-Z])", r"\\frac"),
    (rf"\\frac ?\{{ ?({_NUMERAL}) ?\}} ?\{{ ?({_NUMERAL}) ?\}}(?!\d)", r" \1/\2"),
    (r"\\frac ?(\d) ?(\d)(?!\d)", r" \1/\2"),
    (r"\\frac ?(\d) ?\{ ?(\d+) ?\}(?!\d)", r" \1/\2"),
    (r"\\frac ?\{ ?(\d+) ?\} ?(\d)(?!\d)", r" \1/\2"),
    (r"(?<=\d) and (?=\d+/\d)", " "),
    # Braces: a set's stay, those of LaTeX go where they hold one number or the words of a \text.
    (r"\\(?=[{}])", ""),
    (r"(?<=\s)\{([^{}=,;]*[A-Za-z\u4e00-\u9fff][^{}=,;]*)\}", r" \1 "),
    (r"^\s*\{\s*([^{},;=]+)\s*\}\s*$", r"\1"),
    (r"(?<![\w}\\])\{ ?([-+]?[\d.]+) ?\}(?![{^_])", r"\1"),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def any_of(english: str, chinese: str = "") -> str:
    """Return a pattern for any of the English words or phrases, which commas separate, or the Chinese words."""
    phrases = "|".join(phrase.strip().replace(" ", r"\s") for phrase in english.split(","))
    return rf"(?:\b(?:{phrases})\b" + "".join(f"|{word}" for word in chinese.split()) + ")"


def end_of(text: str) -> str:
    """Return the end of a response, after its thoughts, in narrow characters."""
    if len(text) > MAX_RESPONSE:
        tail = text[-MAX_RESPONSE:]
        text = tail.partition("\n")[2] or tail  # a calculation cut in half could look false
    text = text.rpartition("</think>")[2]
    return text if text.isascii() else text.translate(_WIDE)


def single_backslashes(text: str) -> str:
    r"""Return the text with `\frac` for `\\frac`, except in a matrix, where two backslashes begin a row."""
    return text if "\\\\" not in text or _ROWS.search(text) else _DOUBLED.sub(r"\\", text)


def plain(answer: str) -> str:
    """Return an answer in the one way in which it is compared."""
    text = answer if answer.isascii() else answer.translate(_WIDE).translate(_CHARACTERS)
    if text.isalnum():
        return text
    text = single_backslashes(text)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())
