"""What a text says to a terminal or to tensorboard is shown, not obeyed."""

import json
import subprocess
import sys
import unicodedata

import pytest
from repository import ROOT

from gspo.config import Config, Reward
from gspo.metrics.tensorboard_file import _table
from gspo.metrics.trackers import SamplesFile
from gspo.reward.scorer import Scorer
from gspo.system.output import printable
from gspo.types import Prompt

ESCAPES = {
    "clear": "\x1b[2J",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "eight bits": "\x9b31m",
    "overwritten": "wrong\rright",
    "erased": "wrong\b\b\b\b\bright",
    "backwards": "\u202egnorw",
    "isolated": "\u2067x\u2069",
    "a line": "x\u2028y",
    "deleted": "\x7f\x00",
}
MARKDOWN = [
    *("![](http://evil/x.png)", "[x](http://evil)", "<img src=http://evil/x.png>", "<http://evil>", "http://evil"),
    *("2*3*4 = 24 and 5*6*7", r"\(a\)", r"a \| b", "a|b", "`x`", "__x__", "# x", "&lt;b&gt;", "a&#42;", "- x", "1. x"),
]


def obeyed(text):
    """Characters that a terminal would act upon."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Zl") and c not in "\n\t" or c in "\u202e\u2067\u2069"]


@pytest.mark.parametrize("kind", ESCAPES)
def test_control_characters_are_shown(kind):
    text = ESCAPES[kind]
    assert obeyed(text) and not obeyed(printable(text))
    assert printable(text).encode().decode("unicode_escape") == text, "nothing is lost"


def test_other_texts_are_unchanged():
    for text in ("a\tb\n", "中文 é 🙂", r"\frac{1}{2}", "שלום", "\ud83d"):
        assert printable(text) == text


REWARD = """
def compute_score(solution_str, **_):
    print(solution_str)
    raise ValueError(solution_str)
"""


def test_what_a_reward_prints_and_raises(tmp_path, capfd):
    (tmp_path / "r.py").write_text(REWARD)
    scorer = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1))
    prompt = Prompt(id=0, ids=[1], text="p", ground_truth="", data_source="", extra_info={})
    text = "".join(ESCAPES.values())
    outcome = scorer.pool.submit({"solution_str": text, "ground_truth": "", "data_source": ""}).result(100)
    scorer._warn(outcome, prompt, [text])
    scorer.close()
    captured = capfd.readouterr()
    assert "reward function: \\x1b[2J" in captured.out and "raised ValueError: \\x1b[2J" in captured.err
    assert not obeyed(captured.out + captured.err)


@pytest.mark.parametrize("how", ["print(text)", "raise UserError(text)", "say(text)", "sys.stderr.write(text)"])
def test_what_a_program_prints(how):
    program = "import sys\nfrom gspo.errors import UserError\nfrom gspo.system.console import say\n"
    program += f"from gspo.system.program import guarded\ntext = {''.join(ESCAPES.values())!r}\n"
    program += f"def main():\n    {how}\nguarded(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    printed = (done.stdout + done.stderr).decode().replace("\r", "")
    assert "\\x1b[2J" in printed and not obeyed(printed)


def test_samples_are_the_same_json_without_control_characters(tmp_path):
    text = "".join(ESCAPES.values()) + "中文"
    SamplesFile(tmp_path, Config(), 0).samples(1, {0: {"responses": [text]}})
    written = (tmp_path / "samples.jsonl").read_text()
    assert not obeyed(written) and "中文" in written
    assert json.loads(written)["responses"] == [text]


@pytest.mark.parametrize("text", [*MARKDOWN, *ESCAPES.values()])
def test_tensorboard_shows_an_answer_as_it_is(text):
    from html.parser import HTMLParser

    from tensorboard.plugin_util import markdown_to_safe_html

    row = {"prompt": text, "ground_truth": text, "responses": [text, "b"], "rewards": [1.0, 0.0]}
    tags, shown = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, attributes))
    parser.handle_data = shown.append
    parser.feed(markdown_to_safe_html(_table(row | {"chosen": text, "rejected": "b"})))
    assert {tag for tag, _ in tags} == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert shown.count(printable(text)) == 2, "the prompt and the response"
