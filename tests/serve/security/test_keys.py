from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from serve.security import keys
from serve.security.keys import NewOptions, make_key, run
from serve.security.ring import read_ring

by_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def test_a_new_key_is_shown_once_and_its_hash_kept(tmp_path, capsys):
    """Stdout has the key and nothing else; the file has what the server needs."""
    file = tmp_path / "keys"
    assert run(["new", "app", "--file", str(file)]) == 0
    token = capsys.readouterr().out.strip()
    assert token not in file.read_text()
    assert read_ring(file).find(token).name == "app"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_added_to_those_there_are(tmp_path, capsys):
    """Comments and other lines stay, and so does the file's mode."""
    file = tmp_path / "keys"
    run(["new", "one", "--file", str(file)])
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    file.chmod(0o640)
    assert run(["new", "two", "--file", str(file), "--limits", "images=5"]) == 0
    assert file.read_text().startswith("# ours\none:")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    run(["new", "one", "--file", str(file)])
    capsys.readouterr()
    assert run(["list", "--file", str(file)]) == 0
    assert capsys.readouterr().out == "line 2: one\nline 3: two images=5\nline 4: one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_keys_that_are_added_at_once_are_all_there(tmp_path, capsys, monkeypatch):
    """A second one comes while the first has read the file and not written it yet."""
    file = tmp_path / "keys"
    run(["new", "zero", "--file", str(file)])
    options = NewOptions(name="two", file=str(file))
    second = threading.Thread(target=make_key, args=(options,))

    def give_slowly(*found):
        monkeypatch.undo()
        second.start()
        second.join(0.2)
        keys._give_to_owner_of(*found)

    monkeypatch.setattr(keys, "_give_to_owner_of", give_slowly)
    assert run(["new", "one", "--file", str(file)]) == 0
    second.join()
    assert read_ring(file).names == ["one", "two", "zero"]


def test_a_key_is_added_in_a_directory_that_may_not_be_listed(tmp_path, capsys, monkeypatch):
    """Who may write there needs no more; root is let in everywhere, so the refusal is played."""

    def open_files(path, *more, opening=os.open):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, *more)

    monkeypatch.setattr(os, "open", open_files)
    assert run(["new", "one", "--file", str(tmp_path / "keys")]) == 0
    assert read_ring(tmp_path / "keys").names == ["one"]


def test_what_stands_in_a_key_file_stays_to_the_byte(tmp_path, capsys):
    """Comments may be in any encoding, and lines may end as Windows ends them."""
    file = tmp_path / "keys"
    run(["new", "one", "--file", str(file)])
    before = b"# f\xfcr B\xfccher\r\n" + file.read_bytes()
    file.write_bytes(before)
    assert run(["new", "two", "--file", str(file)]) == 0
    assert file.read_bytes().startswith(before + b"two:")


def test_a_second_key_of_a_name_has_the_limits_of_the_first(tmp_path, capsys):
    """Else no server would take the file any more; the line says which those are."""
    file = tmp_path / "keys"
    assert run(["new", "app", "--file", str(file), "--limits", "calls=8,images=5"]) == 0
    before = file.read_bytes()
    capsys.readouterr()
    for limits in ([], ["--limits", "calls=9"]):
        assert run(["new", "app", "--file", str(file), *limits]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert (
            "expected one set of limits for app, found images=5,calls=8 on line 1 and" in shown.err
        )
    assert shown.err.endswith("and calls=9 on line 2\n")
    assert file.read_bytes() == before
    assert run(["new", "app", "--file", str(file), "--limits", "images=5,calls=8"]) == 0
    assert len(read_ring(file).keys) == 2


def test_without_a_file_the_line_is_shown_beside_the_key(capsys):
    """For files that something else writes, such as a secret of Kubernetes."""
    assert run(["new", "app"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("horace_")
    assert "line for the key file: app:" in shown.err


def test_what_cannot_be_meant_is_one_line(tmp_path, capsys):
    """A name that is none, a file that is damaged, a folder that is not there."""
    assert run(["new", "a b"]) == 1
    damaged = tmp_path / "keys"
    damaged.write_text("damaged")
    assert run(["new", "app", "--file", str(damaged)]) == 1
    assert damaged.read_text() == "damaged"
    assert run(["new", "app", "--file", str(tmp_path / "no" / "keys")]) == 2
    assert run(["new", "app", "--limits", "images=none"]) == 1
    assert run(["old"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 5
    assert "NAME: expected a letter or digit, and up to 63 of those and of ._@-" in shown.err
    assert run(["--help"]) == 0


def test_a_link_to_a_key_file_stays_one(tmp_path, capsys):
    """What it leads to is replaced, or made where it leads to nothing yet."""
    (tmp_path / "kept").mkdir()
    link, file = tmp_path / "keys", tmp_path / "kept" / "keys"
    link.symlink_to("kept/keys")
    for name in ("one", "two"):
        assert run(["new", name, "--file", str(link)]) == 0
        assert link.is_symlink()
    assert read_ring(file).names == ["one", "two"]
    assert [path.name for path in file.parent.iterdir()] == ["keys"]


@by_root
def test_the_owner_of_a_key_file_stays_its_owner(tmp_path, capsys):
    """The server, who may be another user than the one that adds a key, reads it as before."""
    file = tmp_path / "keys"
    assert run(["new", "one", "--file", str(file)]) == 0
    os.chown(file, 10001, 10002)
    file.chmod(0o666)  # more than the umask leaves of a new file
    assert run(["new", "two", "--file", str(file)]) == 0
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (10001, 10002, 0o666)


@by_root
def test_a_key_file_whose_owner_cannot_be_kept_stays_as_it_was(tmp_path, capsys, monkeypatch):
    """Rather than one that its server may read no more."""
    file = tmp_path / "keys"
    run(["new", "one", "--file", str(file)])
    before = file.read_text()
    os.chown(file, 10001, 10002)
    monkeypatch.setattr(os, "fchown", refuse)
    capsys.readouterr()
    assert run(["new", "two", "--file", str(file)]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert (
        f"--file {file}: expected a file that can be written, found Operation not per" in shown.err
    )
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def refuse(*_):
    """Do what the system does with who is not root."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
