"""How kinds are tried out: which setting is taken, on which queries, and what is said of it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from index.ann import trials
from index.ann.candidates import Candidate
from index.ann.sweep import Point
from index.ann.trials import Bench, Goal

COUNT, DIM, K = 400, 8, 10


@pytest.fixture
def vectors(unit_rows):
    """Unit vectors, of which the first 80 ask."""
    return unit_rows(COUNT, DIM)


@pytest.fixture
def make_bench(vectors, tmp_path):
    """Give a function that makes a bench for a goal."""

    def make(recall, queries=vectors[:80]):
        goal = Goal(recall=recall, k=K, threads=1)
        return Bench(vectors, goal, tmp_path, "cosine", queries, np.empty(0, np.int64))

    return make


def points(*efforts):
    """Settings of these efforts."""
    return [Point(parameters={"e": e}, recall=1.0, margin=0.0, query_s=0.0) for e in efforts]


def confirmed(bench, n_found, reached=(8,)):
    """Give the effort that holds of those that were reached, and of the next ones after each.

    Of its ten nearest, a query of number n finds `n_found(effort, n)`; numbers start again with
    every search.
    """

    def search(queries_QD, k, parameters, threads):
        scores, rows = bench._exact(queries_QD, k, {}, threads)
        for number, row in enumerate(scores):
            row[n_found(parameters["e"], number) :] = -np.inf
        return scores, rows

    sweep = SimpleNamespace(
        run=lambda: points(*reached), stronger=lambda point: points(point.parameters["e"] + 1)[0]
    )
    point = bench._confirm(search, sweep)
    return None if point is None else point.parameters["e"]


def test_a_setting_that_does_not_hold_makes_room_for_the_next(make_bench):
    """Up to the third of a factor of re-ranking; then for the next factor."""
    bench = make_bench(0.9)
    assert confirmed(bench, lambda effort, _: min(effort, 10)) == 9
    assert confirmed(bench, lambda effort, _: effort, reached=(7,)) == 9
    assert confirmed(bench, lambda effort, _: effort, reached=(6,)) is None
    assert confirmed(bench, lambda effort, _: effort, reached=(1, 8)) == 9


def test_a_setting_holds_with_a_margin(make_bench):
    """Half of 40 queries find nine of ten: .95, and .05 over the root of their number."""
    for recall, held in ((0.942, 8), (0.943, None)):
        assert confirmed(make_bench(recall), lambda _, number: 9 + number % 2) == held


def test_the_queries_that_choose_do_not_confirm(make_bench, vectors):
    """A setting may suit them alone."""
    bench = make_bench(0.9)
    choosing = {row.tobytes() for row in bench._choosing.vectors_QD}
    confirming = {row.tobytes() for row in bench._confirming.vectors_QD}
    assert (len(choosing), len(confirming), len(choosing & confirming)) == (40, 40, 0)

    def search(queries_QD, k, parameters, threads):
        scores, rows = bench._exact(queries_QD, k, {}, threads)
        scores[[row.tobytes() in confirming for row in queries_QD]] = -np.inf
        return scores, rows

    assert not bench._holds(search, points(1)[0])


def test_queries_that_come_in_turns_choose_and_confirm_alike(make_bench, vectors):
    """Such as images, each followed by its mirrored copy."""
    bench = make_bench(0.9, np.repeat(vectors[:2][None], 40, axis=0).reshape(-1, DIM))
    for half in (bench._choosing, bench._confirming):
        assert len(np.unique(half.vectors_QD, axis=0)) == 2


def test_settings_are_of_ten_neighbours_and_scaled_to_others():
    """As a segment searches."""
    asked = []
    index = SimpleNamespace(
        scale=lambda parameters, k_of, k: {**parameters, "scaled": (k_of, k)},
        search=lambda queries_QD, k, *, parameters, threads: asked.append((k, parameters)),
    )
    trials._searcher(index)(np.zeros((1, DIM), np.float32), 100, {"efSearch": 16}, 1)
    assert asked == [(100, {"efSearch": 16, "scaled": (10, 100)})]


def test_writing_counts_as_building(make_bench, monkeypatch, caplog):
    """And what came of it is said."""
    caplog.set_level("INFO", logger="horace.index")
    ticks = itertools.count()
    write_index = trials.write_index

    def write_slowly(*arguments):
        for _ in range(1000):
            next(ticks)
        write_index(*arguments)

    monkeypatch.setattr(trials, "write_index", write_slowly)
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=lambda: next(ticks))
    monkeypatch.setattr(trials, "time", clock)
    candidate = Candidate(factory="HNSW16", build_bytes=0, search_bytes=0, fits=True)
    trial = make_bench(0.5).try_out(candidate, 0)
    assert trial.build_s >= 1000
    assert " a query: reaches it" in caplog.text
