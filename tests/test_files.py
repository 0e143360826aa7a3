"""Files that are replaced as a whole. Oracle: what was there before, and the folder's list of names."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bpfree.files import inside, remove_abandoned, replacing, write_text


def test_a_file_is_written_and_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.txt"
    write_text(path, "eins\n")
    write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["page.txt"]


def interrupted_write(path: Path, *, durable: bool) -> None:
    with replacing(path, durable=durable) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path, durable=durable)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pt"]


def test_a_file_that_cannot_be_moved_into_place_leaves_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "a folder has this name")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_record_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    """Oracle: where the kernel says that a path leads."""
    folder, other = tmp_path / "runs", tmp_path / "other"
    (folder / "one" / "plots").mkdir(parents=True)
    other.mkdir()
    (folder / "link").symlink_to(other)
    (folder / "one" / "file").symlink_to(other / "file")
    (folder / "near").symlink_to(folder / "one")
    (folder / "circle").symlink_to("circle")
    for name in ("one", "one/plots", "one/new.npz", "near/plots", "./one"):
        assert inside(folder, name) == folder / name
    for name in ("", ".", "..", "../other", "one/../../other", "/etc/passwd", str(folder / "one"), "a\0b"):
        assert inside(folder, name) is None, name
    for name in ("link", "link/file", "one/file", "circle/file"):
        assert inside(folder, name) is None, name
    assert inside(folder, 3) is None  # type: ignore[arg-type]
    (tmp_path / "runs-by-link").symlink_to(folder)  # the folder itself may be one: its owner has made it
    assert inside(tmp_path / "runs-by-link", "one") == tmp_path / "runs-by-link" / "one"


WRITER = """
import os, signal, sys
import subprocess
import sys
from pathlib import Path
from typing import Any
from bpfree.files import replacing
with replacing(Path(sys.argv[1]), durable=True) as file:
    file.write(b"half of the new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_is_removed_and_what_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=False)
    (tmp_path / ".cache-deadbeef").write_text("somebody's own")
    (left,) = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".last.pt-")]
    with replacing(tmp_path / "other.pt") as file:
        file.write(b"whole")
        remove_abandoned(tmp_path, "*.pt")
        assert not left.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".cache-deadbeef", "last.pt", "other.pt"]
    assert (tmp_path / "other.pt").read_bytes() == b"whole"
    assert path.read_bytes() == b"old"


def test_where_a_part_cannot_be_removed_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder became read-only while the file was written."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "refused", "the part")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="no space"), replacing(tmp_path / "page.txt"):
        raise OSError(errno.ENOSPC, "no space")


def test_a_temporary_file_that_is_taken_for_abandoned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody looks just before it is locked."""
    lock, looks = fcntl.flock, [1]

    def late(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and looks:
            looks.pop()
            remove_abandoned(tmp_path, "*.txt")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_text(tmp_path / "page.txt", "all of it")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("page.txt", "all of it")]
