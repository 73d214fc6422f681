"""Write the keys and values of new tokens to their places in the pages of a KV cache."""

from torch import Tensor

from gspo.kernels.dispatch import Implementation, always, choose, on_cuda, triton_kernel


def write_tokens(key_pages: Tensor, value_pages: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write keys [T, Hk, D] and values [T, Hk, Dv] to rows `places` [T * Hk] int64 of the pages.

    key_pages [n, Hk, page, D] and value_pages [n, Hk, page, Dv] are rows of D and Dv numbers, contiguous; keys and
    values may be slices of wider tensors.
    """
    assert key_pages.is_contiguous() and value_pages.is_contiguous() and len(places) == keys.shape[0] * keys.shape[1]
    choose(IMPLEMENTATIONS, keys)(key_pages, value_pages, places, keys, values)


def plain_write_tokens(key_pages: Tensor, value_pages: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
    """Compute `write_tokens` in plain PyTorch."""
    for pages, new in ((key_pages, keys), (value_pages, values)):
        pages.view(-1, new.shape[2]).index_copy_(0, places, new.flatten(0, 1))


IMPLEMENTATIONS = (
    Implementation(on_cuda, triton_kernel("write_tokens_triton", "write_tokens")),
    Implementation(always, lambda keys: plain_write_tokens),
)
