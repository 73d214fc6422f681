"""The attention of decoding: its formulas, its kernels in Triton's interpreter and through the compiler."""

import pytest
import torch
from decode_cases import Case, cases, draw, exactly
from triton_programs import results

from gspo.kernels.decode_attention import decode_attention
from gspo.kernels.decode_types import Pool, Readers


@pytest.mark.parametrize("case", cases()[:6], ids=Case.name)
def test_pages_and_tables_do_not_show(case):
    """In float64 the same as a softmax over each slot's keys, though every entry that is nobody's is not a number."""
    drawn = draw(case._replace(dtype=torch.float64))
    clean = [p._replace(keys=p.keys.nan_to_num(), values=p.values.nan_to_num()) for p in drawn[1:3]]
    found = decode_attention(drawn.q, *clean, drawn.positions, case.width**-0.5, case.softcap, case.window)
    torch.testing.assert_close(found, exactly(case, drawn), rtol=1e-12, atol=1e-12)


def test_one_slot_by_hand():
    """One key in the prompt, which a window of one token hides, and one in the answer."""
    table = lambda size, start: Readers(*(torch.tensor(x).int() for x in ([[0]], [[0]], [size], [start])))  # noqa: E731
    one = torch.ones(1, 1, 1, 1)
    prompts, answers = Pool(one, 3 * one, table(1, 0)), Pool(2 * one, 5 * one, table(1, 1))
    q, at = torch.tensor([[[1.0]]]), torch.tensor([1]).int()
    weight = torch.tensor([1.0, 2.0]).softmax(0)
    expected = (weight * torch.tensor([3.0, 5.0])).sum()
    assert decode_attention(q, prompts, answers, at, 1.0).item() == pytest.approx(expected.item())
    assert decode_attention(q, prompts, answers, at, 1.0, window=1).item() == 5.0


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted_kernels_are_as_near_to_float64_as_plain_pytorch(tmp_path, step):
    """Several programs a sequence; pages and results that nobody wrote are NaN."""
    pytest.importorskip("triton")
    found = results("interpreted_decode.py", tmp_path, str(step))  # every step-th case
    wrong = [line for lines in found.values() for line in lines]
    assert len(found) == len(range(0, 10, step)) and not wrong, "\n".join(wrong)


def test_float32_is_one_tf32_product_where_pytorch_may_round_so(monkeypatch):
    pytest.importorskip("triton")
    from gspo.kernels.decode_attention_triton import blocks

    assert [blocks(8, 64, width, width, 4)["PRECISION"] for width in (128, 256)] == ["tf32x3", "ieee"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert [blocks(8, 64, width, width, 4)["PRECISION"] for width in (128, 256)] == ["tf32", "tf32"]


@pytest.mark.parametrize(
    ("slots", "kv_heads", "tokens", "processors", "splits"),
    [
        (256, 2, 16384, 132, 8),
        (8, 2, 16384, 132, 16),  # 8 x 2 x 16 programs: two for each of 132 processors, nearly
        (1, 2, 16384, 132, 32),
        (1, 2, 1024, 132, 4),  # no share is shorter than 256 tokens
        (8, 2, 16384, 0, 8),
    ],
)
def test_few_long_answers_are_split_among_all_processors(slots, kv_heads, tokens, processors, splits):
    pytest.importorskip("triton")
    from gspo.kernels.decode_attention_triton import split_count

    tables = Readers(
        *(torch.zeros(*x, dtype=torch.int32) for x in ((slots, tokens // 64), (slots, 1), (slots,), (slots,)))
    )
    pages = torch.zeros(1, kv_heads, 64, 16)
    assert split_count(Pool(pages, pages, tables), processors) == splits
