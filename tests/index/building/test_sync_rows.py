import pyarrow as pa

from index.building.sync_rows import RowMaker, with_digest
from index.storage.rows import ROW_SCHEMA


def test_to_make_some_rows_no_other_chunk_is_copied():
    """A sync makes a thousand at a time, of a collection of millions."""
    keys = [f"{n:0100}" for n in range(1000)]
    columns = {
        "id": range(1000),
        "key": keys,
        "label": ["cat"] * 1000,
        "source": ["folder:/s"] * 1000,
    }
    chunk = with_digest(pa.table(columns, schema=ROW_SCHEMA))
    table = pa.concat_tables([chunk] * 100)
    maker = RowMaker(table=table, uri="folder:/new", is_folder=False, metadata=None)
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        rows = maker.make([None, 70_007, None, 5], [*"abcd"], [None] * 4, [*"1234"]).to_pylist()
    finally:
        pa.set_memory_pool(default)
    assert [(row["key"], row["label"], row["digest"]) for row in rows] == [
        ("a", None, "1"), ("b", "cat", "2"), ("c", None, "3"), ("d", "cat", "4"),
    ]  # fmt: skip
    assert 0 < pool.max_memory() < chunk.nbytes / 10
