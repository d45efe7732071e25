import dataclasses
from functools import partial

import numpy as np
import pytest

from index.collection import Collection
from index.ranking import Ranking, pick_diverse, search_range
from index.storage.manifest import read_manifest, write_manifest
from index.storage.writer import CollectionWriter
from models.errors import UsageError

FINGERPRINT = "f" * 64


def mmr(query, vectors, k, diversity):
    """The paper's formula, one candidate at a time."""
    picked = [int(np.argmax(vectors @ query))]
    while len(picked) < k:
        values = {
            c: (1 - diversity) * float(vectors[c] @ query)
            - diversity * max(float(vectors[c] @ vectors[p]) for p in picked)
            for c in range(len(vectors))
            if c not in picked
        }
        picked.append(max(values, key=values.get))
    return picked


@pytest.mark.parametrize("diversity", [0.1, 0.5, 1.0])
def test_maximal_marginal_relevance_is_the_papers(unit_rows, diversity):
    """The nearest first, then the best of near and unlike."""
    vectors, query = unit_rows(40, 8), unit_rows(1, 8, seed=1)[0]
    scores = vectors @ query
    found = pick_diverse(scores, vectors, 12, diversity=diversity)
    assert found.tolist() == mmr(query, vectors, 12, diversity)
    assert pick_diverse(scores[:3], vectors[:3], 12, diversity=diversity).shape == (3,)
    assert pick_diverse(scores[:0], vectors[:0], 12, diversity=diversity).shape == (0,)


def test_diversity_shows_one_of_many_copies(tmp_path, make_collection, unit_rows):
    """Ten copies of the nearest image take one place, not ten."""
    others = unit_rows(40, 32)
    query = others[0]
    vectors = np.concatenate([np.repeat(query[None], 10, axis=0), others[1:]])
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        ranking = Ranking(diversity=0.7)
        pool = collection.search(query[None], ranking.pool(8), fingerprint=FINGERPRINT)
        found = ranking.rank(collection, pool, 8)
        assert found.ids.shape == (1, 8)
        assert np.isclose(found.scores, 1, atol=1e-5).sum() == 1
        plain = Ranking().rank(collection, pool, 8)
        assert np.isclose(plain.scores, 1, atol=1e-5).sum() == 8


def test_what_is_too_far_is_dropped_before_anything_is_picked(tmp_path, make_collection, unit_rows):
    """The rest is padding."""
    vectors, queries = unit_rows(60, 8), unit_rows(3, 8, seed=1)
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        for ranking in (Ranking(min_score=0.5), Ranking(min_score=0.5, diversity=0.3)):
            pool = collection.search(queries, ranking.pool(10), fingerprint=FINGERPRINT)
            found = ranking.rank(collection, pool, 10)
            near = np.minimum((queries @ vectors.T >= 0.5).sum(axis=1), 10)
            assert (found.ids >= 0).sum(axis=1).tolist() == near.tolist()
            assert (found.scores[found.ids >= 0] >= 0.5).all()
            assert np.isneginf(found.scores[found.ids < 0]).all()


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_a_range_search_finds_all_within_the_range(tmp_path, make_collection, unit_rows, factory):
    """However many that are: more than are asked for at first, or none."""
    vectors, queries = unit_rows(900, 4), unit_rows(5, 4, seed=1)
    queries = np.concatenate([queries, queries[:1]])
    with Collection.open(make_collection(tmp_path, vectors, factory=factory)) as collection:
        for least in (-1.0, 0.2, 0.9, 0.9999):
            found = search_range(
                collection, queries, least, fingerprint=FINGERPRINT, exact=factory != "Flat"
            )
            counts = (queries @ vectors.T >= least).sum(axis=1)
            assert (found.ids >= 0).sum(axis=1).tolist() == counts.tolist()
            assert found.ids.shape[1] == counts.max()
            assert all((np.diff(row[row > -2]) <= 0).all() for row in found.scores)
        few = search_range(collection, queries, 0.2, fingerprint=FINGERPRINT, limit=7)
        assert few.ids.shape == (6, 7)
        filtered = search_range(
            collection, queries, -1, fingerprint=FINGERPRINT, filter="label = '1'"
        )
        assert filtered.ids.shape == (6, 300)
        without = np.stack([collection.ids[:300]] * 6)  # more than are asked for at first
        rest = search_range(
            collection, queries, -1, fingerprint=FINGERPRINT, without_QW=without, exact=True
        )
        assert rest.ids.shape == (6, 600)
        assert not np.isin(rest.ids, without).any()
        every = np.stack([collection.ids] * 6)
        empty = search_range(collection, queries, -1, fingerprint=FINGERPRINT, without_QW=every)
        assert empty.ids.shape == (6, 0)
        none = search_range(collection, queries[:0], 0.5, fingerprint=FINGERPRINT)
        assert none.ids.shape == (0, 0)


INDEXES = {
    "HNSW32": {"efSearch": 64},
    "HNSW32,SQ8,RFlat": {"efSearch": 64, "k_factor": 1},
    "IVF32,PQ8x4fs,RFlat": {"nprobe": 8, "k_factor": 8},
    "RR,IVF32,RaBitQ,RFlat": {"nprobe": 8, "k_factor": 8},
}


LISTS = [factory for factory, parameters in INDEXES.items() if "nprobe" in parameters]


def test_a_range_beyond_what_an_index_gives_is_searched_exactly(
    tmp_path, make_collection, unit_rows, monkeypatch
):
    """Images that are left out are asked for, too."""
    path = make_collection(tmp_path, unit_rows(300, 8))
    search, asked = Collection.search, []

    def spy(collection, queries, k, **options):
        asked.append(options["exact"])
        return search(collection, queries, k, **options)

    monkeypatch.setattr(Collection, "search", spy)
    monkeypatch.setattr(Collection, "max_neighbours", 64)
    with Collection.open(path) as collection:
        query = collection.vectors(collection.ids[:1])
        for without in (None, collection.ids[None, :1]):
            search_range(collection, query, 0.99, fingerprint=FINGERPRINT, without_QW=without)
    assert asked == [False, True]


@pytest.fixture(params=INDEXES)
def clustered(request, tmp_path, make_collection):
    """3,000 vectors around twenty centres behind an index, and fifty queries of the same kind."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 16))
    rows = centres[rng.integers(0, 20, 3050)] + 0.5 * rng.standard_normal((3050, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    path = make_collection(tmp_path / "c", rows[:3000], factory=request.param)
    manifest = read_manifest(path)
    entry = dataclasses.replace(manifest.segments[0], parameters=INDEXES[request.param])
    write_manifest(path, dataclasses.replace(manifest, segments=(entry,)))
    with Collection.open(path) as collection:
        yield collection, rows[3000:]


def test_a_range_search_through_an_index_finds_nearly_all(clustered):
    """Ranges of less than is asked for at first, and of more; with effort no fewer."""
    collection, queries = clustered
    for least in (0.9, 0.8, 0.5):
        search = partial(search_range, collection, queries, least, fingerprint=FINGERPRINT)
        exact = search(exact=True)

        def recall(found, exact=exact):
            pairs = zip(exact.ids, found.ids, strict=True)
            n_found = sum(np.isin(e[e >= 0], f).sum() for e, f in pairs)
            return n_found / (exact.ids >= 0).sum()

        plain = recall(search())
        assert plain >= 0.95
        assert recall(search(effort=500)) >= plain - 0.005
        assert recall(search(effort=3000)) >= 0.99


@pytest.mark.parametrize("clustered", LISTS, indirect=True)
def test_lists_of_which_one_is_looked_into_give_all_that_is_asked_for(clustered):
    """A row that no list gave is looked for among all: the range does not end where a list does."""
    collection, queries = clustered
    few = {"nprobe": 1}
    found = collection.search(queries, 600, fingerprint=FINGERPRINT, parameters=few)
    assert (found.ids >= 0).all()
    collection.manifest.segments[0].parameters["nprobe"] = 1
    found = search_range(collection, queries[:5], -1, fingerprint=FINGERPRINT)
    assert found.ids.shape[1] == 3000


def test_a_range_of_one_finds_the_query_itself(tmp_path, make_collection, unit_rows):
    """float32 rounds the cosine of a vector with itself below 1, as often as not."""
    vectors = unit_rows(100, 512)
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        found = search_range(collection, vectors, 1, fingerprint=FINGERPRINT)
        assert (found.ids[:, 0] == collection.ids).all()


def test_the_effort_of_a_range_is_that_of_each_round(clustered, monkeypatch):
    """Of 64 neighbours as many as were said, of 512 four for each."""
    collection, queries = clustered
    asked, parameters_of = [], collection.effort_parameters

    def effort_parameters(candidates, k):
        asked.append((candidates, k))
        return parameters_of(candidates, k)

    monkeypatch.setattr(collection, "effort_parameters", effort_parameters)
    search_range(collection, queries, -1, fingerprint=FINGERPRINT, limit=900, effort=500)
    assert asked == [(500, 64), (2048, 512), (3600, 900)]


def test_a_range_of_a_collection_whose_images_were_deleted(clustered):
    """Finds nothing, with effort and without."""
    collection, queries = clustered
    with CollectionWriter.open(collection.path) as writer:
        writer.delete(collection.ids)
        for effort in (None, 50):
            found = search_range(
                writer.collection, queries, 0.5, fingerprint=FINGERPRINT, effort=effort
            )
            assert found.ids.shape == (50, 0)


def test_bounds(tmp_path, make_collection, unit_rows):
    """No cosine is above 1, and no diversity."""
    for options, message in (
        ({"min_score": 1.5}, "minimal score: expected -1 to 1, found 1.5"),
        ({"min_score": float("nan")}, "minimal score: expected -1 to 1, found nan"),
        ({"diversity": 1.1}, "diversity: expected 0 to 1, found 1.1"),
    ):
        with pytest.raises(UsageError, match=message):
            Ranking(**options)
    with (
        Collection.open(make_collection(tmp_path, unit_rows(9, 8))) as collection,
        pytest.raises(UsageError, match="limit: expected at least 1, found 0"),
    ):
        search_range(collection, unit_rows(1, 8), 0.5, fingerprint=FINGERPRINT, limit=0)
