"""What every store of collections does alike, whoever keeps the vectors.

Each test runs over a collection on disk (exact, with an index, and one that is half segment and
half delta) and over one in a real Milvus Lite, with and without an index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pymilvus import MilvusClient

from benchmarks.indexed import give_index
from index.combine import Combination
from index.errors import CollectionError, UnknownIdError
from index.filters import FilterError
from index.interface import open_collection
from index.milvus.collection import MilvusCollection
from index.milvus.description import Description
from index.milvus.writer import MilvusWriter
from index.ranking import Ranking, search_range
from index.storage.ids import id_of
from index.storage.writer import CollectionWriter
from models.errors import FingerprintMismatchError, UsageError
from tests.combined import search_combined

FINGERPRINT = "a" * 64
DIM = 16
COUNT = 600
STORES = ("flat", "hnsw", "delta", "milvus-flat", "milvus-hnsw")

AnyWriter: TypeAlias = CollectionWriter | MilvusWriter
Make = Callable[..., AnyWriter]


@pytest.fixture(scope="module", params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    """Name the store."""
    return str(request.param)


_numbers = itertools.count()


@pytest.fixture(scope="module")
def make(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Make]:
    """Make a collection of rows and vectors; closed after the module."""
    made: list[AnyWriter] = []

    def make(
        rows: pa.Table, vectors_ND: NDArray[np.float32], *, metric: str = "cosine"
    ) -> AnyWriter:
        writer: AnyWriter
        dim = vectors_ND.shape[1]
        if kind.startswith("milvus"):
            description = Description(
                name="made", fingerprint=FINGERPRINT, dim=dim, metric=metric,
                index=kind.removeprefix("milvus-"), sources={"folder:/a": 1, "folder:/b": 1},
            )  # fmt: skip
            uri = request.getfixturevalue("milvus")
            writer = MilvusWriter.create(f"milvus:{uri}#made_{next(_numbers)}", description)
        else:
            path = tmp_path_factory.mktemp("collection") / "made"
            writer = CollectionWriter.create(
                path, name="made", fingerprint=FINGERPRINT, dim=dim, metric=metric
            )
        made.append(writer)
        half = len(rows) // 2 if kind == "delta" else len(rows)
        writer.add(rows[:half], vectors_ND[:half], fingerprint=FINGERPRINT)
        writer.seal()
        if isinstance(writer, MilvusWriter):
            load_again(writer)
        if isinstance(writer, CollectionWriter) and kind == "hnsw":
            give_index(writer, "HNSW32")
        if half < len(rows):
            writer.add(rows[half:], vectors_ND[half:], fingerprint=FINGERPRINT)
        return writer

    yield make
    for writer in made:
        writer.close()


@pytest.fixture(scope="module")
def vectors_ND() -> NDArray[np.float32]:
    """Draw unit vectors."""
    return unit(np.random.default_rng(0).standard_normal((COUNT, DIM)))


@pytest.fixture(scope="module")
def writer(make: Make, vectors_ND: NDArray[np.float32]) -> AnyWriter:
    """Make the collection that most tests only read."""
    return make(table(range(COUNT)), vectors_ND)


def load_again(writer: MilvusWriter) -> None:
    """Have Milvus Lite build its index: it does so when a collection is loaded, and then only."""
    address = writer.collection.address
    with closing(MilvusClient(uri=address.uri)) as client:
        client.release_collection(address.name)
        client.load_collection(address.name)


def unit(vectors_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to unit length."""
    scaled: NDArray[np.float32] = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.ascontiguousarray(scaled, np.float32)


def table(numbers: range, **columns: Any) -> pa.Table:
    """Make rows of numbers: a third without a label, two sources, columns of every type."""
    further = {
        "number": pa.array(list(numbers), pa.int64()),
        "half": pa.array([n / 2 for n in numbers], pa.float64()),
        "is_even": pa.array([n % 2 == 0 for n in numbers], pa.bool_()),
        "day": pa.array([date(2024, 1, 1 + n % 28) for n in numbers], pa.date32()),
        "taken": pa.array(
            [datetime(2024, 1, 1, n % 24, tzinfo=UTC) for n in numbers], pa.timestamp("us", "UTC")
        ),
        "shot by": pa.array([None if n % 5 else "Ann" for n in numbers], pa.string()),
        "like": pa.array([None if n % 7 else n for n in numbers], pa.int64()),
        "größe": pa.array([float(n) for n in numbers], pa.float64()),
    }
    return pa.table(
        {
            "key": [f"image {n:04}" for n in numbers],
            "label": [None if n % 3 == 0 else "AB"[n % 2] for n in numbers],
            "source": ["folder:/a" if n < COUNT / 2 else "folder:/b" for n in numbers],
            **further,
            **columns,
        }
    )


def ids_of(*numbers: int) -> list[int]:
    """Give the ids of rows."""
    return [id_of(f"image {n:04}") for n in numbers]


def nearest(
    queries_QD: NDArray[np.float32], vectors_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compare all by NumPy; give ids and scores."""
    scores_QN = queries_QD @ vectors_ND.T
    rows_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    ids = np.array(ids_of(*range(len(vectors_ND))))
    return ids[rows_QK], np.take_along_axis(scores_QN, rows_QK, 1)


def test_scores_are_cosines_and_fall(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """Best first, the image itself above all, and every score the cosine that NumPy has."""
    found = writer.collection.search(vectors_ND[:20], 10, fingerprint=FINGERPRINT, exact=True)
    ids, scores = nearest(vectors_ND[:20], vectors_ND, 10)
    assert np.array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_the_index_finds_nearly_what_is_there(
    writer: AnyWriter, vectors_ND: NDArray[np.float32]
) -> None:
    """Searched as people search it, with the same scores for what it finds."""
    queries_QD = unit(np.random.default_rng(1).standard_normal((50, DIM)))
    found = writer.collection.search(queries_QD, 10, fingerprint=FINGERPRINT)
    ids, scores = nearest(queries_QD, vectors_ND, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, ids, strict=True)])
    assert recall >= 0.95
    np.testing.assert_allclose(found.scores[:, 0], scores[:, 0], atol=1e-5)


def test_more_effort_finds_more(make: Make, kind: str) -> None:
    """Of 2,000 vectors without clusters, the least effort finds fewer than much."""
    vectors_ND = unit(np.random.default_rng(2).standard_normal((2000, DIM)))
    collection = make(table(range(2000)), vectors_ND).collection
    low, high = collection.effort_parameters(10, 10), collection.effort_parameters(400, 10)
    if not low:
        assert kind in ("flat", "delta", "milvus-flat")
        return
    queries_QD = unit(np.random.default_rng(3).standard_normal((100, DIM)))
    ids, _ = nearest(queries_QD, vectors_ND, 10)
    recalls = []
    for parameters in (low, high):
        found = collection.search(queries_QD, 10, fingerprint=FINGERPRINT, parameters=parameters)
        pairs = zip(found.ids, ids, strict=True)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))
    assert recalls[0] < recalls[1]
    assert recalls[1] >= 0.99


@pytest.mark.parametrize("left", [1200, 60, 12, 6])
def test_of_few_that_a_filter_leaves_all_are_found(make: Make, left: int) -> None:
    """Wherever they lie in the index, for any query; also where they are more than are read."""
    vectors_ND = unit(np.random.default_rng(6).standard_normal((2400, 64)))
    collection = make(table(range(2400)), vectors_ND).collection
    queries_QD = unit(np.random.default_rng(7).standard_normal((60, 64)))
    ids, _ = nearest(queries_QD, vectors_ND[:left], min(10, left))
    found = collection.search(queries_QD, 10, fingerprint=FINGERPRINT, filter=f"number < {left}")
    assert ((found.ids >= 0).sum(axis=1) == min(10, left)).all()
    pairs = zip(found.ids, ids, strict=True)
    recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])
    assert recall >= (0.95 if left > 60 else 0.99)


def test_of_many_an_index_finds_as_large_a_share(make: Make) -> None:
    """Whoever asks for a hundred, and says nothing of effort, misses no more than of ten."""
    vectors_ND = unit(np.random.default_rng(2).standard_normal((2000, 64)))
    collection = make(table(range(2000)), vectors_ND).collection
    queries_QD = unit(np.random.default_rng(3).standard_normal((100, 64)))
    ids, _ = nearest(queries_QD, vectors_ND, 100)
    found = collection.search(queries_QD, 100, fingerprint=FINGERPRINT)
    pairs = zip(found.ids, ids, strict=True)
    assert np.mean([len(set(a) & set(b)) / 100 for a, b in pairs]) >= 0.995


def test_ties_are_all_found_in_an_order_that_stays(make: Make) -> None:
    """Equal vectors have equal scores; twice asked, twice the same answer."""
    vectors_ND = np.repeat(unit(np.random.default_rng(4).standard_normal((4, DIM))), 5, axis=0)
    collection = make(table(range(20)), vectors_ND).collection
    found = collection.search(vectors_ND[:1], 5, fingerprint=FINGERPRINT)
    assert set(found.ids[0]) == set(ids_of(*range(5)))
    assert np.ptp(found.scores[0]) <= 1e-6
    again = collection.search(vectors_ND[:1], 5, fingerprint=FINGERPRINT)
    assert np.array_equal(again.ids, found.ids)


def test_what_is_missing_is_padded(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """A filter leaves three: three are found, and the rest is -1 and -inf."""
    found = writer.collection.search(
        vectors_ND[:2], 5, fingerprint=FINGERPRINT, filter="number in (3, 4, 5)"
    )
    assert set(found.ids[0][:3]) == set(ids_of(3, 4, 5))
    assert found.ids[:, 3:].tolist() == [[-1, -1]] * 2
    assert np.isneginf(found.scores[:, 3:]).all()


def test_no_more_are_asked_for_than_there_are(make: Make) -> None:
    """Neighbours are at most as many as the collection has; of an empty one there are none."""
    vectors_ND = unit(np.random.default_rng(5).standard_normal((3, DIM)))
    writer = make(table(range(3)), vectors_ND)
    assert writer.collection.search(vectors_ND, 9, fingerprint=FINGERPRINT).ids.shape == (3, 3)
    assert writer.delete(ids_of(0, 1, 2)) == 3
    collection = writer.collection.latest()
    assert collection.count == 0
    assert collection.search(vectors_ND, 9, fingerprint=FINGERPRINT).ids.shape == (3, 0)
    every = search_range(collection, vectors_ND, -1, fingerprint=FINGERPRINT, effort=50)
    assert every.ids.shape == (3, 0)


@pytest.mark.parametrize(
    ("filter", "wanted"),
    [
        ("label = 'A'", lambda n: n % 3 and n % 2 == 0),
        ("label != 'A'", lambda n: not (n % 3 and n % 2 == 0)),
        ("not (label = 'A' or number < 100)", lambda n: not (n % 3 and n % 2 == 0) and n >= 100),
        ("label is null", lambda n: n % 3 == 0),
        ("label is not null and label in ('B', 'C')", lambda n: n % 3 and n % 2),
        ("number >= 7 and number < 9 or half = 150.5", lambda n: n in (7, 8, 301)),
        ("is_even = true", lambda n: n % 2 == 0),
        ("day >= '2024-01-27'", lambda n: n % 28 >= 26),
        ("taken < '2024-01-01T02:00:00Z'", lambda n: n % 24 < 2),
        ("`shot by` = 'Ann'", lambda n: n % 5 == 0),
        ("`shot by` in ('Bob', 'Ann') and number < 20", lambda n: n % 5 == 0 and n < 20),
        ("not `shot by` startswith 'A'", lambda n: n % 5),
        ("like in (7, 8, 14) or like is null and number < 3", lambda n: n in (1, 2, 7, 14)),
        ("größe < 3", lambda n: n < 3),
        ("key endswith '7'", lambda n: n % 10 == 7),
        ("key contains '00' and not source contains '/b'", lambda n: "00" in f"{n:04}" and n < 300),
        ("number in (-1)", lambda n: False),
    ],
)
def test_filters_mean_the_same(
    writer: AnyWriter,
    vectors_ND: NDArray[np.float32],
    filter: str,
    wanted: Callable[[int], object],
) -> None:
    """A filter chooses what it says, and what it chooses is what is found."""
    ids = set(ids_of(*filter_numbers(wanted)))
    assert writer.collection.select(filter).count == len(ids)
    found = writer.collection.search(
        vectors_ND[:1], COUNT, fingerprint=FINGERPRINT, filter=filter, exact=True
    )
    assert set(found.ids[0][found.ids[0] >= 0]) == ids


def filter_numbers(wanted: Callable[[int], object]) -> list[int]:
    """Give the numbers of rows that are wanted."""
    return [n for n in range(COUNT) if wanted(n)]


def test_a_filter_sees_the_names_that_a_caller_sees(writer: AnyWriter) -> None:
    """Sources may go by public names; their URIs are not known then."""
    names = {"folder:/a": "first", "folder:/b": "second"}.__getitem__
    collection = writer.collection
    assert collection.select("source = 'first'", source_names=names).count == COUNT // 2
    assert collection.select("not source startswith 'f'", source_names=names).count == COUNT // 2
    assert collection.select("source contains 'folder'", source_names=names).count == 0


def test_bad_filters_are_refused_alike(writer: AnyWriter) -> None:
    """The error says where, and what columns there are."""
    with pytest.raises(FilterError, match="character 1: expected a column: id, key, label"):
        writer.collection.select("price < 3")


def test_stored_rows_come_back(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """Metadata of every type, and vectors, in the order asked for."""
    rows = writer.collection.rows(ids_of(7, 5))
    assert [row.key for row in rows] == ["image 0007", "image 0005"]
    assert rows[0].label == "B"
    assert rows[1].source == "folder:/a"
    assert rows[1].metadata == {
        "number": 5,
        "half": 2.5,
        "is_even": False,
        "day": date(2024, 1, 6),
        "taken": datetime(2024, 1, 1, 5, tzinfo=UTC),
        "shot by": "Ann",
        "like": None,
        "größe": 5.0,
    }
    np.testing.assert_allclose(writer.collection.vectors(ids_of(9, 1)), vectors_ND[[9, 1]])
    with pytest.raises(UnknownIdError, match="id 5: expected an id of the 600"):
        writer.collection.vectors([5])


def test_all_rows_can_be_read_in_one_order(
    writer: AnyWriter, vectors_ND: NDArray[np.float32]
) -> None:
    """Ids, keys, labels and tables go together."""
    collection = writer.collection
    ids = collection.ids
    assert sorted(ids) == sorted(ids_of(*range(COUNT)))
    keys = collection.keys()
    assert [id_of(key) for key in keys] == ids.tolist()
    numbers = collection.table(["number"])["number"].to_pylist()
    assert ids_of(*numbers) == ids.tolist()
    assert collection.labels() == [None if n % 3 == 0 else "AB"[n % 2] for n in numbers]
    assert collection.find_key("image 0042") == ids_of(42)[0]
    with pytest.raises(UnknownIdError, match="key 'nobody'"):
        collection.find_key("nobody")


def test_images_are_left_out_of_their_own_neighbours(
    writer: AnyWriter, vectors_ND: NDArray[np.float32]
) -> None:
    """Asked by id, an image is no answer to itself, and k others are found."""
    found = writer.collection.search_ids(ids_of(3, 4), 5, exact=True)
    ids, _ = nearest(vectors_ND[3:5], vectors_ND, 6)
    assert np.array_equal(found.ids, ids[:, 1:])


def test_who_is_left_out_costs_no_answer(make: Make) -> None:
    """Named twice, or not there at all: the others are all found."""
    vectors_ND = unit(np.random.default_rng(10).standard_normal((5, DIM)))
    collection = make(table(range(5)), vectors_ND).collection
    for without, wanted in (((0, 0), 4), ((0, 99), 4), ((98, 99), 5), ((0, 1), 3)):
        found = collection.search(
            vectors_ND[:1], 5, fingerprint=FINGERPRINT, without_QW=np.array([ids_of(*without)])
        )
        assert set(found.ids[0]) == set(ids_of(*range(5))) - set(ids_of(*without))
        assert found.ids.shape == (1, wanted)


def test_pages_follow_one_another(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """The second page of ten is what twenty have beyond the first."""
    collection = writer.collection
    twenty = collection.search(vectors_ND[:3], 20, fingerprint=FINGERPRINT, exact=True)
    first = collection.search(vectors_ND[:3], 10, fingerprint=FINGERPRINT, exact=True)
    second = collection.search(
        vectors_ND[:3], 10, fingerprint=FINGERPRINT, exact=True, without_QW=first.ids
    )
    assert np.array_equal(np.hstack([first.ids, second.ids]), twenty.ids)


def test_a_range_has_all_within_it(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """Range search is made of searches, and so the same over every store."""
    found = search_range(
        writer.collection, vectors_ND[:2], 0.4, fingerprint=FINGERPRINT, exact=True
    )
    scores_QN = vectors_ND[:2] @ vectors_ND.T
    for ids, scores in zip(found.ids, scores_QN, strict=True):
        assert set(ids[ids >= 0]) == set(ids_of(*np.flatnonzero(scores >= 0.4).tolist()))


def test_more_than_milvus_gives_are_searched_exactly(
    writer: AnyWriter,
    vectors_ND: NDArray[np.float32],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its limit is that of its own search: exact ones, and ranges, have any number."""
    monkeypatch.setattr("index.milvus.collection.MAX_NEIGHBOURS", 100)
    collection = writer.collection
    search = partial(collection.search, vectors_ND[:2], fingerprint=FINGERPRINT)
    ids, _ = nearest(vectors_ND[:2], vectors_ND, 300)
    assert np.array_equal(search(300, exact=True).ids, ids)
    every = search_range(collection, vectors_ND[:2], -1, fingerprint=FINGERPRINT)
    assert (every.ids >= 0).sum(axis=1).tolist() == [COUNT, COUNT]
    if kind.startswith("milvus"):
        with pytest.raises(UsageError, match="k: expected at most 100 from Milvus, found 101; ask"):
            search(100, without_QW=collection.ids[:2, None])
    else:
        assert collection.max_neighbours is None


def test_written_images_are_there_at_once(make: Make) -> None:
    """Add, replace, delete: each is seen by the next search, and nothing is there twice."""
    vectors_ND = unit(np.random.default_rng(6).standard_normal((30, DIM)))
    writer = make(table(range(20)), vectors_ND[:20])
    writer.add(table(range(20, 25)), vectors_ND[20:25], fingerprint=FINGERPRINT)
    assert writer.collection.count == 25
    changed = table(range(3, 4), label=["new"])
    writer.upsert(changed, vectors_ND[29:30], fingerprint=FINGERPRINT)
    collection = writer.collection
    assert collection.count == 25
    found = collection.search(vectors_ND[29:30], 1, fingerprint=FINGERPRINT)
    assert found.ids.tolist() == [ids_of(3)]
    assert collection.rows(ids_of(3))[0].label == "new"
    assert writer.delete(ids_of(3, 4, 999)) == 2
    found = writer.collection.search(vectors_ND[29:30], 23, fingerprint=FINGERPRINT, exact=True)
    assert set(found.ids[0]) == set(ids_of(*[n for n in range(25) if n not in (3, 4)]))
    with pytest.raises(UnknownIdError):
        writer.collection.rows(ids_of(4))
    writer.add(table(range(3, 5)), vectors_ND[3:5], fingerprint=FINGERPRINT)
    assert writer.collection.count == 25


def test_an_upsert_leaves_nothing_of_the_old_row(make: Make) -> None:
    """A column without a value is null, and not what it was before."""
    vectors_ND = unit(np.random.default_rng(7).standard_normal((2, DIM)))
    writer = make(table(range(2)), vectors_ND)
    bare = pa.table({"key": ["image 0000"], "label": ["x"], "source": ["folder:/a"]})
    writer.upsert(bare, vectors_ND[:1], fingerprint=FINGERPRINT)
    assert writer.collection.rows(ids_of(0))[0].metadata.get("number") is None
    assert writer.collection.select("number is null").count == 1
    new = table(range(1), camera=pa.array(["old"], pa.string()))
    writer.upsert(new, vectors_ND[:1], fingerprint=FINGERPRINT)
    assert writer.collection.select("camera = 'old'").count == 1


def test_what_is_there_is_not_added_again(make: Make) -> None:
    """Nothing of the call is written."""
    vectors_ND = unit(np.random.default_rng(8).standard_normal((6, DIM)))
    writer = make(table(range(4)), vectors_ND[:4])
    with pytest.raises((CollectionError, UsageError), match="image 0003"):
        writer.add(table(range(3, 6)), vectors_ND[3:6], fingerprint=FINGERPRINT)
    assert writer.collection.count == 4


def test_another_encoder_is_refused(writer: AnyWriter, vectors_ND: NDArray[np.float32]) -> None:
    """Equal dimension or not, in searches and in writes."""
    with pytest.raises(FingerprintMismatchError, match=r"a{64}.*b{64}"):
        writer.collection.search(vectors_ND[:1], 1, fingerprint="b" * 64)
    with pytest.raises(FingerprintMismatchError):
        writer.upsert(table(range(1)), vectors_ND[:1], fingerprint="b" * 64)


BAD_IDS: list[tuple[Any, str]] = [
    ([1.5], "1.5"), (["a"], "'a'"), ([2**63], str(2**63)), ([2**70], str(2**70)), ([True], "True"),
    ([[1], [2, 3]], "[[1], [2, 3]]"), (None, "None"), ({5}, "{5}"),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "found"), BAD_IDS)
def test_what_is_no_id_is_refused(writer: AnyWriter, ids: Any, found: str) -> None:
    """A number with a fraction is not taken for the one before it."""
    collection = writer.collection
    search = partial(collection.search_ids, k=3)
    for call in (writer.delete, collection.vectors, collection.rows, search):
        with pytest.raises(UsageError) as error:
            call(ids)
        expected = f"ids: expected whole numbers below 2^63, found {found}; take them from a search"
        assert expected in str(error.value)
    assert writer.delete([]) == writer.delete(np.array([7], np.uint8)) == 0


def test_what_is_no_table_and_no_array_is_refused(
    writer: AnyWriter, vectors_ND: NDArray[np.float32]
) -> None:
    """In one line, and before anything is written or searched."""
    add, search, row = writer.add, writer.collection.search, vectors_ND[:1]
    new = table(range(COUNT, COUNT + 1))
    rows: Any
    for rows in (new.to_pydict(), new.to_pylist(), None):
        with pytest.raises(UsageError, match="rows: expected a table of pyarrow, found "):
            add(rows, row, fingerprint=FINGERPRINT)
    vectors: Any
    for vectors in ("x", [["x"] * DIM], [{}], [[1], [2, 3]]):
        with pytest.raises(UsageError, match=r"vectors: expected \(1, 16\) numbers, found "):
            add(new, vectors, fingerprint=FINGERPRINT)
    queries: Any = row.tolist()
    with pytest.raises(UsageError, match=r"queries: expected an array \(Q, 16\), found list"):
        search(queries, 1, fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match="queries: expected numbers, found <U1"):
        search(np.full((1, DIM), "x"), 1, fingerprint=FINGERPRINT)
    without: Any = [[1]]
    with pytest.raises(UsageError, match=r"without: expected an array \(1, W\), found list"):
        search(row, 1, fingerprint=FINGERPRINT, without_QW=without)
    assert writer.collection.count == COUNT


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_queries_are_refused_alike(writer: AnyWriter, bad: float) -> None:
    """Another dimension, what is not finite, no neighbours, unknown parameters."""
    search = writer.collection.search
    with pytest.raises(UsageError, match=r"expected \(Q, 16\)"):
        search(np.ones((1, 3), np.float32), 1, fingerprint=FINGERPRINT)
    queries = np.ones((2, DIM), np.float32)
    queries[1, 0] = bad
    with pytest.raises(UsageError, match="query 1: expected finite numbers"):
        search(queries, 1, fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match="k: expected at least 1"):
        search(np.ones((1, DIM), np.float32), 0, fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match=r"k: expected a whole number, found 2\.5"):
        search(np.ones((1, DIM), np.float32), 2.5, fingerprint=FINGERPRINT)  # type: ignore[arg-type]  # bad
    queries = np.ones((2, DIM), np.float32)
    for without in (np.zeros(2, np.int64), np.zeros((3, 1), np.int64), np.zeros((2, 1))):
        with pytest.raises(UsageError, match=r"without: expected \(2, W\) ids, found \("):
            search(queries, 1, fingerprint=FINGERPRINT, without_QW=without)  # type: ignore[arg-type]  # bad
    with pytest.raises(UsageError, match="search parameter"):
        search(np.ones((1, DIM), np.float32), 1, fingerprint=FINGERPRINT, parameters={"x": 3})


def test_distances_are_negative_scores(make: Make) -> None:
    """In euclidean collections higher is nearer, too: minus the squared distance."""
    vectors_ND = np.random.default_rng(9).standard_normal((50, DIM)).astype(np.float32)
    collection = make(table(range(50)), vectors_ND, metric="euclidean").collection
    for exact in (True, False):
        found = collection.search(vectors_ND[:3], 4, fingerprint=FINGERPRINT, exact=exact)
        assert found.ids[:, 0].tolist() == ids_of(0, 1, 2)
        squares = ((vectors_ND[:3, None] - vectors_ND[None]) ** 2).sum(axis=2)
        expected = -np.sort(squares, axis=1)[:, :4]
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-4)


def test_what_is_made_of_cosines_is_refused_for_distances(make: Make) -> None:
    """Combined queries, diversity and ranges would mean something else, and say so."""
    vectors_ND = np.random.default_rng(11).standard_normal((9, DIM)).astype(np.float32)
    collection = make(table(range(9)), vectors_ND, metric="euclidean").collection
    both = Combination(positives=ids_of(0, 1))
    expected = "expected a collection of cosines, found one of euclidean distances"
    with pytest.raises(UsageError, match=expected):
        search_combined(collection, [both], 3, fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match=expected):
        search_range(collection, vectors_ND[:1], 0.5, fingerprint=FINGERPRINT)
    found = collection.search(vectors_ND[:1], 3, fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match=expected):
        Ranking(diversity=0.5).rank(collection, found, 2)
    assert Ranking().rank(collection, found, 2).ids.tolist() == found.ids[:, :2].tolist()


def test_no_queries_have_no_answers(writer: AnyWriter) -> None:
    """An empty batch is a batch."""
    empty = np.empty((0, DIM), np.float32)
    found = writer.collection.search(empty, 3, fingerprint=FINGERPRINT)
    assert found.ids.shape == (0, 3)


def test_a_foreign_collection_in_milvus_is_refused(milvus: str) -> None:
    """One that Horace did not make, one that is not there, and a Milvus that does not answer."""
    with closing(MilvusClient(uri=milvus)) as client:
        client.create_collection("foreign", dimension=4)
    with pytest.raises(CollectionError, match="foreign: expected a collection that Horace made"):
        MilvusCollection.open(f"milvus:{milvus}#foreign")
    with pytest.raises(CollectionError, match="nowhere: expected an answer of Milvus, found"):
        MilvusCollection.open(f"milvus:{milvus}#nowhere")
    with pytest.raises(UsageError, match="expected milvus:URI#NAME"):
        MilvusCollection.open("milvus:photos")
    with pytest.raises(UsageError, match="expected letters, digits and _"):
        MilvusCollection.open(f"milvus:{milvus}#my photos")


def test_the_path_of_a_collection_is_no_address(tmp_path: Path) -> None:
    """`open_collection` tells the two apart, and the error of a path is that of a path."""
    with pytest.raises(CollectionError, match="expected a collection directory"):
        open_collection(str(tmp_path / "none"))
