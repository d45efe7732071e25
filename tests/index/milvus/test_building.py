from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pymilvus import MilvusClient

from index.build import BuildOptions, build
from index.building.parts import PartStore
from index.collection import Collection
from index.errors import CollectionError
from index.export import ExportOptions
from index.export import main as export
from index.interface import open_collection
from index.milvus import building, reading
from index.milvus.writer import MilvusWriter
from index.search import SearchOptions, main
from models.command import run_command
from models.errors import UsageError
from tests.index.conftest import make_bundle, make_folder


@pytest.fixture
def options(tmp_path: Path, milvus: str, request: pytest.FixtureRequest) -> BuildOptions:
    """Make images, one of them broken, and an encoder; build under a name of the test's own."""
    folder = make_folder(tmp_path / "images", per_class=4)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    make_bundle(tmp_path / "bundle")
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return BuildOptions(
        images=str(folder), encoder=str(tmp_path / "bundle"), out=tmp_path / name, batch_size=2,
        store=f"milvus:{milvus}",
    )  # fmt: skip


def test_a_build_into_milvus_is_the_build_on_disk(options: BuildOptions, tmp_path: Path) -> None:
    """The same ids, vectors, labels and digests, and the rejects beside the parts."""
    summary = build(options)
    assert (summary.images, summary.rejects, summary.index) == (12, 1, "HNSW32")
    assert json.loads(Path(summary.log).read_text())["key"] == "red/broken.png"
    disk = BuildOptions(
        images=options.images, encoder=options.encoder, out=tmp_path / "disk", batch_size=2
    )
    build(disk)
    with (
        closing(open_collection(summary.collection)) as stored,
        Collection.open(disk.out) as expected,
    ):
        order = np.argsort(expected.ids)
        ids = expected.ids[order]
        assert np.array_equal(stored.ids, ids)
        assert np.array_equal(stored.vectors(ids), expected.vectors(ids))
        assert stored.rows(ids) == expected.rows(ids)
        assert stored.encoder == expected.encoder
    assert not options.target.exists()
    assert not options.target.with_name(f"{options.target.name}.parts").exists()


def test_a_local_file_is_built_without_tracebacks(options: BuildOptions, tmp_path: Path) -> None:
    """Milvus Lite serves it from the build's own process, and does not know every call."""
    args = {"images": options.images, "encoder": options.encoder, "out": options.out}
    args["store"] = f"milvus:{tmp_path / 'local.db'}"
    argv = [text for name, value in args.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "index.build", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "12 images" in done.stdout
    assert "ERROR" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_local_file_that_is_none_or_that_is_open_elsewhere_is_said_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And none is made by looking for it."""
    file = tmp_path / "local.db"
    with pytest.raises(
        CollectionError, match="#photos: expected a file of Milvus Lite, found none"
    ):
        open_collection(f"milvus:{file}#photos")
    with pytest.raises(
        CollectionError, match=r"localhost:19530 is illegal, needs start with .*http"
    ):
        open_collection("milvus:localhost:19530#photos")
    assert not file.exists()
    file.mkdir()
    with (file / "LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CollectionError, match="and that no other process has the file open"):
            open_collection(f"milvus:{file}#photos")
    assert caplog.text == ""


def test_people_search_it_by_its_address(
    options: BuildOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image file and a key find their colour; filters and --together work as on disk."""
    summary = build(options)
    image = Path(options.images) / "blue" / "000.png"
    found = SearchOptions(
        collection=summary.collection, images=(str(image),), key=("red/001.png",), k=3,
        filter="not key endswith '3.png'", json=True,
    )  # fmt: skip
    main(found)
    blue, red = json.loads(capsys.readouterr().out)["queries"]
    assert [hit["label"] for hit in blue["hits"]] == ["blue"] * 3
    assert blue["hits"][0]["key"] == "blue/000.png"
    assert {hit["key"] for hit in red["hits"]} >= {"red/000.png", "red/002.png"}


def test_many_queries_are_asked_some_at_a_time(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Milvus takes 16,384 in a call, and 64 MB; the answers are those of one call."""
    sizes: list[int] = []
    real = MilvusClient.search

    def counted(
        client: MilvusClient, *args: object, data: list[object], **kwargs: object
    ) -> object:
        sizes.append(len(data))
        return real(client, *args, data=data, **kwargs)

    monkeypatch.setattr(MilvusClient, "search", counted)
    with closing(open_collection(build(options).collection)) as stored:
        ids = stored.ids
        found = stored.search_ids(ids, 3)
        for bound, value, asked in (
            ("PAGE_ROWS", 5, [5, 5, 2]),
            ("MAX_MESSAGE_BYTES", 400, [3] * 4),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(reading, bound, value)
                sizes.clear()
                again = stored.search_ids(ids, 3)
            assert sizes == asked
            assert np.array_equal(again.ids, found.ids)
            assert np.array_equal(again.scores, found.scores)


def test_it_is_exported_as_from_disk(options: BuildOptions, tmp_path: Path) -> None:
    """The same rows and vectors, in the order of their ids, under a filter, too."""
    summary = build(options)
    disk = dataclasses.replace(options, out=tmp_path / "disk", store=None)
    build(disk)
    for filter in (None, "label = 'red' or key endswith '2.png'"):
        tables = []
        for number, address in enumerate((summary.collection, str(disk.out))):
            out = tmp_path / f"{number}-{filter is None}.parquet"
            export(ExportOptions(collection=address, out=out, filter=filter))
            tables.append(pq.read_table(out).sort_by("id"))
        assert len(tables[0]) == (12 if filter is None else 6)
        assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    "command",
    [
        "describe C", "delete C --key K", "delete C --key K --dry-run", "compact C", "verify C",
        "tune C --recall .9", "duplicates C --out O", "outliers C --out O", "map C --out O",
        "select C --budget 1 --method random --out O",
    ],
)  # fmt: skip
def test_what_wants_a_directory_says_so(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line that says what does not, and before anything is looked for."""
    name, *args = command.split()
    names = {"C": "milvus:http://nowhere:1#photos", "O": str(tmp_path / "out")}
    module = importlib.import_module(f"index.{name}")
    options = getattr(module, f"{name.title().removesuffix('s')}Options")
    argv = [names.get(arg, arg) for arg in args]
    status = run_command(options, module.main, prog=f"python -m index.{name}", argv=argv)
    assert (status, capsys.readouterr().err) == (
        2,
        f"python -m index.{name}: collection: expected a directory, found the address of a Milvus; "
        "`index.search`, `index.evaluate` and `index.export` take either, this does not\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_taken_is_kept_or_replaced(options: BuildOptions, milvus: str) -> None:
    """Without --replace nothing is embedded; with it the name changes hands, and the old goes."""
    summary = build(options)
    with pytest.raises(UsageError, match=r"expected a new name, found a collection; .*--replace"):
        build(options)
    Image.new("RGB", (9, 9)).save(Path(options.images) / "new.png")
    again = build(BuildOptions(**{**vars(options), "replace": True}))
    assert (again.images, again.collection) == (13, summary.collection)
    with closing(MilvusClient(uri=milvus)) as client:
        mine = [name for name in client.list_collections() if options.target.name in name]
    assert len(mine) == 1


def test_who_has_it_open_is_not_shown_another_encoders_vectors(
    options: BuildOptions, tmp_path: Path
) -> None:
    """A build that takes the name has the same ids; `latest` gives it, with its fingerprint."""
    other = make_bundle(tmp_path / "other", seed=9)
    with closing(open_collection(build(options).collection)) as stored:
        ids = stored.ids
        build(dataclasses.replace(options, encoder=str(other.path), replace=True))
        with pytest.raises(CollectionError, match="open it again: another build may have taken"):
            stored.vectors(ids)
        latest = stored.latest()
        assert (latest.fingerprint, latest.count) == (other.fingerprint, 12)
        assert latest.vectors(ids).shape == (12, 16)


def test_a_build_goes_on_after_milvus_refused(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was embedded is kept; the next run embeds nothing, and no row is twice."""

    def refuse(*_: object, **__: object) -> None:
        raise CollectionError("milvus", expected="an answer of Milvus", found="none")

    with monkeypatch.context() as patch:
        patch.setattr(building, "_give_name", refuse)
        with pytest.raises(CollectionError, match="an answer of Milvus"):
            build(options)
    summary = build(options)
    assert (summary.images, summary.reused) == (12, 12)
    with closing(open_collection(summary.collection)) as stored:
        assert stored.count == 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a function that builds, and ends the build right after a call of the client."""

    def run(call: str, options: BuildOptions) -> None:
        real = getattr(MilvusClient, call)

        def dying(*args: object, **kwargs: object) -> None:
            real(*args, **kwargs)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(MilvusClient, call, dying)
            with pytest.raises(Killed):
                build(options)

    return run


@pytest.fixture
def named(options: BuildOptions, milvus: str) -> Callable[[], list[str]]:
    """Give a function that lists what stands in Milvus of this test."""

    def collections() -> list[str]:
        with closing(MilvusClient(uri=milvus)) as client:
            return [one for one in client.list_collections() if options.target.name in one]

    return collections


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_killed_build_wrote_does_not_stay(
    options: BuildOptions,
    kill: Callable[..., None],
    named: Callable[[], list[str]],
    restart: bool,
) -> None:
    """Whether it goes on, with another index at that, or begins anew."""
    kill("upsert", options)
    assert len(named()) == 1
    summary = build(dataclasses.replace(options, restart=restart, index="flat"))
    assert (summary.images, summary.index, summary.reused) == (12, "Flat", 0 if restart else 12)
    assert len(named()) == 1


def test_what_is_given_up_is_known_until_it_is_dropped(
    options: BuildOptions,
    kill: Callable[..., None],
    named: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where --restart is killed as it is about to drop it."""
    kill("upsert", options)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "drop_collection", die)
        with pytest.raises(Killed):
            build(dataclasses.replace(options, restart=True))
    assert (build(options).images, len(named())) == (12, 1)


def test_a_build_that_has_the_name_has_its_index(
    options: BuildOptions, kill: Callable[..., None], named: Callable[[], list[str]]
) -> None:
    """Another is refused before any work, and can be had by beginning anew."""
    kill("create_alias", options)
    other = dataclasses.replace(options, index="flat")
    for replace in (False, True):
        with pytest.raises(UsageError, match="--index: expected hnsw, of which this build has"):
            build(dataclasses.replace(other, replace=replace))
    summary = build(dataclasses.replace(other, replace=True, restart=True))
    assert (summary.index, len(named())) == ("Flat", 1)


def test_a_build_that_was_killed_when_it_had_the_name_is_finished(
    options: BuildOptions, kill: Callable[..., None], named: Callable[[], list[str]]
) -> None:
    """By the same command, which needs no --replace for it, and drops what had the name before."""
    kill("create_alias", options)
    summary = build(options)
    assert (summary.images, summary.reused) == (12, 12)
    assert not options.target.with_name(f"{options.target.name}.parts").exists()
    before = named()
    again = dataclasses.replace(options, replace=True)
    kill("alter_alias", again)
    assert len(named()) == 2
    assert build(again).reused == 12
    assert len(named()) == 1
    assert named() != before


def test_a_build_that_is_given_up_when_it_had_the_name_takes_along_what_had_it_before(
    options: BuildOptions, kill: Callable[..., None], named: Callable[[], list[str]]
) -> None:
    """It is replaced like any other, and with it goes what it could not drop."""
    build(options)
    again = dataclasses.replace(options, replace=True)
    kill("alter_alias", again)
    anew = dataclasses.replace(again, restart=True)
    assert (build(anew).images, len(named())) == (12, 1)


def test_a_build_goes_on_after_another_replaced_it(
    options: BuildOptions, kill: Callable[..., None], named: Callable[[], list[str]]
) -> None:
    """Each of the two has replaced the other: the one that has the name stays."""
    kill("create_alias", options)
    out = options.target.with_name("other")
    build(dataclasses.replace(options, out=out, name=options.target.name, replace=True))
    summary = build(dataclasses.replace(options, replace=True))
    assert (summary.images, len(named())) == (12, 1)
    with closing(open_collection(summary.collection)) as stored:
        assert stored.count == 12


def test_of_two_builds_of_a_new_name_the_later_replaces_nothing(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --replace, also where the name was free when both began."""
    name = options.target.name
    other = dataclasses.replace(options, out=tmp_path / "other", name=name)
    real = building._write_rejects

    def build_the_other(store: PartStore) -> str:
        monkeypatch.setattr(building, "_write_rejects", real)
        build(other)
        return real(store)

    monkeypatch.setattr(building, "_write_rejects", build_the_other)
    with pytest.raises(UsageError, match="expected a new name, found a collection"):
        build(options)
    with closing(open_collection(str(other.milvus))) as stored:
        assert stored.count == 12


def test_a_collection_that_was_made_otherwise_is_left_alone(options: BuildOptions) -> None:
    """Even with --replace: one that a writer made is no build's to drop."""
    with closing(open_collection(build(options).collection)) as stored:
        description = stored.description  # type: ignore[attr-defined]  # Milvus's alone
    other = BuildOptions(**{**vars(options), "name": "by_hand", "replace": True})
    with (
        closing(MilvusWriter.create(str(other.milvus), description)),
        pytest.raises(UsageError, match=r"one that index\.build made, found another"),
    ):
        build(other)


def test_bad_options_are_said_before_anything_is_opened(options: BuildOptions) -> None:
    """An address that is none, a name that Milvus does not take, and --sync."""
    with pytest.raises(UsageError, match="expected milvus:URI#NAME"):
        BuildOptions(**{**vars(options), "store": "http://localhost:19530"})
    for port in ("abc", "99999"):
        with pytest.raises(UsageError, match="expected milvus:URI#NAME"):
            BuildOptions(**{**vars(options), "store": f"milvus:http://localhost:{port}"})
    with pytest.raises(UsageError, match="no user or password in it") as refused:
        BuildOptions(**{**vars(options), "store": "milvus:http://me:secret@localhost:19530"})
    assert "secret" not in str(refused.value)
    with pytest.raises(UsageError, match="expected letters, digits and _"):
        BuildOptions(**{**vars(options), "name": "my photos"})
    with pytest.raises(UsageError, match="--sync: expected a collection on disk, found --store"):
        BuildOptions(**{**vars(options), "sync": True})
