"""Check rows before training, one by one, and give their prompts keys by which repeats are found."""

import difflib
import hashlib
from array import array
from typing import Any

from gspo.data.encoding import Encoder
from gspo.data.messages import Messages, Tools, read_tools
from gspo.data.schemas import AS_IT_STANDS, FIELDS, Row, bytes_of, is_published, parse_row
from gspo.data.shapes import fields_read, read_as_messages
from gspo.data.stored_rows import split_row
from gspo.errors import UserError
from gspo.system.console import say
from gspo.types import StoredResponses

NO_LIMIT = 1 << 62
SPACES = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)


class TooLong(UserError):
    """A prompt that has more tokens than data.max_prompt_length."""

    def __init__(self, place: str, length: int, most: int):
        super().__init__(
            f"{place}: the prompt has {length} tokens, data.max_prompt_length is {most}. "
            "Raise it, or set data.overlong=drop."
        )


class ResponseTooLong(TooLong):
    """A stored response that has more tokens than rollout.max_new_tokens."""

    def __init__(self, place: str, length: int, most: int):
        UserError.__init__(
            self,
            f"{place}: a response has {length} tokens, its end included, rollout.max_new_tokens is {most}. "
            "Raise it, or set data.overlong=drop.",
        )


class RowChecker:
    """Check rows before training; tokenize a prompt only where the bound on its length is not enough.

    `positions`: most tokens of a prompt that leave the model room for a response. `only_texts`: the reward function is
    the default one, which compares texts. `needs_solutions`: the objective learns from each row's `solution`.
    `stored`: rows may hold responses, of at most `max_response` tokens; with `needs_responses` every row must.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        positions: int = NO_LIMIT,
        only_texts: bool = False,
        needs_solutions: bool = False,
        stored: bool = False,
        needs_responses: bool = False,
        max_response: int = NO_LIMIT,
    ):
        self.encoder, self.max_length, self.positions = encoder, max_length, positions
        self.stored, self.needs_responses, self.max_response = stored, needs_responses, max_response
        self.first: tuple[int, bool] | None = None  # stored rows: responses of the first, whether it has a ground truth
        self.equal_pairs = 0  # rows whose responses are all the same text
        self.only_texts, self.needs_solutions = only_texts, needs_solutions
        self.longest = 0  # of the prompts tokenized, which include all that are longer than `positions`
        self._surely_short = min(max_length, positions)  # a prompt with a bound up to this is not tokenized
        self.truths = array("q")  # of each good row, a hash of its ground truth; 0 where there is none
        self.json_prompts, self.first_json = 0, ""  # prompts whose text is JSON of messages, and the place of the first
        self.good, self._digest = 0, hashlib.blake2b(digest_size=16)
        self.unread: dict[str, str] = {}  # fields that only extra_info holds -> the place of the first
        self.read_as: dict[tuple[str, tuple[str, ...]], str] = {}  # (our field, those that are read for it) -> likewise
        self.without_truth = ""  # the place of the first row without a ground truth

    def __call__(self, row: Any, place: str) -> int:
        """Return the key of a good row's prompt. Raise UserError: TooLong where its length is what is wrong."""
        if isinstance(row, UserError):
            raise row
        row, stored = split_row(row, place, self.needs_responses) if self.stored else (row, None)
        alone = stored is None
        messages, truth, source, extra = parse_row(row, place, needs_truth=alone and self.only_texts, stored=not alone)
        self._note_fields(row, place, guess_truth=alone)
        if truth is None and alone:
            self.without_truth = self.without_truth or place
        if self.stored:
            self._check_stored(stored, truth, place)
        tools = read_tools(row.get("tools"), place)
        if self.only_texts and truth is not None and not isinstance(truth, str):
            raise UserError(
                f"{place}: field 'ground_truth' is a {type(truth).__name__} ({truth!r:.60}), but the default reward "
                "function compares texts and numbers. Write it as text, or give a function that takes it: reward.path."
            )
        if self.only_texts and isinstance(truth, str) and not truth.strip():
            raise UserError(
                f"{place}: field 'ground_truth' is empty ({truth!r:.20}), so the default reward function finds no "
                "response right. Leave the row out, or give a function of your own: reward.path."
            )
        if self.needs_solutions and not (isinstance(s := extra.get("solution"), str) and s.strip()):
            raise UserError(
                f"{place}: objective.algorithm learns from gold texts, but the row has no text in its field 'solution'."
            )
        bound = self.encoder.bound(messages, place, tools)
        if bound is None or bound > self._surely_short:
            length = len(self.encoder.ids(messages, place, tools))
            if length > self.max_length:
                raise TooLong(place, length, self.max_length)
            if length > self.longest:
                self.longest = length
                self._surely_short = min(self.max_length, max(self.positions, length))
        self.truths.append(0 if truth is None else hash(bytes_of(truth)))
        if read_as_messages(row, messages):
            self.json_prompts, self.first_json = self.json_prompts + 1, self.first_json or place
        self.good += 1
        held = () if stored is None else (stored.texts, stored.rewards, stored.finished)
        self._digest.update(bytes_of((messages, truth, source, extra, tools, *held)))
        return prompt_key(messages, tools)

    def _note_fields(self, row: Row, place: str, guess_truth: bool) -> None:
        """Keep the first place of each field that is read for another, and of each that only extra_info holds."""
        if row.keys() <= FIELDS and "prompt" in row and ("ground_truth" in row or "reward_model" in row):
            return
        if is_published(row):
            read: dict[str, tuple[str, ...]] = {"": ("question", "answer") if row.get("question") else ("problem",)}
        else:
            read = fields_read(row, guess_truth)
            for ours, theirs in read.items():
                self.read_as.setdefault((ours, theirs), place)
        used = FIELDS.union(*read.values())
        self.unread |= {name: place for name in row.keys() - used - self.unread.keys() if row[name] is not None}

    def _check_stored(self, stored: StoredResponses | None, truth: Any, place: str) -> None:
        """Raise UserError where a row holds another number of responses than the first, only one of the two has a
        ground truth, or a response is too long."""
        texts = () if stored is None else stored.texts
        self.first = self.first or (len(texts), truth is not None)
        if len(texts) != self.first[0]:
            raise UserError(
                f"{place}: the row holds {len(texts)} responses, the first row {self.first[0]}; all rows need as many."
            )
        if (truth is not None) != self.first[1]:
            has, first = ("a", "none") if truth is not None else ("no", "one")
            raise UserError(f"{place}: the row has {has} ground_truth, the first has {first}: all or none need one.")
        self.equal_pairs += len(set(texts)) == 1
        for text in texts:
            if (length := self.encoder.response_length(text, self.max_response)) > self.max_response:
                raise ResponseTooLong(place, length, self.max_response)

    def fingerprint(self) -> str:
        """Return `<rows> rows <digest>` of the good rows so far: the same wherever they were read from."""
        return f"{self.good} rows {self._digest.hexdigest()}"


def say_fields(checkers: list[RowChecker], own_function: bool) -> None:
    """Say in a line each which fields are read for others, which only extra_info holds, with what a misspelt one may be
    meant for, and that there is no ground truth. `own_function`: the reward function is not the default one."""
    read_as = {key: place for checker in reversed(checkers) for key, place in checker.read_as.items()}
    if read_as:
        words = [f"{' and '.join(map(repr, theirs))} as {ours}" for ours, theirs in read_as]
        say(
            f"note: of the rows are read {', '.join(words)} (first: {next(iter(read_as.values()))}); data.prompt_key "
            "and data.truth_key name other fields."
        )
    if count := sum(checker.json_prompts for checker in checkers):
        first = next(checker.first_json for checker in checkers if checker.first_json)
        say(
            f"note: the prompts of {count:,} rows are JSON texts, read as the messages in them (first: {first}). "
            f"{AS_IT_STANDS}"
        )
    if without := next((checker.without_truth for checker in checkers if checker.without_truth), ""):
        say(
            f"note: {without}: there is no ground truth; the reward function gets None, here and in rows like this. "
            "If another field holds it, name that field by data.truth_key."
        )
    unread: dict[str, str] = {}
    for checker in checkers:
        unread = checker.unread | unread
    if unread:
        _say_unread(unread, own_function)


def _say_unread(unread: dict[str, str], own_function: bool) -> None:
    """Say in one line which fields only extra_info holds, and what a misspelt one may be meant for."""
    near = {name: difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8) for name in sorted(unread)}
    words = [f"{name!r:.60}{f' (is {found[0]!r} meant?)' if found else ''}" for name, found in near.items()]
    more = f" and {len(words) - 10} more" if len(words) > 10 else ""
    kind, place = "warning" if any(near.values()) else "note", next(iter(unread.values()))
    named = f"{', '.join(words[:10])}{more} (first: {place})"
    if own_function:
        say(f"{kind}: of the rows {named} go into extra_info, which the reward function may take.")
    else:
        say(
            f"{kind}: of the rows nothing reads {named}. A function of your own (reward.path) finds them in extra_info."
        )


def prompt_key(messages: Messages, tools: Tools | None = None) -> int:
    """Return 64 bits, in this process the same for prompts of the same text, whatever their ASCII whitespace."""
    text = messages[0].get("content", "") if len(messages) == 1 else "\n".join([m.get("content", "") for m in messages])
    if tools or any(len(m) > 2 for m in messages):
        text += repr((tools, [sorted(m.items()) for m in messages]))
    data = text.encode("utf-8", "surrogatepass").translate(SPACES).strip()
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return hash(data)
