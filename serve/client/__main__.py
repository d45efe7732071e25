"""`python -m serve.client embed|search|bench|models|health`: a server, from a terminal.

A dispatcher: each subcommand is a module of its own with options of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from models.command import run_command
from serve.client.commands import bench, embed, listing, search

PROG = "python -m serve.client"
USAGE = f"""usage: {PROG} COMMAND [OPTIONS]

commands:
  embed    images of files and folders to vectors: .npy, or JSON lines
  search   the nearest images of a collection: a table, JSON, or a picture
  bench    how fast a server answers, and how it fails
  models   which models and collections there are
  health   whether the server serves; exit status 0 or 1

{PROG} COMMAND --help shows the options of a command."""


def run(argv: Sequence[str]) -> int:
    """Run the command that the first argument names; give the exit status."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    prog = f"{PROG} {name}"
    match name:
        case "-h" | "--help":
            print(USAGE)
            return 0
        case "embed":
            return run_command(embed.EmbedCommand, embed.main, prog=prog, argv=rest)
        case "search":
            return run_command(search.SearchCommand, search.main, prog=prog, argv=rest)
        case "bench":
            return run_command(bench.BenchCommand, bench.main, prog=prog, argv=rest)
        case "models":
            return run_command(listing.ModelsCommand, listing.list_models, prog=prog, argv=rest)
        case "health":
            return run_command(listing.HealthCommand, listing.check_health, prog=prog, argv=rest)
    found = repr(name) if name else "none"
    print(
        f"{PROG}: command: expected embed, search, bench, models or health, found {found}; "
        f"see {PROG} --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
