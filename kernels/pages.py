"""Pages of keys and values, and which slots read which of them: what decode.py and its kernels are given."""

from typing import NamedTuple

from torch import Tensor


class Readers(NamedTuple):
    """T sequences of keys, each with the slots that read it. Several may have the same pages."""

    pages: Tensor  # [T, P] int32, their pages, in order; what is behind the last one is not looked at
    members: Tensor  # [T, M] int32, the slots; -1: nobody
    sizes: Tensor  # [T] int32, tokens in these pages
    starts: Tensor  # [T] int32, position of the first of them


class Pool(NamedTuple):
    """Pages and their readers."""

    keys: Tensor  # [n, Hk, page, D]
    values: Tensor  # [n, Hk, page, Dv]
    readers: Readers
