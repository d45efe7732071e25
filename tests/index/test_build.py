import dataclasses
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build, choose_factory, main, plan, sync
from index.building import filling
from index.building.part_file import RunKey
from index.building.parts import PartStore, parts_directory
from index.collection import Collection, id_of
from index.embed import EmbeddedBatch, Reject, embed
from index.errors import CollectionError
from index.storage.manifest import read_manifest
from index.verify import verify
from models.bundle import SHIPPED_BUNDLE
from models.command import run_command
from models.errors import HoraceError, SourceError, UsageError
from models.image_source import digest_of
from models.images import ImageRecord, open_source
from models.runtime import open_bundle

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/data/fashion-mnist-mini/train-images-idx3-ubyte.gz"


def content(collection):
    """Give the bytes of every file but the manifest, and the manifest without its report."""
    files = {
        str(file.relative_to(collection)): file.read_bytes()
        for file in sorted(collection.rglob("*"))
        if file.is_file() and file.name not in ("manifest.json", ".lock")
    }
    document = json.loads((collection / "manifest.json").read_text())
    return files, {k: v for k, v in document.items() if k not in ("build", "checksum")}


def command(*args):
    """Start `python -m index.build` as people do."""
    return subprocess.Popen(
        [sys.executable, "-m", "index.build", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_in_process(capsys, *args):
    """Run the command in this process: status, standard output, standard error."""
    status = run_command(BuildOptions, main, prog="python -m index.build", argv=[*map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_directory_of_that_name_that_is_somebodys_stays_as_it_is(tmp_path, bundle, train_folder):
    """Beside `c` lies `c.parts`; where it is no build's, nothing in it is touched."""
    foreign = tmp_path / "c.parts"
    foreign.mkdir()
    options = BuildOptions(
        images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c", restart=True
    )
    for name in ("thesis.txt", "part-time.txt", "collection"):
        (foreign / name).write_text("precious")
        for step in (build, plan):
            with pytest.raises(UsageError, match=rf"c\.parts, where .* found '{name}' in it"):
                step(options)
        assert [path.name for path in foreign.iterdir()] == [name]
        (foreign / name).unlink()
    build(options)
    assert not foreign.exists()


def test_what_comes_into_the_directory_of_a_build_stays_there(tmp_path, bundle, train_folder):
    """What is not the build's is not deleted with its parts."""
    key = RunKey(
        source="folder:/x", source_count=3, fingerprint="f" * 64, dim=4, batch_size=2, part_size=4
    )
    with PartStore(tmp_path / "c", key) as store:
        (store.directory / "notes.txt").write_text("precious")
        store.discard()
    assert [path.name for path in store.directory.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["two\nlines", "no-utf8-\udcff"])
def test_a_name_that_no_text_can_hold_is_refused_before_work(tmp_path, bundle, train_folder, name):
    """Files of the collection name it."""
    options = BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=tmp_path / name)
    with pytest.raises(UsageError, match=r"--out .*: expected a name without control characters"):
        build(options)
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(UsageError, match=r"--name .*: expected a name without control characters"):
        dataclasses.replace(options, name=name)


def test_a_source_whose_name_no_text_can_hold_is_refused_before_work(tmp_path, bundle, new_folder):
    """Every row names it; by a link with another name it is taken."""
    folder = new_folder().rename(tmp_path / "no-utf8-\udcff")
    options = BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c")
    for step in (plan, build, sync):
        with pytest.raises(UsageError, match=r"no-utf8-\\udcff': expected a name in UTF-8, found"):
            step(options)
    assert not list(tmp_path.glob("*.parts"))
    (tmp_path / "link").symlink_to(folder)
    assert build(dataclasses.replace(options, images=str(tmp_path / "link"))).images == 12


def test_a_collection_holds_every_image_of_its_source(built, bundle, train_folder):
    """Keys, labels and ids stand in the source's order; vectors are the encoder's."""
    source = open_source(str(train_folder))
    records = list(source.records())
    with Collection.open(built) as collection, closing(open_bundle(bundle.path)) as encoder:
        assert collection.keys() == [record.key for record in records]
        assert collection.labels() == [record.label for record in records]
        assert collection.ids.tolist() == [id_of(record.key) for record in records]
        pixels = np.stack([encoder.preprocess(record.read()) for record in records])
        np.testing.assert_array_equal(collection.vectors(collection.ids), embed(encoder, pixels))
        assert {row.source for row in collection.rows(collection.ids)} == {source.uri}
        assert collection.manifest.encoder == str(bundle.path)
    assert not parts_directory(built).exists()


def test_a_collection_does_not_remember_where_its_encoder_ran(tmp_path, bundle, train_folder):
    """Who searches it may have no GPU, or the encoder's vectors already."""
    out = tmp_path / "c"
    options = BuildOptions(
        images=str(train_folder), encoder=f"{bundle.path},provider=cpu", out=out, processes=2
    )
    build(options)
    assert Collection.open(out).manifest.encoder == str(bundle.path)


@pytest.mark.gpu
def test_a_gpu_builds_what_a_cpu_builds(tmp_path):
    """The same rows, vectors up to rounding, and an encoder that anybody can open."""
    made = []
    for place in ("cpu", "cuda"):
        options = BuildOptions(
            images=f"idx:{MINI}",
            encoder=f"{SHIPPED_BUNDLE},provider={place}",
            out=tmp_path / place,
        )
        build(options)
        made.append(Collection.open(tmp_path / place))
    on_cpu, on_gpu = made
    assert on_gpu.manifest.encoder == on_cpu.manifest.encoder == str(SHIPPED_BUNDLE)
    ids = on_cpu.table()["id"].to_pylist()
    assert on_gpu.table()["id"].to_pylist() == ids
    cosines = (on_cpu.vectors(ids) * on_gpu.vectors(ids)).sum(axis=1)
    assert cosines.min() > 1 - 1e-5


def test_bad_images_are_rejected_counted_and_logged(tmp_path, capsys, bundle, new_folder):
    """They are never fatal; the log says which and why."""
    folder = new_folder()
    (folder / "red" / "text.jpg").write_text("no image")
    (folder / "blue" / "empty.png").write_bytes(b"")
    status, out, _ = run_in_process(
        capsys, "--images", folder, "--encoder", bundle.path, "--out", tmp_path / "c"
    )
    assert status == 0
    assert "12 images, Flat" in out
    assert "rejected 2" in out
    assert f"the rejected images and why: {tmp_path / 'c' / 'rejects.jsonl'}" in out
    rejects = [json.loads(line) for line in (tmp_path / "c/rejects.jsonl").read_text().splitlines()]
    assert [(one["key"], one["fault"]) for one in rejects] == [
        ("blue/empty.png", "empty"),
        ("red/text.jpg", "unsupported_format"),
    ]
    assert rejects[0]["message"] == "expected an image, found no bytes"  # the key stands beside it


def test_a_source_without_one_good_image_is_an_error(tmp_path, capsys, bundle):
    """An empty collection is nobody's wish; nothing is kept, and once it is mended it is built."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_text("no image")
    args = ("--images", tmp_path / "images", "--encoder", bundle.path, "--out", tmp_path / "c")
    status, _, err = run_in_process(capsys, *args)
    assert status == 1
    assert "expected at least one image that can be used, found 1 rejected, the first: a.jpg" in err
    assert not list(tmp_path.glob("c*"))
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.jpg")
    assert run_in_process(capsys, *args)[0] == 0


def test_the_summary_as_json(tmp_path, capsys, bundle, train_folder):
    """Machines get what people read."""
    out = tmp_path / "c"
    status, text, _ = run_in_process(
        capsys, "--images", train_folder, "--encoder", bundle.path, "--out", out, "--json"
    )
    summary = json.loads(text)
    assert status == 0
    assert summary.pop("embed_s") > 0
    assert summary.pop("index_s") > 0
    assert summary == {
        "collection": str(out),
        "name": "c",
        "fingerprint": bundle.fingerprint,
        "index": "Flat",
        "images": 60,
        "rejects": 0,
        "log": str(out / "rejects.jsonl"),
        "reused": 0,
        "metadata": None,
    }


def test_metadata_stands_beside_its_own_image(tmp_path, capsys, bundle, new_folder):
    """By key; what has no partner is counted; a filter asks for it and a hit shows it."""
    facts = tmp_path / "facts.csv"
    facts.write_text("key,price,taken\nred/001.png,9.5,2024-05-01\nblue/000.png,2,\ngone.png,1,\n")
    out = tmp_path / "c"
    args = ("--images", new_folder(), "--encoder", bundle.path, "--out", out, "--metadata", facts)
    status, text, _ = run_in_process(capsys, *args)
    assert status == 0
    assert "metadata of 3 rows: price (double), taken (date32[day]); 1 row without an image" in text
    assert "; 10 images without a row" in text
    with Collection.open(out) as collection, closing(open_bundle(bundle.path)) as encoder:
        rows = {row.key: row for row in collection.rows(collection.ids)}
        assert rows["red/001.png"].metadata == {"price": 9.5, "taken": date(2024, 5, 1)}
        assert rows["red/000.png"].metadata == {"price": None, "taken": None}
        chosen = collection.select("price > 3 and taken < '2025-01-01'")
        assert collection.ids[chosen.mask_N].tolist() == [id_of("red/001.png")]
        data = open_source(str(tmp_path / "images")).load("red/001.png")
        assert rows["red/001.png"].digest == digest_of(data)
        vector = embed(encoder, encoder.preprocess(data)[None])[0]
        np.testing.assert_array_equal(collection.vectors([id_of("red/001.png")])[0], vector)


def test_metadata_that_names_no_image_is_refused_before_work(tmp_path, capsys, bundle, new_folder):
    """No image is embedded for it; a dry run says so, too."""
    facts, out = tmp_path / "facts.csv", tmp_path / "c"
    facts.write_text("key,price\nred/001,9.5\n")
    args = ("--images", new_folder(), "--encoder", bundle.path, "--out", out, "--metadata", facts)
    for further in ((), ("--dry-run",)):
        status, _, err = run_in_process(capsys, *args, *further)
        assert status == 1
        assert "expected keys of images, such as 'blue/000.png', found 1 row of others" in err
        assert list(tmp_path.glob("c*")) == []


def test_metadata_that_names_no_image_of_compressed_shards_costs_no_embedding(
    tmp_path, capsys, bundle, new_folder
):
    """They are listed while they are read: it is an error then, and the parts are kept."""
    facts, out, shard = tmp_path / "facts.csv", tmp_path / "c", tmp_path / "s.tar.gz"
    with tarfile.open(shard, "w:gz") as archive:
        for file in sorted(new_folder().rglob("*.png")):
            archive.add(file, str(file.relative_to(tmp_path / "images")))
    facts.write_text("key,price\nred/001,9.5\n")
    args = ("--images", shard, "--encoder", bundle.path, "--out", out, "--metadata", facts)
    status, _, err = run_in_process(capsys, *args)
    assert status == 1
    assert "expected keys of images, such as 's.tar.gz/blue/000.png', found 1 row of others" in err
    assert not out.exists()
    facts.write_text("key,price\ns.tar.gz/red/001.png,9.5\n")
    status, text, _ = run_in_process(capsys, *args, "--json")
    summary = json.loads(text)
    assert (status, summary["reused"], summary["metadata"]["without_row"]) == (0, 12, 11)


def test_metadata_that_no_row_may_have(tmp_path, capsys, bundle, new_folder):
    """Is an error that names the image."""
    facts, out = tmp_path / "facts.csv", tmp_path / "c"
    facts.write_text("key,note\nred/001.png," + "x" * 61440 + "\n")
    args = ("--images", new_folder(), "--encoder", bundle.path, "--out", out, "--metadata", facts)
    status, _, err = run_in_process(capsys, *args)
    assert status == 2
    assert "row of key 'red/001.png': expected at most 61440 bytes of text, found 61" in err
    assert not out.exists()


def test_a_second_image_of_a_key_is_rejected(tmp_path, bundle):
    """An id must name one image; a tar may hold a name twice."""
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for key, level in (("a.png", 10), ("b.png", 20), ("a.png", 30)):
            stream = io.BytesIO()
            Image.new("L", (12, 12), level).save(stream, "PNG")
            member = tarfile.TarInfo(key)
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)
    out = tmp_path / "c"
    summary = build(
        BuildOptions(images=str(tmp_path / "twice.tar"), encoder=str(bundle.path), out=out)
    )
    assert (summary.images, summary.rejects) == (2, 1)
    assert json.loads((out / "rejects.jsonl").read_text()) == {
        "key": "twice.tar/a.png",
        "fault": "duplicate_key",
        "message": "expected a key of its own, found an earlier image of this key",
        "digest": digest_of(stream.getvalue()),
    }


def test_an_image_whose_id_another_key_has_is_rejected(tmp_path, monkeypatch):
    """And the reject names that key, in whatever part it is."""
    monkeypatch.setattr("index.building.part_file.id_of", lambda key: {"a": 1, "b": 2}.get(key, 1))
    key = RunKey(source="", source_count=None, fingerprint="", dim=2, batch_size=2, part_size=2)
    with PartStore(tmp_path / "c", key) as store:
        for start, keys in ((0, ["a", "b"]), (2, ["c", "a"])):
            store.add(
                [
                    EmbeddedBatch(
                        start=start,
                        keys=keys,
                        labels=[None] * 2,
                        digests=["1", "2"],
                        vectors_ND=np.eye(2, dtype=np.float32),
                        rejects=[],
                    )
                ]
            )
        store.settle()
        assert [reject.message for reject in store.rejects] == [
            "expected an id of its own, found that of key 'a'; rename one of the two",
            "expected a key of its own, found an earlier image of this key",
        ]
        assert store.n_images == 2


def test_a_vector_that_no_search_could_compare_is_rejected(tmp_path):
    """An encoder that fails in silence spoils no search."""
    key = RunKey(source="", source_count=None, fingerprint="", dim=2, batch_size=3, part_size=48)
    batch = EmbeddedBatch(
        start=0,
        keys=["a", "b", "c", "d"],
        labels=[None] * 4,
        digests=["1", "2", "3", "4"],
        vectors_ND=np.array([[1, 0], [np.nan, 0], [0, np.inf], [0, 0]], np.float32),
        rejects=[],
    )
    with PartStore(tmp_path / "c", key) as store:
        store.add([batch])
        assert [block.rows["key"].to_pylist() for block in store.blocks()] == [["a"]]
        assert [(reject.key, reject.fault) for reject in store.rejects] == [
            ("b", "not_finite"),
            ("c", "not_finite"),
            ("d", "not_unit"),
        ]
        assert store.rejects[1].digest == "3"
        assert store.rejects[0].message == "expected a finite vector, found NaN or infinity"
        assert store.rejects[2].message == "expected a vector of length 1, found length 0"


def test_files_that_are_no_images_are_mentioned(tmp_path, bundle, new_folder, caplog):
    """Who expected more images learns where they went."""
    folder = new_folder()
    for name in ("notes.txt", "red/.hidden.png"):
        (folder / name).write_text("no image")
    with caplog.at_level(logging.INFO, logger="horace"):
        build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    assert f"folder:{folder}: 2 files passed over: 1 .txt, 1 hidden" in caplog.messages


def test_what_stands_at_out_is_left_alone(tmp_path, bundle, train_folder, new_folder):
    """A collection is replaced on request only, anything else never."""

    def options(out, **more):
        return BuildOptions(
            images=str(train_folder), encoder=str(bundle.path), out=tmp_path / out, **more
        )

    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="found something else of that name"):
        build(options("file", replace=True))
    build(options("c"))
    with pytest.raises(UsageError, match="found a collection; choose another name, or replace"):
        build(options("c"))
    with Collection.open(tmp_path / "c") as before:
        summary = build(options("c", replace=True, index="hnsw"))
        assert summary.index == "HNSW32"
        old = before.search_ids(before.ids[:3], 2)  # readers of the old one go on
        with Collection.open(tmp_path / "c") as after:
            new = after.search_ids(after.ids[:3], 2, exact=True)
    np.testing.assert_array_equal(old.ids, new.ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "file"]


def test_where_out_is_a_link_what_it_leads_to_is_replaced(tmp_path, bundle, train_folder):
    """The collection is on the disk where its owner put it, and called as he calls it."""
    real, link = tmp_path / "disk" / "real", tmp_path / "c"
    real.parent.mkdir()
    link.symlink_to(real)
    options = BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=link)
    for more in ({}, {"replace": True, "index": "hnsw"}, {"replace": True, "restart": True}):
        build(dataclasses.replace(options, **more))
        assert link.readlink() == real
        assert [path.name for path in real.parent.iterdir()] == ["real"]
        with Collection.open(link) as collection:
            assert (collection.name, collection.count) == ("c", 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "disk"]


def test_auto_takes_flat_for_the_small_and_hnsw_for_the_large():
    """Exact search is the default where it is fast."""
    assert [choose_factory("auto", n) for n in (1, 20_000, 20_001)] == ["Flat", "Flat", "HNSW32"]
    assert choose_factory("hnsw", 1) == "HNSW32"
    assert choose_factory("flat", 10**9) == "Flat"


def test_a_recall_chooses_the_index(tmp_path, capsys, bundle, new_folder, monkeypatch):
    """And tunes it on images that it does not have yet; the report is the collection's."""
    monkeypatch.setattr("index.ann.candidates.INDEX_MIN_COUNT", 200)
    monkeypatch.setattr("index.ann.candidates.FLAT_MAX_COUNT", 200)
    monkeypatch.setattr("index.ann.candidates.GRAPH_MAX_COUNT", 200)
    folder = new_folder(per_class=80)
    args = ("--images", folder, "--encoder", bundle.path, "--out", tmp_path / "c", "--recall", ".9")
    status, out, err = run_in_process(capsys, *args, "--memory-budget", "4GB", "--json")
    assert status == 0, err
    manifest = read_manifest(tmp_path / "c")
    assert json.loads(out)["index"] == manifest.segments[0].factory
    assert manifest.segments[0].factory != "Flat"
    assert manifest.tuning["recall"] == 0.9
    assert manifest.tuning["memory_bytes"] == 4_000_000_000
    assert verify(tmp_path / "c").faults == []
    assert verify(tmp_path / "c").unknown == []


def test_a_recall_of_few_images_is_met_by_exact_search(tmp_path, capsys, bundle, new_folder):
    """There are none to hold back, and exact search needs none."""
    args = ("--images", new_folder(), "--encoder", bundle.path, "--out", tmp_path / "c")
    status, out, err = run_in_process(capsys, *args, "--recall", ".99", "--json")
    assert status == 0, err
    assert json.loads(out)["index"] == "Flat"
    assert read_manifest(tmp_path / "c").tuning["chosen"]["recall_at"]["10"] == 1


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """6,000 images of noise in an IDX file: enough to be killed among."""
    path = tmp_path_factory.mktemp("idx") / "noise-images-idx3-ubyte"
    header = np.array([0x00000803, 6000, 14, 14], ">u4").tobytes()
    path.write_bytes(header + np.random.default_rng(0).bytes(6000 * 14 * 14))
    return f"idx:{path}"


def kill_after_parts(process, parts, n, *, sent=signal.SIGKILL, status=-signal.SIGKILL):
    """Send a signal as soon as n parts are there; give what the process wrote on stderr."""
    deadline_s = time.monotonic() + 60
    while len(list(parts.glob("part-*.parquet"))) < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "no parts within a minute"
        time.sleep(0.001)
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == status, err
    return err


def stamps(parts):
    """Tell part files apart from rewritten ones."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in parts.glob("part-*.parquet")
    }


def test_a_killed_build_goes_on_and_ends_in_the_same_files(tmp_path, bundle, many_images):
    """Finished parts outlive two SIGKILLs untouched, and none is embedded twice."""

    def args(out):
        return ("--images", many_images, "--encoder", bundle.path, "--out", out, "--name", "n",
                "--index", "hnsw", "--batch-size", 4, "--json")  # fmt: skip

    out, parts = tmp_path / "killed", tmp_path / "killed.parts"
    kill_after_parts(command(*args(out)), parts, 3)
    first = stamps(parts)
    kill_after_parts(command(*args(out)), parts, len(first) + 3)
    second = stamps(parts)
    assert second.items() >= first.items()
    assert not out.exists()

    process = command(*args(out))
    text, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    summary = json.loads(text)
    assert summary["images"] == 6000
    assert summary["reused"] == 64 * len(second)
    assert f"reusing {64 * len(second)} images in {len(second)} finished parts" in log
    assert f"embedding {6000 - summary['reused']}/{6000 - summary['reused']} images" in log

    undisturbed, _ = command(*args(tmp_path / "whole")).communicate(timeout=60)
    assert json.loads(undisturbed)["reused"] == 0
    assert content(out) == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.fixture
def interrupted(tmp_path, monkeypatch, bundle, many_images):
    """The options of a build that ended after 5 parts, which are there."""
    options = BuildOptions(
        images=many_images, encoder=str(bundle.path), out=tmp_path / "c", batch_size=8
    )
    add = PartStore.add

    def add_or_end(store, batches):
        if len(store.finished) == 5:
            raise KeyboardInterrupt
        add(store, batches)

    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "add", add_or_end)
        with pytest.raises(KeyboardInterrupt):
            build(options)
    return options


def with_options(options, **changes):
    """Change some options."""
    return BuildOptions(**{**vars(options), **changes})


def test_an_interrupt_says_how_to_go_on(tmp_path, bundle, many_images):
    """Ctrl-C is a line that tells what is kept; the same command goes on."""
    out, parts = tmp_path / "c", tmp_path / "c.parts"
    args = ("--images", many_images, "--encoder", bundle.path, "--out", out, "--batch-size", 4)
    err = kill_after_parts(command(*args), parts, 2, sent=signal.SIGINT, status=130)
    line = (
        r"python -m index\.build: interrupted: (\d+) images are embedded and kept; "
        "the same command goes on from there"
    )
    said = re.fullmatch(line, err.splitlines()[-1])
    assert said, err
    n_parts = len(list(parts.glob("part-*.parquet")))
    assert 64 <= int(said[1]) <= 64 * n_parts  # the last may have come with the signal


def test_a_source_that_has_changed_is_refused(tmp_path, monkeypatch, bundle, new_folder):
    """As many images as before are not the same images: none would get another's vector."""
    folder = new_folder(per_class=20)
    (folder / "green/bad.png").write_text("no image")
    options = BuildOptions(
        images=str(folder), encoder=str(bundle.path), out=tmp_path / "c", batch_size=2
    )
    with monkeypatch.context() as patch:
        patch.setattr(filling, "check_images", lambda store: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(options)
    (folder / "blue/003.png").rename(folder / "red/999.png")
    with pytest.raises(CollectionError) as error:
        build(options)
    part = parts_directory(options.out) / "part-000000000000.parquet"
    assert str(error.value) == (
        f"folder:{folder}: expected the images that {part} was made of, found others, "
        "'blue/003.png' among what differs; the source has changed since: start anew with --restart"
    )
    (folder / "red/999.png").rename(folder / "blue/003.png")
    assert build(options).reused == 60


@pytest.fixture
def taken_away(monkeypatch):
    """Give a function that has a build lose its source when its first part is written."""

    def after_one_part(*take):
        takes = [*take]
        add = PartStore.add

        def add_and_take(self, batches):
            add(self, batches)
            if takes:
                takes.pop()()

        monkeypatch.setattr(PartStore, "add", add_and_take)

    return after_one_part


def test_a_source_that_goes_away_ends_the_build_and_not_the_collection(
    tmp_path, bundle, new_folder, taken_away
):
    """What is embedded is kept, and the same command goes on when it is back."""
    folder = new_folder(per_class=40)
    options = BuildOptions(
        images=str(folder), encoder=str(bundle.path), out=tmp_path / "c", batch_size=1
    )
    build(options)
    before = content(options.out)
    again = dataclasses.replace(options, replace=True)
    taken_away(lambda: folder.rename(tmp_path / "away"))
    with pytest.raises(
        SourceError, match=r"expected storage that works, found .*images is out of reach"
    ):
        build(again)
    assert content(options.out) == before
    (tmp_path / "away").rename(folder)
    summary = build(again)
    assert (summary.images, summary.rejects) == (120, 0)
    assert 16 <= summary.reused < 120
    assert content(options.out)[0] == before[0]


def test_a_shard_that_is_replaced_ends_the_build(tmp_path, bundle, new_folder, taken_away):
    """No key gets another image's vector."""
    files = sorted(new_folder(per_class=40).rglob("*.png"))

    def write(shard, order):
        with tarfile.open(shard, "w") as archive:
            for n in order:
                archive.add(files[n], f"{n:03}.png")
        return shard

    shard = write(tmp_path / "s.tar", range(120))
    other = write(tmp_path / "other.tar", reversed(range(120)))
    options = BuildOptions(
        images=str(shard), encoder=str(bundle.path), out=tmp_path / "c", batch_size=1
    )
    taken_away(lambda: other.replace(shard))
    with pytest.raises(SourceError, match="the shard was replaced or written to while it was read"):
        build(options)
    assert not options.out.exists()
    assert parts_directory(options.out).exists()


def test_parts_of_another_run_are_refused_and_dropped_on_request(interrupted, other_bundle):
    """Nothing of another encoder or size is ever mixed in."""
    part = parts_directory(interrupted.out) / "part-000000000000.parquet"
    with pytest.raises(CollectionError) as error:
        build(with_options(interrupted, encoder=str(other_bundle.path)))
    assert f"{part}: expected a part of this run, with fingerprint {other_bundle.fingerprint}" in (
        str(error.value)
    )
    assert "or drop its parts with --restart" in str(error.value)
    with pytest.raises(CollectionError, match="with batch_size 16, found one with batch_size 8"):
        build(with_options(interrupted, batch_size=16))
    assert build(interrupted).reused == 5 * 128  # the refused runs did no harm
    assert build(with_options(interrupted, restart=True, replace=True)).reused == 0


def test_a_damaged_part_is_embedded_again(interrupted, tmp_path):
    """What a disk has lost is made anew, and nothing else."""
    part = parts_directory(interrupted.out) / "part-000000000256.parquet"
    part.write_bytes(part.read_bytes()[:1000])
    assert build(interrupted).reused == 4 * 128
    build(with_options(interrupted, out=tmp_path / "whole", name="c"))
    assert content(interrupted.out) == content(tmp_path / "whole")


def test_a_build_killed_at_its_very_end_is_found_finished(
    tmp_path, monkeypatch, bundle, train_folder
):
    """Between the rename and the removal of the parts the collection is whole."""
    options = BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "discard", lambda store: None)
        first = build(options)
    assert parts_directory(options.out).exists()
    assert build(options) == first
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(UsageError, match="found a collection"):
        build(options)


def test_a_finished_build_is_made_again_where_that_is_asked_for(
    tmp_path, monkeypatch, bundle, train_folder
):
    """With --restart, whatever was left beside it."""
    options = BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "discard", lambda store: None)
        build(options)
    before = (options.out / "manifest.json").read_bytes()
    build(with_options(options, replace=True, restart=True))
    assert (options.out / "manifest.json").read_bytes() != before
    assert not parts_directory(options.out).exists()


def test_a_finished_build_is_not_taken_for_another(
    tmp_path, monkeypatch, bundle, train_folder, test_folder, other_bundle
):
    """Killed at its very end, then asked for something else: that is what is built."""
    options = BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c")
    for changes, images in (
        ({"images": str(test_folder)}, 15),
        ({"encoder": str(other_bundle.path)}, 60),
        ({"index": "hnsw"}, 60),
        ({"name": "another"}, 60),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PartStore, "discard", lambda store: None)
            build(with_options(options, replace=True))
        with pytest.raises(UsageError, match="found a collection"):
            build(with_options(options, **changes))
        summary = build(with_options(options, **changes, replace=True))
        assert (summary.images, summary.reused) == (images, 0)
        assert not parts_directory(options.out).exists()


def test_a_build_killed_while_it_tidies_up_is_found_finished(
    tmp_path, monkeypatch, bundle, train_folder
):
    """The run's name goes last of all that tells one run from another."""
    options = BuildOptions(
        images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c", batch_size=1
    )
    unlink = Path.unlink
    for n_before in range(1, 4):  # of the four parts
        left = iter(range(n_before))

        def unlink_some(path, left=left, missing_ok=False):
            if path.name.startswith("part-"):
                try:
                    next(left)
                except StopIteration:
                    raise KeyboardInterrupt from None
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink_some)
            with pytest.raises(KeyboardInterrupt):
                build(with_options(options, replace=True))
        assert build(options).images == 60
        assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_one_build_at_a_time(tmp_path, bundle, train_folder):
    """A second build of the same collection is told that one is at work."""
    out = tmp_path / "c"
    key = RunKey(source="", source_count=None, fingerprint="", dim=16, batch_size=1, part_size=16)
    with (
        PartStore(out, key),
        pytest.raises(CollectionError, match="expected no other build of this collection"),
    ):
        build(BuildOptions(images=str(train_folder), encoder=str(bundle.path), out=out))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_full_disk_is_one_line(tmp_path, bundle, many_images, kind):
    """Parts fit, the collection does not: nothing appears, and the parts are kept."""
    limit = 64 if kind == "flat" else 400  # KiB that a file may have
    args = ["--images", many_images, "--encoder", str(bundle.path), "--out", str(tmp_path / "c")]
    line = " ".join([sys.executable, "-m", "index.build", *args, "--index", kind])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f {limit}; {line} --batch-size 4"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        f"python -m index.build: {tmp_path / 'c'}: expected a directory that can be written, "
        "with room for the collection, found "
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()
    assert parts_directory(tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"--images": "/no/such"}, 1, "images '/no/such': expected fashion-mnist"),
        ({"--encoder": "/no/such"}, 1, "/no/such: expected a bundle directory, found no such"),
        ({"--encoder": "ftp://x"}, 1, "ftp://x: expected a bundle directory, horace://"),
        ({"--out": "/dev/null/c"}, 1, "expected a directory that can be written, with room"),
        ({"--out": "n" * 251}, 1, ", found File name too long; choose a shorter --out"),
        ({"--batch-size": "0"}, 2, "--batch-size: expected 1 to 65536, found 0"),
        ({"--recall": "2"}, 2, "recall: expected above 0 and up to 1, found 2.0"),
        ({"--memory-budget": "1GB"}, 2, "--memory-budget: expected --recall beside it, found none"),
        ({"--recall": ".9", "--index": "hnsw"}, 2, "--index: expected none beside --recall, which"),
        (
            {"--encoder": "b,provider=tpu"},
            2,
            "encoder b,provider=tpu: expected a bundle's path, provider=cpu|cuda",
        ),
        (
            {"--encoder": "b,provider=cuda", "--engine": "ray"},
            2,
            "--engine ray: expected an encoder that its actors run on their CPUs",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, bundle, train_folder, change, status, message):
    """Bad use is status 2, failed work status 1; what, expected, found and how to mend it."""
    args = {"--images": train_folder, "--encoder": bundle.path, "--out": tmp_path / "c"} | change
    found, _, err = run_in_process(capsys, *(word for pair in args.items() for word in pair))
    assert found == status
    assert err.startswith("python -m index.build: ")
    assert message in err
    assert err.count("\n") == 1


def test_nothing_heavy_is_loaded():
    """Neither torch nor, before a picture is drawn, matplotlib."""
    code = (
        "import sys, index.build, index.search, index.evaluate;"
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_part_with_a_flipped_byte_is_not_built_into_a_collection(interrupted):
    """Pages have checksums: the damaged part is named, and the rest is kept."""
    part = parts_directory(interrupted.out) / "part-000000000256.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(CollectionError) as error:
        build(interrupted)
    assert str(error.value).startswith(f"{part}: expected the part as it was written, found ")
    assert str(error.value).endswith("delete this file and run the same command again")
    assert not interrupted.out.exists()
    part.unlink()
    assert build(interrupted).reused == 6000 - 128


def test_no_flipped_bit_of_a_part_is_a_traceback(tmp_path):
    """A damaged part is embedded again, or named in one line; never anything else."""
    out = tmp_path / "c"
    key = RunKey(source="", source_count=None, fingerprint="", dim=2, batch_size=2, part_size=32)
    batch = EmbeddedBatch(
        start=0,
        keys=["a", "b"],
        labels=["x", None],
        digests=["1", "2"],
        vectors_ND=np.eye(2, dtype=np.float32),
        rejects=[Reject(key="c", fault="empty", message="c: empty")],
    )
    with PartStore(out, key) as store:
        store.add([batch])
    (file,) = parts_directory(out).glob("part-*")
    sound = file.read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).choice(8 * len(sound), 1000, replace=False):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(data)
        try:
            with PartStore(out, key) as store:
                list(store.missing(iter([ImageRecord(key, None, bytes) for key in "abc"])))
                store.settle()
                list(store.blocks())
        except HoraceError:
            refused += 1
        parts_directory(out).mkdir(exist_ok=True)
    assert refused > 100


@pytest.mark.parametrize("out", ["/", "x/../.."])
def test_out_has_a_name(out, monkeypatch):
    """The parts stand beside the collection, under its name."""
    monkeypatch.chdir("/tmp")
    with pytest.raises(UsageError, match="--out: expected a directory with a name"):
        BuildOptions(images="", encoder="", out=Path(out))
