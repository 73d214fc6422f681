"""Keep bfloat16 matrix products from reading memory that was never written.

oneDNN on processors with AMX reads a strided operand in place, in tiles of 32 numbers, and multiplies memory after a
row's end by the tile's zero padding; 0 x NaN is NaN. Seen with torch 2.13 for inner sizes that are no multiple of 32:

    buffer = torch.full((40, 341), float("nan"), dtype=torch.bfloat16)
    a, b = buffer[:, :333].copy_(torch.randn(40, 333)), torch.randn(333, 24).bfloat16()
    torch.mm(a, b).isnan().any()  # True; False for a.contiguous()
"""

from torch import Tensor

TILE = 32  # numbers of 16 bits in a row of a tile


def whole_tiles(x: Tensor) -> Tensor:
    """Return x [..., M, K], or a contiguous copy where a tile would reach past a row's end into other memory.

    For 16-bit operands on CPUs whose memory between rows may never have been written.
    """
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or x.stride(-1) != 1:  # oneDNN copies other layouts anyway
        return x
    return x if x.shape[-1] % TILE == 0 or x.stride(-2) == x.shape[-1] else x.contiguous()


def columns_of(buffer: Tensor, tokens: int, width: int) -> Tensor:
    """Return the corner [tokens, width] of a buffer [T, W] to write to, with zeros after its rows.

    W is a multiple of TILE, so a tile that begins in a row ends in those zeros.
    """
    assert buffer.stride(0) % TILE == 0 and buffer.shape[1] >= width, (buffer.shape, buffer.stride(), width)
    buffer[:tokens, width:].zero_()
    return buffer[:tokens, :width]
