"""Formulas made to take for ever are recognized before a library sees them; others cost little."""

import os
import subprocess
import sys

import pytest
from repository import ROOT

from gspo.reward import latex_process, reward_func
from gspo.reward.latex import available
from gspo.reward.latex_size import is_too_large
from gspo.reward.worker_handle import Settings
from gspo.reward.worker_pool import WorkerPool

needs_library = pytest.mark.skipif(not available(), reason="math-verify is not installed")
PATIENCE_S = 120
BOMBS = [
    *(r"9^{9^{9^{7}}}", "9^{9}^{9}", "{9^{9}}^{9^{9}}", "2^{2^{2^{2^{2^{2}}}}}", "10^{10^{10}}", "(2^{9999})^{9999}"),
    *("99999!", "9!!!", "(9!)!", "9^{9!!}", "9^{(9!)!}", "10^{9}!", "(9^{9})!", r"\binom{10^{9}}{5\cdot 10^{8}}"),
    *("e^{e^{e^{99}}}", r"\exp(\exp(\exp(99)))", r"\exp{\exp{\exp{99}}}", r"\cosh(\cosh(\cosh(99)))"),
    *(r"1\cdot 10^{999999999}", "2^{-10^{9}}", "0.5^{99999}", r"(\frac{1}{2})^{10^{9}}", r"\frac{1}{9^{9^{9}}}"),
    *("(x+1)^{9999}", "(a+b+c+d+x)^{30}", "x^{9^{9^{9}}}", r"x^{\frac{9^{9^{9}}}{3}}", r"\sqrt{9^{9^{9}}}"),
    *(r"\begin{pmatrix}1&9^{9^{9^{9}}}\end{pmatrix}", "1<9^{9^{9^{9}}}", r"\{1,9^{9^{9^9}}\}", r"\sin(9^{9^{9}})"),
    *(
        r"\pi^{\pi^{\pi^{\pi^{\pi}}}}",
        r"\lfloor 9^{9^{9}}\rfloor",
        r"\sqrt[3]{10^{9}!}",
        r"|9^{9^{9}}|",
        "(2,9^{9^{9}}]",
    ),
]
SMALL = [
    *(r"2^{2^{3}}", "x^{2024}", "7^{2023+2024}", "2^{100}", "e^{x^{2}}", "10!", "100!", r"\binom{100}{50}", "n!"),
    *(r"\binom{100000}{2}", "(x+1)^{5}", "(a+b)^{20}", r"6.02\cdot 10^{23}", "10^{-9}", r"\frac{3^{1000}}{2^{99}}"),
    *("x^{y^{z}}", r"\pi^{2}", "(x-1)(x+2)(x-3)", r"e^{\pi}", r"\sqrt[3]{2}", "(1+x)^{n}", "2^{n+1}-1", "2^{1000}-1"),
    *(
        "(n+1)!",
        "1.5^{10}",
        r"\cosh(2)",
        "f(x)=x^{2}",
        "-1^{99}",
        "",
        "^",
        "!",
        "{",
        r"\frac",
        "9^",
        "}",
        ".",
        "0",
        "0^0",
    ),
]


@pytest.mark.parametrize("text", BOMBS)
def test_a_bomb_is_recognized(text):
    assert is_too_large(text)


def test_what_can_be_computed_is_not_refused():
    assert [text for text in SMALL if is_too_large(text)] == []


@needs_library
def test_no_library_sees_a_bomb():
    program = f"import sys; from gspo.reward.latex import equivalent\nfor bomb in {BOMBS!r}:\n"
    program += "    assert not equivalent(bomb, '1') and not equivalent('1', bomb)\nprint('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "False\n", done.stderr


COUNTS = "import os, time\ndef compute_score(s):\n    time.sleep(s)\n    return {'score': 1.0, 'pid': os.getpid()}\n"


@pytest.fixture()
def pool(tmp_path):
    (tmp_path / "r.py").write_text(COUNTS)
    settings = Settings(str(tmp_path / "r.py"), "compute_score", 0.5, warm_up={"s": 0.0})
    made = WorkerPool(settings, 1, spare=True)
    yield made
    made.close()


def test_a_process_waits_ready_to_take_the_place_of_one_that_ends(pool):
    def timeout():
        assert pool.submit({"s": 60}).result(PATIENCE_S).fault == "timeout"
        return pool.submit({"s": 0}).result(PATIENCE_S).reply["parts"]["pid"]

    for _ in range(2):
        pool.spare.join(PATIENCE_S)
        ready = pool.spare.process
        timeout()
        assert pool.threads[0].process is ready
    spare = pool.spare
    spare.join(PATIENCE_S)
    process = spare.process.process
    pool.close()
    assert process.poll() is not None, "and ends with the others"


def test_the_time_limit_of_calls_may_change_between_them(pool):
    pool.timeout_s = 60.0
    assert pool.submit({"s": 0.7}).result(PATIENCE_S).fault == ""
    pool.timeout_s = 0.1
    assert pool.submit({"s": 30}).result(PATIENCE_S).fault == "timeout"


@pytest.mark.slow
@needs_library
def test_many_slow_comparisons_get_less_time_each_and_later_ones_more_again(capsys):
    """Products of powers, each small enough by itself."""
    latex_process._overdue.clear()
    powers = r"(x+1)^{{60}}(x+2)^{{60}}(x+3)^{{60}}(x+y)^{{60}}(y+z)^{{60}}+{}"
    limits = []
    for i in range(6):
        assert reward_func.correctness(rf"\boxed{{{powers.format(i)}}}", "(x+1)^{119}") == 0.0
        limits.append(latex_process.latex_pool(os.getpid()).timeout_s)
    assert limits == [1.5, 0.75, 0.375, 0.25, 0.25, 0.25]
    assert capsys.readouterr().out.count("LaTeX answers that take seconds") == 1
    for i in range(40):
        assert reward_func.correctness(rf"\boxed{{x^2+{i}}}", f"{i}+x^2") == 1.0
    assert latex_process.latex_pool(os.getpid()).timeout_s == latex_process.LATEX_S
