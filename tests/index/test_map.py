import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build
from index.collection import Collection
from index.curation.sprites import MAX_PIXELS, SMALLEST_PX, make_sprites, thumbnail_px
from index.map import MapOptions, main
from models.command import run_command

CHROMIUM = shutil.which("chromium")
HOSTILE = "red/<script>alert(1)<!--.png"


@pytest.fixture
def draw_map(capsys):
    """Run the command in this process: status, standard output, standard error."""

    def run(*args):
        argv = [*map(str, args)]
        status = run_command(MapOptions, main, prog="python -m index.map", argv=argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def hostile(tmp_path, bundle, new_folder):
    """A collection of 13 images, one of them with a hostile name, and its folder."""
    folder = new_folder()
    shutil.copy(folder / "red/000.png", folder / HOSTILE)
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    return out, folder


def elements(page):
    """The data of the page by id, and how many scripts run."""
    found = re.findall(r'<script id="([^"]+)" type="([^"]+)">([^<]*)</script>', page)
    return {name: text for name, _, text in found}, page.count("<script>")


def test_a_page_a_picture_and_places(draw_map, hostile, tmp_path):
    """All of the same images; the same again, where one can no longer be read."""
    path, folder = hostile
    out = tmp_path / "map"
    status, text, _ = draw_map(path, "--out", out, "--smoothing", 0)
    assert status == 0
    assert text.startswith("13 of 13 images by pca; of 2 nearest among these, ")
    with (out / "map.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert HOSTILE in {row["key"] for row in rows}
    assert len({(row["x"], row["y"]) for row in rows}) == 12  # a copy lies on its original
    document = json.loads((out / "map.json").read_text())
    assert (document["images"], document["method"]) == (13, "pca")
    assert len(document["fingerprint"]) == 64
    with Image.open(out / "map.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
    page = (out / "index.html").read_text()
    data, scripts = elements(page)
    assert (sorted(data), scripts) == (["data", "sheet-0"], 1)
    assert json.loads(data["data"])["keys"] == [row["key"] for row in rows]
    assert "alert(1)" not in page.replace("\\u003cscript>alert(1)", "")
    assert "default-src &#x27;none&#x27;" in page
    assert not any(part in page for part in ('src="http', "<link", "url(", "fetch(", "import("))
    (folder / HOSTILE).unlink()
    status, text, _ = draw_map(path, "--out", out, "--smoothing", 0, "--json")
    assert json.loads(text) == document


def test_neighbours_are_told_among_the_drawn(draw_map, make_collection, unit_rows, tmp_path):
    """Also of images none of whose nearest was drawn."""
    path = make_collection(tmp_path / "c", unit_rows(1000, 16))
    args = ("--images", 40, "--smoothing", 0, "--json")
    status, text, _ = draw_map(path, "--out", tmp_path / "map", *args)
    assert status == 0
    with (tmp_path / "map/map.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with Collection.open(path) as collection:
        vectors = collection.vectors([int(row["id"]) for row in rows])
    places = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    near, on_map = (
        np.argsort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1:16]
        for x in (vectors, places)
    )
    kept = [np.isin(a, b).mean() for a, b in zip(near, on_map, strict=True)]
    document = json.loads(text)
    assert (document["images"], document["neighbours"]) == (40, 15)
    assert document["neighbours_kept"] == pytest.approx(np.mean(kept), abs=0.005)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_it_and_finds_by_key(draw_map, hostile, tmp_path):
    """The hostile key is text there, and nothing was refused or failed."""
    out = tmp_path / "map"
    draw_map(hostile[0], "--out", out)
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
        "--enable-logging=stderr",
    )  # fmt: skip
    url = f"file://{out}/index.html#find=alert"
    done = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=120)
    assert '<span id="status" role="status">1 of 1 found</span>' in done.stdout
    assert '<div id="key">red/&lt;script&gt;alert(1)&lt;!--.png</div>' in done.stdout
    assert re.search(r'<div id="none" hidden="">', done.stdout)
    assert len(re.findall(r'<button[^>]*aria-pressed="true"', done.stdout)) == 3
    assert not re.search(r"Refused|Uncaught|CONSOLE.*[Ee]rror", done.stderr)


def test_many_images_have_smaller_thumbnails_within_bounds():
    """Down to where nothing can be seen."""
    assert [thumbnail_px(count) for count in (0, 10, 60_000)] == [96, 96, 28]
    assert thumbnail_px(10**6) == SMALLEST_PX
    for count in (1_000, 30_000, 100_000):
        assert count * thumbnail_px(count) ** 2 <= MAX_PIXELS


def test_a_thumbnail_is_its_image(hostile, caplog):
    """In its colour and proportions; of one that is gone there is none, and it is said once."""
    path, folder = hostile
    (folder / "blue/001.png").unlink()
    with Collection.open(path) as collection:
        rows = collection.rows(collection.ids)
    sprites = make_sprites(rows)
    assert caplog.text.count("1 of 13 images cannot be read now") == 1
    for row, tile in zip(rows, sprites.tiles_N, strict=True):
        assert (tile < 0) == (row.key == "blue/001.png")
        if tile >= 0:
            channel = {"red": 0, "green": 1, "blue": 2}[row.label]
            pixels = sprites.tile(int(tile))
            assert pixels.shape == (96, 96, 3)
            assert not pixels[:9].any()  # 20 x 16 in a square
            assert pixels[48].mean(axis=0).argmax() == channel


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--images", "1"], 2, "--images: expected 2 to 200000, found 1"),
        (["--smoothing", "-1"], 2, "--smoothing: expected at least 0, found -1"),
        (["--seed", "-1"], 2, "--seed: expected at least 0, found -1"),
        (["--out", "FOLDER"], 2, "found something else of that name; choose another"),
        (["--out", "/dev/null/x"], 1, "expected a directory that can be written"),
    ],
)
def test_errors_are_one_line(draw_map, built, tmp_path, args, status, message):
    """Bad use is status 2, failed work status 1."""
    given = [tmp_path if arg == "FOLDER" else arg for arg in args]
    found, _, err = draw_map(built, "--out", tmp_path / "map", *given)
    assert (found, message in err) == (status, True)


def test_lots_are_drawn_of_many(draw_map, built, tmp_path):
    """And the rest is said."""
    args = ("--images", 20, "--smoothing", 0, "--filter", "label != 'red'")
    _, text, _ = draw_map(built, "--out", tmp_path / "map", *args)
    assert text.startswith("20 of 40 images by pca")
