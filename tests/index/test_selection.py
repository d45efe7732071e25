import numpy as np
import pyarrow as pa
import pytest

from index.ann.ann_index import AnnIndex
from index.collection import Collection, id_of
from index.filters import FilterError
from index.selection import (
    KEPT_SELECTION_BYTES,
    Chosen,
    Selector,
    count_candidates,
    is_exact_cheaper,
    keep_chosen,
)
from models.errors import UsageError

FINGERPRINT = "f" * 64


def expected(vectors, queries, mask, k):
    """Ids and cosines of a sort of all products of the rows of a mask."""
    rows = np.flatnonzero(mask)
    scores = queries @ vectors[rows].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    ids = [[id_of(f"{row:04}") for row in rows[line]] for line in order]
    return ids, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("n_queries", [3, 40])
@pytest.mark.parametrize("n_segments", [1, 3])
def test_exact_search_among_what_a_filter_leaves(
    tmp_path, unit_rows, make_collection, n_queries, n_segments
):
    """A few queries or many, one segment or several: those of a sort, and nothing else."""
    vectors, queries = unit_rows(300, 8), unit_rows(n_queries, 8, seed=1)
    path = make_collection(tmp_path, vectors, n_segments=n_segments)
    with Collection.open(path) as collection:
        found = collection.search(queries, 5, fingerprint=FINGERPRINT, filter="label = '1'")
        mask = np.array(collection.labels()) == "1"
        ids, scores = expected(vectors, queries, mask, 5)
        assert found.ids.tolist() == ids
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
@pytest.mark.parametrize("exact", [True, False])
def test_as_many_are_found_as_there_are(tmp_path, unit_rows, make_collection, factory, exact):
    """Fewer than k, one, or none: the rest is padding."""
    vectors, queries = unit_rows(400, 8), unit_rows(4, 8, seed=1)
    path = make_collection(tmp_path, vectors, factory=factory)
    with Collection.open(path) as collection:
        for filter, count in (
            ("key in ('0003', '0007', '0399')", 3),
            ("key = '0003'", 1),
            ("key = 'none'", 0),
        ):
            found = collection.search(
                queries, 10, fingerprint=FINGERPRINT, exact=exact, filter=filter
            )
            assert found.ids.shape == (4, 10)
            assert ((found.ids >= 0).sum(axis=1) == count).all()
            assert np.isneginf(found.scores[:, count:]).all()


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05, 0.01])
def test_recall_holds_at_any_selectivity(tmp_path, unit_rows, make_collection, share):
    """Through the index where much is left, and exactly where little is."""
    vectors, queries = unit_rows(6000, 32), unit_rows(60, 32, seed=1)
    with Collection.open(make_collection(tmp_path, vectors, factory="HNSW32")) as collection:
        filter = f"key < '{int(6000 * share):04}'"
        ids = [
            collection.search(
                queries, 10, fingerprint=FINGERPRINT, exact=exact, filter=filter,
                parameters={"efSearch": 256},
            ).ids
            for exact in (True, False)
        ]  # fmt: skip
        found = np.mean([np.isin(a, b).mean() for a, b in zip(*ids, strict=True)])
        assert found > 0.97


def test_a_filter_far_from_the_query_is_searched_again_exactly(
    tmp_path, make_collection, monkeypatch
):
    """Where the neighbourhood has none of what the filter leaves, the answer is exact."""
    rng = np.random.default_rng(0)
    centres = np.eye(3, 16)[np.arange(3000) % 3]  # the labels of `make_collection`
    vectors = centres + 0.1 * rng.standard_normal((3000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr("index.storage.segment.is_exact_cheaper", lambda **_: False)
    with Collection.open(make_collection(tmp_path, vectors, factory="HNSW32")) as collection:
        queries = vectors[:30]
        mask = np.array(collection.labels()) == "2"
        found = collection.search(queries, 10, fingerprint=FINGERPRINT, filter="label = '2'")
        ids, _ = expected(vectors, queries, mask, 10)
        far = np.arange(30) % 3 != 2
        assert found.ids[far].tolist() == np.array(ids)[far].tolist()


def test_the_index_is_not_asked_again_where_it_was_of_no_use(
    tmp_path, make_collection, monkeypatch
):
    """A filter that the neighbourhoods contradict: after a few queries its rows are compared."""
    rng = np.random.default_rng(0)
    vectors = np.eye(3, 16)[np.arange(3000) % 3] + 0.1 * rng.standard_normal((3000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    asked = []
    search_among = AnnIndex.search_among

    def spy(index, queries, k, among, **options):
        asked.append(len(queries))
        return search_among(index, queries, k, among, **options)

    monkeypatch.setattr(AnnIndex, "search_among", spy)
    monkeypatch.setattr("index.selection.ROWS_A_CANDIDATE", 10)  # 70 candidates for 1,000 rows
    with Collection.open(make_collection(tmp_path, vectors, factory="HNSW32")) as collection:

        def search(label, n):
            for query in vectors[:n]:
                collection.search(query[None], 10, fingerprint=FINGERPRINT, filter=label)
            found, asked[:] = len(asked), []
            return found

        vectors = vectors[np.arange(3000) % 3 == 0]
        assert search("label = '0'", 20) == 20  # as the index finds them, so it goes on
        assert 1 <= search("label = '2'", 20) < 10
        assert search("label = '2'", 20) == 0


def test_a_filter_changes_no_search_but_its_own(tmp_path, unit_rows, make_collection):
    """The index is as it was for the next call."""
    vectors, queries = unit_rows(3000, 16), unit_rows(20, 16, seed=1)
    with Collection.open(make_collection(tmp_path, vectors, factory="HNSW32")) as collection:

        def search(**options):
            return collection.search(queries, 5, fingerprint=FINGERPRINT, **options).ids

        before = search()
        search(filter="label = '0'")
        search(filter="key = '0001'")
        np.testing.assert_array_equal(search(), before)


def test_a_stored_image_is_left_out_under_a_filter_too(tmp_path, unit_rows, make_collection):
    """So many others are found where there are so many."""
    vectors = unit_rows(90, 8)
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        found = collection.search_ids(collection.ids[:6], 29, filter="label = '0'")
        assert not (found.ids == collection.ids[:6, None]).any()
        assert ((found.ids >= 0).sum(axis=1) == 29).all()
        found = collection.search_ids(collection.ids[:6], 50, filter="label = '0'")
        assert (found.ids >= 0).sum(axis=1).tolist() == [29, 30, 30, 29, 30, 30]


def test_a_selection_serves_many_searches_of_its_own_collection(
    tmp_path, unit_rows, make_collection
):
    """What `select` gives stands for the filter's text; another collection refuses it."""
    vectors = unit_rows(30, 8)
    one = make_collection(tmp_path / "one", vectors)
    two = make_collection(tmp_path / "two", vectors[:20])
    with Collection.open(one) as first, Collection.open(two) as second:
        selection = first.select("label = '0'")
        assert (selection.count, selection.filter) == (10, "label = '0'")
        by_text = first.search(vectors, 3, fingerprint=FINGERPRINT, filter="label = '0'")
        by_selection = first.search(vectors, 3, fingerprint=FINGERPRINT, filter=selection)
        np.testing.assert_array_equal(by_text.ids, by_selection.ids)
        with pytest.raises(
            UsageError, match="expected a selection of this state of collection made, found"
        ):
            second.search(vectors, 3, fingerprint=FINGERPRINT, filter=selection)


def test_a_bad_filter_is_refused_with_the_columns_there_are(tmp_path, unit_rows, make_collection):
    """Before anything is searched."""
    with (
        Collection.open(make_collection(tmp_path, unit_rows(9, 8))) as collection,
        pytest.raises(FilterError, match="character 1: expected a column: id, key, label, source"),
    ):
        collection.search(unit_rows(1, 8), 1, fingerprint=FINGERPRINT, filter="colour = 'red'")


def test_a_column_without_a_name_is_in_no_filters_way():
    """Writers refuse it; collections that have one are filtered all the same."""
    rows = pa.table({"key": ["a", "b", "c"], "": [1, 2, 3]})
    assert Selector(rows).select("key > 'a'").mask_N.tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["__filename", "__fragment_index", "__batch_index", "chosen"])
def test_a_column_may_have_a_name_that_arrow_uses(name):
    """Of the data sets that it reads, say: it is in no filter's way, and can be filtered by."""
    selector = Selector(pa.table({"key": ["a", "b", "c"], name: [1, 2, 3]}))
    assert selector.select("key > 'a'").mask_N.tolist() == [False, True, True]
    assert selector.select(f"`{name}` = 2").mask_N.tolist() == [False, True, False]


def test_metadata_is_not_copied_to_choose_by_it():
    """Rows may have 60 KiB of text each, and a filter leave all: here 300 MB of one text."""
    chunk = pa.table({"label": ["a"] * 10, "text": ["x" * 30_000] * 10})
    selector = Selector(pa.concat_tables([chunk] * 1000))
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    assert selector.select("label = 'a'").mask_N.all()
    assert pool.max_memory() - before < 30_000_000


def test_selections_are_kept_within_bounds(tmp_path, unit_rows, make_collection):
    """The one that was used longest ago goes first."""
    path = make_collection(tmp_path, unit_rows(100, 8))
    with Collection.open(path) as collection:
        selector = Selector(collection.table(), max_kept_bytes=2 * (KEPT_SELECTION_BYTES + 200))
        first = selector.select("label = '0'")
        second = selector.select("label = '1'")
        assert selector.select("label = '0'") is first
        selector.select("label = '2'")
        assert selector.select("label = '0'") is first
        assert selector.select("label = '1'") is not second
        assert not first.mask_N.flags.writeable
        long = selector.select(f"label in ('0', '{'x' * 5000}')")  # counts as what it is
        assert selector.select(long.filter) is long
        assert selector.select("label = '0'") is not first


def test_a_source_can_be_known_by_another_name(tmp_path, unit_rows, make_collection):
    """So that a filter over what a caller sees cannot ask for what the caller may not."""
    with Collection.open(make_collection(tmp_path, unit_rows(9, 8))) as collection:
        assert collection.select("source = 'folder:/nowhere'").count == 9
        hidden = collection.select("source contains '/'", source_names=str.upper)
        assert hidden.count == 9
        assert collection.select("source contains 'no'", source_names=str.upper).count == 0


def test_candidates_grow_as_less_is_left():
    """Never fewer than without a filter, never more than there are."""
    counts = [
        count_candidates(10, chosen=chosen, count=60_000, ef_search=64)
        for chosen in (60_000, 30_000, 6_000, 600, 0)
    ]
    assert counts == [64, 64, 164, 1491, 60_000]


def test_what_is_cheaper_depends_on_how_much_is_left_and_asked():
    """A batch compares rows faster than single queries do."""
    assert is_exact_cheaper(chosen=600, candidates=1491, queries=1)
    assert not is_exact_cheaper(chosen=12_000, candidates=90, queries=1)
    assert is_exact_cheaper(chosen=12_000, candidates=90, queries=256)
    assert not is_exact_cheaper(chosen=30_000, candidates=64, queries=256)


def test_where_most_queries_find_too_few_rows_are_compared_sooner():
    """What the index finds too little for is paid for twice."""
    assert not is_exact_cheaper(chosen=6000, candidates=164, queries=1)
    assert is_exact_cheaper(chosen=6000, candidates=164, queries=1, short_share=0.3)
    assert not is_exact_cheaper(chosen=600_000, candidates=164, queries=1, short_share=0.8)


def test_chosen_rows_are_numbered_and_searches_counted():
    """Few or many; and one query without luck does not yet speak against the index."""
    few, many = np.arange(80) % 20 == 3, np.arange(80) % 2 == 1
    for mask in (few, many):
        chosen = Chosen(mask)
        assert chosen.rows().tolist() == np.flatnonzero(mask).tolist()
        assert chosen.count == mask.sum()
    assert chosen.short_share == 0
    chosen.note(asked=1, short=1)
    assert chosen.short_share == 1 / 5
    chosen.note(asked=45, short=24)
    assert chosen.short_share == 0.5
    chosen.note(asked=500, short=500)
    assert chosen.short_share == 0.8


def test_candidates_that_were_not_chosen_are_dropped_in_order():
    """And the queries with too few are named."""
    mask = np.array([True, False, True, True, False, True])  # the last is not that of row -1
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, -np.inf]], np.float32)
    rows = np.array([[3, 1, 0, 2], [4, 2, 1, -1]])
    kept_scores, kept_rows, short = keep_chosen(scores, rows, mask, 2)
    assert kept_rows.tolist() == [[3, 0], [2, -1]]
    np.testing.assert_allclose(kept_scores, np.float32([[0.9, 0.7], [0.8, -np.inf]]))
    assert short.tolist() == [1]
