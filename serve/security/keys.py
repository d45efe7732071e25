"""`python -m serve.security.keys new NAME`: makes an API key, and prints it once.

Rules:
    The key is printed and kept nowhere; the file gets its hash.
    The file is replaced whole, with the owner and modes it had: a server that reads it finds
    the old one or the new one. A link stays, and what it leads to is replaced. Of several that
    add keys at once, each waits for the one before.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from models.command import run_command
from models.errors import UsageError, reason_of
from serve.security.ring import new_token, read_lines, read_ring, write_line

PROG = "python -m serve.security.keys"
USAGE = f"""usage: {PROG} COMMAND [OPTIONS]

commands:
  new NAME   make a key, print it once, and its line for the key file (or add it with --file)
  list       whose keys are in a key file, and on which line

{PROG} COMMAND --help shows the options of a command."""


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Make an API key and print it, once."""

    name: Annotated[str, tyro.conf.Positional]
    """Whose key it is; it is what logs, limits and traces call the caller."""

    file: str | None = None
    """Key file to add it to; made where there is none. The line is printed where not given."""

    limits: str = ""
    """Limits of its own, such as requests=50,images=2000,calls=8 (the first two a second)."""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Say whose keys are in a key file, on which line, with which limits."""

    file: str
    """The key file."""


def make_key(options: NewOptions) -> None:
    """Make a key, and add it to the file or print its line.

    Raises:
        StartError: the name, the limits or the file are not right.
        UsageError: the file cannot be written, or not be given to its owner.
    """
    token = new_token()
    line = write_line(options.name, token, options.limits)
    if options.file is not None:
        _add_line(Path(options.file), line)
    print(token)
    if options.file is None:
        print(f"line for the key file: {line}", file=sys.stderr)
    else:
        print(f"added to {options.file}; the key above is shown only now", file=sys.stderr)


def list_keys(options: ListOptions) -> None:
    """Print whose key each line of a key file has, and its limits.

    Raises:
        StartError: the file is not right.
    """
    for key in read_ring(options.file).keys:
        print(f"line {key.line}: {key.name} {key.limits_text}".rstrip())


def _add_line(path: Path, line: str) -> None:
    """Put a line at a key file's end; the file is replaced whole."""
    target = Path(os.path.realpath(path))
    try:
        with _alone_in(target.parent):
            _replace(path, target, line)
    except OSError as error:
        raise UsageError(
            f"--file {path}",
            expected="a file that can be written",
            found=reason_of(error),
        ) from error


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until nobody else adds a key in a directory.

    Where that has no locks nobody waits: a file system without, a directory that may not be listed.
    """
    with ExitStack() as undo:
        with suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            undo.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _replace(path: Path, target: Path, line: str) -> None:
    """Write a key file anew, with one line more; what is in it already stays to the byte."""
    before, old = b"", None
    if target.exists():
        read_ring(path)
        before, old = target.read_bytes(), target.stat()
    if before and not before.endswith(b"\n"):
        before += b"\n"
    after = before + f"{line}\n".encode()
    read_lines(after.decode(errors="replace"), f"key file {path}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(new, "wb") as file:
            if old is not None:
                _give_to_owner_of(old, new)
            file.write(after)
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _give_to_owner_of(old: os.stat_result, descriptor: int) -> None:
    """Give a new file the owner, group and modes of the old one."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):  # some file systems know no others
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def run(argv: Sequence[str]) -> int:
    """Run the command that the first argument names; give the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "new":
        return run_command(NewOptions, make_key, prog=f"{PROG} new", argv=rest)
    if command == "list":
        return run_command(ListOptions, list_keys, prog=f"{PROG} list", argv=rest)
    found = repr(command) if command else "none"
    print(f"{PROG}: command: expected new or list, found {found}; see --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
