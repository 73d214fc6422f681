"""Define the arguments of an attention over pages: keys and values in pages, and the slots that read them."""

from typing import NamedTuple

from torch import Tensor


class Readers(NamedTuple):
    """T sequences of keys, each with the slots that read it. Sequences may share pages."""

    pages: Tensor  # [T, P] int32, their pages, in order; entries after the last one are not read
    members: Tensor  # [T, M] int32, the slots; -1: none
    sizes: Tensor  # [T] int32, tokens in these pages
    starts: Tensor  # [T] int32, position of the first of them


class Pool(NamedTuple):
    """Pages and their readers."""

    keys: Tensor  # [n, Hk, page, D]
    values: Tensor  # [n, Hk, page, Dv]
    readers: Readers
