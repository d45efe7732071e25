import json

import pytest

from index.collection import Collection, id_of
from index.delete import DeleteOptions, main
from index.duplicates import DuplicateOptions
from index.duplicates import main as find_duplicates
from index.storage.writer import CollectionWriter
from models.command import run_command


@pytest.fixture
def run(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def command(*args):
        argv = [*map(str, args)]
        status = run_command(DeleteOptions, main, prog="python -m index.delete", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def path(built, copy_collection):
    """A collection to delete from."""
    return copy_collection(built)


def keys_of(path):
    """The keys of living images."""
    with Collection.open(path) as collection:
        return collection.keys()


def test_by_key_id_and_filter_at_once(run, path):
    """Each image once, however often it is named; searches do not find them any more."""
    with Collection.open(path) as collection:
        keys, ids = collection.keys(), collection.ids
        reds = {key for key, label in zip(keys, collection.labels(), strict=True) if label == "red"}
    blues = [key for key in keys if key not in reds][:2]
    args = ("--key", blues[0], blues[1], "--id", ids[keys.index(blues[0])])
    status, out, err = run(path, *args, "--filter", "label = 'red'")
    left = 60 - len(reds) - 2
    assert (status, err) == (0, "")
    assert out == f"{path}: deleted {len(reds) + 2} images, {left} are left\n"
    assert set(keys_of(path)) == set(keys) - reds - set(blues)
    with Collection.open(path) as collection:
        found = collection.search_ids(collection.ids[:1], 60)
        assert set(found.ids[found.ids >= 0]) == {*collection.ids.tolist()[1:]}


def test_one_that_is_not_there_and_nothing_is_deleted(run, path):
    """A slip of the pen is found first; what is deleted is not there to be deleted again."""
    key = keys_of(path)[0]
    for args, line in (
        (("--key", key, "nobody"), "key 'nobody': expected a key of the 60 in collection colours"),
        (("--key", key, "--id", 77), "id 77: expected an id of the 60 in collection colours"),
        (("--key", key, "--filter", "colour = 1"), "found 'colour'"),
    ):
        status, out, err = run(path, *args)
        assert (status, out, line in err) == (2 if "--filter" in args else 1, "", True), err
        assert key in keys_of(path)
    assert run(path, "--key", key)[1] == f"{path}: deleted 1 image, 59 are left\n"
    status, _, err = run(path, "--key", key)
    assert (status, f"key {key!r}: expected a key of the 59" in err) == (1, True)


def test_a_dry_run_changes_nothing(run, path):
    """It says how many, and which; a writer at work does not hinder it."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with CollectionWriter.open(path):
        status, out, _ = run(path, "--filter", "label = 'red'", "--dry-run")
    lines = out.splitlines()
    assert (status, lines[0]) == (0, f"{path}: would delete 20 images, 40 would be left")
    assert (len(lines), lines[-1]) == (12, "  ... and 10 more")
    status, out, _ = run(path, "--filter", "label = 'red'", "--dry-run", "--json")
    found = json.loads(out)
    assert (found["would_delete"], found["count"], len(found["keys"])) == (20, 40, 20)
    assert found["ids"] == [str(id_of(key)) for key in found["keys"]]
    (path / ".lock").unlink()
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_duplicates_lists_is_deleted(run, path, tmp_path, capsys):
    """The list goes straight from the one command to the other."""
    report = tmp_path / "report"
    find_duplicates(DuplicateOptions(collection=path, threshold=0.9, out=report, exact=True))
    capsys.readouterr()
    lines = (report / "delete.csv").read_text().splitlines()
    assert len(lines) > 10
    status, out, _ = run(path, "--list", report / "delete.csv", "--json")
    assert (status, json.loads(out)) == (0, {"deleted": len(lines) - 1, "count": 61 - len(lines)})


def test_a_list_may_begin_with_the_mark_of_a_spreadsheet(run, path, tmp_path):
    """Which is no part of the first column's name."""
    (key, *_) = keys_of(path)
    file = tmp_path / "list.csv"
    file.write_text(f"id,why\n{id_of(key)},blurred\n", encoding="utf-8-sig")
    assert run(path, "--list", file)[0] == 0
    assert key not in keys_of(path)


def test_a_list_may_name_keys(run, path, tmp_path):
    """As a spreadsheet leaves them whole, blanks and commas in them included."""
    first, second, *others = keys_of(path)
    file = tmp_path / "list.csv"
    file.write_text(f'why,key\nblurred,"{first}"\ntwice,{second}\n')
    assert run(path, "--list", file)[0] == 0
    assert keys_of(path) == others


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("name\na\n", "list.csv: expected a column id or key, found name; give it the delete.csv"),
        ("", "list.csv: expected a column id or key, found nothing"),
        ("key\na\n", "key 'a': expected a key of the 60"),
        ("id,key\n4.73E+18,a\n", "line 2: expected an id, found '4.73E+18'"),
        ("id\n12x\n", "list.csv, line 2: expected an id, found '12x'"),
        ("id\n-1\n", "list.csv, line 2: expected an id, found '-1'"),
        ("id\n99999999999999999999\n", "line 2: expected an id, found '99999999999999999999'"),
        ("id\n" + "9" * 5000 + "\n", "line 2: expected an id, found '99999"),
        ("id\n\xff\n", "expected a CSV file, found 'utf-8' codec can't decode"),
    ],
)
def test_a_list_that_is_none(run, path, tmp_path, content, line):
    """It is one line, and nothing is deleted."""
    file = tmp_path / "list.csv"
    file.write_bytes(content.encode("latin-1"))
    status, out, err = run(path, "--list", file)
    assert (status, out, line in err) == (1, "", True), err
    assert len(keys_of(path)) == 60


def test_another_writer_is_named(run, path):
    """One writer at a time."""
    with CollectionWriter.open(path):
        status, _, err = run(path, "--filter", "label = 'red'")
    assert (status, "expected no other writer, found process " in err) == (1, True)
    assert len(keys_of(path)) == 60
