"""Every kind of index, through the files that a segment keeps."""

import resource
import weakref

import faiss
import numpy as np
import pytest

from index.ann import ann_index
from index.ann.ann_index import AnnIndex, within
from index.ann.checking import index_fault
from index.ann.kinds import default_parameters, parse_kind
from index.ann.making import Builder, build_index, write_index
from index.ann.opening import open_index
from index.knn import knn_search
from index.selection import Chosen

COUNT, DIM, K = 1000, 32, 10
FACTORIES = [
    "HNSW32",
    "HNSW16,SQ8,RFlat",
    "HNSW16,SQfp16,RFlat",
    "IVF32,PQ16x4fs,RFlat",
    "PCAR28,IVF32,PQ28x4fs,RFlat",
    "RR,IVF32,RaBitQ,RFlat",
    "RR,IVF32,RaBitQ4,RFlat",
    "RR,IVF32,RaBitQfs,RFlat",
]
METRICS = ["cosine", "euclidean"]


def draw(n, *, seed, metric="cosine", noise=0.4):
    """Draw vectors around thirty centres, of unit length where they are compared by cosine."""
    shape, draw = np.random.default_rng(0), np.random.default_rng(seed)
    centres = shape.standard_normal((30, DIM))
    rows = centres[draw.integers(0, 30, n)] + noise * draw.standard_normal((n, DIM))
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def make_index(tmp_path_factory):
    """Give a function that builds, writes and opens an index, each once."""
    made = {}

    def make(factory, metric="cosine"):
        if (factory, metric) not in made:
            folder = tmp_path_factory.mktemp("index")
            np.save(folder / "vectors.npy", draw(COUNT, seed=1, metric=metric))
            vectors = np.load(folder / "vectors.npy", mmap_mode="r")
            index = build_index(vectors, factory, metric=metric, threads=1)
            write_index(index, folder / "index.faiss", factory)
            made[factory, metric] = folder / "index.faiss", vectors
        file, vectors = made[factory, metric]
        return open_index(
            file, factory=factory, count=COUNT, dim=DIM, metric=metric, vectors_ND=vectors
        )

    return make


def recall(found, truth):
    """Give the share of the true neighbours that were found."""
    return np.mean([np.isin(t, f).mean() for f, t in zip(found, truth, strict=True)])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_every_kind_finds_nearly_all_neighbours(make_index, factory, metric):
    """By its own default parameters, on clustered vectors, by either metric."""
    index = make_index(factory, metric)
    queries = draw(100, seed=2, metric=metric)
    scores, rows = index.search(queries, K, parameters={}, threads=1)
    _, truth = knn_search(queries, index.vectors_ND, K, metric=metric)
    assert recall(rows, truth) > 0.95
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_scores_are_those_of_the_vectors(make_index, factory, metric):
    """Whatever the codes are: found rows are ranked again by the segment's own vectors."""
    index = make_index(factory, metric)
    queries = draw(20, seed=3, metric=metric)
    scores, rows = index.search(queries, K, parameters={}, threads=2)
    found = index.vectors_ND[rows]
    if metric == "cosine":
        expected = np.einsum("qd,qkd->qk", queries, found)
    else:
        expected = -np.square(queries[:, None] - found).sum(axis=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", FACTORIES)
def test_parameters_belong_to_the_call(make_index, factory):
    """More effort finds more, and a call without parameters is as it was before."""
    index = make_index(factory)
    queries = draw(100, seed=4)
    _, truth = knn_search(queries, index.vectors_ND, K)
    least = dict.fromkeys(index.kind.defaults, 1)
    most = {name: 100 * value for name, value in default_parameters(factory).items()}

    def search(parameters):
        return index.search(queries, K, parameters=parameters, threads=1)[1]

    before = search({})
    assert recall(search(least), truth) < recall(search(most), truth)
    assert recall(search(most), truth) > 0.99
    np.testing.assert_array_equal(search({}), before)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("HNSW32", {"efSearch": 64}),
        ("HNSW32,SQ8,RFlat", {"efSearch": 64, "k_factor": 1}),
        ("IVF32,PQ16x4fs,RFlat", {"nprobe": 24, "k_factor": 8}),
        ("RR,IVF32,RaBitQfs,RFlat", {"nprobe": 16, "k_factor": 12}),
    ],
)
def test_a_hundred_are_found_about_as_well_as_ten(factory, parameters):
    """By parameters that are for ten, scaled; and ten themselves by those that were given."""
    vectors, queries = draw(3000, seed=1, noise=2.0), draw(200, seed=2, noise=2.0)
    kind = parse_kind(factory)
    index = AnnIndex(kind, build_index(vectors, factory), vectors, metric="cosine")

    def recall_at(k):
        scaled = index.scale(parameters, 10, k)
        _, truth = knn_search(queries, vectors, k)
        return recall(index.search(queries, k, parameters=scaled, threads=1)[1], truth)

    assert recall_at(100) >= recall_at(10) - 0.002
    assert index.scale(parameters, 10, 10) == parameters


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("IVF32,PQ16x4fs,RFlat", {"nprobe": 8, "k_factor": 8}),
        ("RR,IVF32,RaBitQfs,RFlat", {"nprobe": 8, "k_factor": 12}),
    ],
)
def test_lists_are_looked_into_for_the_nearest_and_not_for_chance(factory, parameters):
    """A tenth is left: the ten are among the first hundred of all, and 147 are taken."""
    vectors, queries = draw(3000, seed=1, noise=2.0), draw(200, seed=2, noise=2.0)
    index = AnnIndex(parse_kind(factory), build_index(vectors, factory), vectors, metric="cosine")
    mask = np.random.default_rng(3).random(3000) < 0.1
    rows = np.flatnonzero(mask)
    _, truth = knn_search(queries, vectors, K, rows_M=rows)
    nearest = K * 3000 // len(rows)

    def recall_with(wider):
        _, found, _ = index.search_among(
            queries, K, Chosen(mask), candidates=147, parameters=wider, threads=1
        )
        return recall(found, truth)

    all_ = index.scale(parameters, K, 147)
    wider = index.scale_among(parameters, K, candidates=147, nearest=nearest)
    assert index.scale(parameters, K, nearest)["nprobe"] < wider["nprobe"] < all_["nprobe"]
    assert wider["k_factor"] == all_["k_factor"]
    _, plain_truth = knn_search(queries, vectors, K)
    plain = recall(index.search(queries, K, parameters=parameters, threads=1)[1], plain_truth)
    assert recall_with(wider) >= plain - 0.005


def test_effort_for_one_ranks_as_many_again_as_for_ten(make_index):
    """Or the first of one would not be the first of ten, however far the graph is walked."""
    index = make_index("HNSW16,SQ8,RFlat")
    own = {"efSearch": 64, "k_factor": 1}
    assert index.effort_parameters(500, 1, own) == {"efSearch": 500, "k_factor": 10}
    assert index.effort_parameters(500, 20, own) == {"efSearch": 500, "k_factor": 1}


def test_a_graph_is_walked_for_all_candidates():
    """The last of them are as likely to be chosen as the first."""
    index = AnnIndex(
        parse_kind("HNSW8"), build_index(rows := draw(90, seed=1), "HNSW8"), rows, metric="cosine"
    )
    wider = index.scale_among({"efSearch": 20}, 10, candidates=60, nearest=40)
    assert wider == {"efSearch": 66}


@pytest.mark.parametrize("factory", FACTORIES)
def test_more_than_there_are_are_padded(make_index, factory):
    """Missing places are row -1 and score -inf, after every row that was found."""
    index = make_index(factory)
    scores, rows = index.search(draw(2, seed=5), COUNT + 7, parameters={}, threads=1)
    assert rows.shape == scores.shape == (2, COUNT + 7)
    assert ((rows == -1) == (scores == -np.inf)).all()
    assert (np.diff((rows < 0).astype(int), axis=1) >= 0).all()
    for row in rows:
        found = row[row >= 0]
        assert len(np.unique(found)) == len(found) > 0


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_is_that_of_its_vectors(make_index, factory):
    """What it keeps of them is made again and compared; other vectors are told."""
    index = make_index(factory)
    assert index_fault(index, {}) is None
    index.vectors_ND = draw(COUNT, seed=9)
    if index.kind.family == "graph" and not index.kind.refines:
        index._top.storage = other = faiss.IndexFlatIP(DIM)
        other.add(draw(COUNT, seed=9))
        index.kept = other
    assert "expected the vectors of vectors.npy, found" in str(index_fault(index, {}))


def test_a_graph_of_other_vectors_is_told_however_wide_it_is_searched(tmp_path):
    """With as many candidates as there are rows, any graph would find them all."""
    file, vectors = tmp_path / "index.faiss", draw(COUNT, seed=1)
    write_index(build_index(draw(COUNT, seed=9), "HNSW4"), file, "HNSW4")
    index = open_index(
        file, factory="HNSW4", count=COUNT, dim=DIM, metric="cosine", vectors_ND=vectors
    )
    assert "found " in str(index_fault(index, {"efSearch": COUNT}))


@pytest.mark.parametrize("factory", ["PCAR16,IVF16,PQ16x4fs,RFlat", "RR,IVF16,RaBitQfs,RFlat"])
def test_an_index_of_groups_of_near_copies_is_no_fault(tmp_path, factory):
    """Short codes do not tell a group's vectors apart: as many are ranked as a search ranks."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((20, DIM)), COUNT // 20, axis=0)
    vectors = (vectors + 1e-3 * rng.standard_normal((COUNT, DIM))).astype(np.float32)
    file = tmp_path / "index.faiss"
    write_index(build_index(vectors, factory, metric="euclidean"), file, factory)
    index = open_index(
        file, factory=factory, count=COUNT, dim=DIM, metric="euclidean", vectors_ND=vectors
    )
    assert index_fault(index, {"nprobe": 2, "k_factor": 10}) is None
    index.vectors_ND = draw(COUNT, seed=9, metric="euclidean")
    assert "found " in str(index_fault(index, {"nprobe": 2, "k_factor": 10}))


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_same_vectors_give_the_same_bytes(factory):
    """Whatever the number of threads."""
    vectors = draw(500, seed=1)
    first, second = (
        faiss.serialize_index(build_index(vectors, factory, threads=threads)) for threads in (1, 2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("factory", "metric"),
    [(factory, "cosine") for factory in FACTORIES] + [("IVF32,PQ16x4fs,RFlat", "euclidean")],
)
def test_rows_that_are_held_back_come_at_the_end(make_index, tmp_path, factory, metric):
    """Until then they are not found; then the index is one over all rows in their order."""
    vectors = make_index(factory, metric).vectors_ND
    held_back = np.arange(5, COUNT, 100)
    builder = Builder(vectors, factory, metric=metric, held_back=held_back)
    base = builder.start()
    part = AnnIndex(builder.kind, base, vectors, metric=metric, rows_M=builder.rows_M)
    queries = np.ascontiguousarray(vectors[held_back])
    scores, rows = part.search(queries, K, parameters={}, threads=1)
    _, truth = knn_search(queries, vectors, K, rows_M=builder.rows_M, metric=metric)
    assert recall(rows, truth) > 0.9
    assert not np.isin(rows, held_back).any()
    if metric == "cosine":
        expected = np.einsum("qd,qkd->qk", queries, vectors[rows])
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    del part
    file = tmp_path / "index.faiss"
    write_index(builder.finish(), file, factory)
    whole = open_index(
        file, factory=factory, count=COUNT, dim=DIM, metric=metric, vectors_ND=vectors
    )
    _, rows = whole.search(queries, 1, parameters={}, threads=1)
    assert (rows[:, 0] == held_back).mean() > 0.9
    assert index_fault(whole, {}) is None


@pytest.mark.parametrize("factory", ["IVF200,PQ16x4fs,RFlat", "RR,IVF200,RaBitQfs,RFlat", "HNSW2"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_small_file_opens_within_its_own_size(tmp_path, factory, metric):
    """Also where the lists are many beside the vectors."""
    vectors = draw(250, seed=1, metric=metric)
    write_index(build_index(vectors, factory, metric=metric), tmp_path / "index.faiss", factory)
    index = open_index(
        tmp_path / "index.faiss", factory=factory, count=250, dim=DIM, metric=metric,
        vectors_ND=vectors,
    )  # fmt: skip
    _, rows = index.search(vectors[:50], 1, parameters={"nprobe": 200}, threads=1)
    assert (rows[:, 0] == np.arange(50)).mean() > 0.8


def test_one_graph_of_a_gpu_is_in_memory_at_a_time(monkeypatch):
    """It cannot be added to: with the rows that were held back it is built anew."""
    made = []

    class Graph:
        """What stands for one."""

    def build(kind, vectors_ND, metric):
        assert [graph() for graph in made] == [None] * len(made)
        graph = Graph()
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr("index.ann.making._build_cagra", build)
    builder = Builder(draw(COUNT, seed=1), "CAGRA32", held_back=np.arange(5))
    builder.start()
    assert builder.finish() is made[1]()


@pytest.mark.parametrize("missing", [1, 20_000])
def test_an_index_that_finds_no_room_is_not_taken_for_written(tmp_path, missing):
    """Not even where its last byte alone does not."""
    index, file = build_index(draw(COUNT, seed=1), "HNSW32"), tmp_path / "index.faiss"
    write_index(index, file, "HNSW32")
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size - missing, bounds[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_index(index, file, "HNSW32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)


@pytest.mark.parametrize("factory", FACTORIES)
def test_no_parameter_asks_for_more_rows_than_there_are(make_index, factory):
    """Numbers that FAISS would take memory for, or could not even hold, find what there is."""
    index = make_index(factory)
    queries = draw(3, seed=6)
    most = dict.fromkeys(index.kind.defaults, 1 << 60)
    scores, rows = index.search(queries, K, parameters=most, threads=1)
    expected, _ = knn_search(queries, index.vectors_ND, K)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert (rows >= 0).all()


def test_settings_under_a_filter_are_kept_apart(make_index):
    """A search of as many rows and the same parameters has others: it ranks again."""
    index = make_index("HNSW16,SQ8,RFlat")
    queries = index.vectors_ND[:2]
    options = {"parameters": {"efSearch": 64, "k_factor": 2}, "threads": 1}
    every = Chosen(np.ones(COUNT, bool))
    _, rows, _ = index.search_among(queries, 5, every, candidates=20, **options)
    assert rows[:, 0].tolist() == [0, 1]
    _, rows = index.search(queries, 40, **options)
    assert rows[:, 0].tolist() == [0, 1]


def test_parameters_are_bounded_by_the_vectors():
    """As many candidates as there are vectors, rounded up to a multiple of k."""
    assert within({"nprobe": 9, "k_factor": 10_000}, 1000, 3000) == {"nprobe": 9, "k_factor": 3}
    assert within({"efSearch": 10_000, "k_factor": 2}, 10, 45) == {"efSearch": 45, "k_factor": 2}
    assert within({"k_factor": 10}, 70, 60) == {"k_factor": 1}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_queries_of_a_large_search_are_asked_in_blocks(make_index, monkeypatch, factory, metric):
    """So that memory holds the candidates of a few; the answers are those of one search."""
    queries = draw(50, seed=8, metric=metric)
    one = make_index(factory, metric).search(queries, K, parameters={}, threads=1)
    index, asked = make_index(factory, metric), []
    monkeypatch.setattr(
        ann_index, "BLOCK_CANDIDATES", 7 * K * index.kind.defaults.get("k_factor", 1)
    )
    top = index._top

    class Counting:
        def search(self, queries_QD, k, **rest):
            asked.append(len(queries_QD))
            return top.search(queries_QD, k, **rest)

    index._top = Counting()
    blocks = index.search(queries, K, parameters={}, threads=1)
    assert asked == [7] * 7 + [1]
    np.testing.assert_array_equal(one[1], blocks[1])
    np.testing.assert_allclose(one[0], blocks[0], rtol=1e-5)
