"""The second embedded task: disjoint splits, true and unique solutions, graded rewards, a model that half knows."""

import json
import random
import re

import pytest

from benchmarks.systems_reward import compute_score
from gspo.embedded import MODEL_DIR as EQUATIONS_MODEL
from gspo.embedded.systems import (
    KINDS,
    MODEL_DIR,
    SPLIT_SIZES,
    TRAPS,
    all_systems,
    solution_of_kind,
    split_systems,
    worked_solution,
    write_splits,
)
from gspo.models.loading import load_model, load_tokenizer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt

GOLD = "x = 6, y = 4"


@pytest.fixture(scope="module")
def splits():
    return split_systems()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    write_splits(folder)
    return folder


@pytest.fixture(scope="module")
def rows(written):
    return {name: json.loads((written / f"{name}.json").read_text(encoding="utf-8")) for name in SPLIT_SIZES}


@pytest.fixture(scope="module")
def systems_tokenizer():
    return load_tokenizer(str(MODEL_DIR))


def score(text, gold=GOLD):
    return compute_score("systems_en", text, gold)["score"]


def side(text):
    """{"x": 3, "y": -2, "": 0}: the coefficients of `3x - 2y`."""
    found = {"x": 0, "y": 0, "": 0}
    for sign, number, name in re.findall(r"([-+]?) ?(\d*)([xy]?)", text):
        if number or name:
            found[name] += int(f"{sign}{number or 1}")
    return found


def equations(text):
    """[(a, b, c), ...] of a x + b y = c."""
    sides = [[side(half) for half in equation.split(" = ")] for equation in text.split(", ")]
    return [(left["x"] - right["x"], left["y"] - right["y"], right[""] - left[""]) for left, right in sides]


# ---- the task ----


def test_no_system_is_in_two_splits(splits):
    texts = [s.text for part in splits.values() for s in part]
    assert len(texts) == len(set(texts))
    assert {name: len(splits[name]) for name in SPLIT_SIZES} == SPLIT_SIZES == {"train": 2048, "dev": 256, "test": 512}
    assert len(splits["warm"]) > 3000


def test_no_written_system_is_in_two_files_or_in_the_warm_start(rows, splits):
    texts = [re.split(r"：|: ", row["prompt"], maxsplit=1)[1] for part in rows.values() for row in part]
    assert len(texts) == len(set(texts)) == 2048 + 256 + 512
    assert not set(texts) & {s.text for s in splits["warm"]}


def test_all_shapes_are_equally_common(splits):
    for name in SPLIT_SIZES:
        shapes = [s.shape for s in splits[name]]
        assert set(TRAPS) < set(shapes) and len(set(shapes)) == 8
        assert {shapes.count(shape) for shape in shapes} == {len(shapes) // 8}


def test_every_system_has_exactly_the_stated_solution():
    for s in all_systems():
        (a, b, c), (d, e, f) = equations(s.text)
        assert a * e != b * d, s.text
        assert (a * s.x + b * s.y, d * s.x + e * s.y) == (c, f), s.text


def test_rows_carry_what_was_split(rows, splits):
    for name in SPLIT_SIZES:
        for row, s in zip(rows[name], splits[name], strict=True):
            assert row["prompt"].endswith(s.text) and row["ground_truth"] == f"x = {s.x}, y = {s.y}"
            assert ("solve" in row["prompt"].lower()) == (row["data_source"] == "systems_en")
            assert ("求" in row["prompt"] or "解" in row["prompt"]) == (row["data_source"] == "systems_zh")
    sources = [row["data_source"] for row in rows["train"]]
    assert abs(sources.count("systems_zh") / len(sources) - 0.5) < 0.05


def test_the_files_are_the_same_bytes_every_time(written, tmp_path):
    write_splits(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev.json", "test.json", "train.json"]
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes()


# ---- the pupil ----


def test_every_right_solution_earns_the_full_reward_and_its_lines_hold(rows):
    for row in rows["train"] + rows["dev"] + rows["test"]:
        assert score(row["solution"], row["ground_truth"]) == 1.0, row
        *working, _ = row["solution"].split("\n")
        assert len(working) in (3, 4)
        for line in working:
            _, calculation, value = line.split(" = ")
            assert eval(calculation) == int(value), row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_kind_of_mistake_earns_what_it_should(splits, language):
    rng, mended, slips = random.Random(0), [], set()
    for s in splits["warm"]:
        earned = {k: score(solution_of_kind(s, language, rng, k), s.ground_truth) for k in KINDS[:4]}
        assert (earned["right"], earned["first"], earned["second"]) == (1.0, 0.1, 0.5), s.text
        slips.add(earned["slip"])
        if min(s.x, s.y) < 0:
            solution = solution_of_kind(s, language, rng, "sign")
            reward = compute_score("", solution, s.ground_truth)
            first, second = s.unknowns()
            assert reward["score"] in (0.1, 0.5)
            # A lost sign of the second spoils it alone; of the first, the second too, but for a rounded division.
            mended.append(reward[second] == 1.0 and reward[first] == 0.0)
    assert slips == {0.1, 0.5}  # in the first unknown, in the second
    assert sum(mended) < 0.05 * len(mended)


def test_a_pupils_rewards_are_graded(splits):
    rng = random.Random(1)
    earned = [score(worked_solution(s, "en", rng, mistakes=True), s.ground_truth) for s in splits["warm"]]
    share = {level: earned.count(level) / len(earned) for level in (1.0, 0.5, 0.1)}
    assert sum(share.values()) == pytest.approx(1.0)
    assert 0.25 < share[1.0] < 0.45 and 0.25 < share[0.5] < 0.45 and share[0.1] > 0.15, share


# ---- the reward ----


@pytest.mark.parametrize(
    ("line", "expected", "well_formed"),
    [
        ("Answer: x = 6, y = 4", 1.0, 1.0),
        ("答案：x = 6, y = 4", 1.0, 1.0),
        ("答案：ｙ＝４，ｘ＝６。", 1.0, 1.0),
        ("答案: x = 6 和 y = 4", 1.0, 1.0),
        ("答案：解为x=6，y=4", 1.0, 1.0),
        ("Answer: y = 4, x = 6", 1.0, 1.0),
        ("**Answer:** $x=6$ and $y=4$.", 1.0, 1.0),
        ("Answer: x = 6, y = 4 (checked)\nThat is all.", 1.0, 1.0),
        ("Answer: x = 1, y = 1\n\nNo. Answer: x = 6, y = 4", 1.0, 1.0),
        ("Answer: X = 6; Y = 4", 1.0, 1.0),
        ("Answer: x = 6, y = -4", 0.5, 1.0),
        ("Answer: x = 4, y = 4", 0.5, 1.0),
        ("Answer: x = 6", 0.5, 0.0),
        ("Answer: x = 6, y = 4.5", 0.5, 0.0),
        ("Answer: x = 6, y = 8/2", 0.5, 0.0),
        ("Answer: x = 6, y = 4²", 0.5, 0.0),
        ("Answer: x = 6, y = 4½", 0.5, 0.0),
        ("答案：x = 6, y = 4万", 0.5, 0.0),
        ("Answer: x = 6, y = 4,000", 0.5, 0.0),
        ("Answer: x = 6, y = 4, y = 5", 0.5, 0.0),  # hedging pays for nothing
        ("Answer: x = 4, y = 6", 0.1, 1.0),
        ("答案：x = -6, y = -4", 0.1, 1.0),
        ("Answer: x = 6, y = 4\nAnswer: x = 0, y = 0", 0.1, 1.0),
        ("Answer: x = 5", 0.0, 0.0),
        ("Answer: 6, 4", 0.0, 0.0),
        ("Answer: 2x = 6, -y = 4", 0.0, 0.0),
        ("Answer: x = 6 - 0, y = 4 + 0", 0.0, 0.0),
        ("Answer: x = 6y = 4", 0.0, 0.0),
        ("Answer: max = 6, my = 4", 0.0, 0.0),
        ("Answer:\nx = 6, y = 4", 0.0, 0.0),
        ("x = 6, y = 4", 0.0, 0.0),
        ("2x = 12\nx = 6\ny = 4", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_levels_of_the_reward(line, expected, well_formed):
    for text in (line, f"2x = 10 + 2 = 12\nx = 12 / 2 = 6\n{line}"):
        result = compute_score("systems_en", text, GOLD)
        assert result["score"] == expected and result["format"] == well_formed, result
        assert result.keys() == {"score", "x", "y", "format"}
        assert result["x"] + result["y"] == {1.0: 2, 0.5: 1}.get(expected, 0)


@pytest.mark.parametrize(
    "piece", ["Answer:", "x = ", "x = 6, ", " ", "=", "9", "答案：", "\x00", "\ud800", "(", "x=1,y=2\n"]
)
def test_hostile_texts_cost_little_and_earn_nothing(piece):
    assert score(piece * 200_000) in (0.0, 0.1)
    assert score("Answer: " + piece * 200_000) in (0.0, 0.1)
    assert score(piece * 1000 + "\nAnswer: x = 6, y = 4") == 1.0


def test_a_ground_truth_of_another_task_is_refused():
    with pytest.raises(ValueError, match="x = 6, y = 4"):
        compute_score("equations_en", "Answer: 7", "7")


# ---- the model ----


def test_the_tokenizer_is_built_like_the_first_one(systems_tokenizer, rows):
    ids = systems_tokenizer("1234567890 + 12 = 007", add_special_tokens=False)["input_ids"]
    assert [t for t in systems_tokenizer.convert_ids_to_tokens(ids) if re.search(r"\d", t)] == list("123456789012007")
    first = load_tokenizer(str(EQUATIONS_MODEL))
    assert systems_tokenizer.chat_template == first.chat_template
    assert systems_tokenizer.all_special_tokens == first.all_special_tokens
    solutions = [row["solution"] for row in rows["train"]]
    assert max(map(len, systems_tokenizer(solutions)["input_ids"])) < 48


def test_the_model_is_the_first_ones_architecture():
    configs = [json.loads((folder / "config.json").read_text()) for folder in (EQUATIONS_MODEL, MODEL_DIR)]
    assert configs[0] == configs[1]
    assert sum(f.stat().st_size for f in MODEL_DIR.iterdir()) <= 4 * 2**20


def test_the_model_solves_about_half_of_the_task(systems_tokenizer, rows):
    model = load_model(str(MODEL_DIR))
    sampler = Sampler(model, systems_tokenizer, next(model.parameters()).device)
    prompts = []
    for i, row in enumerate(rows["test"][:32]):
        text = f"<|user|>{row['prompt']}<|assistant|>"
        ids = systems_tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(i, tuple(ids), text, row["ground_truth"], row["data_source"]))
    sampled = sampler.generate(prompts, 8, Sampling(temperature=0.9, max_new_tokens=64))
    groups = [[score(t, p.ground_truth) for t in texts] for p, texts in zip(prompts, sampled.texts, strict=True)]
    flat = sum(groups, [])
    assert 0.2 < flat.count(1.0) / len(flat) < 0.5
    assert 0.15 < flat.count(0.5) / len(flat) < 0.5
    assert flat.count(0.0) / len(flat) < 0.05
    assert sum(max(g) == 1.0 for g in groups) > 0.6 * len(groups)


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes_and_the_tokenizer_that_ships(run_program, tmp_path):
    for name in ("a", "b"):
        command = (
            "gspo.embedded.build_models",
            "--task",
            "systems",
            "--steps",
            2,
            "--batch",
            16,
            "--out",
            tmp_path / name,
        )
        done = run_program("-m", *command)
        assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {*files} == {p.name for p in MODEL_DIR.iterdir()} - {"README.md"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (MODEL_DIR / file).read_bytes(), file
