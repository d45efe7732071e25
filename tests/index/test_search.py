import json
import re
import shutil

import pyarrow as pa
import pytest
from PIL import Image

from benchmarks.indexed import give_index
from index.build import BuildOptions, build
from index.collection import Collection, Row, id_of
from index.found import Found, Hit
from index.search import SearchOptions, main
from index.storage.writer import CollectionWriter
from models.command import run_command


@pytest.fixture
def search(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def run(*args):
        argv = [*map(str, args)]
        status = run_command(SearchOptions, main, prog="python -m index.search", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_table_for_people(search, built, test_folder):
    """Score, label and key of each neighbour, nearest first."""
    query = test_folder / "red/000.png"
    status, out, _ = search(built, query, "--k", 3)
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == str(query)
    assert lines[1].split() == ["score", "label", "key"]
    assert len(lines) == 5
    for line in lines[2:]:
        assert re.fullmatch(r"   0\.\d{4}  red    red/\d{3}\.png", line)


def test_json_for_machines(search, built, bundle, test_folder):
    """Everything that is known of each neighbour, and which encoder compared them."""
    files = [test_folder / "red/000.png", test_folder / "blue/001.png"]
    _, out, _ = search(built, *files, "--k", 2, "--json")
    found = json.loads(out)
    queries = found.pop("queries")
    assert found == {
        "collection": "colours",
        "fingerprint": bundle.fingerprint,
        "index": "Flat",
        "exact": True,
        "effort": None,
        "k": 2,
        "filter": None,
        "min_score": None,
        "diversity": 0.0,
    }
    assert [query["query"] for query in queries] == [str(file) for file in files]
    assert [hit["label"] for query in queries for hit in query["hits"]] == ["red"] * 2 + [
        "blue"
    ] * 2
    assert set(queries[0]["hits"][0]) == {
        "score", "id", "key", "label", "source", "metadata"
    }  # fmt: skip


def test_stored_images_by_key_and_id(search, built_hnsw):
    """They are left out of their own neighbours; exact search agrees here."""
    key = "green/004.png"
    _, by_key, _ = search(built_hnsw, "--key", key, "--json")
    _, by_id, _ = search(built_hnsw, "--id", id_of(key), "--exact", "--json")
    hits = json.loads(by_key)["queries"][0]["hits"]
    assert json.loads(by_key)["exact"] is False
    assert json.loads(by_id)["exact"] is True
    assert len(hits) == 10
    assert key not in [hit["key"] for hit in hits]
    assert [hit["id"] for hit in json.loads(by_id)["queries"][0]["hits"]] == [
        hit["id"] for hit in hits
    ]
    assert [hit["id"] for hit in hits] == [str(id_of(hit["key"])) for hit in hits]  # jq rounds


def test_a_filter_says_what_may_be_found(search, built, test_folder):
    """For files and for stored images; --json repeats it."""
    query = test_folder / "red/000.png"
    filter = "label in ('blue', 'green') and key endswith '3.png'"
    status, out, _ = search(built, query, "--key", "red/001.png", "--filter", filter, "--json")
    document = json.loads(out)
    assert (status, document["filter"]) == (0, filter)
    for found in document["queries"]:
        keys = sorted(hit["key"] for hit in found["hits"])
        assert keys == ["blue/003.png", "blue/013.png", "green/003.png", "green/013.png"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--filter", "key = 'nine'"], "no image passes the filter"),
        (
            ["--filter", "label = 'rde'"],
            "no image passes the filter; labels here are 'blue', 'green', 'red'",
        ),
        (["--min-score", ".99999"], "no image is as near as --min-score 0.99999"),
        (
            ["--min-score", ".99999", "--filter", "label = 'red'"],
            "no image that passes the filter is as near as --min-score 0.99999",
        ),
    ],
)
def test_where_nothing_is_found_the_text_says_why(search, built, test_folder, args, why):
    """In the place of a table, with status 0; the document for machines has an empty list."""
    query = test_folder / "red/000.png"
    assert search(built, query, *args) == (0, f"{query}\n  {why}\n", "")
    status, out, _ = search(built, query, *args, "--json")
    assert (status, json.loads(out)["queries"][0]["hits"]) == (0, [])


def test_a_stored_image_alone_has_no_other(search, built, tmp_path, make_collection, unit_rows):
    """It may pass the filter itself, or be all that there is; other queries keep their tables."""
    _, out, _ = search(built, "--key", "red/000.png", "--filter", "key = 'red/000.png'")
    assert out == "red/000.png  (red)\n  no other image passes the filter\n"
    two = ("--key", "red/000.png", "red/001.png", "--filter", "key = 'red/000.png'")
    _, out, _ = search(built, *two)
    first, second = out.split("\n\n")
    assert first == "red/000.png  (red)\n  no other image passes the filter"
    assert second.splitlines()[0] == "red/001.png  (red)"
    assert second.splitlines()[2].endswith("red    red/000.png")
    make_collection(tmp_path / "one", unit_rows(1, 16))
    _, out, _ = search(tmp_path / "one", "--key", "0000")
    assert out == "0000  (0)\n  no other image is there\n"


def test_of_many_labels_ten_are_shown(search, tmp_path, built):
    """Where none passes a filter about them."""
    wide = tmp_path / "wide"
    shutil.copytree(built, wide)
    with Collection.open(wide) as collection:
        rows, vectors = collection.table(), collection.vectors(collection.ids)
        fingerprint = collection.fingerprint
    labels = pa.array([f"{n:02}" for n in range(59)] + [None])
    rows = rows.drop_columns(["id"]).set_column(
        rows.drop_columns(["id"]).column_names.index("label"), "label", labels
    )
    with CollectionWriter.open(wide) as writer:
        writer.upsert(rows, vectors, fingerprint=fingerprint)
    _, out, _ = search(wide, "--key", "red/000.png", "--filter", "label startswith 'x'")
    assert "filter; labels here are '00', '01', " in out
    assert out.endswith(", '09' and 49 more\n")


def test_all_within_a_range_and_few_that_differ(search, built, test_folder):
    """Fewer than k where fewer are near enough; other neighbours where they shall differ."""
    query = test_folder / "red/000.png"

    def hits(*args):
        status, out, _ = search(built, query, *args, "--json")
        assert status == 0
        return json.loads(out)["queries"][0]["hits"]

    scores = [hit["score"] for hit in hits("--k", 60)]
    least = (scores[6] + scores[7]) / 2
    assert [hit["score"] for hit in hits("--min-score", least, "--k", 3)] == scores[:3]
    assert [hit["score"] for hit in hits("--min-score", least)] == scores[:7]
    every = hits("--min-score", -1)
    assert [hit["score"] for hit in every] == scores  # of 60: more than the ten of a plain search
    assert len(hits("--min-score", -1, "--diversity", 0.2)) == 10
    nearest, diverse = hits("--k", 5), hits("--k", 5, "--diversity", 0.7)
    assert diverse[0] == nearest[0]
    assert len({hit["key"] for hit in diverse}) == 5
    assert diverse != nearest


def test_a_range_leaves_the_query_out_and_says_where_it_ends(search, built, monkeypatch, caplog):
    """A stored image is not within its own range; a default that cuts is no secret."""
    args = ["--key", "red/000.png", "blue/001.png", "--min-score", -1, "--json"]
    status, out, _ = search(built, *args)
    found = json.loads(out)["queries"]
    assert status == 0
    for query in found:
        keys = [hit["key"] for hit in query["hits"]]
        assert len(set(keys)) == len(keys) == 59
        assert query["query"] not in keys
    assert caplog.text == ""
    monkeypatch.setattr("index.search.RANGE_LIMIT", 50)
    _, out, _ = search(built, *args)
    assert [len(query["hits"]) for query in json.loads(out)["queries"]] == [50, 50]
    assert "the nearest 50 are given, and there may be more: see --k" in caplog.text


@pytest.mark.parametrize("factory", ["HNSW32", "IVF16,PQ4x4fs,RFlat", "Flat"])
def test_effort_of_one_search(search, tmp_path, make_collection, unit_rows, factory):
    """More effort finds more of the nearest; another search is as it was, and so are the files."""
    path = tmp_path / "c"
    make_collection(path, unit_rows(3000, 16))
    if factory != "Flat":
        with CollectionWriter.open(path, threads=1) as writer:
            give_index(writer, factory)
    before = (path / "manifest.json").read_bytes()
    keys = [f"{n:04}" for n in range(0, 3000, 60)]

    def hits(*args):
        status, out, _ = search(path, "--key", *keys, *args, "--json")
        assert status == 0
        return [[hit["id"] for hit in one["hits"]] for one in json.loads(out)["queries"]]

    exact = hits("--exact")

    def recall(*args):
        pairs = zip(hits(*args), exact, strict=True)
        return sum(len(set(a) & set(b)) for a, b in pairs) / (10 * len(keys))

    plain, least, most = recall(), recall("--effort", 11), recall("--effort", 3000)
    assert most >= 0.99
    assert recall() == plain
    assert recall("--effort", 1 << 40) >= 0.99
    assert recall("--effort", 3000, "--min-score", -1, "--k", 10) >= 0.99
    within = ("--min-score", 0.7)
    exact = hits(*within, "--exact")
    n_within = sum(map(len, exact))

    def recall_within(*args):
        pairs = zip(hits(*within, *args), exact, strict=True)
        return sum(len(set(a) & set(b)) for a, b in pairs) / n_within

    assert recall_within("--effort", 500) >= max(0.98, recall_within() - 0.005)
    if factory != "Flat":
        assert least < most
    assert (path / "manifest.json").read_bytes() == before


def test_one_query_of_several_images(search, built, test_folder, tmp_path):
    """More like these, less like those; stored ones are left out of the answer."""
    red, blue = test_folder / "red/000.png", test_folder / "blue/001.png"
    status, out, _ = search(built, red, "--key", "blue/001.png", "--together", "--k", 59)
    assert status == 0
    assert out.splitlines()[0] == f"{red} and blue/001.png"
    assert "  blue/001.png" not in out
    grid = tmp_path / "grid.png"
    status, out, _ = search(
        built, red, blue, "--id", id_of("red/003.png"), "--not", blue, "--not-key", "blue/001.png",
        "--not-weight", 2, "--k", 18, "--grid", grid,
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[0] == (
        f"{red} and {blue} and {id_of('red/003.png')} but not {blue} or blue/001.png"
    )
    assert [line.split()[1] for line in lines[2:20]] == ["red"] * 18
    assert grid.is_file()
    status, out, err = search(built, red, "--not", "/no/such.png")
    assert (status, out) == (1, "")
    assert "/no/such.png: expected a readable file" in err


def test_a_grid_of_pictures(search, built, test_folder, tmp_path):
    """Queries from files and from the collection, in one PNG."""
    grid = tmp_path / "grid.png"
    status, out, _ = search(
        built, test_folder / "red/000.png", "--key", "blue/001.png", "--grid", grid
    )
    assert status == 0
    assert out.endswith(f"picture: {grid}\n")
    with Image.open(grid) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_a_grid_says_what_neighbours_are_near_by(search, built_euclidean, tmp_path, monkeypatch):
    """Distances are no cosines."""
    titles = []
    monkeypatch.setattr("index.grid.draw_grid", lambda *_, title: titles.append(title))
    search(built_euclidean, "--key", "red/001.png", "--grid", tmp_path / "grid.png")
    assert titles == ["far: nearest of 60 images by distance"]


def test_a_query_of_several_examples_is_called_as_its_picture_is(
    search, built, test_folder, tmp_path, monkeypatch
):
    """By the first that it is to be like, and not by the last that it is to be unlike."""
    drawn = []
    monkeypatch.setattr("index.grid.draw_grid", lambda _, rows, title: drawn.extend(rows))
    args = ("--not-key", "blue/001.png", "--grid", tmp_path / "grid.png")
    search(built, test_folder / "red/000.png", *args)
    search(built, "--key", "red/002.png", *args)
    assert [query.caption for query, _ in drawn] == ["000.png", "red\n002.png"]


def test_a_grid_shows_what_is_left_of_its_source(search, bundle, new_folder, tmp_path, caplog):
    """Pictures that are gone are said to be so; the search is still good."""
    folder = new_folder(per_class=2)
    options = BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c")
    build(options)
    (folder / "red/000.png").unlink()
    status, _, _ = search(options.out, "--key", "red/001.png", "--grid", tmp_path / "one.png")
    assert status == 0
    assert "red/000.png: expected a readable file" in caplog.text
    shutil.rmtree(folder)
    status, _, _ = search(options.out, "--key", "red/001.png", "--grid", tmp_path / "none.png")
    assert status == 0
    assert "image folder" in caplog.text


def test_by_distances_an_image_is_searched_with_as_the_encoder_gives_it(
    search, built_euclidean, train_folder
):
    """Not at unit length: the image itself is at no distance, whatever its vector's length."""
    key = "red/000.png"
    _, out, _ = search(built_euclidean, train_folder / key, "--k", 1, "--json")
    (hit,) = json.loads(out)["queries"][0]["hits"]
    with Collection.open(built_euclidean) as collection:
        (stored,) = collection.vectors([id_of(key)])
    assert hit["key"] == key
    assert hit["score"] == pytest.approx(0, abs=1e-4 * float(stored @ stored))
    assert float(stored @ stored) > 100


def test_another_encoder_is_refused(search, built, bundle, other_bundle, test_folder):
    """The line names both, by fingerprint and bundle."""
    status, _, err = search(built, test_folder / "red/000.png", "--encoder", other_bundle.path)
    assert status == 1
    assert err == (
        f"python -m index.search: collection colours: expected encoder {bundle.fingerprint} "
        f"({bundle.path}), found encoder {other_bundle.fingerprint} ({other_bundle.path}); "
        "query it with the encoder that built it, or build it again with this one\n"
    )


def test_an_encoder_that_has_moved_is_asked_for(search, new_bundle, new_folder, tmp_path):
    """The manifest remembers where it was; --encoder says where it is."""
    own, folder = new_bundle(), new_folder()
    build(BuildOptions(images=str(folder), encoder=str(own.path), out=tmp_path / "c"))
    moved = own.path.rename(tmp_path / "moved")
    status, _, err = search(tmp_path / "c", folder / "red/000.png")
    assert status == 1
    assert err == (
        f"python -m index.search: encoder of collection c: expected the bundle at {own.path}, "
        "where it was when the collection was built, found nothing; say where it is now with "
        "--encoder\n"
    )
    status, out, _ = search(tmp_path / "c", folder / "red/000.png", "--encoder", moved)
    assert status == 0
    assert "1.0000  red    red/000.png" in out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["COLLECTION"], 2, "queries: expected image files, --key or --id, found none of them"),
        (["COLLECTION", "/no/such.png"], 1, "/no/such.png: expected a readable file, found No"),
        (["COLLECTION", "TEXT"], 1, "text.png: expected JPEG, PNG, WebP, GIF, BMP, TIFF"),
        (["COLLECTION", "--key", "none"], 1, "key 'none': expected a key of the 60 in"),
        (["COLLECTION", "--id", "5"], 1, "id 5: expected an id of the 60 in collection colours"),
        (["COLLECTION", "--id", str(2**63)], 2, "--id: expected numbers below 2^63, found (92"),
        (
            ["COLLECTION", "/no/1.png", "/no/2.png"],
            1,
            "search: 2 bad queries of 2, the first /no/1.png: expected a readable file, found No",
        ),
        (["COLLECTION", "--id", "1", "--grid", "g.jpg"], 2, "--grid: expected a name that ends in"),
        (
            ["COLLECTION", "--key", "red/001.png", "--grid", "/no/such/grid.png"],
            1,
            "--grid /no/such/grid.png: expected a file that can be written, found no directory",
        ),
        (["COLLECTION", "--key", "red/001.png", "--k", "0"], 2, "--k: expected at least 1"),
        (["COLLECTION", "--key", "a", "--effort", "0"], 2, "--effort: expected at least 1, found"),
        (
            ["COLLECTION", "--key", "a", "--effort", "9", "--exact"],
            2,
            "--effort: expected an index to search, found --exact",
        ),
        (
            ["COLLECTION", "--key", "red/001.png", "--filter", "colour = 'red'"],
            2,
            "filter, character 1: expected a column: id, key, label, source, digest, "
            "found 'colour'",
        ),
        (
            ["COLLECTION", "--key", "red/001.png", "--min-score", "2"],
            2,
            "minimal score: expected -1 to 1, found 2",
        ),
        (
            ["COLLECTION", "--key", "red/001.png", "--diversity", "-1"],
            2,
            "diversity: expected 0 to 1, found -1",
        ),
        (
            ["COLLECTION", "--key", "red/001.png", "--not-weight", "11"],
            2,
            "negative weight: expected 0 to 10, found 11",
        ),
        (
            ["COLLECTION", "--key", "a", "--not-key", "red/nine.png"],
            1,
            "key 'a': expected a key of the 60 in",
        ),
        (["/no/such", "--id", "5"], 1, "/no/such: expected a collection directory, found no such"),
        (
            ["COLLECTION", "--key", "red/001.png", "--grid", "/dev/null/grid.png"],
            1,
            "--grid /dev/null/grid.png: expected a file that can be written, found ",
        ),
    ],
)
def test_errors_are_one_line(search, built, tmp_path, args, status, message):
    """Bad use is status 2, failed work status 1."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    names = {"COLLECTION": built, "TEXT": text}
    found, out, err = search(*(names.get(arg, arg) for arg in args))
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_bad_query_does_not_stop_the_others(search, built, tmp_path, test_folder):
    """It has a line of its own, in its place, and the status tells."""
    good, bad = test_folder / "red/000.png", tmp_path / "bad.jpg"
    bad.write_text("no image")
    args = (built, bad, good, "--key", "red/nine.png", "red/001.png", "--k", 1)
    status, out, err = search(*args, "--grid", tmp_path / "grid.png")
    assert status == 1
    assert err.startswith(f"python -m index.search: 2 bad queries of 4, the first {bad}: expected ")
    lines = [line for line in out.splitlines() if line and not line.startswith("  ")]
    assert lines[0].startswith(f"{bad}: expected JPEG")
    assert lines[1] == str(good)
    assert lines[2].startswith("key 'red/nine.png': expected a key of the 60 in collection")
    assert lines[3:] == ["red/001.png  (red)", f"picture: {tmp_path / 'grid.png'}"]
    status, out, _ = search(*args, "--json")
    queries = json.loads(out)["queries"]
    assert status == 1
    assert [len(query["hits"]) for query in queries] == [0, 1, 0, 1]
    assert [query["error"] is None for query in queries] == [False, True, False, True]


def test_captions_name_label_and_file():
    """What is on the picture can be found again."""
    from index.grid import lay_out

    row = Row(id=1, key="data/red/0042.png", label="red", source="folder:/data")
    plain = Row(id=2, key="0043.png", label=None, source="folder:/data")
    hits = [Hit(score=0.98765, row=row), Hit(score=0.5, row=plain)]
    found = [
        Found(query=row.key, label=row.label, row=row, hits=hits),
        Found(query="/tmp/query.png", image=b"", hits=hits),
    ]
    rows = lay_out(found, {1: b"one", 2: None})
    assert [query.caption for query, _ in rows] == ["red\n0042.png", "query.png"]
    assert [tile.caption for tile in rows[0][1]] == ["0.988 red\n0042.png", "0.500\n0043.png"]
    assert [tile.is_match for _, tiles in rows for tile in tiles] == [True, False, None, None]


def test_a_grid_shows_files_that_are_no_images_any_more(search, bundle, new_folder, tmp_path):
    """A picture that was damaged since is one empty tile, not the end."""
    folder = new_folder(per_class=2)
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    (folder / "red/000.png").write_text("no image")
    status, _, _ = search(tmp_path / "c", "--key", "red/001.png", "--grid", tmp_path / "g.png")
    assert status == 0


def test_a_grid_of_too_many_is_cut(search, built, tmp_path, caplog):
    """A picture has room for so many; the table has all of them."""
    keys = [f"{colour}/{n:03}.png" for colour in ("red", "blue") for n in range(15)]
    status, out, _ = search(built, "--key", *keys, "--k", 1, "--grid", tmp_path / "grid.png")
    assert status == 0
    assert out.count("score") == 30
    assert "shows the first 24 of 30 queries" in caplog.text
    wide = tmp_path / "wide.png"
    status, out, _ = search(built, "--key", "red/001.png", "--min-score", -1, "--grid", wide)
    assert status == 0
    assert len(out.splitlines()) == 2 + 59 + 2
    assert "shows the first 24 of 59 neighbours" in caplog.text
    with Image.open(wide) as picture:
        assert picture.width > 3 * picture.height
