"""Decide whether an answer is the gold one: as a choice, a time, numbers, text, or as mathematics."""

import re
from dataclasses import replace

from gspo.reward.answer_numbers import HALF, Number, read_number, same_number
from gspo.reward.answer_text import end_of, plain, single_backslashes
from gspo.reward.final_answer import MAX_ANSWER, final_answer, without_explanation
from gspo.reward.latex_process import same_mathematics

Part = Number | str


def correctness_of(response: str, gold: str, cut_off: bool) -> float:
    """Return 1.0 if the final answer of a response is the gold one, 0.5 if it is at least half of a list, else 0.0."""
    sentences = 1 + len(re.findall(r"[.!?](?=\s+\S)|[。！？](?=.)|\n(?=.)", gold.strip()))
    answer = final_answer(end_of(response), sentences, cut_off).text
    if not answer.strip():
        return 0.0
    right = compare(gold, answer)
    if right < 1.0 and (shorter := without_explanation(answer)) != answer:
        right = max(right, compare(gold, shorter))
    return right


def compare(gold: str, answer: str) -> float:
    """Compare two answers as written: 1.0, 0.5 for at least half of a gold list, 0.0."""
    if len(answer) > 2 * MAX_ANSWER + 4 * len(gold):
        return 0.0
    gold_text, given_text = plain(gold), plain(answer)
    if gold_text and gold_text == given_text:
        return 1.0
    for rule in (_choices, _times):
        decided = rule(gold_text, given_text)
        if decided is not None:
            return decided
    gold_parts, given_parts = parts(gold_text), parts(given_text)
    if not given_parts or _other_variable(gold_text, given_text):
        return 0.0
    right = _matched(gold_parts, given_parts)
    if right < 1.0 and not _is_decided(gold_parts, given_parts, given_text):
        pair = [_as_latex(text) for text in (gold, answer)]
        right = max(right, float(same_mathematics(*pair)))
        if right < 1.0 and (exact := _before_approximation(pair[1])):
            right = float(same_mathematics(pair[0], exact))
    return right


# ---- choices ----

_LETTER = r"[A-Z](?![A-Za-z'])"
_BETWEEN = r"(?: ?, ?| and | ?[和与] ?| ?& ?|\) ?\(| )(?:and )?"
_CHOICES = re.compile(
    r"(?:(?:the )?(?:option|choice|answer)s? |选项?|答案)?\s?"
    rf"\(?\s?((?:{_LETTER}|[A-Z]+)(?:{_BETWEEN}{_LETTER})*)\s?\)?"
    r"(?:(?<=\))\s?|\s?[.:,)]\s?|\s?$|(?=\s?[\u4e00-\u9fff]|\s(?:is|as|for)\b))(.*)$",
    re.DOTALL,
)
_DENIED = re.compile(r"\b(?:not|wrong|incorrect|false|except|or)\b|n't|不|错|除|或|非", re.IGNORECASE)
_GOLD_CHOICE = re.compile(
    rf"\(?\s?({_LETTER}|[A-H]{{2,8}}|[A-H](?:(?: ?, ?| and | ?和 ?| )[A-H])+)\s?\)?(?:[.:]?$|(?<=\)) ?(.*)$|[.:] (.*)$)"
)


def _choices(gold: str, given: str) -> float | None:
    """Compare the letters of choices: `(B) 12` = `B`, `A, B, D` = `ABD`; None where the gold answer is no choice."""
    found = _GOLD_CHOICE.fullmatch(gold)
    if not found or (len(found[1]) > 1 and list(found[1]) != sorted(set(found[1])) and found[1].isalpha()):
        return None
    right, content = set(re.findall("[A-Z]", found[1])), found[2] or found[3] or ""
    stated = _CHOICES.match(given)
    if stated and (len(right) > 1 or not found[1].isalpha() or len(stated[1]) == 1 or re.search(r"\W", stated[1])):
        letters = re.findall("[A-Z]", stated[1])
        if _DENIED.search(stated[2]):
            return 0.0
        chosen = set(letters)
        if len(letters) == len(chosen):
            if chosen == right:
                return 1.0
            if chosen < right and 2 * len(chosen) >= len(right):
                return 0.5
    if content and not stated:
        return compare(content, given)
    return None if not stated else 0.0


# ---- times ----

_CLOCK = re.compile(
    r"(?:at |about )?(?P<half>上午|下午|晚上|早上|凌晨|中午)?\s?"
    r"(?P<hour>\d{1,2})\s?(?:(?::|点|时)\s?(?P<minute>\d{2})\s?分?|(?:点|时)整?)?"
    r"\s?(?P<meridiem>[ap]\.? ?m\b\.?)?",
    re.IGNORECASE,
)


def _times(gold: str, given: str) -> float | None:
    """Compare times of day: 4:30 PM is 4:30 p.m. and 16:30; None unless both are times."""
    read = [_minutes(text) for text in (gold, given)]
    if None in read:
        return None
    (right, known), (said, said_known) = read
    return float(right == said or (not known and said_known and right % 720 == said % 720))


def _minutes(text: str) -> tuple[int, bool] | None:
    """Return (minutes since midnight, whether the half of the day is said) of a time."""
    found = _CLOCK.fullmatch(text.strip(" ."))
    if not found or not (found["minute"] or found["half"] or found["meridiem"]):
        return None
    hour, minute = int(found["hour"]), int(found["minute"] or 0)
    half = {"a": "a", "p": "p", "上": "a", "早": "a", "凌": "a", "下": "p", "晚": "p", "中": "p"}.get(
        (found["meridiem"] or found["half"] or " ")[0].lower(), ""
    )
    if half and hour <= 12:
        hour = hour % 12 + 12 * (half == "p")
    return 60 * hour + minute, bool(half) or hour > 12


# ---- numbers and text ----

_VARIABLE = re.compile(r"[a-z](?:_?\{?\w{1,4}\}?)?", re.IGNORECASE)
_LONE_LETTER = re.compile(r"(?<![a-z])(?!a [a-z]{2})[a-z](?![a-z])", re.IGNORECASE)
_LETTER_TIMES = re.compile(r"(?<=\d) ?x ?(?=\d)")
_SEPARATOR = re.compile(r"[;或和]|,(?!\d{3}(?!\d))|\bor\b|\band\b")


def parts(text: str) -> list[Part]:
    """Return an answer as a list of numbers where it is one, else as one text; nothing for no answer."""
    text = text.rstrip(" .") if not text.endswith("...") else text
    if (numbers := _numbers(text)) is not None:
        return list(numbers)
    text = " ".join(_fold(text).split())
    name, _, value = text.rpartition("=")
    text = re.sub(r"(?<!\w) | (?!\w)", "", text if is_algebra(name) else value)
    return [text] if text else []


def _numbers(text: str) -> list[Number] | None:
    """Return the numbers of "x = 1 or x = 3.5", with names in "x = 1, y = 2"; None unless all are numbers."""
    if len(text) > MAX_ANSWER:
        number = read_number(text) if re.fullmatch(r"[-+]?[\d,.]+", text) else None
        return number and [number]
    if re.fullmatch(r"\s*\{.*\}\s*", text):
        text = text.replace(",", ";")  # of the set {1,200} it separates, of 1,200 not
    name, approximately, value = text.partition("\\approx")
    if approximately and name.strip():
        return _numbers(value) if _VARIABLE.fullmatch(name.strip()) else None
    if not _SEPARATOR.search(HALF.sub("", text)):
        number = _value(text)
        return number and [number]
    if text[0] in "([":
        return None  # a point or an interval has an order
    equations = [part.strip().rpartition("=") for part in _SEPARATOR.split(text.strip(" {}")) if part.strip()]
    numbers = [_value("".join(equation)) for equation in equations]
    if None in numbers or not numbers:
        whole = read_number(text)  # the "and" of "72 clips in April and May"
        return whole and [whole]
    names = [name.strip(" _{}0123456789").casefold() for name, _, _ in equations]
    if len({*names} - {""}) > 1:
        numbers = [replace(number, name=name) for name, number in zip(names, numbers, strict=True)]
    # The 2, 2, 3 of a factorization are three; x = 2 or x = 2 is one.
    if re.search(r"\bor\b|或", text):
        numbers = [n for i, n in enumerate(numbers) if not any(same_number(n, other) for other in numbers[:i])]
    return numbers


def _value(equation: str) -> Number | None:
    """Return the number of `3`, `x = 3` and `3 + 4 = 7`; None for an equation to solve."""
    name, _, value = equation.rpartition("=")
    return None if is_algebra(name) else read_number(value)


def is_algebra(side: str) -> bool:
    """Return whether the left side makes an equation to solve: `2x + 1`, but not `x`, `cost`, `3 * 4`."""
    side = _LETTER_TIMES.sub("*", side.strip().rpartition("=")[2])
    return not _VARIABLE.fullmatch(side.strip()) and bool(_LONE_LETTER.search(side))


def _other_variable(gold: str, given: str) -> bool:
    """Return whether the answer names another variable than the gold one: y = 3 for x = 3."""
    names = [_variable(text) for text in (gold, given)]
    return bool(names[0] and names[1]) and names[0] != names[1]


def _variable(text: str) -> str:
    """Return the x of an answer `x = 3`, in lower case."""
    name = text.partition("=")[0].strip().casefold() if text.count("=") == 1 else ""
    return name if _VARIABLE.fullmatch(name) else ""


def _fold(text: str) -> str:
    r"""Return the text in lower case, unless case tells letters apart: `R - r`, `\Delta`."""
    letters = set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", text))
    if any(letter.swapcase() in letters for letter in letters):
        return text
    return re.sub(r"(\\[a-zA-Z]+)|[^\\]+", lambda found: found[0] if found[1] else found[0].casefold(), text)


def _matched(gold: list[Part], given: list[Part]) -> float:
    """Return 1.0 where each part has its own partner, 0.5 where at least half of gold is given and nothing else."""
    left = list(gold)
    for part in given:
        partner = next((i for i, other in enumerate(left) if _same_part(other, part)), None)
        if partner is None:
            return 0.0
        del left[partner]
    return 1.0 if not left else 0.5 if 2 * len(given) >= len(gold) else 0.0


def _same_part(gold: Part, given: Part) -> bool:
    """Return whether two numbers or two texts are the same."""
    if isinstance(gold, str) or isinstance(given, str):
        return gold == given
    return same_number(gold, given)


# What is still to be computed: an operator between operands, a root, a function, a power.
_UNEVALUATED = re.compile(
    r"[\w)}\]] ?[-+*^]+ ?[\w({\\]|[√!∑∏÷]|根号|\|.*\||\)\s*\(|\d\s?\(|\)\s*\d|"
    r"\\(?:sqrt|binom|log|ln|lg|sin|cos|tan|exp|sum|prod|int|lfloor|lceil|frac|pi|pm|gcd|min|max)"
)


def _is_decided(gold: list[Part], given: list[Part], given_text: str) -> bool:
    """Return whether numbers have decided: a gold number is not given by what has to be computed first."""
    if len(gold) != 1 or not isinstance(gold[0], Number):
        return False
    return all(isinstance(part, Number) for part in given) or bool(_UNEVALUATED.search(given_text))


def _as_latex(text: str) -> str:
    r"""Return `12\sqrt{3}` for `12√3` and `12根号3`, one backslash for two."""
    text = single_backslashes(text.strip()).replace("根号", "√")
    return re.sub(r"√ ?\(([^()]*)\)|√ ?\{([^{}]*)\}|√ ?(\d+|\w)", r"\\sqrt{\1\2\3}", text)


def _before_approximation(answer: str) -> str:
    r"""Return the exact answer of `\sqrt{2} \approx 1.414`; "" where nothing exact is said."""
    exact, sign, _ = re.sub(r"≈", r"\\approx ", answer).partition(r"\approx")
    return exact.strip(" $") if sign and not _VARIABLE.fullmatch(exact.strip(" $")) else ""
