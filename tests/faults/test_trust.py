"""What lies in a folder of somebody else is neither run nor given away."""

import argparse
import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml

import eval as evaluation
from gspo.checkpoint import fingerprints
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.export import export
from gspo.kernels import native

SECRETS = (".env", "evil.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "id_rsa", "notes.json")


# ---- what an export copies ----


def test_an_export_holds_a_models_files_and_nothing_that_happens_to_lie_there(tmp_path, capsys):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    for name in SECRETS:
        (tmp_path / "model" / name).write_text("secret")
    (tmp_path / "model" / "LICENSE").write_text("Apache")
    export(tmp_path / "model", tmp_path / "out")
    expected = {p.name for p in MODEL_DIR.iterdir() if p.is_file()} | {"LICENSE"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    said = capsys.readouterr().out
    assert "not copied" in said and all(name in said for name in SECRETS)


def test_a_link_out_of_the_model_is_not_followed(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="LICENSE is a link to .*secret, outside of the model"):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for k, file in enumerate(p for p in MODEL_DIR.iterdir() if p.is_file()):
        shutil.copy(file, blobs / str(k))
        (snapshot / file.name).symlink_to(blobs / str(k))
    export(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (MODEL_DIR / "tokenizer.json").read_bytes()


# ---- the cache of compiled kernels ----


@pytest.mark.parametrize(("mode", "ours"), [(0o700, True), (0o755, True), (0o777, False), (0o770, False)])
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path, mode, ours):
    file = tmp_path / "kernels-1-2.so"
    file.write_bytes(b"")
    file.chmod(mode)
    assert native._is_ours(file) == ours
    (tmp_path / "link.so").symlink_to(file)
    assert not native._is_ours(tmp_path / "link.so")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_neither_a_library_nor_a_folder_of_another_user_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "gspo" / "kernels-1-2.so"
    assert native.cache_folder() == file.parent
    file.write_bytes(b"")
    file.chmod(0o700)
    os.chown(file, 65534, 65534)
    assert not native._is_ours(file)
    os.chown(file.parent, 65534, 65534)
    with pytest.raises(PermissionError, match="belongs to another user"):
        native.cache_folder()


def test_the_cache_is_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "gspo").mkdir()
    (tmp_path / "gspo").chmod(0o777)
    native.cache_folder()
    assert (tmp_path / "gspo").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_compilation_left_is_removed_and_a_running_one_is_not(tmp_path):
    gone = next(pid for pid in range(2**22 - 1, 2, -1) if not os.path.exists(f"/proc/{pid}"))
    host = socket.gethostname().replace("-", "_")
    running, other, killed, old = (
        tmp_path / name
        for name in (f"tmp-{host}-{os.getpid()}-a", f"tmp-else-{gone}-a", f"tmp-{host}-{gone}-a", "tmpold")
    )
    for folder in (running, other, killed, old):
        folder.mkdir()
        (folder / "kernels.o").write_bytes(b"1")
    os.utime(old, (0, 0))
    native._remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([running, other])


# ---- the reward function in a run's folder ----


@pytest.fixture()
def given(tmp_path, monkeypatch):
    """A run's folder as somebody may give it away -> evaluate it, with config.yaml's reward.path."""
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    (tmp_path / "run" / "reward_func.py").write_text("kept")
    (tmp_path / "mine.py").write_text("kept")
    fingerprints.write(tmp_path / "run", {"reward.path": fingerprints.of_source("kept")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eval.py", str(step)])
    args = evaluation.options()

    def configure(path, reward_func=None):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"reward": {"path": path}}))
        return evaluation.configure(argparse.Namespace(**{**vars(args), "reward_func": reward_func}), step)

    return configure


@pytest.mark.parametrize(
    "path", ["gone.py", "run/reward_func.py", "run/x/../reward_func.py", "run/checkpoints/../../link.py"]
)
def test_code_in_the_folder_of_a_run_is_not_run_unasked(given, tmp_path, path):
    (tmp_path / "run" / "x").mkdir()
    (tmp_path / "link.py").symlink_to("run/reward_func.py")
    with pytest.raises(UserError, match=r"run only when you name it: --reward_func .*/run/reward_func.py"):
        given(path)


def test_code_that_the_user_names_is_run_and_what_has_changed_is_said(given, tmp_path, capsys):
    assert given("gone.py", reward_func="run/reward_func.py").reward.path == "run/reward_func.py"
    assert given("mine.py").reward.path == "mine.py"
    assert capsys.readouterr().out == ""
    Path("mine.py").write_text("other")
    given("mine.py")
    assert "mine.py is not what" in capsys.readouterr().out
