from __future__ import annotations

import errno

import pytest

from models.errors import SourceError
from models.files import atomic_directory
from serve.lifecycle.files import find_models, find_versions, sign


def test_versions_are_numbered_bundles(make_bundle, tmp_path):
    """Other names, empty directories and unfinished ones are none; they come in order."""
    for number in ("10", "9", "01", "x"):
        make_bundle(path=tmp_path / "m" / number)
    for name in ("11", ".tmp-12"):
        (tmp_path / "m" / name).mkdir()
    versions = find_versions(tmp_path / "m")
    assert list(versions.items()) == [(v, tmp_path / "m" / v) for v in ("9", "10")]


def test_a_bundle_has_no_versions(make_bundle, tmp_path):
    """A bundle, one of its files, and what is not there stand for themselves."""
    bundle = make_bundle()
    for path in (bundle.path, bundle.encoder_path, tmp_path / "none"):
        assert find_versions(path) == {"": path}


def test_a_repository_is_a_directory_of_models(make_bundle, tmp_path):
    """With versions or without; what is neither is passed over."""
    make_bundle(path=tmp_path / "r" / "plain")
    make_bundle(path=tmp_path / "r" / "many" / "3")
    (tmp_path / "r" / "empty").mkdir()
    (tmp_path / "r" / "readme.txt").write_text("")
    assert list(find_models(tmp_path / "r")) == ["many", "plain"]
    with pytest.raises(SourceError, match="expected a directory of models, found none"):
        find_models(tmp_path / "none")


def test_whatever_changes_looks_different(make_bundle, tmp_path):
    """A file that grows, is new, or may be read by others, a whole directory; nothing is read."""
    path = make_bundle().path
    seen = [sign(path)]
    with (path / "encoder.onnx").open("ab") as file:
        file.write(b"more")
    seen.append(sign(path))
    (path / "notes").write_text("")
    (path / "notes").chmod(0o644)
    seen.append(sign(path))
    (path / "notes").chmod(0o600)
    seen.append(sign(path))
    with atomic_directory(path, replace=True) as temporary:
        (temporary / "bundle.json").write_text("{}")
    seen.append(sign(path))
    assert len(set(seen)) == 5
    assert sign(path) == seen[-1]
    assert sign(tmp_path / "none") == ()
    (path / ".tmp-half").write_text("")
    assert sign(path) == seen[-1]


def test_what_cannot_be_read_is_not_gone(make_bundle, tmp_path, no_reading):
    """An error names the path; a directory that may be a model is taken for one."""
    make_bundle(path=tmp_path / "r" / "good")
    private = make_bundle(path=tmp_path / "r" / "private" / "1").path.parent
    (tmp_path / "r" / "notes").mkdir()
    with no_reading(private, errno.EACCES):
        assert list(find_models(tmp_path / "r")) == ["good", "private"]
        for read in (sign, find_versions):
            with pytest.raises(SourceError, match=r"private: expected .*, found Permission denied"):
                read(private)
        assert "/private" in [name for name, *_ in sign(tmp_path / "r")]
    with (
        no_reading(tmp_path / "r", errno.EMFILE),
        pytest.raises(SourceError, match="expected a directory of models, found Too many open"),
    ):
        find_models(tmp_path / "r")
