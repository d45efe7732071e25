"""Parts made on Ray: the same files as the local engine's, from actors on one machine or many.

Rules:
    A part is a task: an actor reads, decodes and encodes its records, writes the part's file, and
    sends its bytes; the build puts them in their place in order. So resume, rejects and the
    finished collection are those of a local build, byte for byte.
    An actor takes one CPU and holds one encoder for all its parts: a local Ray on two cores hangs
    where more is asked for (https://github.com/ray-project/ray/issues/44687).
    What the source lists is settled by the build. An actor that finds other images under the same
    URI ends the build: its machine does not see the same files.
    A cluster is joined where RAY_ADDRESS names one; else Ray is started here, and stopped again.
    Ray's telemetry is off.

Images and encoder must be at the same URI on every machine: shared storage, or a server's encoder.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from index.building.part_file import RunKey
from index.building.part_set import PartSet, RecordBatch
from index.building.pipeline import ENCODE_THREADS, choose_crew, embed_batches
from index.embed import split
from index.errors import CollectionError
from models.cpu import cpu_budget
from models.encoder import Encoder, absolute_uri, open_encoder
from models.errors import FingerprintMismatchError, HoraceError
from models.image_source import ImageRecord, ImageSource
from models.images import open_source

CPUS_AN_ACTOR = 1

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray that is started here: some dozens of parts that are made and not yet written."""


def make_parts_on_ray(
    source: ImageSource, encoder: str, parts: PartSet, *, actors: int
) -> Generator[int, None, None]:
    """Make the parts that are missing; yield the number of records of each.

    Args:
        source: of the images; every machine opens it by its URI.
        encoder: as `open_encoder` takes it; likewise.
        parts: where the parts go.
        actors: how many work at once.

    Raises:
        CollectionError: Ray is not installed, or an actor failed; says what it said.
        SourceError: the source is damaged.
    """
    data = _import_ray()
    items = list(_list_missing(source, parts))
    if not items:
        return
    with _running_ray(actors), _quiet_data(data):
        made = data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartMaker,
            fn_constructor_args=(
                source.uri,
                absolute_uri(encoder),
                json.dumps(parts.key.to_json()),
            ),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=CPUS_AN_ACTOR,
        )
        for row in _rows(made):
            if row["error"]:
                raise CollectionError(
                    "a Ray worker",
                    expected=f"the part from record {row['start']} on",
                    found=str(row["error"]),
                )
            yield parts.adopt(int(row["start"]), bytes(row["file"]))


class PartMaker:
    """The actor: makes parts with one encoder."""

    def __init__(self, images: str, encoder: str, key: str) -> None:
        """Open nothing yet: what goes wrong with the first part can be said."""
        self._images, self._encoder_uri = images, encoder
        self._key = RunKey(**json.loads(key))
        self._source: ImageSource | None = None
        self._encoder: Encoder | None = None
        self._records: Iterator[ImageRecord] = iter(())
        self._position = -1

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make one part; give its file, or what went wrong."""
        (start,) = batch["start"].tolist()
        keys = json.loads(batch["keys"][0])
        try:
            file, error = self._make(start, keys), ""
        except HoraceError as fault:
            file, error = b"", str(fault)
        return {
            "start": np.array([start]),
            "file": np.array([file], dtype=object),
            "error": np.array([error], dtype=object),
        }

    def _make(self, start: int, keys: Sequence[str]) -> bytes:
        """Make the file of a part."""
        encoder = self._open_encoder()
        crew = choose_crew(CPUS_AN_ACTOR, self._encoder_uri)
        batches = (
            RecordBatch(start + number * self._key.batch_size, records)
            for number, records in enumerate(split(self._take(start, keys), self._key.batch_size))
        )
        with tempfile.TemporaryDirectory(prefix="horace-part-") as directory:
            made = PartSet(Path(directory), self._key)
            made.add(list(embed_batches(batches, encoder, crew=crew)))
            return made.finished[0].file.read_bytes()

    def _take(self, start: int, keys: Sequence[str]) -> list[ImageRecord]:
        """Give the records of a part; those of the part before are not listed again."""
        if self._source is None:
            self._source = open_source(self._images)
        if self._position != start:
            self._records = self._source.records(start)
        records = list(islice(self._records, len(keys)))
        self._position = start + len(records)
        found = [record.key for record in records]
        if found != list(keys):
            differs = sorted(set(keys) ^ set(found))
            raise CollectionError(
                self._images,
                expected="the images that the build sees",
                found=f"others here, {(differs or found)[0]!r} among what differs",
                mend="every machine must see the same files: use shared storage",
            )
        return records

    def _open_encoder(self) -> Encoder:
        """Open the encoder once; it must be the build's."""
        if self._encoder is None:
            encoder = open_encoder(self._encoder_uri, threads=ENCODE_THREADS)
            if encoder.fingerprint != self._key.fingerprint:
                raise FingerprintMismatchError(
                    f"encoder {self._encoder_uri}",
                    expected=self._key.fingerprint,
                    found=encoder.fingerprint,
                    mend="every machine must open the same encoder",
                )
            self._encoder = encoder
        return self._encoder


def _list_missing(source: ImageSource, parts: PartSet) -> Iterator[dict[str, Any]]:
    """Name the parts to make, and the keys of their records."""
    batches = parts.missing(source.records())
    for _, group in groupby(batches, lambda batch: parts.number(batch.start)):
        batches_of_part = list(group)
        keys = [record.key for batch in batches_of_part for record in batch.records]
        yield {"start": batches_of_part[0].start, "keys": json.dumps(keys)}


def _import_ray() -> Any:
    """Import Ray Data, without its telemetry."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray.data")
    except ImportError as error:
        raise CollectionError(
            "--engine ray",
            expected="the package ray with ray.data",
            found=str(error),
            mend="install it by `pip install '.[ray]'`",
        ) from error


@contextmanager
def _running_ray(actors: int) -> Iterator[None]:
    """Join the cluster that there is, or start Ray for the time of the build."""
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        yield
        return
    _start(ray, actors, os.environ.get("RAY_ADDRESS"))
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, actors: int, address: str | None) -> None:
    """Join the cluster at an address, or start Ray here where there is none."""
    where: dict[str, Any] = {
        "address": "local",  # and not the one that somebody else has started on this machine
        "num_cpus": max(cpu_budget(), actors * CPUS_AN_ACTOR),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    if address is not None:
        where = {"address": address}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is of the first kind
        raise CollectionError(
            "--engine ray",
            expected="the cluster of RAY_ADDRESS" if address else "a Ray that starts here",
            found=str(error).strip().splitlines()[0],
            mend="see `ray status`, or leave RAY_ADDRESS out to start one here",
        ) from error


@contextmanager
def _quiet_data(data: Any) -> Iterator[None]:
    """Have Ray Data keep the order of the parts and leave the terminal alone."""
    context = data.DataContext.get_current()
    was = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    logs = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [one.level for one in logs]
    for one in logs:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(logs, levels, strict=True):
            one.setLevel(level)
        context.enable_progress_bars, context.execution_options.preserve_order = was


def _rows(made: Any) -> Iterator[dict[str, Any]]:
    """Give what the actors send, and say in one line what Ray itself failed of."""
    exceptions = importlib.import_module("ray.exceptions")
    try:
        yield from made.iter_rows()
    except exceptions.RayError as error:
        raise CollectionError(
            "--engine ray",
            expected="workers that stay alive",
            found=str(error).strip().splitlines()[-1],
            mend="what is in parts is kept; the same command goes on from here",
        ) from error
