"""The draw of a token on CUDA, in Triton's interpreter and through the compiler, against the plain one."""

import math

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")
from triton_programs import results


@pytest.mark.slow
def test_interpreted_kernels_draw_what_pytorch_draws(tmp_path):
    """The same uniforms to the bit; the same tokens but for draws that lie between two; log-probs and entropies; tokens
    as often as softmax has them. Several chunks a row; unwritten memory is NaN."""
    found = results("interpreted_sampling.py", tmp_path)
    wrong = [line for lines in found["wrong"].values() for line in lines]
    assert len(found["wrong"]) == 25 and not wrong, "\n".join(wrong)
    assert found["uniforms"]
    seen, expected = found["counts"]
    rare = [i for i, e in enumerate(expected) if e < 5]
    cells = [(s, e) for i, (s, e) in enumerate(zip(seen, expected, strict=True)) if i not in rare]
    cells.append((sum(seen[i] for i in rare), sum(expected[i] for i in rare)))
    freedom = len(cells) - 1
    assert sum((s - e) ** 2 / e for s, e in cells) < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.slow
def test_the_engine_with_interpreted_kernels_samples_what_pytorch_does(tmp_path):
    """Whole models, as on CUDA but for the graphs: blocks of steps, refills, windows, soft caps, a truncated draw."""
    found = results("interpreted_engine.py", tmp_path)
    assert set(found) == {"gemma2", "qwen3"}
    for family, said in found.items():
        assert said["same"] and said["off"] < 1e-4 and said["lengths"] > 3, (family, said)
        assert said["joined"] == 4, "products of two layers that are given the same tensor"
