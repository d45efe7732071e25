"""Search parameters found by measuring, on an index whose recall is known beforehand."""

import itertools

import numpy as np
import pytest

from index.ann import sweep as sweeping
from index.ann.kinds import parse_kind
from index.ann.sweep import Queries, Sweep, exact_truth, margin, recalls, worst

COUNT, K = 200, 10
KIND = parse_kind("IVF64,PQ8x4fs,RFlat")


@pytest.fixture
def queries():
    """Queries whose ten neighbours have the scores 10 to 1."""
    truth = np.tile(np.arange(10, 0, -1, dtype=np.float32), (COUNT, 1))
    return Queries(vectors_QD=np.zeros((COUNT, 2), np.float32), truth_QK=truth, metric="cosine")


def sweep_of(found, queries, target):
    """Sweep an index that finds `found(nprobe, k_factor)` of ten for every query."""
    asked = []

    def search(queries_QD, k, parameters, threads):
        n = found(parameters["nprobe"], parameters["k_factor"])
        asked.append((parameters["nprobe"], parameters["k_factor"]))
        scores = np.full((len(queries_QD), k), -np.inf, np.float32)
        scores[:, :n] = np.arange(10, 10 - n, -1)
        return scores, np.zeros((len(queries_QD), k), np.int64)

    return Sweep(KIND, search, queries, k=K, target=target, threads=1), asked


def test_the_least_effort_of_every_factor_is_found(queries):
    """Of a small factor more effort is needed, and of the smallest none does."""

    def found(nprobe, factor):
        return 10 if nprobe >= 96 / factor and factor >= 3 else 8

    sweep, asked = sweep_of(found, queries, 0.9)
    reached = {p.parameters["k_factor"]: p.parameters["nprobe"] for p in sweep.run()}
    assert reached == {32: 3, 20: 6, 12: 8, 8: 12, 5: 24, 3: 32}
    assert asked[0] == (6, 32)  # nearer to the cheap end
    for larger, smaller in itertools.pairwise(sorted(reached, reverse=True)):
        assert min(n for n, factor in asked if factor == smaller) >= reached[larger]


def test_the_cheapest_setting_comes_first(queries, monkeypatch):
    """By its measured time, not by its effort."""
    monkeypatch.setattr(sweeping, "time_singles", lambda *asked: abs(asked[3]["k_factor"] - 12))
    sweep, _ = sweep_of(lambda nprobe, factor: 10, queries, 0.9)
    factors = [point.parameters["k_factor"] for point in sweep.run()]
    assert (factors[0], factors[-1]) == (12, 32)


def test_what_a_sample_may_err_by_is_asked_for_beyond_the_target(queries):
    """Half of the queries find nine of ten: .95, and twice .05 over the root of their number."""
    n_found = itertools.cycle([10, 9])

    def search(queries_QD, k, parameters, threads):
        scores = np.full((len(queries_QD), k), -np.inf, np.float32)
        for row in scores:
            n = next(n_found)
            row[:n] = np.arange(10, 10 - n, -1)
        return scores, np.zeros((len(queries_QD), k), np.int64)

    for target, is_reached in ((0.942, True), (0.944, False)):
        sweep = Sweep(KIND, search, queries, k=K, target=target, threads=1)
        assert bool(sweep.run()) == is_reached
        assert sweep.best.recall == pytest.approx(0.95)


def test_a_graph_keeps_no_fewer_candidates_than_are_asked_for(queries):
    """It could not find as many."""

    def search(queries_QD, k, parameters, threads):
        return queries.truth_QK[: len(queries_QD)], np.zeros((len(queries_QD), k), np.int64)

    sweep = Sweep(parse_kind("HNSW32"), search, queries, k=K, target=0.9, threads=1)
    assert [point.parameters for point in sweep.run()] == [{"efSearch": 12}]


def test_one_half_of_the_queries_chooses_and_the_other_confirms(queries):
    """Each with its own truth."""
    numbered = np.arange(2 * COUNT, dtype=np.float32).reshape(COUNT, 2)
    both = Queries(vectors_QD=numbered, truth_QK=numbered, metric="cosine")
    for number in (0, 1):
        half = both.half(number)
        np.testing.assert_array_equal(half.vectors_QD, numbered[number::2])
        np.testing.assert_array_equal(half.truth_QK, numbered[number::2])


def test_where_the_largest_factor_does_not_do_the_others_are_not_tried(queries):
    """Halving goes up to the greatest effort, once."""
    sweep, asked = sweep_of(lambda nprobe, factor: 8, queries, 0.9)
    assert sweep.run() == []
    assert {factor for _, factor in asked} == {32}
    assert max(nprobe for nprobe, _ in asked) == KIND.lists
    assert sweep.best.recall == 0.8


def test_the_next_stronger_setting(queries):
    """Of the same factor; none after the last."""
    sweep, _ = sweep_of(lambda nprobe, factor: 9 if nprobe == 48 else 8, queries, 0.9)
    point = sweep.measure({"nprobe": 24, "k_factor": 5})
    for nprobe in (32, 48, 64):
        point = sweep.stronger(point)
        assert point.parameters == {"nprobe": nprobe, "k_factor": 5}
    assert sweep.stronger(point) is None
    assert sweep.best.parameters == {"nprobe": 48, "k_factor": 5}


def test_equal_rows_count_whichever_is_found(queries):
    """What is as near as the k-th true neighbour is one."""
    found = np.tile(np.float32([10, 9, 8, 1, 1, 1, 1, 1, 1, 1]), (COUNT, 1))
    assert (recalls(found, queries, 10) == 1).all()
    assert (recalls(found, queries, 5) == 0.6).all()


def test_fewer_neighbours_than_asked_for_are_all_that_there_are():
    """Of three that exist three can be found."""
    truth = np.float32([[3, 2, 1, -np.inf]])
    queries = Queries(vectors_QD=np.zeros((1, 2), np.float32), truth_QK=truth, metric="cosine")
    assert recalls(np.float32([[3, 1, -np.inf, -np.inf]]), queries, 4).tolist() == [2 / 3]


def test_margins_shrink_with_the_root_of_the_number():
    """Two standard errors of a mean."""
    half = np.array([0.8, 1.0] * 50)
    assert margin(half, 2.0) == pytest.approx(2 * 0.1 / 10)
    assert margin(np.ones(9), 2.0) == 0
    assert worst(np.array([0.0, 0.5] + [1.0] * 38)) == 0.25


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_truth_is_that_of_the_rows_that_are_not_held_back(metric, monkeypatch):
    """By a sort of all scores; of a block all rows may be held back, or all but a few."""
    monkeypatch.setattr(sweeping, "BUILD_BLOCK", 70)
    vectors = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    rows = np.concatenate([np.arange(0, 140, 3), [211], np.arange(215, 280)])
    queries = vectors[:20:2]
    if metric == "cosine":
        scores = queries @ vectors[rows].T
    else:
        scores = -np.square(queries[:, None] - vectors[rows][None]).sum(axis=2)
    truth = exact_truth(queries, vectors, 5, rows_M=rows, metric=metric, threads=1)
    expected = np.sort(scores, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(truth.truth_QK, expected, rtol=1e-4, atol=1e-4)


def test_far_rows_are_not_found_far_from_the_origin():
    """What is equal but for rounding does not depend on where the vectors lie."""
    queries = Queries(
        vectors_QD=np.full((1, 16), 1000, np.float32),
        truth_QK=np.float32([[-10, -12, -15]]),
        metric="euclidean",
    )
    assert recalls(np.float32([[-10, -20, -40]]), queries, 3).tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize("length", [3e-3, 1.0, 300.0])
def test_a_row_at_twice_the_distance_is_not_found_whatever_the_scale(length):
    """Equal but for rounding counts; distances of short vectors are small, and no less apart."""
    vectors = np.zeros((1, 4), np.float32)
    vectors[0, 0] = length
    truth = -(length**2) * np.float32([[0.1, 0.2, 0.3]])
    queries = Queries(vectors_QD=vectors, truth_QK=truth, metric="euclidean")
    assert recalls(truth * (1 + 1e-6), queries, 3).tolist() == [1]
    assert recalls(2 * truth, queries, 3).tolist() == pytest.approx([1 / 3])
