import csv
import json

import pytest

from index.select import SelectOptions, main
from index.storage.writer import CollectionWriter
from models.command import run_command


@pytest.fixture
def select(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def run(*args):
        argv = [*map(str, args)]
        status = run_command(SelectOptions, main, prog="python -m index.select", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def read(file):
    """The lines of a list."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def fill_in(file):
    """Label every image as its folder is called, as a person would."""
    rows = read(file)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "label": row["key"].split("/")[0]} for row in rows)


def test_rounds_go_on_where_the_last_ended(select, built, tmp_path):
    """Typical ones of each colour first, then what a probe of their labels doubts."""
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    status, text, _ = select(built, "--out", first, "--budget", 6, "--ignore-labels")
    assert status == 0
    assert text.startswith("6 of 60 images chosen by typicality, beside 0 labels of 0 classes")
    rows = read(first)
    assert [row["rank"] for row in rows] == [*"123456"]
    assert {row["label"] for row in rows} == {""}
    assert {(row["method"], row["seed"], len(row["fingerprint"])) for row in rows} == {
        ("typicality", "0", 64)
    }
    assert {row["key"].split("/")[0] for row in rows} == {"blue", "green", "red"}
    fill_in(first)
    again = ("--budget", 20, "--ignore-labels", "--labels", first)
    status, text, _ = select(built, "--out", second, "--method", "margin", *again, "--json")
    document = json.loads(text)
    assert (document["free"], document["labelled"], document["classes"]) == (54, 6, 3)
    assert not {row["key"] for row in read(second)} & {row["key"] for row in rows}
    assert document["chosen"] == [row["key"] for row in read(second)]
    third = ("--budget", 100, "--ignore-labels", "--method", "random")
    select(built, "--out", tmp_path / "3.csv", *third, "--labels", first, second)
    assert len(read(tmp_path / "3.csv")) == 60 - 6 - 20


def test_a_list_that_is_there_stays(select, built, tmp_path):
    """Labels may have been typed into it; it is replaced on request only."""
    out = tmp_path / "1.csv"
    args = (built, "--out", out, "--budget", 6, "--ignore-labels")
    select(*args)
    fill_in(out)
    labelled = out.read_bytes()
    status, _, err = select(*args)
    assert status == 2
    assert "expected a new name, found something of that name; choose another name, or add" in err
    assert out.read_bytes() == labelled
    assert select(*args, "--replace", "--labels", out)[0] == 2
    assert out.read_bytes() == labelled
    assert select(*args, "--replace")[0] == 0
    assert {row["label"] for row in read(out)} == {""}


def test_labels_of_the_source_count(select, built, tmp_path):
    """All have one there, so that nothing is left; a filter says what may be chosen."""
    status, _, err = select(built, "--out", tmp_path / "x.csv")
    assert (status, "without a label: expected at least 1, found none; labels of" in err) == (
        2,
        True,
    )
    status, _, err = select(
        built, "--out", tmp_path / "x.csv", "--ignore-labels", "--filter", "label = 'none'"
    )
    assert status == 2
    assert err.endswith(": expected at least 1 that passes the filter, found none\n")
    args = ("--ignore-labels", "--filter", "label = 'red'", "--budget", 5, "--method", "kcentre")
    assert select(built, "--out", tmp_path / "x.csv", *args)[0] == 0
    assert {row["key"].split("/")[0] for row in read(tmp_path / "x.csv")} == {"red"}
    assert len(read(tmp_path / "x.csv")) == 5


def test_where_nothing_is_labelled_labels_are_not_blamed(select, built, copy_collection, tmp_path):
    """Of an empty collection, also where a list of labels is given, and of images without any."""
    path = copy_collection(built)
    labels = tmp_path / "labels.csv"
    labels.write_text("key,label\nx,red\n")
    with CollectionWriter.open(path) as writer:
        before = writer.collection
        rows, vectors = before.table().take([0]), before.vectors(before.ids[:1])
        writer.delete(before.ids)
        status, _, err = select(path, "--out", tmp_path / "x.csv", "--labels", labels)
        assert (status, err.endswith("colours: expected at least 1, found none\n")) == (2, True)
        writer.add(rows.drop_columns(["label"]), vectors, fingerprint=before.fingerprint)
    status, _, err = select(path, "--out", tmp_path / "x.csv", "--filter", "key = 'x'")
    assert status == 2
    assert err.endswith("colours: expected at least 1 that passes the filter, found none\n")


def test_where_all_is_labelled_by_a_list_it_is_said(select, built, tmp_path):
    """And no labels of the source are blamed: there are none that count."""
    assert select(built, "--out", tmp_path / "a.csv", "--ignore-labels", "--budget", 60)[0] == 0
    args = ("--labels", tmp_path / "a.csv", "--ignore-labels")
    status, _, err = select(built, "--out", tmp_path / "b.csv", *args)
    assert status == 2
    assert err.endswith(
        "images of collection colours without a label: expected at least 1, found none\n"
    )


def test_labels_by_id_and_of_images_that_are_gone(select, built, tmp_path, caplog):
    """Some unknown ones are counted; a spreadsheet's byte order mark is no part of a name."""
    select(
        built, "--out", tmp_path / "a.csv", "--budget", 2, "--ignore-labels", "--method", "random"
    )
    ids = [row["id"] for row in read(tmp_path / "a.csv")]
    labels = tmp_path / "labels.csv"
    labels.write_text(f"\ufeffid,label\n{ids[0]},red\n{ids[1]},\n17,red\n", encoding="utf-8")
    args = ("--labels", labels, "--ignore-labels", "--method", "random", "--budget", 99)
    status, text, _ = select(built, "--out", tmp_path / "b.csv", *args)
    assert (status, "58 of 58 images chosen" in text, "beside 1 label of 1 class:" in text) == (
        0,
        True,
        True,
    )
    assert "labels.csv: 1 image not in collection" in caplog.text


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--budget", "0"], 2, "--budget: expected at least 1, found 0"),
        (["--smoothing", "-1"], 2, "--smoothing: expected at least 0, found -1"),
        (["--seed", "-1"], 2, "--seed: expected at least 0, found -1"),
        (["--labels", "OUT"], 2, "expected a new file, found one of --labels"),
        (["--labels", "/no/such"], 1, "--labels /no/such: expected a file that can be read"),
        (["--labels", "NAMES"], 2, "with the columns key (or id) and label, found a, b"),
        (["--labels", "OTHER"], 2, "expected keys of collection colours, such as"),
        (["--labels", "LINE"], 2, "LINE.csv, line 2: expected a key or an id, found neither"),
        (["--labels", "BYTES"], 2, "expected a CSV file in UTF-8"),
        (["--method", "margin"], 2, "labels for a probe: expected those of at least 2 classes"),
        (["--method", "random", "--out", "/dev/null/x"], 1, "expected a file that can be written"),
    ],
)
def test_errors_are_one_line(select, built, tmp_path, args, status, message):
    """Bad use is status 2, failed work status 1; nothing is written."""
    files = {"NAMES": b"a,b\n", "OTHER": b"key,label\nx,y\n", "LINE": b"id,label\nx,y\n"}
    files["BYTES"] = b"key,label\n\xff,x\n"
    for name, content in files.items():
        (tmp_path / f"{name}.csv").write_bytes(content)
    out = tmp_path / "OUT.csv"
    names = {name: tmp_path / f"{name}.csv" for name in (*files, "OUT")}
    given = [names.get(arg, arg) for arg in args]
    found, _, err = select(built, "--ignore-labels", "--out", out, *given)
    assert (found, message in err) == (status, True)
    assert err.count("\n") == 1
    assert not out.exists()
