"""How every command of Horace starts, reports progress and ends.

Rules:
    A `HoraceError` is printed as one line on stderr, and so is what the system refuses; the
    exit status is 2 for bad use, 1 for failed work, 130 for Ctrl-C. A traceback is shown only
    with `--debug`.
    A `KeyboardInterrupt` that carries a text says how to go on; the line shows it.
    Options are a frozen keyword-only dataclass that tyro reads; its `__post_init__`
    validates and raises `UsageError`.
    Progress is a bar on a terminal, and elsewhere a log line now and then.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import tyro
from tqdm import tqdm

from models.errors import HoraceError, UsageError, reason_of

Item = TypeVar("Item")
Options = TypeVar("Options")

LOG_EVERY_S = 10.0
"""Seconds between two progress lines where there is no terminal."""

_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""Categories of what moves a terminal's cursor, ends a line, or is a byte that is no text; a narrow
blank is none of it."""

log = logging.getLogger("horace")


def run_command(
    options_type: type[Options],
    main: Callable[[Options], None],
    *,
    prog: str,
    argv: Sequence[str] | None = None,
    default: Options | None = None,
) -> int:
    """Parse the options, run `main`, and give the exit status of what came of it.

    Args:
        options_type: a frozen dataclass; its docstrings are the command's help.
        main: does the work; raises `HoraceError` for what a person can mend.
        prog: the command as people type it, such as `python -m index.build`.
        argv: the arguments; those of the process where None.
        default: an instance whose values stand in for the fields' defaults (a preset).

    Raises:
        SystemExit: tyro's own, with status 2, for arguments that do not parse.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")  # libraries: warnings
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    help_text = inspect.getdoc(options_type) or ""
    try:
        options = tyro.cli(
            options_type,
            prog=prog,
            args=[arg for arg in args if arg != "--debug"],
            description=f"{help_text}\n\nWith --debug an error shows its traceback.",
            default=tyro.MISSING_NONPROP if default is None else default,
        )
        main(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except HoraceError as error:
        if debug:
            raise
        let_go_of_stdout()
        print(f"{prog}: {shown(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as interrupt:
        let_go_of_stdout()
        print(": ".join([prog, "interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has what it wants
        let_go_of_stdout()
    except OSError as error:  # a full disk, a directory that nobody may look into
        if debug:
            raise
        let_go_of_stdout()
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"{prog}: {shown(f'{name}{reason_of(error)}')}", file=sys.stderr)
        return 1
    return 0


def let_go_of_stdout() -> None:
    """Say nothing more where nobody listens, or the interpreter complains when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(text: str) -> str:
    """Write out line breaks and other control characters, which names of files may have."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROLS else c
        for c in text
    )


def counted(count: int, what: str, *, plural: str = "") -> str:
    """Count things in words: `1 image`, `2 images`; `plural` where it is not made by an s."""
    return f"{count} {what if count == 1 else plural or f'{what}s'}"


def per_second(rate: float) -> str:
    """Say how fast: `1600/s`, and of what is slow `0.42/s`."""
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def progress(
    items: Iterable[Item],
    *,
    what: str,
    total: int | None = None,
    unit: str = "image",
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """Yield `items` and show how far along they are, how fast, and when they end.

    Args:
        items: what is being worked through.
        what: a word or two for the work, such as `embedding`.
        total: how many units there are, where known.
        unit: what is counted, one of them.
        size: how many units an item is; one where not given.
    """
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=total, desc=what, unit=f" {unit}s", disable=not on_terminal)
    start_s = last_s = time.monotonic()
    done, said = 0, -1
    with bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            now_s = time.monotonic()
            if not on_terminal and now_s - last_s >= LOG_EVERY_S:
                last_s, said = now_s, done
                log.info("%s", _progress_line(what, done, total, unit, now_s - start_s))
    if not on_terminal and said != done:
        log.info("%s", _progress_line(what, done, total, unit, time.monotonic() - start_s))


def _progress_line(what: str, done: int, total: int | None, unit: str, elapsed_s: float) -> str:
    """Say `embedding 512/60000 images, 4000/s, 15 s left`."""
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    of_total = "" if total is None else f"/{total}"
    line = f"{what} {done}{of_total} {unit}s, {per_second(rate)}"
    if total is not None and 0 < done < total:
        line += f", {(total - done) / rate:.0f} s left"
    return line
