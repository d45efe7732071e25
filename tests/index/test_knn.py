import math

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from index import knn
from index.knn import knn_search, merge_neighbours, weighted_knn_vote
from models.errors import UsageError

SMALL_INTS = st.integers(-2, 2)


def direct_search(queries, bank, k):
    """Sort every inner product: falling, and among equals by the row."""
    products = queries @ bank.T
    rows = np.stack([np.lexsort((np.arange(len(bank)), -line)) for line in products])[:, :k]
    return np.take_along_axis(products, rows, axis=1), rows


@st.composite
def banks(draw):
    """Integer vectors: their products are exact, and full of ties."""
    n, dim, n_queries = draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 25))
    bank = draw(arrays(np.float32, (n, dim), elements=SMALL_INTS))
    queries = draw(arrays(np.float32, (n_queries, dim), elements=SMALL_INTS))
    return queries, bank, draw(st.integers(1, 50))


@given(banks())
def test_search_is_a_sort_of_all_products(case):
    """Exact means exact: ties go to the lower row, what does not exist is -1 and -inf."""
    queries, bank, k = case
    scores, rows = knn_search(queries, bank, k)
    expected_scores, expected_rows = direct_search(queries, bank, k)
    n_found = min(k, len(bank))
    assert rows.shape == scores.shape == (len(queries), k)
    np.testing.assert_array_equal(rows[:, :n_found], expected_rows)
    np.testing.assert_array_equal(scores[:, :n_found], expected_scores)
    assert (rows[:, n_found:] == -1).all()
    assert (scores[:, n_found:] == -np.inf).all()


@given(banks(), st.integers(0, 40))
def test_merged_banks_are_one_bank(case, cut):
    """Searching in two pieces and merging gives what searching the whole does."""
    queries, bank, k = case
    cut = min(cut, len(bank))
    whole = knn_search(queries, bank, k)
    left, right = knn_search(queries, bank[:cut], k), knn_search(queries, bank[cut:], k)
    shifted = np.where(right[1] < 0, -1, right[1] + cut)
    merged = merge_neighbours([left, (right[0], shifted)], k)
    np.testing.assert_array_equal(merged[0], whole[0])
    np.testing.assert_array_equal(merged[1], whole[1])


def test_search_of_many_real_vectors_agrees_with_numpy(unit_rows):
    """The blocked path of faiss gives the same neighbours as a plain product."""
    bank, queries = unit_rows(3000, 24), unit_rows(200, 24, seed=1)
    scores, rows = knn_search(queries, bank, 150, threads=2)
    expected_scores, expected_rows = direct_search(queries, bank, 150)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (rows == expected_rows).mean() > 0.999  # neighbours within rounding may swap


def test_a_collapsed_bank_is_searched_all_the_same():
    """A thousand copies of one vector: the first k rows win."""
    bank = np.ones((1000, 4), np.float32)
    _, rows = knn_search(np.ones((30, 4), np.float32), bank, 5)
    assert (rows == np.arange(5)).all()


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(k):
    """There is no such thing as no neighbours."""
    with pytest.raises(UsageError, match=f"k: expected at least 1, found {k}"):
        knn_search(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), k)


def test_queries_have_the_dimension_of_the_bank():
    """Faiss would read beyond the array."""
    with pytest.raises(UsageError, match=r"queries: expected \(Q, 2\), found \(1, 3\)"):
        knn_search(np.ones((1, 3), np.float32), np.ones((3, 2), np.float32), 1)


@given(
    arrays(np.float32, (6, 7), elements=st.floats(-1, 1, width=32)),
    arrays(np.int64, (6, 7), elements=st.integers(-1, 3)),
    st.integers(1, 9),
    st.floats(0.05, 2),
)
def test_vote_is_the_sum_of_exponentials(similarities, labels, k, temperature):
    """The paper's formula, up to a factor a query: exp(s / T) summed by class."""
    scores = weighted_knn_vote(similarities, labels, k=k, temperature=temperature, n_classes=4)
    for query in range(6):
        expected = [0.0] * 4
        for similarity, label in list(zip(similarities[query], labels[query], strict=True))[:k]:
            if label >= 0:
                expected[label] += math.exp(float(similarity) / temperature)
        factor = math.exp(float(similarities[query][:k].max()) / temperature)
        np.testing.assert_allclose(scores[query] * factor, expected, rtol=1e-5, atol=1e-30)


def test_padding_has_no_vote():
    """A list without neighbours gives no class a vote, and a small T does not overflow."""
    similarities = np.array([[0.5, -np.inf], [-np.inf, -np.inf]], np.float32)
    labels = np.array([[1, -1], [-1, -1]])
    scores = weighted_knn_vote(similarities, labels, k=2, temperature=1e-4, n_classes=2)
    np.testing.assert_array_equal(scores, [[0, 1], [0, 0]])


def test_a_search_gives_the_thread_count_back():
    """OpenMP's count is shared with whatever else the thread runs, such as torch."""
    before = faiss.omp_get_max_threads()
    bank = np.eye(4, dtype=np.float32)
    try:
        faiss.omp_set_num_threads(2)
        knn_search(bank, bank, 2, threads=1)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("n_queries", [3, 50])
def test_some_rows_of_a_bank_alone_with_ties_by_row(n_queries, monkeypatch):
    """As if the others were not there, whether rows are read in place or copied in blocks."""
    monkeypatch.setattr("index.knn.BLOCK_BYTES", 4 * 8 * 20)
    rng = np.random.default_rng(0)
    bank = rng.integers(-1, 2, (300, 8)).astype(np.float32)  # few values: many ties
    queries = rng.integers(-1, 2, (n_queries, 8)).astype(np.float32)
    rows = np.flatnonzero(rng.random(300) < 0.5)
    scores, found = knn_search(queries, bank, 12, rows_M=rows)
    expected = rows[np.argsort(-(queries @ bank[rows].T), axis=1, kind="stable")[:, :12]]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, np.einsum("qd,qkd->qk", queries, bank[expected]))
    _, few = knn_search(queries, bank, 12, rows_M=rows[:5])
    assert (few[:, 5:] == -1).all()
    assert (np.sort(few[:, :5]) == rows[:5]).all()


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_of_some_rows_that_tie_no_other_row_is_scored(n_queries, metric, monkeypatch):
    """As of copies of an image under a filter: the bank may be of any size."""
    widths, all_scores = [], knn._all_scores

    def spy(*arguments):
        scores = all_scores(*arguments)
        widths.append(scores.shape[1])
        return scores

    monkeypatch.setattr(knn, "_all_scores", spy)
    monkeypatch.setattr(knn, "BLOCK_BYTES", 4 * 8 * 20)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(3000, 70, replace=False))
    bank = rng.standard_normal((3000, 8)).astype(np.float32)
    bank[rows] = np.eye(8, dtype=np.float32)[np.arange(70) % 8]
    queries = bank[rows[:1]] + rng.uniform(0, 0.1, (n_queries, 8)).astype(np.float32)
    _, found = knn_search(queries, bank, 5, rows_M=rows, metric=metric)
    assert (found == rows[:40:8]).all()
    assert set(widths) == {70}


@pytest.mark.parametrize("n_queries", [1, 64, 300])
@pytest.mark.parametrize(("count", "n_copies"), [(40, 3), (1003, 3), (1003, 30)])
def test_copies_of_one_image_tie_wherever_they_lie(unit_rows, count, n_copies, n_queries):
    """A product of matrices rounds a row's score by its place; the lowest rows come first still."""
    rng, bank = np.random.default_rng(0), unit_rows(count, 512)
    copies = np.sort(rng.choice(count, n_copies, replace=False))
    bank[copies] = bank[copies[0]]
    queries = bank[copies[0]] + 0.03 * rng.normal(size=(n_queries, 512)).astype(np.float32)
    scores, rows = knn_search(queries, bank, 10)
    n_found = min(10, n_copies)
    assert (rows[:, :n_found] == copies[:n_found]).all()
    assert (scores[:, :n_found] == scores[:, :1]).all()
    for query in (0, n_queries - 1):  # alone it has the same
        alone_scores, alone = knn_search(queries[query : query + 1], bank, 10)
        np.testing.assert_array_equal(alone[0], rows[query])
        np.testing.assert_array_equal(alone_scores[0], scores[query])


@pytest.mark.parametrize("n_queries", [3, 40])
@pytest.mark.parametrize("rows", [None, np.arange(0, 60, 2)])
def test_by_distance_the_nearest_come_first(n_queries, rows):
    """Scores are minus the squared distance; of equal rows the lower comes first."""
    rng = np.random.default_rng(0)
    bank = np.repeat(rng.integers(-9, 9, (15, 8)), 4, axis=0).astype(np.float32)  # exact sums
    queries = rng.integers(-9, 9, (n_queries, 8)).astype(np.float32)
    scores, found = knn_search(queries, bank, 6, rows_M=rows, metric="euclidean")
    chosen = np.arange(60) if rows is None else rows
    expected = -np.square(queries[:, None] - bank[chosen][None]).sum(axis=2)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(found, chosen[order])
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1))


@pytest.mark.parametrize(("n_queries", "count", "dim"), [(1, 500, 16), (12, 300, 4096)])
def test_distances_far_from_the_origin_are_exact(n_queries, count, dim):
    """A query alone and many: of lengths and products float32 would leave nothing there."""
    rng = np.random.default_rng(0)
    bank = (1000 + rng.standard_normal((count, dim))).astype(np.float32)
    queries = (1000 + rng.standard_normal((n_queries, dim))).astype(np.float32)
    scores, found = knn_search(queries, bank, 10, metric="euclidean")
    expected = -np.square(queries[:, None].astype(np.float64) - bank[None]).sum(axis=2)
    np.testing.assert_array_equal(found, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(scores, np.take_along_axis(expected, found, 1), rtol=1e-5)


def test_a_metric_that_there_is_not_is_refused():
    """With the two that there are."""
    with pytest.raises(UsageError, match="metric: expected cosine or euclidean, found manhattan"):
        knn_search(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1, metric="manhattan")
