"""Whether what readers were answered while a writer wrote is what some current snapshot holds.

A write becomes visible at some moment between its call and its return. So a call of a reader may
be answered from any state between the last write that had returned when it began, and the last
that had been called when it ended; an answer is right when it equals an exact search over one of
those, computed here anew, in float64, from the ledger alone.

Equal means: as many hits as there can be, each a living image of that state in that state's
version, with its own score, and the scores those of the nearest, all within 1e-5. Where two images
are that close to equally near, either may stand.

Shapes: A answers, K neighbours, D dimensions, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.ledger import DIM, Write, vectors_of
from index.collection import id_of

TOLERANCE = 1e-5
"""Of a score: float32 sums of 16 products are within 1e-6."""


@dataclass(frozen=True, kw_only=True)
class TimedWrite:
    """A write that was acknowledged, with the moments of its call and of its return."""

    write: Write
    before_s: float
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one reader was answered, a query a call.

    Attributes:
        before_s: (A,) when each call began.
        after_s: (A,) when it ended.
        queries_AD: (A, D) float32, unit length.
        ids_AK: (A, K) int64, -1 where there were fewer.
        scores_AK: (A, K) float32.
        versions_AK: (A, K) int64, what the hits' labels say; -1 where there were fewer.
    """

    before_s: NDArray[np.float64]
    after_s: NDArray[np.float64]
    queries_AD: NDArray[np.float32]
    ids_AK: NDArray[np.int64]
    scores_AK: NDArray[np.float32]
    versions_AK: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.before_s)

    def save(self, file: Path) -> None:
        """Write them to an .npz file."""
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, file: Path) -> Answers:
        """Read what `save` wrote."""
        with np.load(file) as arrays:
            return cls(**arrays)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the answers compare.

    Attributes:
        answers: how many there were.
        wrong: of those that equal no search over a state that was current.
        first_wrong: the first of those, in words.
        unsettled: answers to which, by the clock, states of different content might have led.
        states: how many there were.
    """

    answers: int
    wrong: int
    first_wrong: str
    unsettled: int
    states: int


class History:
    """Every state that a collection went through, from its writes."""

    def __init__(self, writes: Sequence[TimedWrite]) -> None:
        """Lay out each version of each image with the states in which it lived."""
        self.before_s = np.array([write.before_s for write in writes])
        self.after_s = np.array([write.after_s for write in writes])
        self.count = len(writes) + 1
        changes = [bool(write.write.put or write.write.taken) for write in writes]
        self.contents = np.cumsum([False, *changes])  # of states: what compacts changes nothing
        living: dict[str, int] = {}
        rows: list[tuple[str, int]] = []
        born: list[int] = []
        died: list[int] = []
        for state, timed in enumerate(writes, start=1):
            for key in (*timed.write.taken, *timed.write.put):
                if key in living:
                    died[living.pop(key)] = state
            for row in timed.write.put.items():
                living[row[0]] = len(rows)
                rows.append(row)
                born.append(state)
                died.append(self.count)
        self._born, self._died = np.array(born), np.array(died)
        self._ids = np.array([id_of(key) for key, _ in rows], np.int64)
        self._versions = np.array([version for _, version in rows], np.int64)
        blocks = [vectors_of(dict([row])) for row in rows]
        self._vectors_ND = np.concatenate(blocks or [np.empty((0, DIM), np.float32)])

    def candidates(self, answers: Answers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the first and the last state that may have been current during each call."""
        first_A = np.searchsorted(self.after_s, answers.before_s, "left")
        last_A = np.searchsorted(self.before_s, answers.after_s, "right")
        return first_A, last_A

    def agree(self, state: int, answers: Answers, which: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say of some answers whether each equals an exact search over a state."""
        rows = np.flatnonzero((self._born <= state) & (self._died > state))
        ids_N = self._ids[rows]
        order = np.argsort(ids_N)
        ids_N, versions_N = ids_N[order], self._versions[rows][order]
        vectors_ND = self._vectors_ND[rows][order].astype(np.float64)
        ids_AK, scores_AK = answers.ids_AK[which], answers.scores_AK[which]
        k_found = min(ids_AK.shape[1], len(ids_N))
        is_missing = (ids_AK[:, k_found:] == -1).all(axis=1)
        if not k_found:
            return is_missing
        ids_AK, scores_AK = ids_AK[:, :k_found], scores_AK[:, :k_found]
        places_AK = np.minimum(np.searchsorted(ids_N, ids_AK), len(ids_N) - 1)
        lives = (ids_N[places_AK] == ids_AK).all(axis=1)
        is_version = (versions_N[places_AK] == answers.versions_AK[which, :k_found]).all(axis=1)
        is_once = (np.diff(np.sort(ids_AK, axis=1), axis=1) > 0).all(axis=1)
        all_AN = answers.queries_AD[which].astype(np.float64) @ vectors_ND.T
        own_AK = np.take_along_axis(all_AN, places_AK, 1)
        nearest_AK = -np.sort(np.partition(-all_AN, k_found - 1, axis=1)[:, :k_found], axis=1)
        is_own = (np.abs(own_AK - scores_AK) < TOLERANCE).all(axis=1)
        is_nearest = (np.abs(nearest_AK - scores_AK) < TOLERANCE).all(axis=1)
        verdict: NDArray[np.bool_] = is_missing & lives & is_version & is_once & is_own & is_nearest
        return verdict


def judge(writes: Sequence[TimedWrite], answers: Sequence[Answers]) -> Verdict:
    """Hold every answer against every state that may have been current during its call."""
    history = History(writes)
    wrong = unsettled = 0
    first_wrong = ""
    for reader, own in enumerate(answers):
        first_A, last_A = history.candidates(own)
        unsettled += int((history.contents[last_A] > history.contents[first_A]).sum())
        is_right = np.zeros(len(own), bool)
        for state in range(history.count):
            which = np.flatnonzero((first_A <= state) & (state <= last_A) & ~is_right)
            if which.size:
                is_right[which] = history.agree(state, own, which)
        bad = np.flatnonzero(~is_right)
        wrong += bad.size
        if bad.size and not first_wrong:
            at = int(bad[0])
            first_wrong = (
                f"reader {reader}, call {at}: ids {own.ids_AK[at].tolist()} are the nearest of "
                f"none of the states {first_A[at]} to {last_A[at]}"
            )
    return Verdict(
        answers=sum(map(len, answers)),
        wrong=wrong,
        first_wrong=first_wrong,
        unsettled=unsettled,
        states=history.count,
    )
