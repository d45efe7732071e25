"""Files of indexes that somebody else may have written, or that were damaged."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from index.ann.making import build_index, write_index
from index.ann.opening import open_index
from index.errors import CollectionError
from models.errors import UsageError

ROOT = Path(__file__).parents[3]
COUNT, DIM = 400, 16
FACTORIES = [
    "HNSW8",
    "HNSW8,SQ8,RFlat",
    "IVF16,PQ8x4fs,RFlat",
    "PCAR8,IVF16,PQ8x4fs,RFlat",
    "RR,IVF16,RaBitQ,RFlat",
    "RR,IVF16,RaBitQfs,RFlat",
]

FUZZ = """
import resource, sys
from pathlib import Path
import numpy as np
from index.ann.kinds import parse_kind
from index.ann.opening import open_index
from index.errors import CollectionError
from models.errors import UsageError

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
vectors = np.load(folder / "vectors.npy", mmap_mode="r")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
random = np.random.default_rng(0)
refused = opened = 0
for factory in sys.argv[3:]:
    whole = (folder / f"{factory}.faiss").read_bytes()
    for n in range(rounds):
        content = bytearray(whole)
        if n % 4 == 0:
            content = content[: random.integers(len(content))]
        elif n % 4 == 1:  # a length or a count, as a rule
            place = 4 * random.integers(min(len(content), 400) // 4)
            content[place : place + 4] = random.bytes(4)
        else:
            place = random.integers(len(content))
            content[place] ^= 1 << random.integers(8)
        file = folder / "damaged.faiss"
        file.write_bytes(content)
        try:
            index = open_index(
                file, factory=factory, count=len(vectors), dim=vectors.shape[1],
                metric="cosine", vectors_ND=vectors,
            )
        except CollectionError:
            refused += 1
            continue
        _, rows = index.search(np.ascontiguousarray(vectors[:8]), 5, parameters={}, threads=1)
        assert ((rows >= -1) & (rows < len(vectors))).all()
        opened += 1
print(refused, opened)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors and an index of every kind over them."""
    folder = tmp_path_factory.mktemp("indexes")
    rows = np.random.default_rng(1).standard_normal((COUNT, DIM))
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    for factory in FACTORIES:
        write_index(build_index(vectors, factory), folder / f"{factory}.faiss", factory)
    return folder


def open_in(folder, file, factory, *, count=COUNT, metric="cosine"):
    """Open a file as an index of the folder's vectors."""
    return open_index(
        folder / file, factory=factory, count=count, dim=DIM, metric=metric,
        vectors_ND=np.load(folder / "vectors.npy", mmap_mode="r"),
    )  # fmt: skip


def test_damaged_files_are_refused_or_searched_safely(folder):
    """In a process that may take 1 GiB more than it begins with; none of them ends it."""
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, folder, "40", *FACTORIES],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    refused, opened = map(int, done.stdout.split())
    assert refused + opened == 40 * len(FACTORIES)
    assert refused > 10 * len(FACTORIES)


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_index_of_another_kind_is_refused(folder, factory):
    """Each kind's file by the name of every other kind, and by other numbers."""
    for other in [*FACTORIES, "HNSW16", "IVF8,PQ8x4fs,RFlat", "RR,IVF16,RaBitQ4,RFlat"]:
        if other != factory:
            with pytest.raises(CollectionError, match=f"expected {other} of {COUNT} x {DIM}"):
                open_in(folder, f"{factory}.faiss", other)


@pytest.mark.parametrize("factory", FACTORIES)
def test_another_size_or_metric_is_refused(folder, factory):
    """Whatever the manifest says."""
    with pytest.raises(CollectionError, match=rf"found Index\w+ of {COUNT} x {DIM}, metric 0"):
        open_in(folder, f"{factory}.faiss", factory, count=COUNT - 1)
    with pytest.raises(CollectionError, match=r"squared distance, found .* metric 0"):
        open_in(folder, f"{factory}.faiss", factory, metric="euclidean")


def test_a_factory_that_is_no_kind_is_refused(folder):
    """FAISS knows many more; a manifest that names one was not written here."""
    with pytest.raises(CollectionError, match=r"a kind of index that is known, found NSG32"):
        open_in(folder, "HNSW8.faiss", "NSG32")


def test_rows_that_lists_name_are_checked(folder, tmp_path):
    """A search gives them out, and re-ranking reads the vectors there."""
    name = "IVF16,PQ8x4fs,RFlat"
    for change, found in (
        (lambda ids: ids.__setitem__(0, COUNT), f"row {COUNT} in list "),
        (lambda ids: ids.__setitem__(0, -5), "row -5 in list "),
        (lambda ids: ids.__setitem__(0, ids[1]), "row .* twice|row .* in no list"),
    ):
        index = faiss.read_index(str(folder / f"{name}.faiss"))
        number = int(np.argmax([index.invlists.list_size(n) for n in range(16)]))
        change(faiss.rev_swig_ptr(index.invlists.get_ids(number), 2))
        faiss.write_index(index, str(tmp_path / "changed.faiss"))
        with pytest.raises(CollectionError, match=f"expected lists of its rows, found {found}"):
            open_index(
                tmp_path / "changed.faiss", factory=name, count=COUNT, dim=DIM, metric="cosine",
                vectors_ND=np.load(folder / "vectors.npy"),
            )  # fmt: skip


def test_every_number_that_a_scan_goes_by_is_checked(folder, tmp_path):
    """FAISS takes from the file how many queries it scans for at once, and trusts it."""
    name = "IVF16,PQ8x4fs,RFlat"
    index = faiss.read_index(str(folder / f"{name}.faiss"))
    faiss.downcast_index(index).qbs2 += 2
    faiss.write_index(index, str(tmp_path / "changed.faiss"))
    with pytest.raises(CollectionError, match=f"expected {name} of {COUNT} x {DIM}"):
        open_index(
            tmp_path / "changed.faiss", factory=name, count=COUNT, dim=DIM, metric="cosine",
            vectors_ND=np.load(folder / "vectors.npy"),
        )  # fmt: skip


def test_a_graph_with_vectors_of_its_own_is_refused(folder, tmp_path):
    """`write_index` leaves them out: those of the segment are searched."""
    vectors = np.load(folder / "vectors.npy")
    faiss.write_index(build_index(vectors, "HNSW8"), str(tmp_path / "index.faiss"))
    with pytest.raises(CollectionError, match="links between its rows, found vectors of its own"):
        open_index(
            tmp_path / "index.faiss", factory="HNSW8", count=COUNT, dim=DIM, metric="cosine",
            vectors_ND=vectors,
        )  # fmt: skip


def test_a_graph_of_cagra_is_opened_and_searched_by_the_cpu(folder, tmp_path):
    """A CPU can make one, though not in the way of a GPU."""
    vectors = np.load(folder / "vectors.npy")
    index = faiss.IndexHNSWCagra(DIM, 16, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    write_index(index, tmp_path / "index.faiss", "CAGRA32")
    opened = open_index(
        tmp_path / "index.faiss", factory="CAGRA32", count=COUNT, dim=DIM, metric="cosine",
        vectors_ND=vectors,
    )  # fmt: skip
    _, rows = opened.search(vectors[:50], 1, parameters={"efSearch": 50}, threads=1)
    assert (rows[:, 0] == np.arange(50)).mean() > 0.9


@pytest.mark.gpu
def test_cagra_is_built_by_a_gpu_and_searched_by_the_cpu(folder, tmp_path):
    """The file is one of FAISS for the CPU."""
    vectors = np.load(folder / "vectors.npy")
    write_index(build_index(vectors, "CAGRA32"), tmp_path / "index.faiss", "CAGRA32")
    opened = open_index(
        tmp_path / "index.faiss", factory="CAGRA32", count=COUNT, dim=DIM, metric="cosine",
        vectors_ND=vectors,
    )  # fmt: skip
    _, rows = opened.search(vectors[:50], 1, parameters={"efSearch": 50}, threads=1)
    assert (rows[:, 0] == np.arange(50)).mean() > 0.9


def test_cagra_without_a_gpu_says_what_is_missing(folder):
    """Before anything is built."""
    if hasattr(faiss, "GpuIndexCagra") and faiss.get_num_gpus():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="index CAGRA32: expected an NVIDIA GPU and faiss-gpu"):
        build_index(np.load(folder / "vectors.npy"), "CAGRA32")


def test_a_system_that_cannot_open_an_index_does_not_blame_it(folder, monkeypatch):
    """FAISS says it in words of its own, so the file is opened before."""

    def refuse(file, *_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CollectionError, match=r"the system opens, found Too many open files; mend"):
        open_in(folder, "HNSW8.faiss", "HNSW8")
