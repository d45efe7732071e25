import random

import pytest

from benchmarks import index_fuzz
from benchmarks.damage import damages
from benchmarks.index_fuzz import FuzzOptions, cases, hunt, make_collection, prepare, try_collection
from benchmarks.ledger import read_state
from index.collection import Collection
from index.verify import Verification

KINDS = {"flip", "truncate", "append", "swap", "foreign", "huge"}


def test_every_damage_is_one(tmp_path):
    """Each way of damage is there for a file of arrays, and all give other bytes."""
    make_collection(tmp_path / "c", seed=0, factory="HNSW32")
    file = next(tmp_path.rglob("ids.npy"))
    content = file.read_bytes()
    draw = random.Random(0)
    found = list(damages("ids.npy", content, content[:-1] + b"x", flips=10, draw=draw))
    assert {damage.kind for damage in found} == KINDS
    assert all(damage.content != content for damage in found)


def test_what_is_not_found_is_a_finding(tmp_path, monkeypatch):
    """The hunt can fail: where verify sees nothing, or opening refuses nothing, it says so."""
    path = tmp_path / "c"
    make_collection(path, seed=0, factory="HNSW32")
    with Collection.open(path) as collection:
        expected = read_state(collection)
    options = FuzzOptions(flips=3, only="000001/ids.npy")
    name, damage = next(cases(path, path, options))
    before = (path / name).read_bytes()
    assert try_collection(path, name, damage, expected) == ""
    blind = Verification(content="", files=0, size_bytes=0, faults=[], unknown=[])
    with monkeypatch.context() as patch:
        patch.setattr(index_fuzz, "verify", lambda _: blind)
        assert try_collection(path, name, damage, expected) == "not found by verify"
    with monkeypatch.context() as patch:
        patch.setattr(index_fuzz, "_opens", lambda *_, **__: None)
        assert try_collection(path, name, damage, expected) == "opened"
    assert (path / name).read_bytes() == before


@pytest.mark.slow
def test_damage_to_every_file_is_found_or_refused(tmp_path):
    """A few hundred ways; `python -m benchmarks.index_fuzz` tries thousands."""
    prepare(tmp_path, "HNSW32")
    found = hunt(tmp_path, FuzzOptions(flips=4))
    assert found["findings"] == []
    assert int(str(found["trials"])) > 300
