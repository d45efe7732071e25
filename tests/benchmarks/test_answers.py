import dataclasses

import numpy as np
import pytest

from benchmarks.answers import Answers, TimedWrite, judge
from benchmarks.ledger import DIM, Write, vectors_of
from index.collection import id_of

K = 3
STATES = [{"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 2, "c": 1, "d": 1}, {"a": 1, "c": 1}]
WRITES = [
    TimedWrite(write=Write(kind="add", put=STATES[0]), before_s=1, after_s=2),
    TimedWrite(write=Write(kind="upsert", put={"b": 2}), before_s=3, after_s=4),
    TimedWrite(write=Write(kind="delete", taken=("b", "d")), before_s=5, after_s=6),
    TimedWrite(write=Write(kind="compact", all=True), before_s=7, after_s=8),
]


def answer(state, *, before_s, after_s, seed=0):
    """What an exact search over a state gives."""
    query_D = np.random.default_rng(seed).standard_normal(DIM)
    query_D = (query_D / np.linalg.norm(query_D)).astype(np.float32)
    keys = list(state)
    scores = vectors_of(state) @ query_D if keys else np.empty(0)
    order = np.argsort(-scores)[:K]
    pad = (0, K - len(order))
    found = [keys[place] for place in order]
    return Answers(
        before_s=np.array([before_s]),
        after_s=np.array([after_s]),
        queries_AD=query_D[None],
        ids_AK=np.pad([id_of(key) for key in found], pad, constant_values=-1)[None].astype(int),
        scores_AK=np.pad(scores[order], pad, constant_values=-np.inf)[None],
        versions_AK=np.pad([state[key] for key in found], pad, constant_values=-1)[None].astype(
            int
        ),
    )


@pytest.mark.parametrize(
    ("state", "before_s", "after_s"),
    [
        ({}, 0.1, 0.9),
        ({}, 0.1, 1.5),
        (STATES[0], 2.1, 2.9),
        (STATES[0], 2.1, 3.5),
        (STATES[1], 2.1, 3.5),
        (STATES[0], 2.1, 9.9),
        (STATES[1], 2.1, 9.9),
        (STATES[2], 6.1, 6.2),
        (STATES[2], 6.1, 9.9),
    ],
)
def test_an_answer_of_a_state_that_was_current_is_right(state, before_s, after_s):
    """Any that the clock allows, also of a collection with fewer images than are asked for."""
    verdict = judge(WRITES, [answer(state, before_s=before_s, after_s=after_s)])
    assert (verdict.answers, verdict.wrong, verdict.states) == (1, 0, 5)


@pytest.mark.parametrize(
    ("state", "before_s", "after_s"),
    [
        ({}, 2.1, 2.9),  # what was acknowledged is not seen
        (STATES[0], 0.1, 0.9),  # seen before it was written
        (STATES[0], 4.1, 4.9),  # of before the upsert
        (STATES[1], 2.1, 2.9),  # of after it
        (STATES[1], 6.1, 9.9),  # what was deleted is seen
        ({"a": 1, "c": 1, "d": 1}, 4.5, 9.9),  # half of a delete
        ({"a": 1, "b": 1, "c": 1}, 4.5, 9.9),
    ],
)
def test_an_answer_of_another_state_is_wrong(state, before_s, after_s):
    """Too old, too new, or of half a write."""
    wrong = sum(
        judge(WRITES, [answer(state, before_s=before_s, after_s=after_s, seed=seed)]).wrong
        for seed in range(20)
    )
    assert wrong >= 10  # K of four images do not always show the fourth
    verdict = judge(WRITES, [answer({}, before_s=2.1, after_s=2.9)])
    assert "the nearest of none of the states 1 to 1" in verdict.first_wrong


def change(answers, name, at, value):
    """Put another value into an answer."""
    array = getattr(answers, name).copy()
    array[0, at] = value
    return dataclasses.replace(answers, **{name: array})


def test_an_answer_with_anything_wrong_in_it_is_wrong():
    """An id, its version, its score, one twice, one too few."""
    right = answer(STATES[0], before_s=2.1, after_s=2.9)
    assert judge(WRITES, [right]).wrong == 0
    ids, scores = right.ids_AK[0], right.scores_AK[0]
    for wrong in (
        change(right, "ids_AK", 0, 12345),
        change(right, "ids_AK", 1, ids[0]),
        change(right, "ids_AK", 2, -1),
        change(right, "versions_AK", 0, 2),
        change(right, "scores_AK", 0, scores[0] + 1e-3),
        change(right, "scores_AK", 1, scores[0]),
    ):
        assert judge(WRITES, [wrong]).wrong == 1
    twice = change(change(right, "ids_AK", 1, ids[0]), "scores_AK", 1, scores[0])
    assert judge(WRITES, [right, twice]).wrong == 1
