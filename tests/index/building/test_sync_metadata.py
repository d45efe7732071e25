import dataclasses
import io
import itertools
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from index.build import BuildOptions, main, sync
from index.building import metadata, sync_writing
from index.building.sync_state import read_state
from index.collection import Collection, id_of
from index.storage import incoming, rows
from index.verify import verify
from models.command import run_command
from tests.index.building.conftest import check, facts, picture


def test_a_row_of_more_text_than_may_come_in_stays_as_it_is(options, folder, tmp_path, monkeypatch):
    """As older collections have: updated, moved or changed, its key is rejected each time."""
    table = tmp_path / "facts.csv"
    long = "x" * 62_000
    table.write_text(f"key,note\na/00.png,{long}\na/02.png,{long}\na/04.png,{long}\n")
    with monkeypatch.context() as patch:
        patch.setattr(rows, "MAX_TEXT_BYTES", 63_000)
        sync(dataclasses.replace(options, metadata=table))
    table.write_text(f"key,note\na/00.png,{long}y\na/06.png,short\n")
    (folder / "a" / "02.png").rename(folder / "b" / "moved.png")
    picture(folder / "a" / "04.png", 251)
    for _ in range(2):
        assert facts(sync(options)) == {
            "unchanged": 10, "rejected": 2, "embedded": 1, "read": 12
        }  # fmt: skip
    reject = read_state(options.out, f"folder:{folder}").rejects["b/moved.png"]
    assert reject.fault == "row_too_large"
    assert re.fullmatch(
        r"expected at most 61440 bytes of text in its row, found 62\d\d\d",
        reject.message,
    )
    (folder / "b" / "moved.png").rename(folder / "a" / "02.png")
    assert facts(sync(dataclasses.replace(options, metadata=table))) == {
        "updated": 2, "unchanged": 8, "rejected": 1, "embedded": 1, "changed": 1, "read": 12
    }  # fmt: skip
    with Collection.open(options.out) as collection:
        notes = {row.key: row.metadata["note"] for row in collection.rows(collection.ids)}
        assert notes == dict.fromkeys(notes) | {"a/00.png": long, "a/06.png": "short"}
    assert verify(options.out).faults == []


def test_a_date_that_may_not_come_in_any_more_is_null_once_its_row_is_written(
    options, folder, tmp_path, monkeypatch
):
    """As older collections have: it ends no sync; a row that stays as it is keeps it."""
    table = tmp_path / "facts.parquet"
    days = pa.array([3_000_000, 0, 3_000_000], pa.int32()).cast(pa.date32())
    keys = ["a/00.png", "a/02.png", "a/04.png"]
    pq.write_table(
        pa.table({"key": keys, "day": days, "seen": days.cast(pa.timestamp("us"))}), table
    )
    with monkeypatch.context() as patch:
        for module in (incoming, metadata):
            patch.setattr(module, "first_unheld", lambda column: None)
        sync(dataclasses.replace(options, metadata=table))
    for name in ("00", "02"):
        picture(folder / "a" / f"{name}.png", 251)
    assert facts(sync(options)) == {"changed": 2, "unchanged": 10, "embedded": 2, "read": 12}
    pq.write_table(pa.table({"key": keys[1:2], "note": ["new"]}), table)
    assert facts(sync(dataclasses.replace(options, metadata=table)))["updated"] == 1
    with Collection.open(options.out) as collection:
        kept = collection.table(["key", "day"])
    is_day = dict(zip(kept["key"].to_pylist(), kept["day"].is_valid().to_pylist(), strict=True))
    assert [is_day[key] for key in keys] == [False, True, True]


def test_a_row_of_as_much_text_as_may_come_in_is_written(options, folder, tmp_path):
    """And one with a byte more is rejected, not the sync."""
    sync(options)
    with Collection.open(options.out) as collection:
        bytes_N = rows.text_bytes(collection.table())
    table, size = tmp_path / "facts.csv", rows.MAX_TEXT_BYTES - int(bytes_N[0])
    table.write_text(f"key,note\na/00.png,{'x' * size}\na/02.png,{'x' * (size + 1)}\n")
    told = dataclasses.replace(options, metadata=table)
    assert facts(sync(told)) == {"updated": 1, "unchanged": 10, "rejected": 1, "read": 12}


def test_new_images_under_old_names_never_get_the_metadata_of_those_that_moved(
    options, folder, bundle, tmp_path, monkeypatch, interrupt
):
    """Not even where the sync was killed between its writes."""
    table = tmp_path / "facts.csv"
    names = [f"{n:02}.png" for n in range(0, 12, 2)]
    table.write_text("key,price\n" + "".join(f"a/{name},1\n" for name in names))
    sync(dataclasses.replace(options, metadata=table))
    (folder / "a").rename(folder / "m")
    for level, name in enumerate(names):
        picture(folder / "a" / name, 121 + level)
    monkeypatch.setattr(sync_writing, "WRITE_ROWS", 2)
    interrupt(options)
    sync(options)
    with Collection.open(options.out) as collection:
        rows = collection.rows(collection.ids)
        prices = {row.key: row.metadata["price"] for row in rows if row.key[0] in "am"}
    assert prices == {
        f"{place}/{name}": n for place, n in (("a", None), ("m", 1)) for name in names
    }
    check(options.out, folder, bundle)


def test_metadata_stays_with_its_image_and_a_new_table_has_the_last_word(options, folder, tmp_path):
    """Through a change and a move; labels given by a table are not undone by a sync without."""
    table = tmp_path / "facts.csv"
    table.write_text("key,price,label\na/00.png,1.5,dear\na/02.png,2.5,dear\na/04.png,3.5,\n")
    sync(dataclasses.replace(options, metadata=table))
    (folder / "a" / "00.png").rename(folder / "b" / "moved.png")
    picture(folder / "a" / "02.png", 252)
    picture(folder / "a" / "new.png", 251)
    assert facts(sync(options))["moved"] == 1

    def known():
        with Collection.open(options.out) as collection:
            rows = {row.key: row for row in collection.rows(collection.ids)}
            keys = ("b/moved.png", "a/02.png", "a/04.png", "a/new.png")
            return [(rows[key].metadata["price"], rows[key].label) for key in keys]

    assert known() == [(1.5, "dear"), (2.5, "dear"), (3.5, "a"), (None, "a")]
    table.write_text("key,price,count\na/02.png,9,1\na/new.png,8,2\n")
    summary = sync(dataclasses.replace(options, metadata=table))
    assert facts(summary) == {"updated": 4, "unchanged": 9, "read": 13}
    assert summary.metadata["without_row"] == 11
    assert known() == [(None, "dear"), (9.0, "dear"), (None, "a"), (8.0, "a")]
    with Collection.open(options.out) as collection:
        assert collection.select("count >= 1").count == 2


def test_a_label_that_the_table_takes_back_is_the_sources_own(options, tmp_path):
    """As in a collection that was built with the table as it is."""
    table = tmp_path / "facts.csv"
    told = dataclasses.replace(options, metadata=table)
    for given, known in (("hand", "hand"), ("", "a"), ("hand", "hand")):
        table.write_text(f"key,label\na/00.png,{given}\n")
        sync(told)
        with Collection.open(options.out) as collection:
            assert [row.label for row in collection.rows([id_of("a/00.png")])] == [known]


def test_images_keep_what_is_theirs_when_files_are_renamed(options, folder, bundle, tmp_path):
    """Two are exchanged, others numbered anew after one that is gone, and before a new one."""
    sync(options)
    digits = [f"{n:02}" for n in range(0, 12, 2)]
    table = tmp_path / "facts.csv"
    lines = [f"a/{n}.png,{n},hand-{n}\n" for n in digits]
    table.write_text("key,price,label\n" + "".join(lines))
    sync(dataclasses.replace(options, metadata=table))

    def known():
        with Collection.open(options.out) as collection:
            rows = sorted(collection.rows(collection.ids), key=lambda row: row.key)
            return [(row.metadata["price"], row.label) for row in rows if row.key < "b"]

    def theirs(*prices):
        return [(price, f"hand-{price:02}") for price in prices]

    one, other, aside = (folder / "a" / name for name in ("00.png", "02.png", "x"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert facts(sync(options)) == {"moved": 2, "unchanged": 10, "read": 12}
    assert known() == theirs(2, 0, 4, 6, 8, 10)
    for now, was in itertools.pairwise(digits):
        (folder / "a" / f"{was}.png").rename(folder / "a" / f"{now}.png")
    assert facts(sync(options)) == {"moved": 5, "gone": 1, "unchanged": 6, "read": 11}
    assert known() == theirs(0, 4, 6, 8, 10)
    for was, now in reversed([*itertools.pairwise(digits)]):
        (folder / "a" / f"{was}.png").rename(folder / "a" / f"{now}.png")
    picture(one, 251)
    assert facts(sync(options)) == {
        "new": 1, "moved": 5, "unchanged": 6, "embedded": 1, "read": 12
    }  # fmt: skip
    assert known() == [(None, "a"), *theirs(0, 4, 6, 8, 10)]
    check(options.out, folder, bundle)


def test_a_column_of_metadata_that_has_another_type_now(options, folder, tmp_path, capsys):
    """What can be the collection's type becomes that; else it is one line, and nothing changed."""
    table = tmp_path / "prices.csv"
    table.write_text("key,price,shelf\na/00.png,1.5,x\nb/01.png,2.5,y\n")
    sync(dataclasses.replace(options, metadata=table))
    table.write_text("key,price,shelf\na/00.png,1,7\nb/01.png,2,8\n")
    for is_dry in (True, False):
        summary = sync(dataclasses.replace(options, metadata=table, dry_run=is_dry))
        assert facts(summary) == {"updated": 2, "unchanged": 10, "read": 12}
    before = (options.out / "manifest.json").read_bytes()
    with Collection.open(options.out) as collection:
        (row,) = collection.rows([id_of("a/00.png")])
        assert row.metadata == {"price": 1.0, "shelf": "7"}
    table.write_text("key,price\na/00.png,cheap\nb/01.png,2\n")
    args = ["--images", str(folder), "--encoder", options.encoder, "--out", str(options.out)]
    for more in ([], ["--dry-run"]):
        argv = [*args, "--sync", "--metadata", str(table), *more]
        assert run_command(BuildOptions, main, prog="index.build", argv=argv) == 1
        assert (
            f"index.build: --metadata {table}, column 'price': expected double, as the collection "
            "has it, found string: "
        ) in capsys.readouterr().err
    assert (options.out / "manifest.json").read_bytes() == before


def test_codes_that_are_text_in_the_collection_stay_as_they_are_written(options, tmp_path):
    """Whatever else a CSV's column of them might be."""
    codes = {"a/00.png": "00123", "b/01.png": "1.50"}
    parquet, table = tmp_path / "facts.parquet", tmp_path / "facts.csv"
    pq.write_table(pa.table({"key": list(codes), "sku": list(codes.values())}), parquet)
    sync(dataclasses.replace(options, metadata=parquet))
    table.write_text("key,sku\n" + "".join(f"{key},{code}\n" for key, code in codes.items()))
    summary = sync(dataclasses.replace(options, metadata=table))
    assert facts(summary) == {"unchanged": 12, "read": 12}
    with Collection.open(options.out) as collection:
        rows = collection.rows([id_of(key) for key in codes])
        assert [row.metadata["sku"] for row in rows] == ["00123", "1.50"]


def test_labels_of_a_table_stay_where_shards_give_none(options, tmp_path):
    """A sync without the table undoes none; a class in the shards has the last word."""

    def write_shard(labels):
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number, (name, label) in enumerate(labels.items()):
                picture(tmp_path / "member.png", 20 * number)
                archive.add(tmp_path / "member.png", f"{name}.png")
                member = tarfile.TarInfo(f"{name}.cls")
                member.size = len(label)
                if label:
                    archive.addfile(member, io.BytesIO(label.encode()))

    def labels():
        with Collection.open(options.out) as collection:
            return {row.key[-5]: row.label for row in collection.rows(collection.ids)}

    table = tmp_path / "labels.csv"
    table.write_text("key,label\nshard.tar/a.png,dear\nshard.tar/b.png,cheap\n")
    write_shard({"a": "", "b": "", "c": "x"})
    shards = dataclasses.replace(options, images=str(tmp_path / "shard.tar"))
    sync(dataclasses.replace(shards, metadata=table))
    assert labels() == {"a": "dear", "b": "cheap", "c": "x"}
    assert facts(sync(shards)) == {"unchanged": 3, "read": 3}
    assert labels() == {"a": "dear", "b": "cheap", "c": "x"}
    write_shard({"a": "", "b": "y", "c": "x"})
    assert facts(sync(shards)) == {"updated": 1, "unchanged": 2, "read": 3}
    assert labels() == {"a": "dear", "b": "y", "c": "x"}
