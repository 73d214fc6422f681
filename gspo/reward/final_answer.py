r"""Find the final answer of a response: what its last mark says, or a retraction after it, or its last number.

A box, `####`, `<answer>` and 【答案】 are strong marks: the last one counts. Phrases ("the answer is", 答案：, 故选)
count after the last strong mark only where a number, a choice or a formula follows. "No wait, it is 8." takes back what
was said before it. A last number without a mark counts by what stands around it: the 2 of `$\sqrt{2}$` is no answer.
"""

import re
from dataclasses import dataclass

from gspo.reward.answer_numbers import read_number
from gspo.reward.answer_text import any_of, plain

MAX_ANSWER, MAX_MARKS = 200, 8  # the last marks are looked at


@dataclass(frozen=True)
class Answer:
    """A final answer as written, and whether it is marked as one."""

    text: str
    marked: bool


# ---- marks ----

_BOX = re.compile(r"\\\\?(?:boxed|fbox) ?\{")
# What stands before a box and changes what is in it: -\boxed{7}, "not \boxed{7}".
_MINUS_BEFORE_BOX = r"(?:^|[\s=($\[:,])-|[=$(\[]\s*-\s"
_WORDS_BEFORE_BOX = any_of(
    "not, not equal to, not to be, negative, minus, at least, at most, more than, less than, fewer than, greater than,"
    "up to",
    r"负 不是 不等于 大于 小于 至少 至多 不 ≠ [<>] \\neq? \\[lg][et]q?",
)
_BEFORE_BOX = re.compile(rf"(?:{_MINUS_BEFORE_BOX}|{_WORDS_BEFORE_BOX}\s*)\$?\s*$", re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL)
_LENTICULAR = re.compile(r"【\s*(?:正确|最终|参考)?答案\s*】[\s:：]*")
_SPACE = r"\s{0,9}(?:\*\*)?\s{0,9}"
_IS = (
    r"(?:(?:is|are|would be|should be|will be|must be|was|comes to|equals)\b(?: (?:therefore|thus|then|simply|indeed))?"
    "|[:=是为])"
)
_PHRASE = re.compile(
    rf"(?:\banswers?(?: choice)?{_SPACE}{_IS}|\bans\s?[:.=]|答案\s?(?=\(?[A-H]\)?(?![a-zA-Z]))|"
    rf"(?:答案|(?<![回解\u4e00-\u9fff])答){_SPACE}(?:应该?|应当|就|可能|即|也)?(?:选择?|是|为|等于|[:=])|"
    r"正确(?:的)?(?:选项|答案)\s?(?:是|为|[:：]))[\s:：*_$]*",
    re.IGNORECASE,
)
_LETTERS = r"[A-Z](?![a-z])(?:(?:\s?[、,和与及]\s?|\s)?[A-Z](?![a-z]))*"
_CHOICE = re.compile(
    r"(?:[故应只]?选(?:择|项)?(?:的是|是|为|出)?\s?[:：]?|\bis (?:option|choice)|\b(?:[Oo]ption|[Cc]hoice) is|"
    r"\b(?:[Oo]ption|[Cc]hoice)(?= \(?[A-H]\)? is (?:the )?(?:correct|right|best))|"
    r"(?=[A-H]\s?选?项?\s?是?(?:正确|符合题意)))[\s$*]*"
    rf"(?=(?:\(|\\text\w*\{{\(?)?{_LETTERS}(?:\)|\}}|[^a-zA-Z]|$))"
)
# Said of an answer, not an answer.
_COMMENT = re.compile(
    r"(?:not )?"
    + any_of(
        "(?:in)?correct, right, wrong, reasonable, valid, clear, given, expressed, rounded, simplified, the same,"
        "as follows, consistent, confirmed, unique, in the, found, obtained",
        "正确 对的 错误",
    ),
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"[.](?=[\s$*)\"”】]|\\[\])]|$)|[?](?=\s|$)|[。！？；\n【]|<(?:eo[aes]|/)|<\||"
    r"(?<![\d)}!])!(?=\s|$)|!(?=\s+[A-Z]|\s*[\u4e00-\u9fff]|$)"  # 5! may be a factorial
)
_OPENING = re.compile(r"(?:[\s*_:：]|\$|\\[\[(]|是|为)*")
_TAKES_BACK = any_of(
    "no\\W{1,3}wait, wait, actually, correction, sorry, scratch that, hold on, oops, i meant?, i made an? \\w{4,8},"
    "let me correct (?:that|this|myself)",
    "不对 等等 等一下 更正 抱歉 说错了 算错了 应该是 应为",
)
_AND_SAYS = any_of(
    "no, not? that, wait, actually, sorry, i meant?, that(?:'s| is| was) (?:wrong|not right|incorrect),"
    "(?:it|this|that)'s, the, right, correct, real, true, final, answer, it, this, that, should, must, be, is, was, so",
    "不对 等等 正确 答案 应该? 是 为 它",
)
_RETRACTION = re.compile(rf"{_TAKES_BACK}(?:[\s,:;.!，：。！—-]|{_AND_SAYS}){{0,24}}", re.IGNORECASE)
# Words with which an explanation of the answer begins.
_EXPLANATION = re.compile(
    r"(?:,| -+)\s?"
    + any_of(
        "which, since, because, so, as, where, who, that is, meaning, i\\.e, given, based, assuming, making,"
        "and (?:this|that|it|so)"
    )
    + r"|\s(?:because|since|which)\b|\s\([^()]*=[^()]*\)|\s?\("
    + any_of("since, because, as, i\\.e, rounded, approximately, that is, note, from, by, using")
    + r"|[,(]\s?(?:因为|由于|所以|即|其中|也就是|这是)",
    re.IGNORECASE,
)


def final_answer(text: str, sentences: int = 1, cut_off: bool = False) -> Answer:
    """Return the final answer of a text that `answer_text.end_of` has returned.

    `sentences`: in how many an answer may be written (a gold answer such as "Dr. Who" has two). `cut_off`: the response
    was ended by the limit of tokens, so that what stands at its very end may be half an answer.
    """
    strong, rest = _last_strong_mark(text, sentences, cut_off)
    spoken, rest = _last_phrase(text, rest, sentences, cut_off, must_be_readable=strong is not None)
    found = spoken if spoken is not None else strong
    if found is not None:
        later = _retraction(text, rest, cut_off)
        return Answer(_bare(found if later is None else later), True)
    return _unmarked(text, cut_off)


def _bare(answer: str) -> str:
    """Return an answer without the space and the delimiters around it."""
    return re.sub(r"^(?:\s|\*\*|\\[(\[]|\$(?!\d[^$]*$))+|(?:\s|\*\*|\\[)\]]|(?<!\\)\$)+$", "", answer)


# ---- strong marks ----


def _last_strong_mark(text: str, sentences: int, cut_off: bool) -> tuple[str | None, int]:
    """Return (content, place where it ends) of the last box, ####, <answer> or 【答案】; (None, 0) without one."""
    best, begins, ends = None, -1, 0
    for found in (_box(text), _line(text, cut_off), _tagged(text, cut_off), _lenticular(text, sentences, cut_off)):
        if found and found[1] > begins:
            best, begins, ends = found
    return best, ends


def _box(text: str) -> tuple[str, int, int] | None:
    """Return (content, begin, end) of the last box that closes; its sign before it, if it has one."""
    last = max(text.rfind("boxed"), text.rfind("fbox"))
    found = _BOX.search(text, max(last - 2, 0)) if last >= 0 else None
    if not found:
        return None
    end = _closing_brace(text, found.end())
    if end is None:
        return None
    before = _BEFORE_BOX.search(text[max(0, found.start() - 24) : found.start()])
    sign = before[0].strip(" $=([:,\n") + " " if before else ""
    return sign + text[found.end() : end], found.start(), end + 1


def _closing_brace(text: str, start: int) -> int | None:
    r"""Return the place of the brace that closes one opened before `start`; `\{` and `\}` are text."""
    depth = 1
    for found in re.compile(r"\\?[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return None


def _line(text: str, cut_off: bool) -> tuple[str, int, int] | None:
    """Return (content, begin, end) of the line of the last ####."""
    begin = text.rfind("####")
    if begin < 0:
        return None
    content = _OPENING.sub("", text[begin + 4 :].lstrip("# \n"), count=1)
    start = len(text) - len(content)
    end = text.find("\n", start)
    if end < 0:
        if cut_off:
            return None
        end = len(text)
    line = text[start:end]
    marks = list(_PHRASE.finditer(line))
    if marks:  # "#### The answer is 72"
        start += marks[-1].end()
        line = text[start:end]
    stop = _SENTENCE_END.search(line)
    while stop and (stop[0] == "!" or not line[: stop.start()].strip()):  # 5! is a factorial here
        stop = _SENTENCE_END.search(line, stop.end())
    return (line[: stop.start()] if stop else line), begin, end


def _tagged(text: str, cut_off: bool) -> tuple[str, int, int] | None:
    """Return (content, begin, end) of the last <answer>."""
    begin = max(text.rfind("<answer>"), text.rfind("<Answer>"), text.rfind("<ANSWER>"))
    found = _TAG.match(text, begin) if begin >= 0 else None
    if not found or (cut_off and found.end() == len(text) and not found[0].endswith(">")):
        return None
    content = found[1].strip()
    marks = list(_PHRASE.finditer(content))
    return (content[marks[-1].end() :] if marks else content), begin, found.end()


def _lenticular(text: str, sentences: int, cut_off: bool) -> tuple[str, int, int] | None:
    """Return (content, begin, end) of what follows the last 【答案】."""
    begin = text.rfind("答案】")
    marks = list(_LENTICULAR.finditer(text, max(0, begin - 8))) if begin >= 0 else []
    if not marks:
        return None
    found = _sentence(text, marks[-1].end(), sentences, cut_off)
    return found and (found[0], marks[-1].start(), found[1])


# ---- phrases ----


def _last_phrase(
    text: str, start: int, sentences: int, cut_off: bool, must_be_readable: bool
) -> tuple[str | None, int]:
    """Return (content, end) of the last phrase such as "the answer is" from `start` on; (None, start) without one."""
    tail = text[start:]
    ends = sorted({m.end() for m in _PHRASE.finditer(tail)} | {m.end() for m in _CHOICE.finditer(tail)}, reverse=True)
    first = None
    for end in ends[:MAX_MARKS]:
        found = _sentence(text, start + end, sentences, cut_off)
        if found is None or _COMMENT.match(found[0]):
            continue
        if not must_be_readable:
            return found
        first = first or (found if is_readable(found[0]) else None)
    if first is None and ends and not must_be_readable:
        return "", len(text)
    return first or (None, start)


def is_readable(answer: str) -> bool:
    """Return whether an answer is a number, a choice or a short formula, and not words about one."""
    text = plain(answer[:MAX_ANSWER])
    if read_number(text.rpartition("=")[2]) or re.fullmatch(r"\(?[A-H](?:, ?[A-H]|[A-H])*\)?\.?", text):
        return True
    if len(text) > 60 or not re.search(r"[\d\\^=+*/]|^[a-zA-Z]$", text):
        return False
    return not re.search(r"[A-Za-z]{3} [A-Za-z]|[\u4e00-\u9fff]", re.sub(r"\\[a-z]+", "", text))


def _sentence(text: str, start: int, sentences: int, cut_off: bool) -> tuple[str, int] | None:
    """Return (text of some sentences from `start` on, end); None where a cut-off response ends in it."""
    start = _OPENING.match(text, start).end()
    window = text[start : start + 2000]
    end, stops = len(window), _SENTENCE_END.finditer(window)
    for _ in range(sentences):
        stop = next(stops, None)
        if stop is None:
            end = len(window)
            break
        end = stop.start()
    if cut_off and start + end >= len(text):
        return None
    content = window[:end]
    if content.endswith("!") and not content.endswith("!!"):
        content = content[:-1]  # an exclamation
    return content, start + end


def without_explanation(answer: str) -> str:
    """Return `7` of "7, which is prime" and "7 (since 3 + 4 = 7)"."""
    found = _EXPLANATION.search(answer)
    return answer[: found.start()] if found and found.start() else answer


def _retraction(text: str, start: int, cut_off: bool) -> str | None:
    """Return what a later "No wait, it is 8." puts in the place of the answer; None where nothing does."""
    for found in list(_RETRACTION.finditer(text, start))[: -1 - MAX_MARKS : -1]:
        said = _sentence(text, found.end(), 1, cut_off)
        if said and (is_choice_like(said[0]) or read_number(plain(without_explanation(said[0][:MAX_ANSWER])))):
            return said[0]
    return None


def is_choice_like(answer: str) -> bool:
    """Return whether this is a letter, perhaps in parentheses."""
    return re.fullmatch(r"\s*\(?[A-H]\)?\s*", answer) is not None


# ---- no mark ----

_NO_PROSE = re.compile(r"[^\W\d_]{2}|[=\n]")
_LIST = re.compile(r"(?=[-+.\d]|[a-z] ?=)(?:\b[a-z] ?=|[^=])*$", re.IGNORECASE)  # "3 clips", "x = 1 or x = 2"
_A_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_LEFT_END = re.compile(
    r"[=\n;；，。！？]|(?<=\D)[:：]|[,.!?](?=\s)|\\approx|≈|"
    r"\b(?:makes|gives|gets?|is|are|be|has|have|leaves|costs?)\s|(?<![不非没])[是为得有]"
)
_RIGHT_END = re.compile(r"[=\n;；，。！？]|[,.!?](?=[\s$)*]|$)")
_PAIR = re.compile(r"[\[({](?:[^\[\](){}]*)$")


def _unmarked(text: str, cut_off: bool) -> Answer:
    """Return the whole text where it is nothing but an answer, else its last number with what changes it."""
    text = text.strip()
    if not cut_off and (not _NO_PROSE.search(re.sub(r"\\[a-zA-Z]+", "", text)) or _is_list(text)):
        return Answer(_bare(text), True)
    numbers = list(_A_NUMBER.finditer(text, max(0, len(text) - 2000)))
    if not numbers:
        return Answer("" if cut_off else text, False)
    last = numbers[-1]
    if cut_off:
        return Answer("", False)
    return Answer(_around(text, last.start(), last.end()), False)


def _is_list(text: str) -> bool:
    """Return whether a text is a short list of numbers with words and names: "3 clips", "x = 1 or x = 2"."""
    if len(text) > MAX_ANSWER or not _LIST.match(text):
        return False
    parts = re.split(r"[;或和]|,(?!\d{3}(?!\d))|\bor\b|\band\b", plain(text))
    return all(read_number(part.rpartition("=")[2]) for part in parts if part.strip())


def _around(text: str, start: int, end: int) -> str:
    """Return the last number alone where nothing near it changes it, else with its surroundings."""
    line = text.rfind("\n", 0, start) + 1
    before, after = text[max(line, start - 80) : start], text[end : end + 80].partition("\n")[0]
    if before.count("$") % 2 and "$" in after:  # in a formula: $...$
        before, after = before.rpartition("$")[2], after.partition("$")[0]
        if "\\" in before.rpartition("=")[2]:
            return before.rpartition("=")[2] + text[start:end] + after
    opened = _PAIR.search(before)
    if opened and re.fullmatch(r"[\[({][\d\s.,;+-]*", opened[0]) and ("," in opened[0] or after[:1] == ","):  # [1, 3]
        return opened[0] + text[start:end] + after
    cuts = list(_LEFT_END.finditer(before))
    before = before[cuts[-1].end() :] if cuts else before
    cut = _RIGHT_END.search(after)
    after = after[: cut.start()] if cut else after
    if opened and "(" in opened[0]:
        before, after = before.rpartition("(")[2], after.partition(")")[0]
    earlier = list(_A_NUMBER.finditer(before))
    if earlier and re.search(r"[^\W\d_]{2}", before[earlier[-1].end() :]):
        before = before[earlier[-1].end() :].lstrip()
        before = before.partition(" ")[2] if before[:1].isascii() and before[:1].isalpha() else before
    whole = before + text[start:end] + after
    read = read_number(plain(whole))
    alone = re.match(r"\s?%|\s?(?:dozen|hundred|thousand|million|billion|[万亿])", after)
    number = text[start:end] + (alone[0] if alone else "")
    signed = re.search(r"(?:^|[\s(=$])(-)\s?\$?$", before)
    number = "-" + number if signed else number
    return number if read and (bare := read_number(plain(number))) and bare.value == read.value else whole
