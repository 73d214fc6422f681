"""The page: what is in it, that a response is never markup, and that its scripts do what they say."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from repository import ROOT
from run_on_disk import group, write_run

from gspo.errors import UserError
from gspo.metrics.run_log import GLOSSARY
from gspo.report.__main__ import write_report
from gspo.report.page import HERE, SCRIPTS, chinese_glossary, content_of
from gspo.report.read_run import read_run
from gspo.system.output import CONTROLS

HOSTILE = [
    "<script>document.title = 'obeyed'</script>",
    "</script><img src=x onerror=\"document.title='obeyed'\">",
    "<!-- <script> \u2028 \u2029 ]]> &lt;b&gt;",
    "\x1b[2J\x1b]0;obeyed\x07 \u202eobeyed",
    "half \ud83d a character, {{script}} {{data}}",
]


class Page(HTMLParser):
    """A page's tags, attributes, and the texts of its elements by tag and class."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "img"):
            self.open.append((tag, dict(attrs).get("class") or dict(attrs).get("id") or ""))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for place in self.open[-2:]:
            self.texts.setdefault(place, []).append(data)


def page_of_samples(folder, samples, **run):
    return write_report([str(write_run(folder / "a", samples=samples, **run))]).read_text(encoding="utf-8")


def data_of(text):
    return json.loads("".join(Page(text).texts["script", "data"]))


def hostile_rows():
    return [group(bad, (bad, f"{bad}!", "fine"), (1.0, 0.0, 0.0), truth=bad) for bad in HOSTILE]


def test_no_text_of_a_model_is_markup(tmp_path):
    text = page_of_samples(tmp_path, {1: hostile_rows()})
    mild = page_of_samples(tmp_path / "mild", {1: [group("p", ("a", "b", "fine"), (1.0, 0.0, 0.0))]})
    assert Page(text).tags == Page(mild).tags
    assert not {chr(c) for c in CONTROLS} & {*text}, "nothing for a terminal to obey, for those who print the file"
    (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert not {*"<>&"} & {*embedded}
    prompts = data_of(text)["runs"][0]["prompts"]
    assert prompts[:2] == HOSTILE[:2] and prompts[3] == r"\x1b[2J\x1b]0;obeyed\x07 \u202eobeyed"
    assert prompts[4] == r"half \ud83d a character, {{script}} {{data}}"


def test_the_page_loads_nothing_and_runs_its_own_scripts_only(tmp_path):
    text = page_of_samples(tmp_path, {})
    page = Page(text)
    assert not {"src", "href", "srcset", "action", "style"} & {name for name, _ in page.attributes}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    script, style = page.texts["script", ""], page.texts["style", ""]
    for rule, parts in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256("".join(parts).encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


def test_several_runs_stand_side_by_side_with_the_settings_in_which_they_differ(tmp_path):
    runs = [
        write_run(tmp_path / "a", settings=["rollout.n=4", "trainer.seed=1"]),
        write_run(tmp_path / "b" / "a", settings=["rollout.n=8", "trainer.seed=1"], steps=9),
    ]
    content = content_of([read_run(run) for run in runs], None)
    assert content["settings"] == [["rollout.n", "4", "8"]]
    assert [run["name"] for run in content["runs"]] == [str(run) for run in runs], "both are called a"
    assert content["ranges"] == {"kl_divergence": (0.001, 0.1)}
    assert content["meaning"]["en"]["kl_divergence"] == GLOSSARY["kl_divergence"]


def test_of_one_run_the_settings_that_are_not_the_default_are_shown(tmp_path):
    run = read_run(write_run(tmp_path / "a", settings=["rollout.n=4", "health.kl_divergence_max=0.2"]))
    del run.settings["trainer.trackers"]  # an older version had none
    content = content_of([run], None)
    assert content["settings"] == [["rollout.n", "4", "8"], ["health.kl_divergence_max", "0.2", "0.1"]]
    assert content["ranges"]["kl_divergence"] == (0.001, 0.2), "the limits are the run's own"


def test_the_chinese_meanings_are_those_of_the_chinese_page():
    assert chinese_glossary().keys() == GLOSSARY.keys()
    assert not any(re.search(r"`|\]\(", meaning) for meaning in chinese_glossary().values())


def test_the_page_is_written_where_it_is_said_and_says_what_was_left_out(tmp_path, capsys):
    folder = str(write_run(tmp_path / "a", samples={1: [group()]}))
    assert write_report([folder]) == tmp_path / "a" / "report.html"
    assert f"wrote {tmp_path}/a/report.html (0.0 MB; a: 6 steps, 1 groups of samples)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--out .*: name a file in a folder that exists"):
        write_report([folder], tmp_path / "no" / "x.html")
    with pytest.raises(UserError, match="is named twice"):
        write_report([folder, f"{folder}/."])


def test_every_file_of_the_page_is_short():
    for path in HERE.iterdir():
        assert path.is_dir() or len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert {path.name for path in HERE.glob("*.js")} == {*SCRIPTS}
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert "</" not in script and "<!--" not in script, "the script element would end"


# ---- the scripts ----

NODE = shutil.which("node")


def computed(expression):
    """The value of an expression of the page's scripts, as node computes it."""
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    done = subprocess.run(
        [NODE, "-e", f"{script}\nconsole.log(JSON.stringify({expression}))"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_both_languages_have_the_same_words_with_the_same_values():
    words = computed("WORDS")
    assert {*words} == {"en", "zh"} and words["en"].keys() == words["zh"].keys()
    for key, text in words["en"].items():
        assert {*re.findall(r"\{\w+\}", text)} == {*re.findall(r"\{\w+\}", words["zh"][key])}, key
    used = {*re.findall(r'data-word="(\w+)"', (HERE / "page.html").read_text(encoding="utf-8"))}
    assert used <= words["en"].keys()


CASES = [  # two texts -> the pieces that differ
    ("x = 11\nAnswer: 11", "x = 1\nAnswer: 1", (["11", "11"], ["1", "1"])),
    ("x = 3 + 4 = 7", "x = 3 + 4 = 7", ([], [])),
    ("因为甲，选 A", "因为乙，选 B", (["甲", "A"], ["乙", "B"])),
    ("a b c d", "a c d", (["b", " "], [])),
    ("", "🙂 yes", ([], ["🙂", " ", "yes"])),
    ("5 then 7 then 9", "5 then 9", (["7", " ", "then", " "], [])),
]


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_two_responses_are_marked_where_they_differ_from_their_fork_on():
    pairs = json.dumps([pair[:2] for pair in CASES])
    found = computed(
        f"{pairs}.map(([a, b]) => {{ const [x, y] = [pieces(a), pieces(b)]; const [m, n] = differing(x, y);"
        " return [x.join('') === a, x.filter((_, i) => m[i]), y.filter((_, i) => n[i]),"
        " [...m.keys()].filter((i) => m[i]).every((i) => i >= forkOf(x, y))]; })"
    )
    for (a, b, (of_a, of_b)), (whole, marked_a, marked_b, behind) in zip(CASES, found, strict=True):
        assert (whole, marked_a, marked_b, behind) == (True, of_a, of_b, True), (a, b)


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_texts_too_long_to_compare_are_marked_whole_from_the_fork_on():
    texts = "['s', ...'ab'.repeat(1500)], ['s', ...'ba'.repeat(1500)]"
    assert computed(f"differing({texts}).map((marks) => marks.filter((x) => x).length)") == [3000, 3000]


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_the_filter_lets_pass_what_it_names(tmp_path):
    samples = {
        1: [group("one"), group("two", ("b", "c"), (0.0, 0.0), pair=None)],
        5: [group("three", ("4", "4"), (1.0, 1.0), pair=None, truth="Seven")],
    }
    runs = json.dumps(content_of([read_run(write_run(tmp_path / "a", samples=samples))], None)["runs"])

    def passing(**wanted):
        wanted = {"run": "", "round": "", "outcome": "", "search": ""} | wanted
        return f"passing(runs, {json.dumps(wanted)}).map(([run, group]) => run.prompts[group[1]])"

    cases = {
        passing(): ["one", "two", "three"],
        passing(round="1"): ["one", "two"],
        passing(round="2"): ["three"],
        passing(outcome="right"): ["three"],
        passing(outcome="mixed"): ["one"],
        passing(outcome="wrong"): ["two"],
        passing(outcome="pair"): ["one"],
        passing(search="IS 5"): ["one"],
        passing(search="seven"): ["three"],
        passing(search="two", round="2"): [],
        passing(run="0"): ["one", "two", "three"],
        passing(run="1"): [],
    }
    assert computed(f"((runs) => [{', '.join(cases)}])({runs})") == [*cases.values()]


@pytest.mark.skipif(NODE is None, reason="no node here")
@pytest.mark.parametrize("settings", [["reward.correct_at=0.5"], ["reward.range=[0.0,0.5]"]])
def test_right_is_what_the_run_calls_right(settings, tmp_path):
    rows = [group("one", ("a", "b"), (0.5, 0.5), pair=None)]
    run = read_run(write_run(tmp_path / "a", samples={1: rows}, settings=settings))
    content = json.dumps(content_of([run], None)["runs"])
    assert computed(f"outcomeOf({content}[0].samples[0], {content}[0])") == "right"


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_the_bold_curve_is_a_mean_within_a_round():
    found = computed("smooth([1, 2, 3, 4], [0, 2, 10, 12], [[1, 1], [3, 2]])")
    assert found == [1, 1, 11, 11]
    assert computed("smooth([1, 2, 3], [0, null, 4], [[1, 1]])") == [2, None, 2]


# ---- in a browser ----

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def shown(path, address, tmp_path):
    """The page as Chromium shows it at this address."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=4000", f"file://{path}#{address}"], capture_output=True, timeout=300
    )
    return Page(done.stdout.decode("utf-8"))


@pytest.mark.slow
@in_a_browser
def test_chromium_shows_curves_tables_and_the_filtered_samples(tmp_path):
    samples = {1: [group("one"), group("two", ("b", "c"), (0.0, 0.0), pair=None)], 5: [group("three")]}
    folders = [
        write_run(tmp_path / name, samples=samples, settings=[f"rollout.n={n}"]) for name, n in (("a", 4), ("b", 8))
    ]
    path = write_report([str(folder) for folder in folders])
    page = shown(path, "language=zh&run=0&round=1&outcome=mixed", tmp_path)
    assert page.tags.count("article") == 1 and page.texts["p", "prompt text"] == ["one"]
    assert page.texts["output", "found"] == ["6 组中的 1 组"]
    assert page.texts["mark", "won"] == ["4"] and page.texts["mark", "lost"] == ["5"]
    assert ("class", "thin run-1") in page.attributes and ("class", "band") in page.attributes
    assert "rollout.n" in page.texts["td", ""] and "训练前后" in page.texts["h2", ""]


@pytest.mark.slow
@in_a_browser
def test_chromium_obeys_no_answer(tmp_path):
    folder = write_run(tmp_path / "a", samples={1: hostile_rows()})
    page = shown(write_report([str(folder)]), "language=en", tmp_path)
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.tags.count("article") == len(HOSTILE)
    assert page.texts["title", ""] == ["GSPO: a"]
    assert page.texts["p", "prompt text"][:2] == HOSTILE[:2]
