"""Every setting that is a path x everything that a path may wrongly be: one paragraph, never a traceback or a wait."""

import json
import os
import shutil
import socket
import stat
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from saved_run import ALONE, no_file_above

import eval as evaluation
from gspo import compare, export, plot, sample, samples
from gspo.algorithm.self_play_models import round_of
from gspo.checkpoint.run_folder import open_run, save_reward_function
from gspo.config import PARAMETERS, Reward
from gspo.data import encoding
from gspo.data.prompts import load_splits
from gspo.data.sources import open_source
from gspo.distributed.world import process_group
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.read_config import load_config
from gspo.report.__main__ import write_report
from gspo.reward.scorer import Scorer
from gspo.system.program import guarded


def with_config(key, also=()):
    """Read one path of the configuration as a run does."""

    def read(path):
        cfg = load_config("configs/quick.yaml", [f"{key}={path}", "eval.round_prompts=1", *also])
        if key == "model.path":
            return load_model_config(cfg.model.path) and load_tokenizer(cfg.model.path)
        if key == "data.chat_template":
            return load_tokenizer(None, cfg.data.chat_template)
        if key.startswith("data."):
            return load_splits(cfg, TOKENIZER, load_model_config(None))
        if key.startswith("reward."):
            return Scorer(Reward(path=cfg.reward.path, model_path=cfg.reward.model_path, workers=1)).close()
        assert key.startswith("trainer."), f"say how {key} is read"
        return open_run(cfg, ALONE)

    return read


def with_eval(*flags):
    def read(path):
        given = [path if flag == "PATH" else flag for flag in flags]
        sys.argv = ["eval.py", *given]
        args = evaluation.options()
        if {"--json", "--answers"} & {*flags}:  # before anything is sampled
            args.model = "/no such model"
        return evaluation.run_evaluation(args, ALONE)

    return read


def with_compare(path):
    sys.argv = ["compare", str(path), str(path) + "2"]
    return compare.main()


def with_plot(path):
    sys.argv = ["plot", str(path), "{tmp}/curves.png"]
    return plot.main()


def with_sample(*given):
    def read(path):
        sys.argv = ["sample", *(path if x == "PATH" else x for x in given), "--n", "1", "--max_new_tokens", "1"]
        return sample.main()

    return read


TOKENIZER = load_tokenizer(None)
SETTINGS = {
    "--config": load_config,
    **{key: with_config(key) for key, field in PARAMETERS.items() if field.metadata.get("path")},
    "trainer.run_name": with_config("trainer.run_name", ["trainer.output_dir={tmp}/runs"]),
    "open_source": open_source,
    "eval MODEL": with_eval("PATH"),
    "eval --data": with_eval("--data", "PATH", "--limit", "1"),
    "eval --reward_func": with_eval("--reward_func", "PATH", "--limit", "1"),
    "eval --json": with_eval("--json", "PATH"),
    "eval --answers": with_eval("--answers", "PATH"),
    "samples RUN": lambda path: samples.open_groups(str(path), None),
    "compare RUN": with_compare,
    "plot RUN": with_plot,
    "report RUN": lambda path: write_report([str(path)], None),
    "sample MODEL": with_sample("PATH", "{tmp}/rows.jsonl", "{tmp}/answers.jsonl"),
    "sample PROMPTS": with_sample("embedded", "PATH", "{tmp}/answers.jsonl"),
    "sample ANSWERS": with_sample("embedded", "{tmp}/rows.jsonl", "PATH"),
    "export CHECKPOINT": lambda path: export.export(Path(path), Path("{tmp}/model")),
    "export DIR": lambda path: export.export(MODEL_DIR, Path(path)),
}
KINDS = {
    "missing": lambda tmp: tmp / "no" / "such.json",
    "a folder": lambda tmp: made(tmp / "folder.json", lambda p: p.mkdir()),
    "unreadable": lambda tmp: Path("/proc/self/mem"),  # for root, too
    "below a file": lambda tmp: tmp / "rows.jsonl" / "x.json",
    "a long name": lambda tmp: tmp / ("x" * 300 + ".json"),
    "a long path": lambda tmp: tmp.joinpath(*["x" * 100] * 60),
    "a NUL": lambda tmp: tmp / "a\0b.json",
    "half a character": lambda tmp: str(tmp) + "/\ud83d.json",
    "a link to itself": lambda tmp: made(tmp / "loop.json", lambda p: p.symlink_to(p)),
    "a pipe": lambda tmp: made(tmp / "pipe.json", os.mkfifo),
    "a pipe .py": lambda tmp: made(tmp / "pipe.py", os.mkfifo),
    "a socket": lambda tmp: made(tmp / "s.json", lambda p: socket.socket(socket.AF_UNIX).bind(str(p))),
    "a device": lambda tmp: Path("/dev/zero"),
    "nobody's": lambda tmp: "~nobody-of-that-name/x.json",
    "nobody": lambda tmp: "~nobody-of-that-name",
    "bytes": lambda tmp: made(tmp / "bytes.json", lambda p: p.write_bytes(bytes(range(256)))),
}
WORK = {  # what is made, or replaced, or takes everything
    *(("trainer.output_dir", kind) for kind in ("missing", "a folder")),
    *(("export DIR", kind) for kind in ("missing", "a folder")),
    *(("sample ANSWERS", kind) for kind in ("a device", "bytes")),
}


def made(path, make):
    make(path)
    return path


@contextmanager
def ends_within(seconds):
    """Fail a test that waits: a thread ends the process's wait by a signal of pytest's own (pytest-timeout)."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), 2))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.fixture()
def tmp(tmp_path, monkeypatch):
    """A folder with a file of rows; programs begin in it, beside the presets."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1", "ground_truth": "2", "data_source": "d"}) + "\n")
    monkeypatch.setattr(sys, "argv", [])
    yield tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_path_is_one_paragraph(tmp, setting, kind, monkeypatch, capsys):
    path = str(KINDS[kind](tmp))
    before = {p: p.lstat().st_mode for p in tmp.iterdir()}
    read = SETTINGS[setting]
    with monkeypatch.context() as patch, ends_within(60):
        patch.setattr(sys, "argv", [])
        if hasattr(read, "__code__"):
            read = fill(read, tmp)
        try:
            guarded(lambda: read(path))
            worked = True
        except SystemExit as e:
            worked = False
            assert e.code == 2
    said = capsys.readouterr().err
    assert worked or (said.startswith("error: ") and said.count("\n") == 1), said
    assert worked == ((setting, kind) in WORK), said
    for old, mode in before.items():
        assert stat.S_IFMT(old.lstat().st_mode) == stat.S_IFMT(mode)
    assert not [p for p in tmp.rglob("*.part") if p.exists()]


def fill(read, tmp):
    """Replace {tmp} in what the case was made with."""
    for cell in read.__closure__ or ():
        if isinstance(cell.cell_contents, tuple):
            cell.cell_contents = tuple(str(x).replace("{tmp}", str(tmp)) for x in cell.cell_contents)
    return read


def model_folder(tmp, **changed):
    """A copy of the embedded model, with other entries of config.json."""
    shutil.copytree(MODEL_DIR, tmp / "model")
    file = tmp / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return str(tmp / "model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_model_folder_with_a_pipe_in_it_is_refused_and_not_waited_for(tmp, name):
    folder = Path(model_folder(tmp))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for opened in (load_model_config, load_tokenizer):
        with ends_within(60), pytest.raises(UserError, match=f"has {name}, which is a pipe or a device"):
            opened(str(folder))


@pytest.mark.parametrize(
    ("key", "size"),
    [("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("num_hidden_layers", -1), ("vocab_size", 10**12),
     ("hidden_size", 1e30), ("intermediate_size", 10**12)],
)  # fmt: skip
def test_a_model_of_impossible_size_is_refused_before_it_is_built(tmp, key, size):
    with ends_within(60), pytest.raises(UserError, match=f"has {key} = .* in config.json; it can be"):
        load_model_config(model_folder(tmp, **{key: size}))


def test_a_config_nested_too_deep_is_refused(tmp):
    folder = Path(model_folder(tmp))
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_model_config(str(folder))


BEYOND = ("trainer.seed=18446744073709551616", "rollout.n=1000000000000", "eval.n=1000000000",
          "selfplay.rounds=1000000000", "trainer.max_steps=1e30")  # fmt: skip


@pytest.mark.parametrize("setting", BEYOND)
def test_a_number_beyond_all_use_is_refused(setting):
    with pytest.raises(UserError, match=f"{setting.split('=')[0]} = .*out of range"):
        load_config(None, [setting])


def test_the_most_rounds_cost_no_time():
    most = PARAMETERS["selfplay.rounds"].metadata["le"]
    assert [round_of(step, 100, most) for step in (0, 99)] == [most // 100 - 1, most - 1]


def test_yaml_nested_too_deep_is_refused(tmp):
    (tmp / "deep.yaml").write_text("- " * 100_000)
    with pytest.raises(UserError, match="deep.yaml"):
        load_config(tmp / "deep.yaml")


def test_a_long_prompt_is_not_read_in_silence(monkeypatch, capsys):
    monkeypatch.setattr(encoding, "SLOW_CHARACTERS", 15)
    for text in ("1+1 = ?", "1000 + 2000 = ?"):
        encoding.Encoder(TOKENIZER).ids([{"role": "user", "content": text + " "}], "rows.json, row 1")
    assert capsys.readouterr().out == (
        "note: rows.json, row 1: the tokenizer reads a prompt of 16 characters, which takes a while\n"
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "reward_func.py", "eval_after.json", "config.yaml"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_lies_in_place_of_a_runs_file_is_named(tmp, name, make):
    (tmp / "quick").mkdir()
    make(tmp / "quick" / name)
    with (
        ends_within(60),
        pytest.raises(UserError, match=f"{name} is a folder, a pipe or a device, not a file of a run"),
    ):
        open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={tmp}"]), ALONE)


def test_a_kept_reward_function_that_is_no_text_is_kept_and_replaced(tmp):
    (tmp / "reward_func.py").write_bytes(b"\xff\xfe")
    save_reward_function(tmp, "return 1", 3)
    assert (tmp / "reward_func.py").read_text() == "return 1" and (tmp / "reward_func_until_step_3.py").exists()


FULL = {
    "reward copy": lambda tmp: save_reward_function(tmp, "x" * 100_000, 0),
    "output_dir": lambda tmp: open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={tmp}"]), ALONE),
    "export": lambda tmp: export.export(MODEL_DIR, tmp / "model"),
    "sample": lambda tmp: fill(with_sample("embedded", "{tmp}/rows.jsonl", "{tmp}/answers.jsonl"), tmp)("PATH"),
    "json": lambda tmp: evaluation.write_json(tmp / "e.json", {"a": "x" * 100_000}),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_paragraph(tmp, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    with no_file_above(10), pytest.raises(SystemExit) as e:
        guarded(lambda: FULL[name](tmp))
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "File too large" in said
    assert str(tmp) in said


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are missing"),
        ({"RANK": "0x1"}, "RANK = '0x1'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT = 'b'"),
        ({"RANK": "3"}, "RANK = 3 in the environment, but WORLD_SIZE = 1"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE = '-1'"),
    ],
)
def test_an_environment_that_no_launcher_made_is_named(monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says), process_group():
        pass


@pytest.mark.parametrize("row", ["7", "null", '"text"', "[1]"])
def test_a_row_of_prompts_that_is_no_object_is_named(tmp, row, monkeypatch):
    (tmp / "rows.jsonl").write_text(row + "\n")
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(UserError, match="rows.jsonl, line 1: a row is an object"):
        fill(with_sample("embedded", "{tmp}/rows.jsonl", "{tmp}/answers.jsonl"), tmp)("PATH")
    assert not [*tmp.glob("answers*")]


def test_a_bug_keeps_its_traceback():
    for bug in (OSError("no number, no file"), ValueError("a"), ConnectionResetError(104, "reset")):
        with pytest.raises(type(bug)):
            guarded(lambda bug=bug: (_ for _ in ()).throw(bug))
