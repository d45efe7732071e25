from contextlib import closing
from pathlib import Path

from index.build import BuildOptions, build
from index.collection import Collection
from index.storage.manifest import read_manifest
from models.runtime import open_bundle


def test_the_encoder_is_found_from_any_directory(tmp_path, bundle, train_folder, monkeypatch):
    """However it was named."""
    monkeypatch.chdir(bundle.path.parent)
    build(BuildOptions(images=str(train_folder), encoder=bundle.path.name, out=tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    with closing(open_bundle(Path(read_manifest(tmp_path / "c").encoder))) as encoder:
        assert encoder.fingerprint == bundle.fingerprint


def test_a_source_has_as_many_images_as_can_be_used(tmp_path, bundle, new_folder):
    """What was rejected is none of them."""
    folder = new_folder()
    (folder / "red" / "000.png").write_bytes(b"no image")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    with Collection.open(tmp_path / "c") as collection:
        assert collection.manifest.sources == collection.sources == {f"folder:{folder}": 11}


def test_a_graph_is_searched_with_the_effort_that_was_measured(built_hnsw, built):
    """FAISS's own is a quarter of it; exact search has none."""
    (graph,), (flat,) = (read_manifest(path).segments for path in (built_hnsw, built))
    assert (graph.factory, graph.parameters) == ("HNSW32", {"efSearch": 64})
    assert (flat.factory, flat.parameters) == ("Flat", {})
