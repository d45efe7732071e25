"""No reply tells where things lie on the server, or how it is built inside."""

from __future__ import annotations

import importlib
import pkgutil
import time

import grpc
import pytest

import index
import models
import serve
from models.errors import FingerprintMismatchError, HoraceError, ImageError, ImageFault
from serve.errors import MAX_MESSAGE_BYTES, UnknownNameError, to_status, without_paths

PATH = "/srv/horace/models/photos/bundle.json"
SKIPPED = ("models.networks",)  # want torch, and are never imported by a server


def every_error() -> list[type[HoraceError]]:
    """All kinds of our errors that a server could meet."""
    for package in (models, index, serve):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and not module.name.startswith(SKIPPED):
                importlib.import_module(module.name)
    found, todo = [], [HoraceError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return [kind for kind in found if kind.__module__.split(".")[0] in ("models", "index", "serve")]


def make(kind: type[HoraceError]) -> HoraceError:
    """Make an error of a kind that names a path wherever it can."""
    if issubclass(kind, ImageError):
        return kind(ImageFault.CORRUPT, PATH, expected=PATH, found=PATH, mend=PATH)
    if issubclass(kind, FingerprintMismatchError):
        return kind(PATH, expected=PATH, found=PATH, mend=PATH)
    return kind(PATH, expected=PATH, found=PATH, mend=f"see {PATH}")


KINDS = every_error()


def raised(error: BaseException) -> BaseException:
    """Give an error a traceback and a cause."""
    try:
        try:
            open(PATH)  # noqa: SIM115  # raises
        except OSError as cause:
            raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_error_of_ours_tells_a_path(kind):
    """Also those that are written for operators, and come to a caller by accident."""
    code, message = to_status(raised(make(kind)))
    assert code is not grpc.StatusCode.UNKNOWN
    for secret in ("/srv", "horace/models", "photos/", "Traceback", 'File "', __file__):
        assert secret not in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "No such file or directory", PATH),
        KeyError(PATH),
        RuntimeError(f'Traceback (most recent call last):\n  File "{PATH}", line 1'),
        MemoryError(),
        AssertionError(PATH),
        UnicodeDecodeError("utf-8", PATH.encode(), 0, 1, PATH),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_other_error_tells_anything(error):
    """A number, under which the log has the rest."""
    code, message = to_status(raised(error))
    assert code is grpc.StatusCode.INTERNAL
    assert message.startswith("internal error; the server's log has it as incident ")
    assert "/" not in message


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"bundle {PATH}: damaged", "bundle .../bundle.json: damaged"),
        ("bundle artifacts/b/bundle.json, line 3", "bundle .../bundle.json, line 3"),
        (f'File "{PATH}"', 'File ".../bundle.json"'),
        ("see ~/keys/mine", "see .../mine"),
        ("../b/e.onnx", ".../e.onnx"),
        ("in /data: damaged", "in .../data: damaged"),
        ("/srv/models/photos/", ".../photos"),
        ("file:///etc/passwd", ".../passwd"),
        ("bundle a/b/bundle: damaged", "bundle .../bundle: damaged"),
        ("/srv/my models/b/bundle.json", ".../my .../bundle.json"),
        ("//srv/models//photos///bundle.json", ".../bundle.json"),
        ("--bundle=/data, x=~/b", "--bundle=.../data, x=.../b"),
        ("image/jpeg or image/png", "image/jpeg or image/png"),
        ("horace://host:50051/photos", "horace://host:50051/photos"),
        ("https://example.org/a/b.html", "https://example.org/a/b.html"),
        ("FP32/FP16 at 1/2, a and/or b", "FP32/FP16 at 1/2, a and/or b"),
        ("such as '/images', without", "such as '/images', without"),
    ],
)
def test_of_a_path_its_last_part_is_left(text, left):
    """Enough to know what it is about; addresses and kinds of content stay."""
    assert without_paths(text) == left


@pytest.mark.parametrize("hostile", ["=a", "+/", "/a/=", "a/", "'/=", "=~", "a.", "/", "file:/="])
@pytest.mark.parametrize("end", [" /", "//", "'/"])
def test_a_long_text_costs_no_more_than_its_length(hostile, end):
    """Never its square, of which this would be seconds."""
    text = hostile * (16_000 // len(hostile)) + end
    began_s = time.thread_time()
    without_paths(text)
    assert time.thread_time() - began_s < 0.5


@pytest.mark.parametrize("made_of", ["x", "=a", " /a", "\u00e9"])
def test_a_long_message_is_cut_before_it_is_searched(monkeypatch, made_of):
    """However much of a caller's text an error repeats; what it grows by is cut off again."""
    searched = []
    monkeypatch.setattr(
        "serve.errors.without_paths", lambda text: searched.append(text) or without_paths(text)
    )
    _, message = to_status(UnknownNameError("model", found=made_of * 100_000 + " /"))
    for text in (*searched, message):
        assert MAX_MESSAGE_BYTES - 4 < len(text.encode()) <= MAX_MESSAGE_BYTES + len("...")
