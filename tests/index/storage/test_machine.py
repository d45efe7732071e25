"""A collection under any order of writes does what a dictionary does."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from index.collection import Collection, id_of
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.command import counted

FINGERPRINT, DIM = "f" * 64, 4
KEYS = st.lists(st.integers(0, 11).map(str), min_size=1, max_size=4, unique=True)


class Machine(RuleBasedStateMachine):
    """Writes, in any order; `model` has the vector and the turn of every key."""

    @initialize()
    def create(self):
        """Begin with an empty collection, and a reader that follows it."""
        self.directory = Path(tempfile.mkdtemp())
        self.rng = np.random.default_rng(0)
        self.model = {}
        self.turn = 0
        self.writer = CollectionWriter.create(
            self.directory / "c", name="made", fingerprint=FINGERPRINT, dim=DIM, threads=1
        )
        self.reader = Collection.open(self.directory / "c", threads=1)
        self.old = []

    def teardown(self):
        """Remove it."""
        if hasattr(self, "writer"):
            self.writer.close()
            shutil.rmtree(self.directory)

    def put(self, write, keys):
        """Write these keys with new vectors, and every third time without a column."""
        self.turn += 1
        vectors = self.rng.standard_normal((len(keys), DIM))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        columns = {"turn": [self.turn] * len(keys)} if self.turn % 3 else {}
        table = pa.table({"key": keys, "source": [f"s{self.turn % 2}"] * len(keys), **columns})
        write(table, vectors, fingerprint=FINGERPRINT)
        turn = self.turn if columns else None
        self.model |= {key: (vector, turn) for key, vector in zip(keys, vectors, strict=True)}

    @rule(keys=KEYS)
    def add(self, keys):
        """Add those that are not there."""
        if new := [key for key in keys if key not in self.model]:
            self.put(self.writer.add, new)

    @rule(keys=KEYS)
    def upsert(self, keys):
        """Add or replace."""
        self.put(self.writer.upsert, keys)

    @rule(keys=KEYS)
    def delete(self, keys):
        """Take out; the number of those that were there is right."""
        there = [key for key in keys if self.model.pop(key, None) is not None]
        assert self.writer.delete([id_of(key) for key in keys]) == len(there)

    @rule()
    def seal(self):
        """Make a segment of the delta."""
        self.writer.seal()

    @rule(all=st.booleans())
    def compact(self, all):
        """Merge some segments, or all into one."""
        self.writer.compact(all=all)
        if all:
            assert len(self.writer.collection.manifest.segments) == bool(self.model)

    @rule()
    def reopen(self):
        """Let go of the collection and open it again."""
        self.writer.close()
        self.writer = CollectionWriter.open(self.directory / "c", threads=1)

    @rule()
    def keep(self):
        """Keep a snapshot for later."""
        self.old.append((self.writer.collection, dict(self.model)))

    @rule()
    def check_files(self):
        """The files are sound, nothing lies about, and old snapshots are as they were."""
        found = verify(self.directory / "c")
        assert (found.faults, found.unknown) == ([], [])
        assert found.content == counted(len(self.model), "image")
        for old, model in self.old:
            self.check(old, model)

    @invariant()
    def agrees(self):
        """Writer and reader see what the dictionary has, at the same version."""
        if hasattr(self, "writer"):
            self.check(self.writer.collection, self.model)
            self.reader = self.reader.latest()
            self.check(self.reader, self.model)
            assert self.reader.version == self.writer.collection.version

    def check(self, collection, model):
        """A snapshot has what a dictionary has."""
        keys = sorted(model)
        assert sorted(collection.keys()) == keys
        assert (collection.count, len(collection.ids)) == (len(keys), len(keys))
        assert sum(collection.sources.values()) == len(keys)
        ids = [id_of(key) for key in keys]
        rows = collection.rows(ids)
        assert [(row.key, row.metadata.get("turn")) for row in rows] == [
            (key, model[key][1]) for key in keys
        ]
        np.testing.assert_array_equal(collection.ids[collection.row_numbers(ids)], ids)
        if keys:
            vectors = np.array([model[key][0] for key in keys])
            np.testing.assert_array_equal(collection.vectors(ids), vectors)
            self.check_search(collection, np.array(ids), vectors)

    def check_search(self, collection, ids, vectors):
        """Searches and filters find what NumPy does."""
        queries = vectors[:2]
        scores = queries @ vectors.T
        order = np.argsort(-scores, axis=1)
        for k in (1, 5):
            found = collection.search(queries, k, fingerprint=FINGERPRINT)
            np.testing.assert_array_equal(found.ids, ids[order[:, :k]])
        is_odd = collection.ids % 2 == 1
        odd = ", ".join(map(str, [-1, *collection.ids[is_odd]]))
        selection = collection.select(f"id in ({odd})")
        np.testing.assert_array_equal(selection.mask_N, is_odd)
        found = collection.search(queries, 5, fingerprint=FINGERPRINT, filter=selection)
        for query, found_ids in enumerate(found.ids):
            expected = [id_ for id_ in ids[order[query]] if id_ % 2][:5]
            assert found_ids[found_ids >= 0].tolist() == expected


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
