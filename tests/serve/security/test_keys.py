from __future__ import annotations

import stat

from serve.security.keys import run
from serve.security.ring import read_ring


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
