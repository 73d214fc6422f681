"""Know when a run's time is up (`trainer.time_limit`), before its last step would go beyond it."""

import re
import time

from gspo.errors import UserError

STARTED = time.monotonic()  # when this module was imported: with the program's first lines
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `90s`, `45m`, `1h30m`, `2d`, or of a scheduler's `[days-]hours:minutes:seconds`.

    UserError where it is none of these, or no time at all.
    """
    written = text.strip().lower()
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", written):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        total = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif re.fullmatch(r"\d+(\.\d+)?", written):
        total = float(written)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms]\s*)+", written):
        total = sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", written))
    else:
        total = 0.0
    if not 0 < total < float("inf"):
        raise UserError(
            f"trainer.time_limit = {text!r} is no length of time; write 90s, 45m, 1h30m, 2d, or hours:minutes:seconds."
        )
    return total


class TimeLimit:
    """The time that a process has from its start; none without a text."""

    def __init__(self, text: str | None):
        self.text, self.seconds = text, parse_duration(text) if text else float("inf")
        self.last: float | None = None  # when a step began
        self.longest = 0.0  # step, in seconds

    def reached(self) -> str:
        """Return why no further step may begin, or nothing; to be called before each step.

        A step that may take as long as the longest so far has to end within the limit.
        """
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        if now + self.longest <= STARTED + self.seconds:
            return ""
        return f"trainer.time_limit = {self.text} leaves no time for another step"
