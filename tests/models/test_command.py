import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from models import command
from models.command import counted, progress, run_command, shown
from models.errors import HoraceError, UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count to n."""

    n: int = 3
    """How far."""

    def __post_init__(self) -> None:
        """Refuse what cannot be counted to."""
        if self.n < 0:
            raise UsageError("--n", expected="0 or more", found=str(self.n), mend="count upwards")


def run(main: Callable[[Options], None], *argv: str) -> int:
    """Run `main` as a command of its own."""
    return run_command(Options, main, prog="python -m count", argv=argv)


def fail(_: Options) -> None:
    """Fail as work fails."""
    raise HoraceError("counting", expected="a quiet room", found="noise")


def test_success_is_status_0_and_options_arrive():
    """A command that ends well ends with 0."""
    seen: list[int] = []
    assert run(lambda options: seen.append(options.n), "--n", "7") == 0
    assert seen == [7]


def test_bad_use_is_one_line_and_status_2(capsys):
    """The dataclass validates; the person reads what, expected, found and how to mend it."""
    assert run(lambda _: None, "--n", "-1") == 2
    assert capsys.readouterr().err == (
        "python -m count: --n: expected 0 or more, found -1; count upwards\n"
    )


def test_failed_work_is_one_line_and_status_1(capsys):
    """No traceback without --debug."""
    assert run(fail) == 1
    assert capsys.readouterr().err == (
        "python -m count: counting: expected a quiet room, found noise\n"
    )


def test_debug_shows_the_traceback():
    """With --debug the error is raised as it is."""
    with pytest.raises(HoraceError, match="a quiet room"):
        run(fail, "--debug")


def test_interrupt_is_status_130(capsys):
    """Ctrl-C is a line, too."""

    def interrupted(_: Options) -> None:
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    assert capsys.readouterr().err == "python -m count: interrupted\n"


def test_an_interrupt_may_say_how_to_go_on(capsys):
    """Who interrupts long work learns what is kept."""

    def interrupted(_: Options) -> None:
        raise KeyboardInterrupt("2 are counted; go on from there")

    assert run(interrupted) == 130
    line = "python -m count: interrupted: 2 are counted; go on from there\n"
    assert capsys.readouterr().err == line


def test_our_own_bugs_are_not_hidden():
    """What is not a HoraceError keeps its traceback: it is for us."""
    with pytest.raises(ZeroDivisionError):
        run(lambda _: print(1 / 0))


def test_what_the_system_refuses_is_one_line_and_status_1(capsys):
    """A directory that nobody may look into, a disk that is full: no traceback."""

    def refuse(_: Options) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "secret\nplace")

    assert run(refuse) == 1
    assert capsys.readouterr().err == ("python -m count: secret\\nplace: Permission denied\n")
    with pytest.raises(PermissionError):
        run(refuse, "--debug")


def test_a_name_with_a_line_break_is_still_one_line(capsys):
    """Control characters are written out."""

    def fail(_: Options) -> None:
        raise HoraceError("a\nb", expected="ä", found="\x1b[2J")

    assert run(fail) == 1
    assert capsys.readouterr().err == ("python -m count: a\\nb: expected ä, found \\x1b[2J\n")


COUNTING = """
import sys
from dataclasses import dataclass
from models.command import run_command
from models.errors import HoraceError
@dataclass(frozen=True, kw_only=True)
class Options:
    n: int = 3
def main(options):
    print("x" * 100)
    {ends}
sys.exit(run_command(Options, main, prog="count", argv=()))
"""


@pytest.mark.parametrize(
    ("ends", "stdout", "status", "stderr"),
    [
        ("", "| true", 0, ""),
        ("", "> /dev/full", 1, "count: No space left on device\n"),
        ("", ">&-", 0, ""),
        ("raise OSError(28, 'Full')", ">&-", 1, "count: Full\n"),
        ("raise HoraceError('no')", "| true", 1, "count: no\n"),
        ("raise KeyboardInterrupt", "> /dev/full", 130, "count: interrupted\n"),
    ],
)
def test_an_output_that_takes_nothing(ends, stdout, status, stderr):
    """Who has stopped reading has what it wants; a disk that is full is an error; none is none."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    shell = f'"$PYTHON" -c "$CODE" {stdout}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell],
        env=environment | {"PYTHON": sys.executable, "CODE": COUNTING.format(ends=ends)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (status, stderr)


def test_help_names_debug(capsys):
    """--help shows the docstrings, and --debug."""
    with pytest.raises(SystemExit) as caught:
        run(lambda _: None, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "How far." in text
    assert "--debug" in text


def test_a_name_is_shown_on_its_line():
    """What would end it, or moves the cursor, is written out; every other sign stays."""
    assert shown("a\nb\x1b[31m\u2028c\x9b\udc9b") == "a\\nb\\x1b[31m\\u2028c\\x9b\\udc9b"
    for name in ("größe 画像.png", "at 3.04\u202fPM.png", "👩\u200d🔬.png"):
        assert shown(name) == name


def test_one_is_counted_in_the_singular():
    """And no other number; a plural may be told."""
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(2, "class", plural="classes") == "2 classes"


def test_progress_off_a_terminal_logs_lines(monkeypatch, caplog):
    """Elsewhere than on a terminal there is a line now and then, with rate and time left."""
    clock_s = iter([0.0, 5.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock_s))
    with caplog.at_level(logging.INFO, logger="horace"):
        batches = [[1] * 10, [1] * 14, [1] * 6]
        assert list(progress(batches, what="embedding", total=30, size=len)) == batches
    assert caplog.messages == [
        "embedding 24/30 images, 2/s, 3 s left",
        "embedding 30/30 images, 2.1/s",
    ]


def test_progress_off_a_terminal_says_the_end_once(monkeypatch, caplog):
    """Also where the last item took long; and what takes long is not said to stand still."""
    clock_s = iter([0.0, 40.0, 80.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock_s))
    with caplog.at_level(logging.INFO, logger="horace"):
        assert list(progress([1, 2], what="choosing", total=2, unit="recipe")) == [1, 2]
    assert caplog.messages == [
        "choosing 1/2 recipes, 0.025/s, 40 s left",
        "choosing 2/2 recipes, 0.025/s",
    ]


def test_progress_on_a_terminal_counts_in_the_plural(monkeypatch, capsys):
    """The bar's rate reads as the log's: images, however slow."""
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress([1, 2], what="embedding", total=2)) == [1, 2]
    bar = capsys.readouterr().err
    assert "images/s" in bar
    assert "image/s" not in bar
