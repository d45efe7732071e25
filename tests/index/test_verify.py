import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index.ann.hnsw_file import graph_fault
from index.ann.making import build_index, write_index
from index.build import BuildOptions, build
from index.collection import Collection
from index.errors import CollectionError
from index.storage.journal import JournalFile, Position
from index.storage.manifest import hash_files, read_manifest, write_manifest
from index.storage.records import PUT, decode, encode_put
from index.storage.segment import Block
from index.storage.writer import CollectionWriter
from index.verify import VerifyOptions, main, verify
from models.command import run_command

ROOT = Path(__file__).parents[2]
FILES = [
    "manifest.json",
    "rejects.jsonl",
    "segments/000000/vectors.npy",
    "segments/000000/ids.npy",
    "segments/000000/rows.parquet",
    "segments/000000/index.faiss",
]


@pytest.fixture
def run(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def command(*args):
        argv = [*map(str, args)]
        status = run_command(VerifyOptions, main, prog="python -m index.verify", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def rehash(path, **changes):
    """Make the manifest agree with files that were changed, as a forger would."""
    manifest = read_manifest(path)
    changes = {"files": hash_files(path, manifest.files), **changes}
    write_manifest(path, dataclasses.replace(manifest, **changes))


@pytest.fixture
def with_rejects(tmp_path, bundle, new_folder):
    """An HNSW collection whose build rejected an image."""
    folder = new_folder()
    (folder / "red" / "bad.png").write_text("no image")
    out = tmp_path / "with-rejects"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out, index="hnsw"))
    return out


def test_a_sound_collection(run, with_rejects):
    """One line, or JSON; nothing is changed."""
    before = {file: file.read_bytes() for file in with_rejects.rglob("*") if file.is_file()}
    status, out, err = run(with_rejects)
    assert (status, err) == (0, "")
    size = sum(map(len, before.values()))
    assert out == f"{with_rejects}: 12 images in 6 files, {size} bytes: sound\n"
    status, out, _ = run(with_rejects, "--json")
    found = json.loads(out)
    assert (status, found["content"], found["faults"], found["unknown"]) == (0, "12 images", [], [])
    assert before == {file: file.read_bytes() for file in with_rejects.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_in_any_file_is_found(run, with_rejects, name):
    """At its start, its end and places between; the file is named and the status is 1."""
    file = with_rejects / name
    content = file.read_bytes()
    assert content
    for at in {*np.linspace(0, len(content) - 1, 9).astype(int).tolist()}:
        for flip in (0x01, 0x80, 0x2A):
            damaged = bytearray(content)
            damaged[at] ^= flip
            file.write_bytes(damaged)
            status, _, err = run(with_rejects)
            assert (status, str(file) in err) == (1, True), f"byte {at} ^ {flip:#x}"
    file.write_bytes(content)
    assert run(with_rejects)[0] == 0


@pytest.fixture
def written(built_hnsw, copy_collection, unit_rows):
    """An HNSW collection that was written to: tombstones, a segment more, and a journal."""
    path = copy_collection(built_hnsw)
    with CollectionWriter.open(path) as writer:
        fingerprint = writer.collection.fingerprint
        vectors = unit_rows(4, writer.collection.dim)

        def add(key, row):
            table = pa.table({"key": [key], "source": ["folder:/nowhere"]})
            writer.upsert(table, vectors[row : row + 1], fingerprint=fingerprint)

        writer.delete(writer.collection.ids[[3, 5]])
        add("sealed", 0)
        writer.seal()
        add("in the journal", 1)
        add("sealed", 2)
        writer.delete(writer.collection.ids[:1])
    return path


def test_what_a_writer_wrote_is_sound(run, written):
    """60 images, 3 deleted, 2 added; the journal is a file like the others, the lock is none."""
    status, out, err = run(written)
    assert (status, err) == (0, "")
    assert out.startswith(f"{written}: 59 images in 11 files, ")


@pytest.mark.parametrize("name", ["journal-", "segments/000000/tombstones-", "manifest.json"])
def test_one_flipped_byte_of_what_a_writer_wrote_is_found(run, written, name):
    """By verify, which names the file, and by opening, for the writer as for readers."""
    (file,) = written.glob(f"{name}*")
    content = file.read_bytes()
    step = max(1, len(content) // 24)
    for at in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[at] ^= 0x20
        file.write_bytes(damaged)
        status, _, err = run(written)
        assert (status, str(file) in err) == (1, True), f"byte {at}"
        for opening in (Collection.open, CollectionWriter.open):
            with pytest.raises(CollectionError, match=f"{file}: expected "):
                opening(written)
    file.write_bytes(content[:-1])
    status, _, err = run(written)
    assert (status, str(file) in err) == (1, True)
    file.write_bytes(content)
    assert run(written)[0] == 0


def test_a_journal_of_what_does_not_belong_is_found(written):
    """Vectors of another length, ids of other keys, tables of other columns: digests are right."""
    manifest = read_manifest(written)
    journal = JournalFile(written, manifest.journal, writable=True)
    (*_, last) = journal.read(Position())
    good = next(
        change
        for record in journal.read(Position())
        if isinstance(change := decode(record, manifest.dim, ""), Block)
    )
    ids = good.rows["id"].to_numpy() + 1
    other_rows = good.rows.set_column(0, good.rows.schema.field(0), [ids])
    for block, fault in [
        (Block(rows=good.rows, vectors_ND=good.vectors_ND * 2), "found 2 in row 0"),
        (Block(rows=other_rows, vectors_ND=good.vectors_ND), "expected the id of key 'in the jou"),
        (Block(rows=good.rows, vectors_ND=good.vectors_ND[:, :8]), "bytes for 1 rows of 16 dim"),
        (Block(rows=good.rows.select(["id"]), vectors_ND=good.vectors_ND), "found rows of id"),
    ]:
        journal.append(PUT, encode_put(block), last.position)
        (found,) = verify(written).faults
        assert found.startswith(str(journal.file))
        assert fault in found
    journal.append(7, [b"what?"], last.position)
    assert verify(written).faults[0].startswith(f"{journal.file}: expected rows of this collection")


@pytest.mark.parametrize("name", ["bundle.json", "encoder.onnx", "random.onnx"])
def test_one_flipped_byte_in_a_bundle_is_found(run, new_bundle, name):
    """Also where it stands in what the fingerprint does not cover."""
    bundle = new_bundle()
    status, out, _ = run(bundle.path)
    assert (status, "an encoder of 16 dimensions in 3 files" in out) == (0, True)
    file = bundle.path / name
    content = file.read_bytes()
    for at in {*np.linspace(0, len(content) - 1, 40).astype(int).tolist()}:
        damaged = bytearray(content)
        damaged[at] ^= 0x01
        file.write_bytes(damaged)
        status, _, err = run(bundle.path)
        assert (status, str(file) in err or "bundle.json" in err) == (1, True), f"byte {at}"


def test_what_a_killed_writer_left_is_said_to_be_harmless(run, written):
    """And who deletes it, who then does."""
    left = [written / "journal-000099", written / "segments/000099/vectors.npy"]
    left[1].parent.mkdir()
    for file in left:
        file.touch()
    fate = "no part of it; the next writer, such as `index.compact`, deletes it"
    status, out, _ = run(written)
    assert status == 0
    assert out.splitlines()[:2] == [f"{file}: {fate}" for file in left]
    CollectionWriter.open(written).close()
    assert not any(file.exists() for file in left)
    assert run(written)[1].count("\n") == 1


def test_a_file_of_any_name_is_mentioned(run, written):
    """Also one that is no text, or would be more than a name on a terminal."""
    (written / os.fsdecode(b"a\xff\x1b[31m\n")).touch()
    status, out, _ = run(written)
    assert (status, out.count("\n")) == (0, 2)
    assert f"{written}/a\\udcff\\x1b[31m\\n: no part of it; Horace neither" in out


def test_every_fault_is_told_at_once(run, with_rejects):
    """A line each, and how many at the end; what is no part of it is mentioned."""
    (with_rejects / "segments/000000/ids.npy").unlink()
    file = with_rejects / "segments/000000/index.faiss"
    file.write_bytes(file.read_bytes()[:100])
    (with_rejects / "notes.txt").write_text("mine")
    status, out, err = run(with_rejects)
    lines = out.splitlines()
    assert status == 1
    assert (
        lines[0]
        == f"{with_rejects / 'notes.txt'}: no part of it; Horace neither reads nor deletes it"
    )
    assert "ids.npy: expected a file that manifest.json lists, found none" in lines[1]
    assert "index.faiss: expected " in lines[2]
    assert err.startswith("python -m index.verify: 2 faults, the first: ")


def test_what_is_no_collection(run, tmp_path):
    """It has no manifest; one that is too large is not read."""
    status, _, err = run(tmp_path)
    assert (status, "found no manifest.json in it" in err) == (1, True)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 30)
    status, _, err = run(tmp_path)
    assert (status, "expected at most 67108864 bytes, found 1073741824" in err) == (1, True)


def test_vectors_of_other_lengths_are_found(built, copy_collection):
    """Also where every checksum agrees."""
    path = copy_collection(built)
    file = path / "segments/000000/vectors.npy"
    vectors = np.load(file)
    for value, shown in ((2.0, "2"), (np.nan, "nan")):
        changed = vectors.copy()
        changed[7] *= value
        np.save(file, changed)
        rehash(path)
        assert verify(path).faults == [
            f"{file}: expected vectors of length 1, found {shown} in row 7"
        ]


def test_an_index_of_other_vectors_is_found(built_hnsw, copy_collection):
    """Of the right type, size and metric, and every checksum agrees."""
    path = copy_collection(built_hnsw)
    file, factory = path / "segments/000000/index.faiss", "HNSW32,SQ8,RFlat"
    vectors = np.load(path / "segments/000000/vectors.npy")
    vectors[[3, 4]] = vectors[[4, 3]]
    write_index(build_index(vectors, factory), file, factory)
    (entry,) = read_manifest(path).segments
    rehash(path, segments=(dataclasses.replace(entry, factory=factory),))
    assert verify(path).faults == [
        f"{file}: expected the vectors of vectors.npy, found another in row 3"
    ]


def test_an_id_of_another_key_is_found(built, copy_collection):
    """Though ids.npy and rows.parquet agree on it."""
    path = copy_collection(built)
    folder = path / "segments/000000"
    ids = np.load(folder / "ids.npy")
    ids[5] += 1
    np.save(folder / "ids.npy", ids)
    table = pq.read_table(folder / "rows.parquet")
    pq.write_table(table.set_column(0, table.schema.field(0), [ids]), folder / "rows.parquet")
    rehash(path)
    (fault,) = verify(path).faults
    assert fault.startswith(f"{folder / 'rows.parquet'}: expected the id of key '")
    assert fault.endswith(f"', found {ids[5]} in row 5")


def test_ids_that_are_there_twice_are_found(built, copy_collection):
    """An image is there once, in whatever segment."""
    path = copy_collection(built)
    manifest = read_manifest(path)
    (entry,) = manifest.segments
    again = dataclasses.replace(entry, name="000001")
    source = path / "segments/000000"
    target = path / "segments/000001"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    names = [*manifest.files, *(f"segments/000001/{f.name}" for f in target.iterdir())]
    rehash(path, segments=(entry, again), files=hash_files(path, names))
    faults = verify(path).faults
    assert faults[0].startswith(f"{path}: expected every id once, found ")
    assert faults[
        1
    ] == f"{path / 'manifest.json'}: expected 120 images, found 60 images of its " + ("sources")


def broken(change):
    """An HNSW index of 60 rows with a change in its links."""
    vectors = np.eye(60, 16, dtype=np.float32) + 0.01
    index = build_index(vectors, "HNSW32")
    change(index.hnsw)
    return index


def view(vector):
    """A vector of faiss, to be written to."""
    return faiss.rev_swig_ptr(vector.data(), vector.size())


def link_far(hnsw):
    """A link to a row that is not there."""
    view(hnsw.neighbors)[5] = 1 << 30


def link_below(hnsw):
    """A link to a row before the first."""
    view(hnsw.neighbors)[5] = -7


def enter_elsewhere(hnsw):
    """An entry that is not there."""
    hnsw.entry_point = 60


def shift_offsets(hnsw):
    """Links of one node counted to another."""
    view(hnsw.offsets)[3] += 1


def shift_back(hnsw):
    """Links of one node counted before those of another."""
    view(hnsw.offsets)[3] = 0


def end_early(hnsw):
    """Fewer links than there are."""
    view(hnsw.offsets)[60] -= 1


def set_level(hnsw):
    """A node higher than there are levels."""
    view(hnsw.levels)[7] = 99


def raise_top(hnsw):
    """More levels than any node has."""
    hnsw.max_level = 9


BROKEN = [
    (link_far, "a link to row 1073741824"),
    (link_below, "a link to row "),
    (enter_elsewhere, "an entry at row 60, level "),
    (raise_top, ", level 9"),
    (shift_offsets, "nodes with other numbers of links than their levels have"),
    (shift_back, "offsets that do not rise"),
    (end_early, "links where "),
    (set_level, "a node of level 99"),
]


@pytest.mark.parametrize(("change", "found"), BROKEN)
def test_links_that_lead_astray_are_told(change, found):
    """Whatever version of faiss has read them."""
    assert graph_fault(broken(lambda _: None)) is None
    assert found in str(graph_fault(broken(change)))


@pytest.mark.parametrize(("change", "found"), BROKEN)
def test_links_that_lead_astray_are_refused_at_opening(built_hnsw, copy_collection, change, found):
    """Otherwise faiss would follow them out of its memory."""
    path = copy_collection(built_hnsw)
    write_index(broken(change), path / "segments/000000/index.faiss", "HNSW32")
    rehash(path)
    with pytest.raises(CollectionError, match=f"expected .*{found}|no FAISS index"):
        Collection.open(path, verify=False)
    assert verify(path).faults


def claims_too_much(path, name):
    """Change a header so that it speaks of terabytes."""
    file = path / "segments/000000" / name
    content = file.read_bytes()
    if name.endswith(".npy"):
        content = content.replace(b"(60,", b"(%d," % (1 << 40)).replace(b" " * 11 + b"\n", b"\n", 1)
    else:
        length = (60 * 16).to_bytes(8, "little")  # floats of the stored vectors
        at = content.index(length)
        content = content[:at] + (1 << 40).to_bytes(8, "little") + content[at + 8 :]
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy", "index.faiss"])
@pytest.mark.parametrize("command", ["verify", "open"])
def test_an_oversized_header_is_refused_within_bounded_memory(
    built_hnsw, copy_collection, name, command
):
    """A process that may have 2 GiB more than it starts with says what is wrong."""
    path = copy_collection(built_hnsw)
    claims_too_much(path, name)
    rehash(path)
    code = {
        "verify": "from index.verify import verify; print(verify(sys.argv[1]).faults)",
        "open": "from index.collection import Collection; Collection.open(sys.argv[1])",
    }[command]
    limited = (
        "import sys, resource, faiss, pathlib, index.verify; "
        "from pathlib import Path; sys.argv[1] = Path(sys.argv[1]); "
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2); " + code
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, path], cwd=ROOT, capture_output=True, text=True
    )
    assert f"{path}/segments/000000/{name}: expected" in done.stdout + done.stderr
    assert done.returncode == (0 if command == "verify" else 1)
    assert "MemoryError" not in done.stderr


def test_a_log_of_rejects_that_is_none(with_rejects):
    """Every line is an object that names the image."""
    (with_rejects / "rejects.jsonl").write_text('{"key": "a"}\n[]\n')
    rehash(with_rejects)
    assert verify(with_rejects).faults == [
        f"{with_rejects / 'rejects.jsonl'}: expected a JSON object with a key on every line, found "
        "something else"
    ]


def test_a_manifest_of_other_bytes_is_refused_at_opening(built, copy_collection):
    """Also where they say the same: a flipped byte may make white space of white space."""
    path = copy_collection(built)
    file = path / "manifest.json"
    content = file.read_bytes()
    for changed in (content[:-1], content + b"\n", content.replace(b"  ", b"\n\n", 1)):
        file.write_bytes(changed)
        with pytest.raises(CollectionError, match=r"manifest\.json: expected the bytes that were"):
            Collection.open(path)
        assert verify(path).faults


def test_forged_text_that_is_none_is_refused(built, copy_collection):
    """A key that is no UTF-8, though every checksum agrees: nobody stumbles over it later."""
    path = copy_collection(built)
    file = path / "segments/000000/rows.parquet"
    table = pq.read_table(file)
    keys = pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string())
    pq.write_table(table.set_column(1, table.schema.field(1), keys), file)
    rehash(path)
    with pytest.raises(CollectionError, match=r"rows\.parquet: expected the 60 rows .*UTF8"):
        Collection.open(path)


def test_a_header_that_is_no_literal_is_refused(built, copy_collection):
    """Whatever NumPy raises for it."""
    path = copy_collection(built)
    file = path / "segments/000000/ids.npy"
    content = file.read_bytes()
    for text in (b"(60,", b"'descr'", b"}"):
        for other in (b"(", b"\xff", b"\\", b"0" * 40, b"L"):
            file.write_bytes(content.replace(text, other.ljust(len(text))[: len(text)], 1))
            rehash(path)
            with pytest.raises(CollectionError, match=r"ids\.npy: expected int64 \(60,\)"):
                Collection.open(path)


def test_a_column_whose_name_is_no_text_is_refused(built, copy_collection):
    """Though every checksum agrees."""
    path = copy_collection(built)
    file = path / "segments/000000/rows.parquet"
    content = file.read_bytes()
    places = [at for at in range(len(content)) if content.startswith(b"digest", at)]
    n_refused = 0
    for at in places:
        file.write_bytes(content[:at] + b"\xff\xfe" + content[at + 2 :])
        rehash(path)
        try:
            with Collection.open(path) as collection:
                assert collection.table().column_names[-1] == "digest"
        except CollectionError:
            n_refused += 1
    assert n_refused > 0


@pytest.mark.parametrize("name", ["manifest.json", "journal-000001", ".lock"])
def test_a_pipe_in_the_place_of_a_file(name, built, copy_collection, tmp_path):
    """Is refused in one line; nobody waits for what never comes."""
    path = copy_collection(built)
    with CollectionWriter.open(path) as writer:
        writer.delete(writer.collection.ids[:1])
    (path / name).unlink()
    os.mkfifo(path / name)
    code = (
        "import sys\n"
        "from index.collection import Collection\n"
        "from index.storage.writer import CollectionWriter\n"
        "from models.errors import HoraceError\n"
        "for opened in (Collection.open, CollectionWriter.open):\n"
        "    try: opened(sys.argv[1])\n"
        "    except HoraceError as error: print(error)\n"
    )
    for arguments in (["-c", code], ["-m", "index.verify"]):
        done = subprocess.run(
            [sys.executable, *arguments, str(path)], capture_output=True, text=True, timeout=60
        )
        if name != ".lock" or arguments[0] == "-c":
            assert "found" in done.stdout + done.stderr
            assert "no regular file" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
