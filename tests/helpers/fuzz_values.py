"""Values, texts and files drawn at random for the tests that fuzz, and what they may do with them."""

import math
import os
import re

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gspo.errors import UserError
from gspo.system.output import kept_output

CASES = int(os.environ.get("GSPO_FUZZ_CASES", 2000))
LIMIT_S = 900 * max(1, CASES // 2000)  # for a test; minutes are usual
fuzz = settings(
    max_examples=CASES,
    derandomize=False,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

# Of all that JSON can hold, also what no sensible program writes.
numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0, math.nan, math.inf, -math.inf]),
    st.floats(),
)
texts = st.one_of(
    st.sampled_from(["", " ", "\0", "\ud83d", "a\ud800b", "\x1b[2J", "null", "true", "1", "../..", "~", "#### 7"]),
    st.text(st.characters(), max_size=12),  # half characters are among them
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
DEPTHS = (100, 700, 990, 100_000)
A_VALUE = re.compile(rb': *("[^"\\]*"|[-+.\w]+|\[\]|\{\})')


def nested(depth: int, leaf: str = "1") -> str:
    """Return lists in lists, which readers that call themselves cannot all read."""
    return "[" * depth + leaf + "]" * depth


def objects_like(known: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Draw objects with some of the known fields, one or the other of them wrong, and now and then one too many."""
    field = {name: st.one_of(good, good, good, values) for name, good in known.items()}
    return st.builds(
        lambda a, b: {**a, **b}, st.fixed_dictionaries({}, optional=field), st.dictionaries(texts, values, max_size=1)
    )


def damaged(data, text: str, depths: tuple[int, ...] = DEPTHS) -> bytes:
    """Draw what becomes of a file: mostly nothing, or it is cut, a byte changes, or it is nested too deep."""
    raw = text.encode("utf-8", "surrogatepass")
    how = data.draw(st.sampled_from(["whole"] * 6 + ["cut", "byte", "insert", "deep"]))
    at = data.draw(st.integers(0, len(raw)))
    if how == "cut":
        return raw[:at]
    if how == "byte":
        return raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    if how == "insert":
        return raw[:at] + data.draw(st.binary(max_size=6)) + raw[at:]
    if how == "deep":
        inside = nested(data.draw(st.sampled_from(depths)), data.draw(st.sampled_from(["1", '"\\ud83d"', "{}"])))
        found = [*A_VALUE.finditer(raw)]
        if found:
            place = data.draw(st.sampled_from(found))
            return raw[: place.start(1)] + inside.encode() + raw[place.end(1) :]
    return raw


def read_or_refused(read):
    """Return what `read` returns, None where it refuses with a paragraph; any other exception fails the test."""
    try:
        with kept_output():  # as in every program: what is printed may hold half a character
            return read()
    except UserError as e:
        assert str(e).strip() and "Traceback" not in str(e)
        return None
