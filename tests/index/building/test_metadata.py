import gzip
import os
import time
from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.building.metadata import Metadata
from index.errors import CollectionError
from index.storage.rows import ROW_SCHEMA, is_row_schema
from models.errors import UsageError

NO_UTF_8 = pa.array([b"caf\xe9"]).view(pa.string())
"""Parquet keeps it, and says that it is text."""


def rows_of(*keys, label=None):
    """Make rows of a collection."""
    columns = {"id": range(len(keys)), "key": keys, "label": [label] * len(keys), "source": "s"}
    columns["source"] = ["folder:/s"] * len(keys)
    return pa.table({name: list(value) for name, value in columns.items()}, schema=ROW_SCHEMA)


@pytest.fixture
def write(tmp_path):
    """Give a function that writes a file and gives its path."""

    def write(content, name="facts.csv"):
        file = tmp_path / name
        if isinstance(content, pa.Table):
            pq.write_table(content, file)
        else:
            data = content.encode()
            file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return file

    return write


@pytest.mark.parametrize("name", ["pipe.csv", "pipe.csv.gz", "pipe.parquet"])
def test_a_pipe_is_told(tmp_path, name):
    """It would be waited for."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(CollectionError, match=f"{name}: expected a table .*no regular file"):
        Metadata(tmp_path / name)


def test_a_csv_gives_typed_columns_by_key(write):
    """Order does not matter; empty fields are null; what has no row has nulls; dates are dates."""
    file = write(
        "price,key,when,sold,name,seen,none\n"
        '2.5,b,2024-05-01,true,"say ""hi"",\n2",2024-05-01T12:00:00Z,\n'
        ",a,,false,,,\n"
        "7,gone,2023-01-01,true,x,,\n"
    )
    metadata = Metadata(file)
    metadata.meet(["a", "b", "c"])
    joined = metadata.join(rows_of("a", "b", "c"))
    assert is_row_schema(joined.schema)
    assert joined.schema.equals(pa.schema([*ROW_SCHEMA, *metadata.columns]))
    assert joined.drop_columns(["id", "source", "label"]).to_pylist() == [
        {"key": "a", "price": None, "when": None, "sold": False, "name": None, "seen": None,
         "none": None},
        {"key": "b", "price": 2.5, "when": date(2024, 5, 1), "sold": True,
         "name": 'say "hi",\n2', "seen": datetime(2024, 5, 1, 12, tzinfo=UTC), "none": None},
        {"key": "c", "price": None, "when": None, "sold": None, "name": None, "seen": None,
         "none": None},
    ]  # fmt: skip
    report = metadata.report()
    assert (report.rows, report.without_image, report.without_row) == (3, 1, 1)
    assert str(report) == (
        "metadata of 3 rows: price (double), when (date32[day]), sold (bool), name (string), "
        "seen (timestamp[us, tz=UTC]), none (string); 1 row without an image; 1 image without a row"
    )
    assert report.to_json()["columns"]["none"] == "string"


def test_keys_are_texts_and_types_are_told_from_all_values(write):
    """A key of digits keeps its zeros; a word in the last of many rows makes a column text."""
    lines = [f"{n:05},{n}" for n in range(200_000)]
    metadata = Metadata(write("key,code\n" + "\n".join(lines) + "\nlast,none\n"))
    joined = metadata.join(rows_of("00007", "last"))
    assert joined["code"].to_pylist() == ["7", "none"]


@pytest.mark.parametrize("name", ["facts.tsv", "facts.tsv.gz", "FACTS.TSV"])
def test_tabs_and_compressed_files(write, name):
    """By the name of the file."""
    joined = Metadata(write("key\tn\na\t4\n", name)).join(rows_of("a"))
    assert joined["n"].to_pylist() == [4]


def test_parquet_columns_are_kept_as_what_they_mean(write):
    """Narrow numbers, categories, decimals, nanoseconds: of the few types that filters know."""
    moment = datetime(2024, 5, 1, 12, 30)
    table = pa.table(
        {
            "key": pa.array(["a"]).dictionary_encode(),
            "small": pa.array([3], pa.uint8()),
            "kind": pa.array(["x"]).dictionary_encode(),
            "cost": pa.array([Decimal("1.25")]),
            "nan": pa.array([float("nan")], pa.float32()),
            "moment": pa.array([moment], pa.timestamp("ns")),
            "day": pa.array([date(2024, 5, 1)], pa.date64()),
        }
    )
    joined = Metadata(write(table, "facts.parquet")).join(rows_of("a"))
    assert is_row_schema(joined.schema)
    (row,) = joined.drop_columns(["id", "label", "source", "key"]).to_pylist()
    assert row == {
        "small": 3, "kind": "x", "cost": 1.25, "nan": None, "moment": moment,
        "day": date(2024, 5, 1),
    }  # fmt: skip


def test_a_year_that_no_date_has_is_refused(write):
    """Here, and not in a search that finds the row; "never" is often one, in UTC."""
    late = write("key,until\na,\nb,9999-12-31T23:59:59-05:00\n")
    with pytest.raises(
        CollectionError, match="column 'until': expected years from 1 to 9999, in UTC, found 10000-"
    ):
        Metadata(late)
    kept = Metadata(write("key,until\na,9999-12-31T23:59:59Z\n")).join(rows_of("a"))
    assert kept["until"].to_pylist() == [datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)]


def test_a_label_of_the_table_goes_before_that_of_the_source(write):
    """Where it has one."""
    metadata = Metadata(write("key,label\na,7\nb,\n"))
    joined = metadata.join(rows_of("a", "b", "c", label="folder"))
    assert joined["label"].to_pylist() == ["7", "folder", "folder"]
    assert joined.column_names == ROW_SCHEMA.names
    assert metadata.columns.names == []


def test_a_column_that_is_there_is_replaced(write):
    """Joined again, a table has the last word, also where it says nothing."""
    joined = Metadata(write("key,n\na,1\nb,2\n")).join(rows_of("a", "b"))
    again = Metadata(write("key,n\na,5\n", "later.csv")).join(joined)
    assert again["n"].to_pylist() == [5, None]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("key,n\na,1\nb,2\na,3\n", "f.csv", "expected one row an image, with its key, found 2 rows "
         "of 'a'; leave one row for each key"),
        ("key,n\na,1\n,2\n", "f.csv", "one row an image, with its key, found none in row 2"),
        ("name,n\na,1\n", "f.csv", "expected a column 'key' that names the images, found columns "
         "name, n"),
        ("key,id\na,1\n", "f.csv", "column 'id': expected a name of its own, found one of that "
         "name, which Horace fills itself; rename it"),
        ("key,digest\na,1\n", "f.csv", "column 'digest': expected a name of its own"),
        ("key,vector\na,1\n", "f.csv", "column 'vector': expected a name of its own"),
        ("key,n,n\na,1,2\n", "f.csv", "column 'n': expected a name of its own, found 2 of that"),
        ("key,a`b\na,1\n", "f.csv", "expected a name of its own, found a name that no filter can"),
        ("key,n\na,1,2\n", "f.csv", "f.csv: expected a table in CSV or parquet, found CSV parse"),
        ("", "f.csv", "f.csv: expected a table in CSV or parquet, found Empty CSV file"),
        ("key", "f.parquet", "f.parquet: expected a table in CSV or parquet, found Parquet"),
        (pa.table({"key": ["a"], "n": [[1]]}), "f.parquet", "column 'n': expected texts, numbers, "
         "true or false, dates or times, found values of list<"),
        (pa.table({"key": NO_UTF_8}), "f.parquet", "column 'key': expected texts, numbers"),
        (pa.table({"key": ["a"], "n": NO_UTF_8}), "f.parquet", "column 'n': expected texts"),
        (pa.table({"key": ["a"], "n": pa.array([2**63], pa.uint64())}), "f.parquet",
         "column 'n': expected texts, numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_said(write, content, name, message):
    """File and column, what would have been right, and what there is."""
    with pytest.raises(CollectionError) as error:
        Metadata(write(content, name))
    assert message in str(error.value)
    assert "--metadata " in str(error.value)


def test_a_file_of_no_known_name_is_bad_use(write):
    """The ending says how it is read."""
    with pytest.raises(UsageError, match=r"expected a name that ends in \.csv, \.tsv or \.parquet"):
        Metadata(write("key\n", "facts.txt"))


def test_a_table_of_other_keys_is_an_error(write):
    """Somebody has named the images in another way: nulls everywhere are nobody's wish."""
    metadata = Metadata(write("key,n\ncats/1,1\n"))
    metadata.meet(["cats/1.jpg"])
    with pytest.raises(CollectionError) as error:
        metadata.require_met("cats/1.jpg")
    assert (
        "expected keys of images, such as 'cats/1.jpg', found 1 row of others, such as 'cats/1'"
        in str(error.value)
    )


def test_a_large_table_is_joined_to_many_blocks_in_time_with_their_rows(write):
    """Blocks come by a thousand rows: a look through the whole table for each took hours."""
    keys = [f"{n:09}" for n in range(100_000)]
    metadata = Metadata(write(pa.table({"key": keys, "n": range(len(keys))}), "facts.parquet"))
    began_s = time.thread_time()
    for start in range(0, len(keys), 2_000):
        some = keys[start : start + 10]
        metadata.meet(some)
        assert metadata.join(rows_of(*some))["n"].to_pylist() == list(range(start, start + 10))
    assert time.thread_time() - began_s < 0.5
    assert metadata.report().without_image == len(keys) - 500
