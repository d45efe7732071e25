import csv
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build
from index.outliers import OutlierOptions, main
from models.command import run_command


@pytest.fixture
def outliers(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def run(*args):
        argv = [*map(str, args)]
        status = run_command(OutlierOptions, main, prog="python -m index.outliers", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def with_stranger(tmp_path, bundle, new_folder):
    """24 images of three colours, one of them of a hostile name and a wrong label, and a stranger.

    The encoder subtracts grey and projects: a chessboard points where no colour does.
    """
    folder = new_folder(per_class=8)
    Image.open(folder / "red/000.png").save(folder / "green/<script>alert(1)<.png")
    board = np.kron(np.indices((4, 5)).sum(axis=0) % 2, np.ones((4, 4))) * 255
    Image.fromarray(board.astype(np.uint8)).convert("RGB").save(folder / "blue/board.png")
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    return out, folder


def test_a_report_of_both(outliers, with_stranger, tmp_path):
    """The stranger first, the wrong label suspected, all in lists, JSON and pictures."""
    out, folder = with_stranger
    report = tmp_path / "report"
    status, text, _ = outliers(out, "--out", report)
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith("the 20 oddest of 26 images")
    assert "blue/board.png" in lines[1]
    assert any("<script>" in line and "green, its neighbours red" in line for line in lines)
    with (report / "outliers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 26
    assert (rows[0]["key"], rows[0]["label"]) == ("blue/board.png", "blue")
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    with (report / "suspects.csv").open(newline="") as file:
        suspect = next(row for row in csv.DictReader(file) if "script" in row["key"])
    assert (suspect["label"], suspect["suggested"]) == ("green", "red")
    document = json.loads((report / "outliers.json").read_text())
    assert (document["method"], document["k"], document["images"]) == ("farthest", 5, 26)
    assert len(document["fingerprint"]) == 64
    assert document["outliers"][0]["key"] == "blue/board.png"
    page = (report / "index.html").read_text()
    assert not any(part in page for part in ('src="http', "<script", "<link", "url("))
    html.parser.HTMLParser().feed(page)
    (folder / "blue/board.png").unlink()
    status, text, _ = outliers(out, "--out", report, "--json")
    assert json.loads(text) == document
    assert "no picture" in (report / "index.html").read_text()


def test_a_report_is_utf_8_whatever_the_locale(outliers, tmp_path, bundle, new_folder, monkeypatch):
    """As the page says of itself, and as `index.select` reads lists."""
    folder, out = new_folder(), tmp_path / "things"
    (folder / "red/000.png").rename(folder / "red/é.png")
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")
    assert outliers(out, "--out", tmp_path / "report", "--json")[0] == 0
    for name in ("index.html", "outliers.csv"):
        assert "red/é.png" in (tmp_path / "report" / name).read_text("utf-8")


def test_a_source_that_is_away_is_said_once(outliers, with_stranger, tmp_path, caplog):
    """However many doubtful labels a page has."""
    out, folder = with_stranger
    folder.rename(tmp_path / "away")
    assert outliers(out, "--out", tmp_path / "report")[0] == 0
    assert caplog.text.count(f"image folder {folder}: expected a folder, found nothing") == 1


def test_few_are_shown_of_many(outliers, built, tmp_path):
    """The lists have all."""
    status, _, _ = outliers(
        built, "--count", 3, "--k", 4, "--method", "mean", "--out", tmp_path / "r"
    )
    assert status == 0
    page = (tmp_path / "r/index.html").read_text()
    assert "The 3 oddest of 60 images" in page
    document = json.loads((tmp_path / "r/outliers.json").read_text())
    assert (len(document["outliers"]), document["k"], document["method"]) == (3, 4, "mean")


def test_the_vote_over_labels_is_the_same_whatever_k_is(outliers, with_stranger):
    """That is of the score alone."""
    few, many = (json.loads(outliers(with_stranger[0], "--k", k, "--json")[1]) for k in (1, 20))
    assert (few["k"], many["k"]) == (1, 20)
    assert few["median_score"] < many["median_score"]
    assert few["suspects"] == many["suspects"] != []


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["COLLECTION", "--k", "0"], 2, "--k: expected at least 1, found 0"),
        (["COLLECTION", "--count", "0"], 2, "--count: expected at least 1, found 0"),
        (["COLLECTION", "--out", "FOLDER"], 2, "found something else of that name; choose another"),
        (["COLLECTION", "--out", "/dev/null/x"], 1, "expected a directory that can be written"),
        (["COLLECTION", "--filter", "label = 'x'"], 2, "to look at: expected at least 2, found 0"),
        (["/no/such"], 1, "/no/such: expected a collection directory"),
    ],
)
def test_errors_are_one_line(outliers, built, tmp_path, args, status, message):
    """Bad use is status 2, failed work status 1."""
    names = {"COLLECTION": built, "FOLDER": tmp_path}
    found, _, err = outliers(*(names.get(arg, arg) for arg in args))
    assert (found, message in err) == (status, True)
    assert err.count("\n") == 1
