"""The options of `python -m index.build`, and which of them exclude one another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.ann.memory import parse_size
from index.ann.trials import Goal
from index.building.pipeline import REMOTE_REQUESTS
from index.building.target import check_name
from index.milvus.connection import MilvusAddress, read_address
from models.errors import UsageError
from models.providers import ON_CPU, split_placement

MAX_AT_ONCE = 1024
"""Actors, processes, or requests; more is a slip of the finger."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Embed the images of a source and make a collection of them."""

    images: str
    """The images: a folder (or folder:PATH), tar shards (or wds:PATTERN), idx:IMAGES[,LABELS],
    or fashion-mnist[:train|:test]."""
    encoder: str
    """The encoder: a bundle's directory, or one of a server: horace://host:port/model (by TLS:
    horaces://), or triton://host:port[,host2:port...]/model. A bundle computes on a GPU where
    ,provider=cuda follows it, on the second one with ,device=1."""
    out: Path
    """The collection's directory, to be made."""
    name: str | None = None
    """The collection's name; that of its directory where none is given."""
    index: Literal["auto", "flat", "hnsw"] = "auto"
    """flat searches every vector; hnsw is approximate; auto takes flat up to 20,000 images, or,
    with --recall, what is measured to be the fastest."""
    recall: float | None = None
    """Have the index chosen and tuned until it finds this share of the 10 nearest images, such as
    .99: see `index.tune`."""
    memory_budget: str | None = None
    """With --recall: most that this process may hold while the index is built, such as 500MB."""
    metadata: Path | None = None
    """A CSV or parquet file with a column `key`; its other columns are stored with the images."""
    batch_size: int = 64
    """Images encoded at once."""
    engine: Literal["local", "ray"] = "local"
    """What embeds: this machine, or actors on Ray (extra `ray`): the cluster of RAY_ADDRESS, or a
    Ray that is started here. What they make is the same."""
    actors: int = 1
    """Actors on Ray, each with an encoder of its own and one CPU."""
    processes: int = 1
    """Processes that share the work: one fills some sixteen CPUs. What they make is the same."""
    requests: int = REMOTE_REQUESTS
    """Batches on their way to a server's encoder at once."""
    store: str | None = None
    """Keep the collection in a Milvus instead: milvus:URI, such as milvus:http://localhost:19530,
    under the name of --out, where the parts lie meanwhile. Its token: MILVUS_TOKEN."""
    replace: bool = False
    """Replace the collection that stands at --out."""
    restart: bool = False
    """Drop what an unfinished build of --out has embedded, instead of going on from it."""
    sync: bool = False
    """Bring the collection at --out up to date with the images, or build it where there is none:
    embed what is new or changed, drop what is gone. Other sources in it are left alone."""
    checksum: bool = False
    """With --sync: read and hash every file, also one whose size and times are as they were."""
    moved_from: str | None = None
    """With --sync: where the source was, as a path or as the collection's URI of it, that is at
    --images now."""
    dry_run: bool = False
    """Say what would be done and how long it would take, and write nothing."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not self.target.name:
            raise UsageError("--out", expected="a directory with a name", found=str(self.out))
        check_name("--name", self.name or "")
        if not 1 <= self.batch_size <= 65536:
            raise UsageError("--batch-size", expected="1 to 65536", found=str(self.batch_size))
        self._check_engine()
        self._check_sync()
        self._check_recall()
        if self.store is not None:
            self._check_store()
        at_once = {
            "--actors": self.actors,
            "--processes": self.processes,
            "--requests": self.requests,
        }
        for name, value in at_once.items():
            if not 1 <= value <= MAX_AT_ONCE:
                raise UsageError(name, expected=f"1 to {MAX_AT_ONCE}", found=str(value))

    def _check_engine(self) -> None:
        """Refuse an encoder that Ray cannot run, and numbers that the engine does not ask for."""
        _, placement = split_placement(self.encoder)
        if self.engine == "ray" and placement not in (None, ON_CPU):
            raise UsageError(
                "--engine ray",
                expected="an encoder that its actors run on their CPUs, or one of a server",
                found=self.encoder,
            )
        if self.engine == "ray":
            wrong = [
                ("--processes", self.processes > 1),
                ("--requests", self.requests != REMOTE_REQUESTS),
            ]
            expected = "none beside --engine ray, which has --actors"
        else:
            wrong, expected = [("--actors", self.actors > 1)], "--engine ray beside it"
        for name, is_given in wrong:
            if is_given:
                raise UsageError(name, expected=expected, found="otherwise")

    def _check_recall(self) -> None:
        """Refuse a recall that somebody else decides, and a budget of nothing."""
        wrong = [
            ("--index", self.index != "auto"),
            ("--sync", self.sync),
            ("--store", self.store is not None),
        ]
        for name, is_given in wrong:
            if is_given and self.recall is not None:
                raise UsageError(
                    name, expected="none beside --recall, which chooses the index", found="one"
                )
        if self.memory_budget is not None and self.recall is None:
            raise UsageError("--memory-budget", expected="--recall beside it", found="none")
        self.goal  # noqa: B018  # checks itself

    @property
    def goal(self) -> Goal | None:
        """What the index must reach, with `--recall`."""
        if self.recall is None:
            return None
        budget = None if self.memory_budget is None else parse_size(self.memory_budget)
        return Goal(recall=self.recall, memory_bytes=budget)

    def _check_store(self) -> None:
        """Refuse an address that is none, and what Milvus cannot do."""
        self.milvus  # noqa: B018  # checks itself
        for name, is_given, mend in (
            ("--sync", self.sync, "build it again with --replace"),
            ("--dry-run", self.dry_run, "leave out --store: the images and the time are the same"),
        ):
            if is_given:
                raise UsageError(name, expected="a collection on disk", found="--store", mend=mend)

    def _check_sync(self) -> None:
        """Refuse what a sync cannot do, and what only a sync can."""
        if not self.sync:
            wrong = [("--checksum", self.checksum), ("--moved-from", self.moved_from is not None)]
            expected = "--sync beside it"
        else:
            wrong = [
                ("--replace", self.replace),
                ("--restart", self.restart),
                ("--engine ray", self.engine == "ray"),
                ("--processes", self.processes > 1),
            ]
            expected = "none of it beside --sync, which goes on with what is there by itself"
        for name, is_given in wrong:
            if is_given:
                raise UsageError(name, expected=expected, found="otherwise")

    @property
    def milvus(self) -> MilvusAddress:
        """Where in Milvus the collection is to be, with `--store`."""
        return read_address(f"{self.store}#{self.title}")

    @property
    def target(self) -> Path:
        """The collection's directory, absolute; where `--out` is a link, what that leads to."""
        out = Path(os.path.abspath(self.out))
        return Path(os.path.realpath(out)) if out.is_symlink() else out

    @property
    def title(self) -> str:
        """The collection's name, even for `--out .`."""
        return self.name or os.path.basename(os.path.abspath(self.out))
