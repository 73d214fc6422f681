"""The page of the first run shows what `make train-quick` prints: what one waits for, and no false alarm."""

import re

import pytest
from repository import ROOT

from benchmarks.first_run import PAGES, SHOWN_STEPS, quick_run, transcript

PRINTED = """\
CPU, 2 threads, fp32 | model: the embedded model | kept in outputs/quick
before training: 40 / 512 responses, 2,451 tok/s, 4 s, about 1 min left
step 49/100  round 1  reward 0.900  left 50 s
step 50/100  round 1  reward 0.934  kl 0.0500  length 15.2  1234 tok/s  0.61 s  left 31 s
round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950
round 2 begins: the opponent is now the policy of step 50
step 51/100  round 2  reward 0.947  kl 0.0000  length 15.2  1234 tok/s  0.61 s  left 2 min
checkpoint outputs/quick/checkpoints/step_000050, the best
the whole run takes about 2 min: 97 more steps of 0.61 s and 3 s of evaluation
done in 1 min 29 s; the last checkpoint: outputs/quick/checkpoints/step_000100
"""


IN_CHINESE = """\
CPU，2 线程，fp32 | 模型：内置模型
训练前：40 / 512 个回复，2,451 tok/s，4 秒，约剩 1 分钟
步 50/100  轮 1  奖励 0.934  长度 15.2  1234 tok/s  0.61 秒  剩余 31 秒
第 1 轮结束，第 50 步：留出准确率 0.961（之前 0.398），奖励 0.950
检查点 outputs/quick/checkpoints/step_000050，目前最好的
整个训练约需 2 分钟：还有 97 步，每步 0.61 秒，另加评估 3 秒
用时 1 分 29 秒；最后的检查点：outputs/quick/checkpoints/step_000100
"""


def shown(page):
    """The transcript on a page."""
    return (ROOT / page).read_text(encoding="utf-8").partition("```text\n")[2].partition("\n```\n")[0]


def figures(line):
    """The numbers of a line but those that stand in words: `round 1` and `step 50` may change places."""
    return sorted(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", line))


def without_numbers(text):
    return re.sub(r"\d+\.\d+|\d+%", "#", text)


def test_speed_is_left_out_and_a_checkpoint_stands_behind_its_step():
    assert transcript(PRINTED).splitlines() == [
        "CPU, … threads, fp32 | model: the embedded model | kept in outputs/quick",
        "step 50/100  round 1  reward 0.934  kl 0.0500  length 15.2  … tok/s  … s  left …",
        "round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950",
        "round 2 begins: the opponent is now the policy of step 50",
        "checkpoint outputs/quick/checkpoints/step_000050, the best",
        "step 51/100  round 2  reward 0.947  kl 0.0000  length 15.2  … tok/s  … s  left …",
        "the whole run takes about …: 97 more steps of … s and … of evaluation",
        "done in …; the last checkpoint: outputs/quick/checkpoints/step_000100",
    ]


def test_a_chinese_run_is_shown_alike():
    assert transcript(IN_CHINESE).splitlines() == [
        "CPU，… 线程，fp32 | 模型：内置模型",
        "步 50/100  轮 1  奖励 0.934  长度 15.2  … tok/s  … 秒  剩余 …",
        "第 1 轮结束，第 50 步：留出准确率 0.961（之前 0.398），奖励 0.950",
        "检查点 outputs/quick/checkpoints/step_000050，目前最好的",
        "整个训练约需 …：还有 97 步，每步 … 秒，另加评估 …",
        "用时 …；最后的检查点：outputs/quick/checkpoints/step_000100",
    ]


def test_both_pages_show_the_same_run_each_in_its_language():
    english, chinese = map(shown, PAGES.values())
    pairs = [*zip(english.splitlines(), chinese.splitlines(), strict=True)]
    assert [pair for pair in pairs if figures(pair[0]) != figures(pair[1])] == []
    names = r"\S*[/=_@.]\S*|<.*>|`acc`|prompt|token|fp32|rank|KL|GiB|CPU|train|val|test|x|share"
    assert re.findall(r"[A-Za-z]+", re.sub(names, "", chinese.partition("接下来")[0])) == []


def test_the_page_shows_what_the_console_is_to_tell():
    lines = shown(PAGES["en"]).splitlines()
    parts = [part.partition(": ")[0] for part in lines[0].split(" | ")]
    assert parts == ["CPU, … threads, fp32", "model", "data", "reward", "kept in outputs/quick"]
    assert "rows)" in lines[0] and "right from 1 on" in lines[0]
    assert [line for line in lines if line.startswith(("warning", "alarm"))] == []
    steps = [line for line in lines if line.startswith("step ")]
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in steps] == [*SHOWN_STEPS]
    assert all(word in line for line in steps for word in ("no pair ", "cut off ", "ordered ", "left "))
    beginnings = ["before training: ", "before step 1: held-out", "round 1 ends, step 50: held-out", "round 2 begins"]
    beginnings += ["round 2 ends, step 100: held-out", "checkpoint ", "the whole run takes", "done in", "the best: "]
    assert [start for start in beginnings if not any(line.startswith(start) for line in lines)] == []
    assert "eval.before_and_after=false skips it" in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("language", PAGES)
def test_the_page_is_what_a_run_prints(language):
    """But for the numbers, which another processor may round differently."""
    again = transcript(quick_run(language=language))
    assert without_numbers(again) == without_numbers(shown(PAGES[language]))
    assert float(re.search(r"(?:round 2 ends|第 2 轮结束).*(?: accuracy |准确率 )([\d.]+)", again)[1]) > 0.9
