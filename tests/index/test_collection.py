import errno
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from index.ann.making import build_index as build_hnsw
from index.collection import Collection, id_of, version_text
from index.errors import CollectionError, UnknownIdError
from index.storage.manifest import Manifest, hash_files, read_manifest, write_manifest
from models.documents import document_bytes
from models.errors import FingerprintMismatchError, UsageError

FINGERPRINT = "f" * 64


def rehash(path):
    """Make the manifest agree with files that were changed."""
    manifest = read_manifest(path)
    changed = Manifest(**{**vars(manifest), "files": hash_files(path, manifest.files)})
    write_manifest(path, changed)


def test_what_a_collection_says_of_itself(built, bundle):
    """Name, size, metric and encoder come from the manifest."""
    with Collection.open(built) as collection:
        assert (collection.name, collection.count, collection.dim) == ("colours", 60, 16)
        assert (collection.metric, collection.factory) == ("cosine", "Flat")
        assert collection.fingerprint == bundle.fingerprint
        assert repr(collection) == (
            f"<Collection colours 60 x 16 Flat fingerprint={bundle.fingerprint[:12]}>"
        )


@pytest.mark.parametrize("n_segments", [1, 3])
def test_search_is_exact_over_any_number_of_segments(
    tmp_path, unit_rows, n_segments, make_collection
):
    """Ids and cosines are those of a sort of all products, best first."""
    vectors, queries = unit_rows(100, 8), unit_rows(7, 8, seed=1)
    with Collection.open(make_collection(tmp_path, vectors, n_segments=n_segments)) as collection:
        found = collection.search(queries, 5, fingerprint=FINGERPRINT)
        order = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
        expected = [[id_of(f"{row:04}") for row in line] for line in order]
        assert found.ids.tolist() == expected
        np.testing.assert_allclose(found.scores, -np.sort(-(queries @ vectors.T))[:, :5], atol=1e-6)
        np.testing.assert_array_equal(collection.vectors(found.ids[0]), vectors[order[0]])
        assert [row.key for row in collection.rows(found.ids[0])] == [
            f"{row:04}" for row in order[0]
        ]


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_a_k_beyond_the_collection_gives_all_of_it(tmp_path, unit_rows, factory, make_collection):
    """However large it is, no memory is taken for neighbours that do not exist."""
    vectors = unit_rows(4, 8)
    with Collection.open(make_collection(tmp_path, vectors, factory=factory)) as collection:
        for k in (6, 2_000_000_000):
            found = collection.search(vectors[:2], k, fingerprint=FINGERPRINT)
            assert np.sort(found.ids).tolist() == [sorted(collection.ids)] * 2
            assert found.scores.shape == (2, 4)
            others = collection.search_ids(collection.ids, k)
            assert others.ids.shape == (4, 3)
            assert not (others.ids == collection.ids[:, None]).any()


def test_where_the_lists_hold_fewer_than_k_every_row_is_compared(
    tmp_path, unit_rows, make_collection
):
    """As many are found as are asked for, however few lists are looked into."""
    path = make_collection(tmp_path, unit_rows(400, 8), factory="IVF16,PQ4x4fs,RFlat")
    with Collection.open(path) as collection:
        found, exact = (
            collection.search(unit_rows(3, 8, seed=1), 200, fingerprint="f" * 64, **options)
            for options in ({"parameters": {"nprobe": 1}}, {"exact": True})
        )
    assert np.array_equal(found.ids, exact.ids)


@pytest.mark.parametrize("exact", [True, False])
def test_a_stored_image_is_no_neighbour_of_itself(built_hnsw, exact):
    """Searching by id leaves each id out of its own list, and k are left."""
    with Collection.open(built_hnsw) as collection:
        found = collection.search_ids(collection.ids, 5, exact=exact)
        assert found.ids.shape == (60, 5)
        assert not (found.ids == collection.ids[:, None]).any()
        assert (np.diff(found.scores, axis=1) <= 0).all()


def test_another_encoder_is_refused(built, other_bundle):
    """Equal dimension is no proof: the message names both fingerprints."""
    with Collection.open(built) as collection:
        with pytest.raises(FingerprintMismatchError) as error:
            collection.search(np.ones((1, 16), np.float32), 1, fingerprint=other_bundle.fingerprint)
        assert str(error.value) == (
            f"collection colours: expected encoder {collection.fingerprint}, "
            f"found encoder {other_bundle.fingerprint}; query it with the encoder that built it, "
            "or build it again with this one"
        )


def test_wrong_queries_are_refused(built):
    """Dimension and k are checked before faiss sees them."""
    with Collection.open(built) as collection:
        own = collection.fingerprint
        with pytest.raises(UsageError, match=r"queries: expected \(Q, 16\), found \(1, 15\)"):
            collection.search(np.ones((1, 15), np.float32), 1, fingerprint=own)
        with pytest.raises(UsageError, match="k: expected at least 1, found 0"):
            collection.search(np.ones((1, 16), np.float32), 0, fingerprint=own)
        with pytest.raises(UsageError, match="k: expected at least 1, found 0"):
            collection.search_ids(collection.ids[:1], 0)
        for value in (np.nan, np.inf):
            queries = np.ones((2, 16), np.float32)
            queries[1, 3] = value
            with pytest.raises(UsageError, match="query 1: expected finite numbers, found NaN or"):
                collection.search(queries, 1, fingerprint=own, exact=True)


def test_a_long_query_is_no_infinite_one(built):
    """A vector whose square is beyond float32 is searched with like any other."""
    with Collection.open(built) as collection:
        queries = collection.vectors(collection.ids[:3])
        short = collection.search(queries, 5, fingerprint=collection.fingerprint, exact=True)
        long = collection.search(queries * 1e30, 5, fingerprint=collection.fingerprint, exact=True)
    assert np.array_equal(short.ids, long.ids)


def test_unknown_ids_and_keys_are_named(built):
    """What is asked for by name and is not there is an error of its own."""
    with Collection.open(built) as collection:
        for lookup in (collection.rows, collection.vectors):
            with pytest.raises(UnknownIdError, match="id 12345: expected an id of the 60 in"):
                lookup([int(collection.ids[0]), 12345])
        with pytest.raises(UnknownIdError, match="id -1"):
            collection.search_ids([-1], 1)
        with pytest.raises(
            UnknownIdError, match=r"key 'red/999.png': .*; keys here look like 'blue/000.png'$"
        ):
            collection.find_key("red/999.png")
        assert collection.find_key("red/001.png") == id_of("red/001.png")


def test_places_have_the_shape_of_the_ids(built):
    """As neighbours come, some for each query."""
    with Collection.open(built) as collection:
        asked = collection.ids[[[3, 1], [0, 59]]]
        assert collection.row_numbers(asked).tolist() == [[3, 1], [0, 59]]


def test_a_version_is_written_as_numbers_with_a_point():
    """Whatever else stands for one is written as it is."""
    assert [version_text(version) for version in ((3, 17), "x", 4)] == ["3.17", "x", "4"]


def test_ids_are_stable():
    """An id is a function of the key, the same in every version."""
    assert id_of("train/00000") == 4730330076128425568
    assert id_of("") >= 0


def test_a_closed_collection_says_so(built):
    """Using what was closed is an error, not an empty answer."""
    collection = Collection.open(built)
    assert collection.is_current()
    collection.close()
    assert not collection.is_current()
    with pytest.raises(CollectionError, match="expected an open one, found closed"):
        collection.search(np.ones((1, 16), np.float32), 1, fingerprint=collection.fingerprint)


def test_raising_ef_search_raises_recall_and_changes_nothing_else(
    tmp_path, unit_rows, make_collection
):
    """The parameter belongs to the call: a call without it is as before."""
    vectors, queries = unit_rows(4000, 32), unit_rows(100, 32, seed=1)
    path = make_collection(tmp_path, vectors, factory="HNSW32")
    with Collection.open(path) as collection:

        def search(**options):
            return collection.search(queries, 10, fingerprint=FINGERPRINT, **options).ids

        def recall(found):
            return np.mean([np.isin(a, b).mean() for a, b in zip(found, exact, strict=True)])

        exact, before = search(exact=True), search()
        recalls = [recall(search(parameters={"efSearch": ef})) for ef in (10, 40, 400)]
        assert recalls[0] < recalls[1] < recalls[2]
        assert recalls[2] > 0.99
        np.testing.assert_array_equal(search(), before)


def test_a_parameter_of_another_index_is_refused(tmp_path, unit_rows, make_collection):
    """What the index does not have is named, with what it has."""
    vectors = unit_rows(10, 8)
    for factory, expected in (("Flat", "none for Flat"), ("HNSW32", "efSearch of at least 1")):
        path = make_collection(tmp_path / factory, vectors, factory=factory)
        with (
            Collection.open(path) as collection,
            pytest.raises(UsageError, match=f"search parameter nprobe: expected {expected}"),
        ):
            collection.search(vectors, 1, fingerprint=FINGERPRINT, parameters={"nprobe": 3})


def test_many_threads_get_what_one_gets(tmp_path, unit_rows, make_collection):
    """An open collection is safe to search from any number of threads."""
    vectors, queries = unit_rows(2000, 16), unit_rows(64, 16, seed=1)
    path = make_collection(tmp_path, vectors, factory="HNSW32")
    with Collection.open(path, threads=1) as collection, ThreadPoolExecutor(8) as pool:

        def search(n):
            return collection.search(
                queries[n : n + 1], 5, fingerprint=FINGERPRINT, exact=n % 2 == 0
            ).ids

        alone = [search(n) for n in range(64)]
        together = list(pool.map(search, range(64)))
        np.testing.assert_array_equal(alone, together)


def test_hnsw_is_built_the_same_twice(unit_rows):
    """One thread and a fixed seed: the same vectors give the same bytes."""
    vectors = unit_rows(500, 16)
    first, second = (faiss.serialize_index(build_hnsw(vectors, "HNSW32")) for _ in range(2))
    np.testing.assert_array_equal(first, second)


FILES = ["vectors.npy", "ids.npy", "rows.parquet", "index.faiss"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(built_hnsw, copy_collection, name):
    """One line says which file, what was expected, what was found and how to mend it."""
    path = copy_collection(built_hnsw)
    file = path / "segments/000000" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CollectionError) as error:
        Collection.open(path)
    assert re.fullmatch(
        rf"{file}: expected SHA-256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}; "
        "the file is damaged: copy the collection again, or build it again",
        str(error.value),
    )


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found_without_hashing(built_hnsw, copy_collection, name):
    """Presence and size are checked even where hashing is not asked for."""
    path = copy_collection(built_hnsw)
    file = path / "segments/000000" / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    with pytest.raises(CollectionError, match=f"expected {size} bytes, found {size // 2} bytes"):
        Collection.open(path, verify=False)
    file.unlink()
    with pytest.raises(CollectionError, match=r"expected a file that manifest.json lists"):
        Collection.open(path, verify=False)


def foreign_indexes():
    """Indexes that belong to another collection, or are no HNSW at all."""
    vectors = np.eye(60, 16, dtype=np.float32)
    other_metric = faiss.IndexHNSWFlat(16, 32, faiss.METRIC_L2)
    other_metric.add(vectors)
    other_type = faiss.IndexFlatIP(16)
    other_type.add(vectors)
    return {
        "count": (build_hnsw(vectors[:59], "HNSW32"), "IndexHNSWFlat of 59 x 16, metric 0"),
        "dim": (build_hnsw(np.eye(60, 15, dtype=np.float32), "HNSW32"), "of 60 x 15, metric 0"),
        "metric": (other_metric, "IndexHNSWFlat of 60 x 16, metric 1"),
        "type": (other_type, "IndexFlatIP of 60 x 16, metric 0"),
    }


@pytest.mark.parametrize("kind", ["count", "dim", "metric", "type"])
def test_a_foreign_faiss_file_is_refused(built_hnsw, copy_collection, kind):
    """Even where the manifest was made to agree, type, size and metric must be right."""
    path = copy_collection(built_hnsw)
    index, found = foreign_indexes()[kind]
    faiss.write_index(index, str(path / "segments/000000/index.faiss"))
    rehash(path)
    with pytest.raises(CollectionError) as error:
        Collection.open(path)
    assert "expected HNSW32 of 60 x 16, inner product, found" in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no index at all", b"IHNf" + b"\xff" * 200])
def test_hostile_bytes_are_refused_within_bounded_memory(built_hnsw, copy_collection, content):
    """Sizes that a header claims are bounded by the size of the file."""
    path = copy_collection(built_hnsw)
    (path / "segments/000000/index.faiss").write_bytes(content)
    rehash(path)
    limit = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(CollectionError, match="found no FAISS index"):
        Collection.open(path)
    assert faiss.get_deserialization_vector_byte_limit() == limit


def test_an_oversized_vector_count_is_refused(built_hnsw, copy_collection):
    """A length within a real index is blown up: faiss must not allocate what it says."""
    path = copy_collection(built_hnsw)
    file = path / "segments/000000/index.faiss"
    content = bytearray(file.read_bytes())
    length = (60 * 16).to_bytes(8, "little")  # floats of the stored vectors
    at = content.index(length)
    content[at : at + 8] = (1 << 36).to_bytes(8, "little")
    file.write_bytes(content)
    rehash(path)
    with pytest.raises(CollectionError, match="found no FAISS index"):
        Collection.open(path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("vectors.npy", np.zeros((60, 16), np.float64)),
        ("vectors.npy", np.zeros((61, 16), np.float32)),
        ("ids.npy", np.arange(60, dtype=np.int32)),
    ],
)
def test_an_array_of_another_shape_or_type_is_refused(built, copy_collection, name, array):
    """The manifest says what the arrays are."""
    path = copy_collection(built)
    np.save(path / "segments/000000" / name, array)
    rehash(path)
    with pytest.raises(CollectionError, match=rf"expected (float32|int64) .*found {array.dtype}"):
        Collection.open(path)


def test_pickled_arrays_are_never_loaded(built, copy_collection):
    """A .npy file may hold code: it is refused."""
    path = copy_collection(built)
    np.save(path / "segments/000000/ids.npy", np.array([print], object), allow_pickle=True)
    rehash(path)
    with pytest.raises(CollectionError, match="no such array"):
        Collection.open(path)


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy", "rows.parquet"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_system_that_cannot_open_a_file_does_not_blame_it(built, monkeypatch, name, error):
    """Nobody builds a collection again for want of memory or descriptors."""

    def refuse(opened):
        def load(file, *args, **kwargs):
            if Path(file).name == name:
                raise error
            return opened(file, *args, **kwargs)

        return load

    monkeypatch.setattr(np, "load", refuse(np.load))
    monkeypatch.setattr(pq, "ParquetFile", refuse(pq.ParquetFile))
    with pytest.raises(CollectionError) as caught:
        Collection.open(built)
    found = "MemoryError" if isinstance(error, MemoryError) else "Too many open files"
    assert str(caught.value).endswith(
        f"{name}: expected a file that the system opens, found {found}; mend that and open the "
        "collection again: the file may be sound"
    )


def test_a_manifest_that_may_not_be_read_is_no_missing_collection(built, monkeypatch):
    """Who may not read a collection, or not look into its folder, is not told to make one."""

    def refuse(*_, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("index.storage.manifest.open_regular", "pathlib.Path.stat"):
        monkeypatch.setattr(name, refuse)
        with pytest.raises(CollectionError) as caught:
            Collection.open(built)
        assert "found Permission denied; mend that and" in str(caught.value)
    monkeypatch.undo()


def test_metadata_of_other_rows_is_refused(
    built, built_hnsw, copy_collection, tmp_path, unit_rows, make_collection
):
    """Vectors and metadata that do not belong together are never joined."""
    path = copy_collection(built)
    other = make_collection(tmp_path / "other", unit_rows(60, 16))
    shutil.copy(other / "segments/000000/rows.parquet", path / "segments/000000/rows.parquet")
    rehash(path)
    with pytest.raises(CollectionError, match=r"expected the 60 rows of ids.npy, in its order"):
        Collection.open(path)
    (path / "segments/000000/rows.parquet").write_bytes(b"PAR1 but not really")
    rehash(path)
    with pytest.raises(CollectionError, match="no such table"):
        Collection.open(path)


def test_an_edited_manifest_is_found(built, copy_collection):
    """The manifest has a checksum of its own."""
    path = copy_collection(built)
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"dim": 16', '"dim": 61'))
    with pytest.raises(CollectionError, match=r"manifest.json: expected checksum [0-9a-f]{64}"):
        Collection.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "not JSON",
            "expected JSON with a schema_version, of finite numbers, found something else",
        ),
        ("[]", "expected JSON with a schema_version"),
        ('{"schema_version": 9}', "expected schema version 2, found version 9"),
        ('{"schema_version": 1, "dim": NaN}', "expected JSON with a schema_version"),
        ('{"schema_version": 1, "dim": 1e999}', "expected JSON with a schema_version"),
        ("[" * 100_000, "expected JSON with a schema_version"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content, message):
    """Damage and other versions are told apart."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CollectionError, match=message):
        Collection.open(tmp_path)


def test_a_segment_whose_file_is_not_listed_is_refused(built, copy_collection):
    """What the manifest does not name is not there."""
    path = copy_collection(built)
    manifest = read_manifest(path)
    files = {n: entry for n, entry in manifest.files.items() if not n.endswith("ids.npy")}
    write_manifest(path, Manifest(**{**vars(manifest), "files": files}))
    with pytest.raises(CollectionError, match=r"ids.npy: expected a file that manifest.json lists"):
        Collection.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("segments"),
        lambda document: document.update(metric="manhattan"),
        lambda document: document.update(files={"../../etc/passwd": {"sha256": "", "bytes": 1}}),
        lambda document: document.update(generation=-1),
        lambda document: document.update(journal={"name": "../journal", "id": "00" * 16}),
        lambda document: document.update(journal={"name": "journal", "id": "00"}),
        lambda document: document["segments"][0].update(dead=3),
        lambda document: document["segments"][0].update(dead=61, tombstones="dead.npy"),
        lambda document: document["segments"][0].update(dead=1, tombstones="../dead.npy"),
        lambda document: document["segments"].append(document["segments"][0]),
        lambda document: document["segments"][0].update(count="60"),
        lambda document: document["segments"][0].update(count=-60),
        lambda document: document["segments"][0].update(name=7),
        lambda document: document.update(dim=True),
        lambda document: document.update(dim=1 << 70),
        lambda document: document.update(versions=[1]),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(built, copy_collection, change):
    """Fields are checked even where the checksum was made to agree."""
    path = copy_collection(built)
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_bytes(document_bytes(document))
    with pytest.raises(CollectionError, match="expected a manifest of schema 2, found no usable"):
        Collection.open(path)


def test_what_is_no_collection_is_refused(tmp_path):
    """A missing directory and another directory are told apart."""
    with pytest.raises(CollectionError, match="expected a collection directory, found no such"):
        Collection.open(tmp_path / "none")
    with pytest.raises(CollectionError, match=r"found no manifest.json in it; make one with"):
        Collection.open(tmp_path)
