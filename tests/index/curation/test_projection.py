import builtins
import sys
import types

import numpy as np
import pytest

from index.curation.map_page import MAX_LABELS, make_legend, to_grid
from index.curation.projection import neighbours_kept, project
from index.errors import CollectionError


def test_pca_keeps_what_lies_in_a_plane(unit_rows):
    """All distances, the larger spread across; the same every time."""
    rng = np.random.default_rng(0)
    plane, _ = np.linalg.qr(rng.standard_normal((16, 2)))
    places = rng.standard_normal((50, 2)) * [5, 1]
    vectors = (places @ plane.T + unit_rows(1, 16)).astype(np.float32)
    found = project(vectors, "pca", seed=0)
    assert found[:, 0].std() > found[:, 1].std()
    distances = [np.linalg.norm(p[:, None] - p, axis=2) for p in (places, found)]
    np.testing.assert_allclose(*distances, atol=1e-4)
    np.testing.assert_array_equal(found, project(vectors, "pca", seed=5))
    assert project(vectors[:, :1], "pca", seed=0).shape == (50, 2)


@pytest.mark.slow  # numba compiles for a minute
@pytest.mark.filterwarnings("ignore")  # numba's, on its own matters
def test_pacmap_tells_crowds_apart(unit_rows):
    """Whose images are nearer to one another than to any of the other crowd."""
    vectors = unit_rows(60, 16) * 0.1 + np.repeat(np.eye(2, 16), 30, axis=0)
    places = project(vectors.astype(np.float32), "pacmap", seed=0)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    assert distances[:30, :30].max() < distances[:30, 30:].min()


def test_a_missing_extra_is_named(monkeypatch, unit_rows):
    """With what to do about it."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pacmap":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        CollectionError, match=r"found no module pacmap; pip install -e '\.\[map\]'"
    ):
        project(unit_rows(30, 8), "pacmap", seed=0)


def test_neighbours_that_are_kept():
    """All on a line as it is; of one that was shuffled, few."""
    line = np.square(np.arange(200, dtype=np.float32))[:, None] * np.eye(1, 2, dtype=np.float32)
    vectors = line @ np.eye(2, 5, dtype=np.float32)
    assert neighbours_kept(line, vectors, 3, metric="euclidean") == 1
    shuffled = np.random.default_rng(0).permutation(line)
    assert neighbours_kept(shuffled, vectors, 3, metric="euclidean") < 0.1


def test_any_seed_is_one_for_pacmap(monkeypatch, unit_rows):
    """Which NumPy takes, with what PaCMAP adds to it."""
    seeds = []

    class PaCMAP:
        def __init__(self, *, random_state, **_):
            seeds.append(random_state)

        def fit_transform(self, vectors, init):
            return vectors[:, :2]

    monkeypatch.setitem(sys.modules, "pacmap", types.SimpleNamespace(PaCMAP=PaCMAP))
    for seed in (3, 5_000_000_000):
        project(unit_rows(30, 8), "pacmap", seed=seed)
    assert seeds == [3, 5_000_000_000 % 2**31]


def test_places_lie_on_a_square_grid_in_proportion():
    """Whatever the extent, y down; one place for all is its middle."""
    grid = to_grid(np.array([[-10, 0], [10, 0], [0, 5]], np.float32))
    assert np.abs(grid.astype(int) - [[0, 40959], [65535, 40959], [32768, 24576]]).max() <= 1
    assert (to_grid(np.ones((3, 2), np.float32)) == 32768).all()


def test_rare_labels_and_none_have_a_place_in_the_legend():
    """After those with a colour of their own; counts are of all images."""
    labels = [None, "b", "a", "a"]
    legend = make_legend(labels)
    assert (legend.names, legend.counts) == (["a", "b", "no label"], [2, 1, 1])
    assert legend.numbers_N.tolist() == [2, 1, 0, 0]
    many = [str(n) for n in range(MAX_LABELS + 5)] * 2 + ["3"]
    legend = make_legend(many)
    assert len(legend.names) == MAX_LABELS + 1
    assert (legend.names[0], legend.names[-1]) == ("3", "others")
    assert sum(legend.counts) == len(many)
