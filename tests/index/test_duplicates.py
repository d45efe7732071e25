import csv
import errno
import html.parser
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from index.build import BuildOptions, build
from index.collection import Collection, id_of
from index.curation.near import Grouping, find_groups
from index.duplicates import DuplicateOptions, main
from models.command import run_command


@pytest.fixture
def duplicates(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def run(*args):
        argv = [*map(str, args)]
        status = run_command(DuplicateOptions, main, prog="python -m index.duplicates", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def on_arc(*degrees):
    """Unit vectors in a plane, at these angles."""
    radians = np.radians(degrees)
    rows = np.zeros((len(degrees), 8), np.float32)
    rows[:, 0], rows[:, 1] = np.cos(radians), np.sin(radians)
    return rows


def keys_of(collection, groups):
    """The groups as keys: the kept one, then the others, nearest first."""
    return [[row.key for row in collection.rows([g.kept, *g.others])] for g in groups]


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_groups_do_not_chain(tmp_path, make_collection, factory):
    """Ten degrees apart each, none is grouped with one that is twenty away."""
    vectors = on_arc(0, 10, 20, 30, 40, 180)
    with Collection.open(make_collection(tmp_path, vectors, factory=factory)) as collection:
        groups = find_groups(collection, float(np.cos(np.radians(11))))
        assert keys_of(collection, groups) == [["0000", "0001"], ["0002", "0003"]]
        assert groups[0].scores == pytest.approx([np.cos(np.radians(10))], abs=1e-6)
        assert find_groups(collection, 0.9999) == []


def test_an_image_goes_to_the_nearest_that_is_kept(tmp_path, make_collection):
    """Though another one was there first."""
    with Collection.open(make_collection(tmp_path, on_arc(0, 9, 13))) as collection:
        groups = find_groups(collection, float(np.cos(np.radians(10))))
        assert keys_of(collection, groups) == [["0002", "0001"]]


def test_many_copies_of_one_image_are_one_group(tmp_path, make_collection):
    """More than are asked for at first."""
    vectors = on_arc(*[0] * 500, *range(20, 180, 20))
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        (group,) = find_groups(collection, 0.99)
        assert collection.rows([group.kept])[0].key == "0000"
        assert len(set(group.others)) == 499


def test_a_threshold_of_one_finds_every_copy(tmp_path, make_collection, unit_rows):
    """float32 rounds the cosine of a vector with itself below 1, as often as not."""
    vectors = np.repeat(unit_rows(100, 512), 2, axis=0)
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        assert len(find_groups(collection, 1.0)) == 100


def test_a_filter_says_what_is_looked_at(tmp_path, make_collection):
    """The others are neither kept nor deleted."""
    with Collection.open(make_collection(tmp_path, on_arc(0, 0, 0, 0, 0, 0))) as collection:
        selection = collection.select("label = '1'")  # rows 1 and 4
        groups = find_groups(collection, 0.99, selection=selection)
        assert keys_of(collection, groups) == [["0001", "0004"]]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.3, 0.95))
def test_what_is_deleted_has_a_twin_and_what_is_kept_has_none(seed, threshold):
    """Of any neighbourhoods, also where some are missed on one side."""
    rng = np.random.default_rng(seed)
    vectors = on_arc(*rng.uniform(0, 180, 30))
    scores = vectors @ vectors.T
    grouping = Grouping()
    missed = rng.random((30, 30)) < 0.1
    for row in range(30):
        near = np.flatnonzero((scores[row] >= threshold) & ~missed[row])
        grouping.add(row, [(int(n), float(scores[row, n])) for n in near if n != row])
    groups = grouping.groups()
    gone = [other for group in groups for other in group.others]
    assert len(gone) == len(set(gone))
    for group in groups:
        assert group.scores == sorted(group.scores, reverse=True)
        for other, score in zip(group.others, group.scores, strict=True):
            assert score == pytest.approx(scores[group.kept, other])
            assert score >= threshold
    kept = sorted(set(range(30)) - set(gone))
    for later, row in enumerate(kept):
        for other in kept[:later]:
            seen = not missed[row, other] or not missed[other, row]
            assert scores[row, other] < threshold or not seen


@pytest.fixture
def with_copies(tmp_path, bundle, new_folder):
    """A collection of 12 images, three of which are copies, one under another label."""
    folder = new_folder()
    for copy, original in (
        ("red/copy & <b>.png", "red/000.png"),
        ("green/stray.png", "red/000.png"),
        ("blue/again.png", "blue/001.png"),
    ):
        Image.open(folder / original).save(folder / copy)
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    return out, folder


def test_a_list_for_people_and_a_report(duplicates, with_copies, tmp_path):
    """Groups, what may be deleted, and a page with a picture of every image."""
    out, folder = with_copies
    report = tmp_path / "report"
    status, text, _ = duplicates(out, "--threshold", 0.9999, "--out", report)
    lines = text.splitlines()
    assert status == 0
    assert lines[0] == "3 near-duplicates in 2 groups, of 15 images"
    assert lines[2] == "green/stray.png  (2 more)  labels differ: green, red"
    assert sorted(line.split(maxsplit=1)[1] for line in lines[3:5]) == [
        "red/000.png",
        "red/copy & <b>.png",
    ]
    with (report / "delete.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["key"], row["kept_key"]) for row in rows} == {
        ("red/000.png", "green/stray.png"),
        ("red/copy & <b>.png", "green/stray.png"),
        ("blue/again.png", "blue/001.png"),
    }
    assert {int(row["id"]) for row in rows} == {id_of(row["key"]) for row in rows}
    document = json.loads((report / "groups.json").read_text())
    assert (document["duplicates"], document["threshold"], document["exact"]) == (3, 0.9999, True)
    page = (report / "index.html").read_text()
    assert page.count("data:image/") == 5
    assert "red/copy &amp; &lt;b&gt;.png" in page
    assert not any(part in page for part in ('src="http', "<script", "<link", "url("))
    html.parser.HTMLParser().feed(page)
    (folder / "red/000.png").unlink()
    status, text, _ = duplicates(out, "--threshold", 0.9999, "--out", report, "--json")
    assert json.loads(text) == document
    assert "no picture" in (report / "index.html").read_text()
    assert sorted(path.name for path in report.parent.glob("*report*")) == ["report"]


def test_a_source_that_is_away_is_said_once(duplicates, with_copies, tmp_path, caplog):
    """However many groups a page has."""
    out, folder = with_copies
    folder.rename(tmp_path / "away")
    assert duplicates(out, "--threshold", 0.9999, "--out", tmp_path / "report")[0] == 0
    assert caplog.text.count(f"image folder {folder}: expected a folder, found nothing") == 1


def test_a_name_forges_no_line(duplicates, bundle, new_folder, tmp_path, caplog):
    """Nor does it reach the terminal, of an image that cannot be read any more either."""
    folder = new_folder(per_class=1)
    picture = Image.open(folder / "red/000.png")
    picture.save(folder / "red/001\n  1.0000  forged\x1b[2J.png")
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    _, text, _ = duplicates(out, "--threshold", 0.9999)
    assert text.splitlines()[3:] == ["  1.0000  red/001\\n  1.0000  forged\\x1b[2J.png"]
    shutil.rmtree(folder / "red")
    duplicates(out, "--threshold", 0.9999, "--out", tmp_path / "report")
    assert "red/001\\n  1.0000  forged\\x1b[2J.png: expected" in caplog.text
    assert "\x1b" not in caplog.text


def test_groups_are_looked_up_together(duplicates, make_collection, tmp_path, monkeypatch):
    """Of a hundred thousand groups one after the other it took minutes."""
    rows, calls = Collection.rows, []
    monkeypatch.setattr(Collection, "rows", lambda *args: calls.append(args) or rows(*args))
    path = make_collection(tmp_path / "c", on_arc(0, 1, 2, 90, 91, 180, 181))
    status, out, _ = duplicates(path, "--threshold", 0.999, "--json")
    assert status == 0
    groups = [[one["kept"], *one["others"]] for one in json.loads(out)["groups"]]
    assert [[row["key"] for row in group] for group in groups] == [
        ["0000", "0001", "0002"], ["0003", "0004"], ["0005", "0006"],
    ]  # fmt: skip
    assert len(calls) == 1


def test_few_groups_are_shown_of_many(duplicates, with_copies):
    """And the rest is counted; a filter leaves others out."""
    out, _ = with_copies
    _, text, _ = duplicates(out, "--threshold", 0.9999, "--max-groups", 1)
    assert text.startswith("3 near-duplicates in 2 groups, of 15 images\n")
    assert text.endswith("... and 1 group more\n")
    _, text, _ = duplicates(out, "--threshold", 0.9999, "--filter", "label = 'blue'", "--exact")
    assert text.startswith("1 near-duplicate in 1 group, of 5 images\n")
    _, text, _ = duplicates(out, "--threshold", 1, "--filter", "label = 'none'")
    assert text == "0 near-duplicates in 0 groups, of 0 images\n"


def test_a_full_disk_is_said_with_what_helps(duplicates, with_copies, tmp_path, monkeypatch):
    """Another name on the same disk would not."""

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("index.duplicates.write_csv", no_room)
    status, _, err = duplicates(with_copies[0], "--out", tmp_path / "report")
    assert status == 1
    assert err.endswith("found No space left on device; make room, or choose another place\n")
    assert not list(tmp_path.glob("*report*"))


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["COLLECTION", "--threshold", "0"], 2, "--threshold: expected above 0, up to 1, found"),
        (["COLLECTION", "--max-groups", "0"], 2, "--max-groups: expected at least 1, found 0"),
        (["COLLECTION", "--out", "FOLDER"], 2, "found something else of that name; choose another"),
        (
            ["COLLECTION", "--out", "/dev/null/report"],
            1,
            "expected a directory that can be written",
        ),
        (["COLLECTION", "--filter", "x"], 2, "filter, character 1: expected a column"),
        (["/no/such"], 1, "/no/such: expected a collection directory"),
    ],
)
def test_errors_are_one_line(duplicates, built, tmp_path, args, status, message):
    """Bad use is status 2, failed work status 1."""
    names = {"COLLECTION": built, "FOLDER": tmp_path}
    found, _, err = duplicates(*(names.get(arg, arg) for arg in args))
    assert (found, message in err) == (status, True)
    assert err.count("\n") == 1
