"""What a program is told to write to: a device, a pipe, a link or a descriptor stays what it is."""

import os
import stat
import subprocess
import sys
import threading

import pytest
from repository import ROOT

from gspo.system.files import replacing, write_json, write_text


@pytest.fixture()
def full(tmp_path):
    """A device of our own that takes nothing, as /dev/full."""
    try:
        os.mknod(tmp_path / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        (tmp_path / "full").open("wb").close()
    except OSError:
        pytest.skip("may not make a device here")
    return tmp_path / "full"


@pytest.mark.parametrize("by_link", [False, True])
def test_a_device_is_written_to_and_stays_one(full, tmp_path, by_link):
    if by_link:
        (tmp_path / "link").symlink_to(full)
    with pytest.raises(OSError, match="No space left") as e:
        write_json(tmp_path / "link" if by_link else full, {"a": 1})
    assert e.value.filename == str(tmp_path / "link" if by_link else full)
    assert stat.S_ISCHR(full.stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "link"][: 1 + by_link]


def test_a_null_device_takes_everything(tmp_path):
    os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3)) if os.geteuid() == 0 else pytest.skip("no root")
    write_text(tmp_path / "null", "text")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_a_pipe_is_written_to_and_one_without_a_reader_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        write_text(tmp_path / "pipe", "text")
    read = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(read, True)
    got = []
    thread = threading.Thread(target=lambda: got.append(os.fdopen(read, "rb").read()))
    text = "text" * 100_000  # more than a pipe holds
    with replacing(tmp_path / "pipe") as part:
        part.write_text(text)
        keep = os.open(tmp_path / "pipe", os.O_WRONLY)
        thread.start()
    os.close(keep)
    thread.join(60)
    assert got[0].decode() == text and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "{tmp}/link"])
@pytest.mark.parametrize("to_file", [False, True])
def test_the_standard_output_is_written_to(tmp_path, target, to_file):
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    target = target.replace("{tmp}", str(tmp_path))
    program = (
        "import sys; from pathlib import Path; from gspo.system.files import write_text\n"
        "print('before', flush=True); write_text(Path(sys.argv[1]), 'text\\n'); print('after')"
    )
    with (tmp_path / "out").open("w") as file:
        out = file if to_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", program, target], cwd=ROOT, stdout=out, check=True)
    said = (tmp_path / "out").read_bytes() if to_file else done.stdout
    assert said == b"before\ntext\nafter\n"
    assert os.path.islink("/dev/stdout") and sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_of_a_link_the_file_is_replaced_that_it_points_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == text
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["file"]
