import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import index.building.sync as sync_module
from index.build import BuildOptions, build, main, sync
from index.building import part_set, sync_state, sync_writing
from index.building.parts import PartStore, parts_directory
from index.building.sync_state import Stamp, read_state
from index.collection import Collection, id_of
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.command import run_command
from models.errors import FingerprintMismatchError, SourceError, UsageError
from models.images import open_source
from models.runtime import open_bundle
from tests.index.building.conftest import check, count, facts, picture

ROOT = Path(__file__).parents[3]


def test_a_file_is_settled_when_it_was_left_alone_for_seconds(monkeypatch):
    """By the later of its two times."""
    monkeypatch.setattr(sync_state, "SETTLED_S", 3.0)
    for times in ((7_000_000_000, 1), (1, 7_000_000_000)):
        stamp = Stamp(1, *times, inode=1)
        assert not stamp.is_settled(10_000_000_000)
        assert stamp.is_settled(10_000_000_001)


def test_a_file_of_the_future_is_settled_by_the_time_of_the_file_system(monkeypatch):
    """Which its owner cannot set, and which may be of a server whose clock is ahead."""
    monkeypatch.setattr(sync_state, "SETTLED_S", 3.0)
    ahead_ns = 3_600_000_000_000
    assert Stamp(1, ahead_ns, 1, inode=1).is_settled(10_000_000_000)
    assert not Stamp(1, ahead_ns, 9_000_000_000, inode=1).is_settled(10_000_000_000)
    assert not Stamp(1, ahead_ns, ahead_ns, inode=1).is_settled(10_000_000_000)


def test_a_collection_follows_its_folder(options, folder, bundle):
    """New, changed, moved and gone files, each counted; only unknown content is embedded."""
    assert facts(sync(options)) == {"new": 12, "embedded": 12}
    check(options.out, folder, bundle)
    picture(folder / "a" / "new.png", 251)
    picture(folder / "a" / "02.png", 252)
    (folder / "a" / "00.png").rename(folder / "b" / "moved.png")
    (folder / "b" / "01.png").unlink()
    assert facts(sync(options)) == {
        "new": 1, "changed": 1, "moved": 1, "gone": 1, "unchanged": 9, "embedded": 2, "read": 12,
    }  # fmt: skip
    check(options.out, folder, bundle)
    with Collection.open(options.out) as collection:
        (moved,) = collection.rows([id_of("b/moved.png")])
        assert moved.label == "b"
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}
    check(options.out, folder, bundle)


def test_files_that_were_left_alone_are_not_read(options, folder, settled):
    """But one of the same size and time of modification is; and all are with --checksum."""
    sync(options)
    sync(options)
    assert facts(sync(options)) == {"unchanged": 12}
    victim, other = folder / "a" / "00.png", folder / "a" / "02.png"
    before = victim.stat()
    data = bytearray(other.read_bytes())
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert victim.stat().st_mtime_ns == before.st_mtime_ns
    assert facts(sync(options)) == {"changed": 1, "unchanged": 11, "read": 1}
    checked = dataclasses.replace(options, checksum=True)
    assert facts(sync(checked)) == {"unchanged": 12, "read": 12}


def test_a_file_that_was_just_written_is_read_again(options):
    """Within the grain of a file system's clock it may be written once more, unseen."""
    sync(options)
    sync(options)
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}


def test_a_damaged_memory_costs_reading_and_nothing_else(options, folder, bundle, settled):
    """What is remembered is a help; the collection says what is there."""
    sync(options)
    sync(options)
    for file in (options.out / "sync").iterdir():
        file.write_bytes(b"PAR1 junk")
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}
    shutil.rmtree(options.out / "sync")
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}
    check(options.out, folder, bundle)


def test_a_folder_that_is_away_keeps_its_images(options, folder, tmp_path, monkeypatch):
    """Whether it cannot be listed or a link leads nowhere: an hour of it drops nothing."""
    (folder / "a").rename(tmp_path / "disk")
    (folder / "a").symlink_to(tmp_path / "disk")
    sync(options)
    (tmp_path / "disk").rename(tmp_path / "away")
    assert facts(sync(options)) == {"unchanged": 6, "unreadable": 6, "rejected": 1, "read": 7}
    real = os.scandir

    def scandir(path):
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(SourceError, match="expected a folder that can be listed"):
            sync(options)
    (tmp_path / "away").rename(tmp_path / "disk")
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}


def test_a_folder_that_was_emptied_drops_nothing(options, folder, tmp_path):
    """Its disk may not be mounted."""
    sync(options)
    folder.rename(tmp_path / "disk")
    folder.mkdir()
    with pytest.raises(SourceError, match=r"expected images .*, found none"):
        sync(options)
    folder.rmdir()
    (tmp_path / "disk").rename(folder)
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}


def test_rejects_are_tried_again_when_they_have_changed(options, folder, bundle, monkeypatch):
    """Not before; those of the first build are known as well."""
    bad = folder / "a" / "bad.png"
    bad.write_text("no image")
    assert facts(sync(options)) == {"new": 12, "rejected": 1, "embedded": 12}
    monkeypatch.setattr(sync_writing, "embed_batches", None)  # nothing can be embedded
    for _ in range(2):
        assert facts(sync(options)) == {"unchanged": 12, "rejected": 1, "read": 13}
    monkeypatch.undo()
    (reject,) = read_state(options.out, f"folder:{folder}").rejects.values()
    assert (reject.key, reject.fault) == ("a/bad.png", "unsupported_format")
    picture(bad, 253)
    assert facts(sync(options)) == {"new": 1, "unchanged": 12, "embedded": 1, "read": 13}
    bad.write_text("no image any more")
    monkeypatch.setattr(sync_state, "SETTLED_S", -1e9)
    assert facts(sync(options)) == {"unchanged": 12, "rejected": 1, "read": 13}
    bad.unlink()
    check(options.out, folder, bundle)


@pytest.mark.parametrize("n_bytes", [0, 40])
def test_a_file_that_is_being_written_keeps_its_row(options, folder, monkeypatch, n_bytes):
    """With its metadata, until nobody has written to it for a while."""
    table = folder.parent / "m.csv"
    table.write_text("key,price\na/00.png,7\n")
    sync(dataclasses.replace(options, metadata=table))
    file = folder / "a" / "00.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:n_bytes])
    for _ in range(2):
        counts = facts(sync(options))
        counts.pop("read")
        assert counts == {"unchanged": 11, "unreadable": 1, "rejected": 1}
    with Collection.open(options.out) as collection:
        assert collection.rows([id_of("a/00.png")])[0].metadata == {"price": 7}
    file.write_bytes(whole)
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}
    file.write_bytes(whole[:n_bytes])
    monkeypatch.setattr(sync_state, "SETTLED_S", -1e9)
    counts = facts(sync(options))
    counts.pop("read")
    assert counts == {"unchanged": 11, "rejected": 1}
    assert count(options.out) == 11


def test_an_image_that_is_written_to_after_it_was_looked_at_keeps_its_row(
    options, folder, monkeypatch, settled
):
    """What the encoder was given may be half of it."""
    sync(options)
    file = folder / "a" / "00.png"
    picture(file, 254)
    whole, embed_batches = file.read_bytes(), sync_writing.embed_batches

    def cut_and_embed(*args, **kwargs):
        file.write_bytes(whole[:40])
        return embed_batches(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sync_writing, "embed_batches", cut_and_embed)
        assert facts(sync(options))["unreadable"] == 1
    assert count(options.out) == 12
    file.write_bytes(whole)
    sync(options)
    assert count(options.out) == 12


def test_an_image_without_a_direction_is_rejected(options, folder, bundle):
    """The encoder takes the grey of 110 for nothing, and nothing has no cosine."""
    sync(options)
    picture(folder / "a" / "110.png", 110)
    picture(folder / "a" / "new.png", 251)
    assert facts(sync(options)) == {
        "new": 1, "unchanged": 12, "rejected": 1, "embedded": 2, "read": 14
    }  # fmt: skip
    with Collection.open(options.out) as collection:
        assert collection.count == 13
    assert verify(options.out).faults == []


def test_a_stored_vector_without_a_direction_is_rejected(options, folder, tmp_path, monkeypatch):
    """As older collections have: with other metadata or moved it goes, and the rest is written."""
    monkeypatch.setattr(part_set, "reject_unsound", lambda *_: {})
    for name in ("110.png", "twin.png"):
        picture(folder / "a" / name, 110)
    assert facts(sync(options)) == {"new": 14, "embedded": 14}
    monkeypatch.undo()
    table = tmp_path / "facts.csv"
    table.write_text("key,price\na/00.png,1\na/110.png,2\n")
    (folder / "a" / "twin.png").rename(folder / "b" / "twin.png")
    told = dataclasses.replace(options, metadata=table)
    assert facts(sync(told)) == {"updated": 1, "unchanged": 12 - 1, "rejected": 2, "read": 14}
    assert facts(sync(told)) == {"unchanged": 12, "rejected": 2, "read": 14}
    with Collection.open(options.out) as collection:
        assert collection.count == 12
        assert collection.select("price = 1").count == 1
    assert verify(options.out).faults == []


def test_a_stored_vector_without_a_direction_takes_no_other_along(options, folder, monkeypatch):
    """Exchanged with another image, it goes, and the other is under its name."""
    one, other = folder / "a" / "110.png", folder / "a" / "00.png"
    with monkeypatch.context() as patch:
        patch.setattr(part_set, "reject_unsound", lambda *_: {})
        picture(one, 110)
        sync(options)
    with Collection.open(options.out) as collection:
        vector = collection.vectors([id_of("a/00.png")])
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert facts(sync(options)) == {"moved": 1, "unchanged": 11, "rejected": 1, "read": 13}
    with Collection.open(options.out) as collection:
        np.testing.assert_array_equal(collection.vectors([id_of("a/110.png")]), vector)
        assert (collection.count, id_of("a/00.png") in collection.ids) == (12, False)


def test_a_file_that_can_be_read_no_more_keeps_its_row(options, folder, settled, monkeypatch):
    """Though it was read a moment before, and is the same file."""
    sync(options)
    picture(folder / "a" / "00.png", 254)

    def refused_and_embed(*args, **kwargs):
        monkeypatch.setattr(Path, "read_bytes", refuse)
        return embed_batches(*args, **kwargs)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    embed_batches = sync_writing.embed_batches
    monkeypatch.setattr(sync_writing, "embed_batches", refused_and_embed)
    counts = {"unchanged": 11, "unreadable": 1, "rejected": 1, "read": 12}
    assert facts(sync(options)) == counts
    assert count(options.out) == 12


def test_vectors_are_as_long_as_the_collection_compares_them(options, folder, bundle):
    """By distances, those of images are the encoder's own, as those of queries are."""
    with CollectionWriter.create(
        options.out, name="c", fingerprint=bundle.fingerprint, dim=bundle.output.dim,
        metric="euclidean",
    ):  # fmt: skip
        pass
    picture(folder / "a" / "110.png", 110)  # the encoder gives zero, which has a distance
    assert facts(sync(options)) == {"new": 13, "embedded": 13}
    with Collection.open(options.out) as opened, closing(open_bundle(bundle.path)) as encoder:
        for record in open_source(str(folder)).records():
            expected = encoder.encode(encoder.preprocess(record.read())[None])
            found = opened.vectors([id_of(record.key)])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_sync_goes_on(options, folder, bundle, monkeypatch, interrupt):
    """What was written is not embedded again; nothing is there twice."""
    (folder / "a" / "00.png").unlink()
    sync(options)
    for level in range(12):
        picture(folder / "c" / f"{level:02}.png", 3 + 20 * level)
    monkeypatch.setattr(sync_writing, "WRITE_ROWS", 4)
    interrupt(options)
    assert facts(sync(options)) == {"new": 4, "unchanged": 19, "embedded": 4, "read": 23}
    check(options.out, folder, bundle)


def test_sources_are_brought_up_to_date_one_by_one(options, folder, tmp_path):
    """A second one is added; what one of them has is no matter of the other's."""
    sync(options)
    other = tmp_path / "other"
    for level in range(3):
        picture(other / "c" / f"{level}.png", 7 + level)
    picture(other / "a" / "00.png", 99)
    second = dataclasses.replace(options, images=str(other))
    assert facts(sync(second)) == {"new": 3, "rejected": 1, "embedded": 3}
    with Collection.open(options.out) as collection:
        assert collection.sources == {f"folder:{folder}": 12, f"folder:{other}": 3}
        assert collection.find_key("a/00.png") == id_of("a/00.png")
        (row,) = collection.rows([id_of("a/00.png")])
        assert row.source == f"folder:{folder}"
    (other / "c" / "0.png").unlink()
    assert facts(sync(second)) == {"gone": 1, "unchanged": 2, "rejected": 1, "read": 3}
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}
    (folder / "a" / "00.png").unlink()  # and its key is free
    assert facts(sync(options)) == {"gone": 1, "unchanged": 11, "read": 11}
    assert facts(sync(second)) == {"new": 1, "unchanged": 2, "embedded": 1, "read": 3}
    assert verify(options.out).faults == []


def test_what_was_embedded_unlooked_at_is_known_the_next_time(options, tmp_path, settled):
    """Of a source that the collection did not know, and what is no image in it, too."""
    sync(options)
    for level in range(2):
        picture(tmp_path / "second" / "c" / f"{level}.png", 100 + level)
    (tmp_path / "second" / "c" / "broken.png").write_text("no image")
    second = dataclasses.replace(options, images=str(tmp_path / "second"))
    assert facts(sync(second)) == {"new": 2, "embedded": 2, "rejected": 1}
    assert facts(sync(second)) == {"unchanged": 2, "rejected": 1}


def test_a_source_that_was_moved_keeps_its_vectors(options, folder, tmp_path):
    """Told where it was, nothing is embedded; untold, its keys belong to the old one."""
    sync(options)
    folder.rename(tmp_path / "elsewhere")
    moved = dataclasses.replace(options, images=str(tmp_path / "elsewhere"))
    assert facts(sync(moved)) == {"rejected": 12}
    told = dataclasses.replace(moved, moved_from=f"folder:{folder}")
    assert facts(sync(told)) == {"updated": 12, "read": 12}
    with Collection.open(options.out) as collection:
        assert collection.sources == {f"folder:{tmp_path / 'elsewhere'}": 12}


def test_where_a_source_was_may_be_said_as_a_path(options, folder, tmp_path):
    """As `--images` takes it; where nothing was, is refused; and what is done may be said again."""
    sync(options)
    folder.rename(tmp_path / "elsewhere")
    moved = dataclasses.replace(options, images=str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=f"--moved-from: expected one of folder:{folder}, found"):
        sync(dataclasses.replace(moved, moved_from=str(tmp_path / "nowhere")))
    told = dataclasses.replace(moved, moved_from=str(folder))
    assert facts(sync(told)) == {"updated": 12, "read": 12}
    assert facts(sync(told)) == {"unchanged": 12, "read": 12}


def test_a_first_sync_that_was_killed_goes_on_whatever_the_folder_has_now(
    options, folder, bundle, monkeypatch, caplog
):
    """One more image, one less, or one of another name: it begins anew, and says so."""
    options = dataclasses.replace(options, batch_size=1)
    for level in range(20):
        picture(folder / "c" / f"{level:02}.png", 221 + level)
    changes = [
        lambda: picture(folder / "c" / "new.png", 251),
        (folder / "c" / "00.png").unlink,
        lambda: (folder / "c" / "01.png").rename(folder / "c" / "last.png"),
    ]
    add = part_set.PartSet.add
    for change in changes:
        with monkeypatch.context() as patch:

            def add_one(parts, batches):
                add(parts, batches)
                raise KeyboardInterrupt

            patch.setattr(part_set.PartSet, "add", add_one)
            with pytest.raises(KeyboardInterrupt):
                sync(options)
        change()
        planned = sync(dataclasses.replace(options, dry_run=True))
        assert (planned.images, planned.reused) == (len(list(folder.rglob("*.png"))), 0)
    caplog.clear()
    assert facts(sync(options)) == {"new": 32, "embedded": 32}
    assert "has other images than when this build was broken off" in caplog.text
    check(options.out, folder, bundle)


def test_what_a_first_build_left_goes_with_the_next_sync(options, monkeypatch):
    """It was killed between its last two steps."""
    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "discard", lambda store: None)
        sync(options)
    foreign = parts_directory(options.out) / "mine"
    foreign.write_text("no part")
    sync(options)
    assert foreign.exists()
    foreign.unlink()
    sync(options)
    assert not parts_directory(options.out).exists()


def test_another_encoder_is_refused(options, other_bundle):
    """Before anything is read or written."""
    sync(options)
    with pytest.raises(FingerprintMismatchError, match="found encoder"):
        sync(dataclasses.replace(options, encoder=str(other_bundle.path)))


def test_a_dry_run_changes_nothing(options, folder):
    """And says what would be done."""
    sync(options)
    picture(folder / "a" / "new.png", 251)
    before = (options.out / "manifest.json").read_bytes()
    summary = sync(dataclasses.replace(options, dry_run=True))
    assert facts(summary) == {"new": 1, "unchanged": 12, "embedded": 1, "read": 13}
    assert re.search(r"to embed 1 in about \d+\.\d s; nothing was changed", str(summary))
    assert (options.out / "manifest.json").read_bytes() == before


def test_a_dry_run_says_how_long_it_takes(options, folder, monkeypatch):
    """By a sample, as of a build; where nothing is to be embedded, no time."""
    monkeypatch.setattr(sync_module, "measure_rate", lambda *_: (1, 0.25))
    sync(options)
    picture(folder / "a" / "new.png", 251)
    picture(folder / "a" / "newer.png", 252)
    summary = sync(dataclasses.replace(options, dry_run=True))
    assert summary.embed_s == 8
    assert "to embed 2 in about 8.0 s; nothing was changed" in str(summary)
    monkeypatch.undo()
    sync(options)
    summary = sync(dataclasses.replace(options, dry_run=True))
    assert summary.embed_s == 0
    assert "to embed 0; nothing was changed" in str(summary)


def test_a_dry_run_while_a_writer_is_at_work(options, folder):
    """It waits for nobody, sees what was written, and leaves every file as it is."""
    sync(options)
    with CollectionWriter.open(options.out) as writer:
        writer.delete(writer.collection.ids[:2])
        (options.out / "journal-000099").write_bytes(b"what a writer that was killed has left")
        journal = options.out / writer.collection.manifest.journal.name
        with journal.open("ab") as file:
            file.write(b"torn")
        before = {file: file.read_bytes() for file in options.out.rglob("*") if file.is_file()}
        summary = sync(dataclasses.replace(options, dry_run=True))
        assert facts(summary) == {"new": 2, "unchanged": 10, "embedded": 2, "read": 12}
        assert summary.images == 10
    after = {file: file.read_bytes() for file in options.out.rglob("*") if file.is_file()}
    assert after == before


def test_a_collection_of_before_digests_is_embedded_once_more(options, folder, bundle):
    """Without a digest nothing says that an image is what it was."""
    build(dataclasses.replace(options, sync=False))
    with sync_module.CollectionWriter.open(options.out) as writer:
        table = writer.collection.table().drop_columns(["digest"])
        vectors = writer.collection.vectors(writer.collection.ids)
        columns = table.append_column("digest", sync_module.pa.nulls(12, sync_module.pa.string()))
        writer.upsert(columns, vectors, fingerprint=bundle.fingerprint)
    assert facts(sync(options)) == {"changed": 12, "embedded": 12, "read": 12}
    assert facts(sync(options)) == {"unchanged": 12, "read": 12}


def test_the_command_says_what_it_did(options, folder, capsys):
    """As text and as JSON; what contradicts itself is bad use."""
    args = ["--images", str(folder), "--encoder", options.encoder, "--out", str(options.out)]

    def run(*more):
        status = run_command(BuildOptions, main, prog="index.build", argv=[*args, *more])
        return status, *capsys.readouterr()

    status, out, _ = run("--sync")
    assert status == 0
    assert "12 new, 0 changed, 0 moved, 0 gone, 0 unchanged, 0 rejected" in out
    status, out, _ = run("--sync", "--json")
    assert json.loads(out)["unchanged"] == 12
    for more, message in (
        (["--checksum"], "--checksum: expected --sync beside it"),
        (["--sync", "--replace"], "--replace: expected none of it beside --sync"),
        (["--sync", "--engine", "ray"], "--engine ray: expected none of it beside --sync"),
        (["--sync", "--name", "d"], "--name: expected c, as it is called, found d"),
    ):
        status, _, err = run(*more)
        assert status == 2
        assert message in err


def test_a_killed_sync_leaves_a_sound_collection_and_goes_on(options, folder, tmp_path):
    """What it wrote before SIGKILL is there and is not embedded again."""
    sync(options)
    images = tmp_path / "noise-images-idx3-ubyte"
    header = np.array([0x00000803, 10_000, 14, 14], ">u4").tobytes()
    images.write_bytes(header + np.random.default_rng(0).bytes(10_000 * 14 * 14))
    args = ("--images", f"idx:{images}", "--encoder", options.encoder, "--out", options.out)
    command = [sys.executable, "-m", "index.build", *map(str, args), "--sync"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 60
    while count(options.out) == 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "nothing was written within a minute"
        time.sleep(0.001)
    process.kill()
    process.communicate()
    n_there = count(options.out) - 12
    assert 0 < n_there < 10_000
    assert verify(options.out).faults == []
    summary = sync(dataclasses.replace(options, images=f"idx:{images}"))
    assert (summary.unchanged, summary.new, summary.embedded) == (
        n_there, 10_000 - n_there, 10_000 - n_there
    )  # fmt: skip
    assert summary.images == 10_012
    assert verify(options.out).faults == []


def test_shards_are_followed_as_folders_are(options, tmp_path):
    """By their bytes, since a shard says nothing of its members; labels follow the source."""

    def write_shard(images):
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for name, (level, label) in images.items():
                picture(tmp_path / "member.png", level)
                archive.add(tmp_path / "member.png", f"{name}.png")
                member = tarfile.TarInfo(f"{name}.cls")
                member.size = len(label)
                archive.addfile(member, io.BytesIO(label.encode()))

    write_shard({"a": (10, "x"), "b": (20, "x"), "c": (30, "x")})
    shards = dataclasses.replace(options, images=str(tmp_path / "shard.tar"))
    assert facts(sync(shards)) == {"new": 3, "embedded": 3}
    write_shard({"a": (10, "y"), "b": (21, "x"), "d": (30, "z")})
    assert facts(sync(shards)) == {
        "changed": 1, "moved": 1, "updated": 1, "embedded": 1, "read": 3
    }  # fmt: skip
    with Collection.open(options.out) as collection:
        rows = collection.rows(collection.ids)
        assert {row.key: row.label for row in rows} == {
            "shard.tar/a.png": "y", "shard.tar/b.png": "x", "shard.tar/d.png": "z"
        }  # fmt: skip


def test_a_flipped_byte_in_what_is_remembered_is_found(options, folder, settled):
    """By verify; a sync takes none of it for true."""
    (folder / "a" / "bad.png").write_text("no image")
    sync(options)
    sync(options)
    path, source = options.out, f"folder:{folder}"
    assert {file.suffix for file in (path / "sync").iterdir()} == {".stamps", ".jsonl"}
    assert read_state(path, source).stamps
    for file in sorted((path / "sync").iterdir()):
        content = file.read_bytes()
        for at in {*np.linspace(0, len(content) - 1, 30).astype(int).tolist()}:
            damaged = bytearray(content)
            damaged[at] ^= 0x01
            file.write_bytes(damaged)
            assert verify(path).faults == [
                f"{file}: expected the bytes that were written, found others; delete the file"
            ]
            state = read_state(path, source)
            assert not (state.stamps if file.suffix == ".stamps" else state.rejects)
        file.write_bytes(content)
        assert verify(path).faults == []
