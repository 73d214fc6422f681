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


@pytest.mark.slow
def test_kernels_compile_for_sm_80_and_sm_90a_with_nothing_spilled_and_on_tensor_cores(tmp_path):
    pytest.importorskip("triton")
    found = results("compiled_decode.py", tmp_path)
    assert len(found) == 40
    for name, said in found.items():
        assert said["spilled"] == 0 and said["shared"] <= 99 * 1024, (name, said)  # what every GPU since sm_80 has
        plain = "merge" in name or "fp32" in name and ("x256" in name or "x192" in name)
        assert plain == (said["tensor cores"] == 0), (name, said)
