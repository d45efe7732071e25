import ctypes
import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.files import (
    LEFT_OVER_S,
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_file,
    canonical_json,
    publish_directory,
    sha256_file,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def reverse_keys(value):
    """The same value with the keys of every dictionary the other way round."""
    if isinstance(value, dict):
        return {key: reverse_keys(inner) for key, inner in reversed(value.items())}
    return [reverse_keys(inner) for inner in value] if isinstance(value, list) else value


def test_hash_is_that_of_the_content(tmp_path):
    """A file larger than one chunk hashes as a whole."""
    content = bytes(range(256)) * 8192
    (tmp_path / "f").write_bytes(content)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@given(st.dictionaries(st.text(), json_values, max_size=3))
@example({"a": [{"b": 1, "c": 2}], "d": {"e": {}, "f": 3}})
def test_equal_values_have_one_text(value):
    """The order of keys does not matter, at any depth."""
    assert canonical_json(value) == canonical_json(reverse_keys(value))


def test_nan_has_no_canonical_text():
    """What JSON cannot hold is an error, not a dialect."""
    with pytest.raises(ValueError, match="Out of range float values"):
        canonical_json({"x": float("nan")})


def test_file_appears_whole(tmp_path):
    """Until the block ends the old content stands."""
    target = tmp_path / "deep" / "f"
    with atomic_file(target) as temporary:
        temporary.write_text("one")
    with atomic_file(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["f"]


def test_failure_leaves_the_old_file(tmp_path):
    """An exception inside the block changes nothing and leaves nothing."""
    target = tmp_path / "f"
    target.write_text("old")

    def fail() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    """As if the file had been opened."""
    (tmp_path / "f").write_text("old")
    (tmp_path / "link").symlink_to("f")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "f").read_text() == "new"


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    """Whoever is root and writes to /dev/null would have a file of that name for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "loop").symlink_to("loop")
    for path in (fifo, tmp_path):
        with pytest.raises(OSError, match="no regular file"), atomic_file(path):
            pass
    assert fifo.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "loop"]


def test_directory_appears_whole_and_replaces_on_request(tmp_path):
    """An existing directory is refused, or swapped with its open files still readable."""
    target = tmp_path / "d"
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "f").write_text("one")
    with pytest.raises(FileExistsError), atomic_directory(target):
        pass
    with (target / "sub" / "f").open() as reader:
        with atomic_directory(target, replace=True) as temporary:
            (temporary / "f").write_text("two")
        assert reader.read() == "one"
    assert [path.name for path in target.iterdir()] == ["f"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_failed_directory_leaves_nothing(tmp_path):
    """An exception inside the block removes what was written so far."""

    def fail() -> None:
        with atomic_directory(tmp_path / "d") as temporary:
            (temporary / "f").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from models.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as temporary:
    (temporary / "f").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_of_a_directory_goes_a_day_later(tmp_path):
    """And nothing else: what is new, what is being filled, what is of another name."""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / "d"], check=False)
    old, new = tmp_path.iterdir()
    others = [tmp_path / f"{TEMPORARY_PREFIX}{name}" for name in ("d.e.abcdefgh", "d.abcdefgh.old")]
    for other in others:
        other.mkdir()

    def age(*directories: Path) -> None:
        for directory in directories:
            os.utime(directory, times=(time.time() - LEFT_OVER_S - 1,) * 2)

    age(old, *others)
    with atomic_directory(tmp_path / "d") as filled:
        assert not old.exists()
        age(filled)
        with atomic_directory(tmp_path / "d") as temporary:
            assert {*tmp_path.iterdir()} == {new, filled, temporary, *others}


def test_content_is_on_the_disk_before_its_name_and_the_name_at_the_end(tmp_path, disk):
    """Of a file and of a directory: a power failure leaves the old one or the whole new one."""
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("one")
    assert disk == [("sync", temporary), ("name", tmp_path / "f"), ("sync", tmp_path)]
    disk.clear()
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "f").write_text("one")
    content = [("sync", temporary), ("sync", temporary / "f")]
    assert disk == [*content, ("name", tmp_path / "d"), ("sync", tmp_path)]


def refuse_to_swap(*_: object) -> int:
    """Answer as a file system does that cannot exchange names."""
    ctypes.set_errno(errno.EINVAL)
    return -1


def test_where_names_cannot_be_exchanged_three_renames_do(tmp_path, monkeypatch):
    """The new directory takes the name, and nothing is left of the old one."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=refuse_to_swap))
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").touch()
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_failed_exchange_leaves_the_old_directory_in_its_place(tmp_path, monkeypatch):
    """Where the second of the three renames fails, the first is undone."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    built, target = tmp_path / "built", tmp_path / "d"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError):
        publish_directory(built, target, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_a_directory_that_appeared_meanwhile_is_not_replaced(tmp_path):
    """Without `replace` the name must be free at the very end, too."""

    def build() -> None:
        with atomic_directory(tmp_path / "d") as temporary:
            (temporary / "new").touch()
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / "precious").touch()

    with pytest.raises(OSError, match="not empty"):
        build()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["precious"]
