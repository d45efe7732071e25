import dataclasses
import json
import re
import tarfile

import pytest

import index.building.assemble as assemble
from index.build import BuildOptions, build, main, plan
from index.building.dry_run import BuildPlan
from index.building.part_set import PartSet
from index.errors import CollectionError
from models.errors import UsageError
from models.runtime import OnnxEncoder


def options(bundle, images, out, **more):
    """Give the options of a build in parts of 16 images."""
    return BuildOptions(images=str(images), encoder=str(bundle.path), out=out, batch_size=1, **more)


def everything(folder):
    """Tell every file and folder below, and when it was changed."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def leave_parts(monkeypatch, wanted, n):
    """Build until n parts are there."""
    add = PartSet.add

    def add_or_end(parts, batches):
        if len(parts.finished) == n:
            raise KeyboardInterrupt
        add(parts, batches)

    with monkeypatch.context() as patch:
        patch.setattr(PartSet, "add", add_or_end)
        with pytest.raises(KeyboardInterrupt):
            build(wanted)


def test_nothing_is_written(tmp_path, bundle, train_folder):
    """Not even a directory."""
    planned = plan(options(bundle, train_folder, tmp_path / "c"))
    assert list(tmp_path.iterdir()) == []
    assert (planned.images, planned.reused, planned.reused_parts) == (60, 0, 0)
    assert (planned.index, planned.dim) == ("Flat", bundle.dim)
    assert planned.fingerprint == bundle.fingerprint
    assert planned.sampled > 0
    assert planned.embed_s == pytest.approx(60 / planned.images_per_s)


def test_what_is_slow_does_not_stand_still(tmp_path, bundle, train_folder):
    """As a large encoder on few CPUs, of which 0/s was said."""
    wanted = options(bundle, train_folder, tmp_path / "c")
    planned = dataclasses.replace(plan(wanted), images_per_s=0.42)
    assert ": 0.42/s, as " in str(planned)
    assert "embedded 60 in 1000.0 s (0.06/s)" in str(
        dataclasses.replace(build(wanted), embed_s=1e3)
    )


def test_parts_of_another_run_that_are_to_be_dropped(tmp_path, bundle, train_folder, monkeypatch):
    """Are not looked at, and a collection that is to be replaced gets not even a lock."""
    wanted = options(bundle, train_folder, tmp_path / "c")
    leave_parts(monkeypatch, wanted, 2)
    other = dataclasses.replace(wanted, batch_size=2)
    with pytest.raises(CollectionError, match="or drop its parts with --restart"):
        plan(other)
    assert plan(dataclasses.replace(other, restart=True)).reused == 0
    build(wanted)
    (wanted.out / ".lock").unlink(missing_ok=True)
    before = everything(tmp_path)
    plan(dataclasses.replace(wanted, replace=True))
    assert everything(tmp_path) == before


def test_an_index_that_is_chosen_by_its_recall(tmp_path, bundle, train_folder, monkeypatch):
    """Is said so, with what there is to choose from within the memory."""
    monkeypatch.setattr("index.ann.candidates.INDEX_MIN_COUNT", 50)
    wanted = options(bundle, train_folder, tmp_path / "c", recall=0.9)
    planned = plan(wanted)
    assert (planned.index, planned.recall) == (None, 0.9)
    assert planned.candidates[:2] == ["Flat", "IVF16,PQ4x4fs,RFlat"]
    assert "index chosen by its recall, at least 0.9, of Flat IVF16,PQ4x4fs,RFlat " in str(planned)


@pytest.mark.parametrize("work", [plan, build])
def test_a_recall_within_too_little_memory(tmp_path, bundle, train_folder, monkeypatch, work):
    """Is refused before anything is embedded, with what this process holds already."""
    for encode in ("encode", "encode_in_lane"):
        monkeypatch.setattr(OnnxEncoder, encode, lambda *_: pytest.fail("it was embedded"))
    wanted = options(bundle, train_folder, tmp_path / "c", recall=0.9, memory_budget="1MB")
    with pytest.raises(UsageError, match=r"memory: expected more than the .* that this process"):
        work(wanted)


def test_an_index_that_memory_cannot_hold(tmp_path, bundle, train_folder, monkeypatch, caplog):
    """Is refused before anything is embedded; where memory may be free later, it is a warning."""
    wanted = options(bundle, train_folder, tmp_path / "c", index="hnsw")
    monkeypatch.setattr(assemble, "free_memory_bytes", lambda: 20_000)
    assert plan(wanted).index == "HNSW32"
    message = (
        r"memory for index HNSW32 over 60 x 16: expected at least \d\S* kB to build it, found "
        r"\S+ \w+, 20 kB of it free; take --index flat; or, without --index and --sync, "
        r"--recall .99 --memory-budget 2GB, which chooses one that fits"
    )
    assert re.fullmatch(message, caplog.messages[-1])
    monkeypatch.setattr(assemble, "memory_bytes", lambda: 30_000)
    for work in (plan, build):
        with pytest.raises(UsageError, match=message):
            work(wanted)
    assert list(tmp_path.iterdir()) == []
    assert plan(dataclasses.replace(wanted, index="flat")).index == "Flat"


def test_parts_of_an_unfinished_run_are_counted_and_left_alone(
    tmp_path, monkeypatch, bundle, train_folder
):
    """What would be reused is said, and with --restart nothing is; the parts stay."""
    wanted = options(bundle, train_folder, tmp_path / "c")
    leave_parts(monkeypatch, wanted, 2)
    before = everything(tmp_path)
    planned = plan(wanted)
    assert (planned.reused, planned.reused_parts) == (32, 2)
    assert planned.embed_s == pytest.approx(28 / planned.images_per_s)
    assert plan(options(bundle, train_folder, tmp_path / "c", restart=True)).reused == 0
    assert everything(tmp_path) == before
    assert build(wanted).reused == 32


def test_the_size_on_the_disk_is_about_right(tmp_path, bundle, train_folder):
    """Within a tenth, or the few kilobytes that a small collection's headers and manifest take."""
    for kind in ("flat", "hnsw"):
        wanted = options(bundle, train_folder, tmp_path / kind, index=kind)
        planned = plan(wanted)
        build(wanted)
        found = sum(f.stat().st_size for f in (tmp_path / kind).rglob("*") if f.is_file())
        assert planned.collection_bytes == pytest.approx(found, rel=0.1, abs=16_000)
        assert planned.collection_bytes > 60 * bundle.dim * 4


def test_what_the_build_would_refuse_is_refused(tmp_path, monkeypatch, bundle, new_folder):
    """A collection that stands there, and a source that has changed since the parts were made."""
    folder = new_folder(per_class=20)
    wanted = options(bundle, folder, tmp_path / "c")
    leave_parts(monkeypatch, wanted, 2)
    (folder / "blue/003.png").rename(folder / "red/999.png")
    with pytest.raises(CollectionError, match=r"'blue/003\.png' among what differs"):
        plan(wanted)
    (folder / "red/999.png").rename(folder / "blue/003.png")
    build(wanted)
    with pytest.raises(UsageError, match="found a collection"):
        plan(wanted)


def test_a_source_that_cannot_be_counted_has_no_total(tmp_path, bundle, train_folder):
    """A compressed shard would have to be read: the rate is said, the whole is not."""
    with tarfile.open(tmp_path / "shard.tar.gz", "w:gz") as archive:
        archive.add(train_folder, arcname=".")
    planned = plan(options(bundle, tmp_path / "shard.tar.gz", tmp_path / "c"))
    assert (planned.images, planned.index, planned.embed_s) == (None, None, None)
    assert planned.images_per_s > 0
    assert "would build images of wds:" in str(planned)


def test_text_and_json(tmp_path, capsys, bundle, train_folder):
    """People and machines get the same."""
    main(options(bundle, train_folder, tmp_path / "c", dry_run=True))
    text = capsys.readouterr().out
    assert text.startswith(f"would build 60 images of folder:{train_folder} with encoder tiny ")
    assert "reuses 0 images in 0 finished parts" in text
    assert "of parts beside it until it is done" in text
    assert "embedding takes about 0 s: " in text
    main(options(bundle, train_folder, tmp_path / "c", dry_run=True, json=True))
    assert BuildPlan(**json.loads(capsys.readouterr().out)).images == 60
