"""The report: one page that shows any run at any moment, and trusts none of its texts."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.command import run_command
from models.errors import UsageError
from models.html import VOID
from models.images import open_source
from train.data.training_data import DataIn, open_training_data
from train.pretrain import kept_options
from train.report.__main__ import ReportOptions, draw_views, main
from train.report.facts import duration, number, read_facts
from train.report.model import draw_sample, find_out
from train.report.sections import at_a_glance
from train.run import RunDirectory

SECTIONS = (
    "warnings", "curves", "views", "embeddings", "neighbours", "configuration", "skipped",
    "commands",
)  # fmt: skip
NOT_ITS_IMAGES = (
    "The images are not those of the run any more: views, embeddings and neighbours show others."
)
EVIL = "<img src=x onerror=alert(1)>"

Copy = Callable[..., Path]


class Page(HTMLParser):
    """A page read back: elements must close in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element."""
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element of a diagram that closes itself."""
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep what people read."""
        self.words.append(data)

    @property
    def read(self) -> str:
        """All of its words."""
        return " ".join(self.words)


@pytest.fixture
def copy_run(finished_run: Path, tmp_path: Path) -> Copy:
    """Give a function that copies the finished run, with another source where one is given."""

    def copy(uri: str | None = None) -> Path:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        config = json.loads((run / "config.json").read_text())
        config["data"]["uri"] = uri or config["data"]["uri"]
        (run / "config.json").write_text(json.dumps(config))
        return run

    return copy


@pytest.fixture(scope="module")
def whole_page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the finished run."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    main(ReportOptions(run=finished_run, out=out, images=64))
    return Page(out)


def folder_of_images(folder: Path, classes: tuple[str, ...]) -> str:
    """Write twelve PNG files for each class folder; give the source."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"a&b {i}.png")
    return f"folder:{folder}"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said beside progress."""
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_the_page_has_every_section_and_needs_nothing_else(whole_page: Page) -> None:
    """It parses, names its sections, and takes nothing from a network or a script."""
    ids = {value for name, value in whole_page.attributes if name == "id"}
    assert set(SECTIONS) <= ids
    assert not {"script", "link", "iframe", "object"} & set(whole_page.names)
    assert "//" not in re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=\s]+", "", whole_page.text)
    contents = [value or "" for name, value in whole_page.attributes if name == "content"]
    assert any(content.startswith("default-src 'none'; ") for content in contents)
    for name, value in whole_page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith(("data:image/", "#"))


def test_everything_shown_has_words(whole_page: Page) -> None:
    """Pictures have alternative texts, diagrams labels, and ids are there once."""
    assert whole_page.names.count("svg") >= 8
    assert whole_page.text.count('role="img" aria-label="') == whole_page.names.count("svg")
    assert whole_page.text.count("<img ") == whole_page.text.count(' alt="')
    ids = [value for name, value in whole_page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert 'aria-label="Loss, loss: loss ' in whole_page.text


def test_the_page_says_what_run_it_is(whole_page: Page, finished_run: Path) -> None:
    """Status, source, accuracy beside its baselines, hardware, versions and the command."""
    facts = read_facts(RunDirectory(path=finished_run))
    assert facts.status == "finished"
    assert "finished" in whole_page.read
    assert str(finished_run) in whole_page.read
    top1 = facts.last("knn_top1")
    assert top1 is not None
    assert f"{100 * top1:.1f} %" in whole_page.read
    assert "raw pixels" in whole_page.read
    assert "torch 2." in whole_page.read
    assert str(facts.config.environment["hardware"]) in whole_page.read
    assert facts.config.command in whole_page.read
    assert "3 of 3" in whole_page.read
    assert f"python -m train.export {finished_run}" in whole_page.read


def test_texts_of_a_run_are_no_markup(copy_run: Copy, tmp_path: Path) -> None:
    """Labels, file names, messages and options with tags in them are shown as they are."""
    run = copy_run(folder_of_images(tmp_path / "photos", (EVIL, 'b"ag')))
    reject = {"key": f"{EVIL}/c.png", "fault": "corrupt", "message": "<script>alert(2)</script>"}
    (run / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    config = json.loads((run / "config.json").read_text())
    config["command"] = "python -m train.pretrain '<b>'"
    (run / "config.json").write_text(json.dumps(config))
    main(ReportOptions(run=run, images=24))
    page = Page(run / "report.html")
    assert not {"script", "b>"} & set(page.names)
    assert "onerror" not in {name for name, _ in page.attributes}
    for text in (EVIL, reject["key"], reject["message"], "1 corrupt", "'<b>'"):
        assert text in page.read


def test_images_without_labels_are_shown_by_name(copy_run: Copy, tmp_path: Path) -> None:
    """Without labels there is no accuracy and no colour of right and wrong."""
    run = copy_run(folder_of_images(tmp_path / "flat", ("",)))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [json.dumps(r) for r in records if not any(k.startswith("knn") for k in r)]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    main(ReportOptions(run=run, images=16))
    page = Page(run / "report.html")
    assert "kNN" not in page.read
    assert "the nearest of 11 others" in page.read
    assert "Green has the same label" not in page.read
    assert "a&b " in page.read
    assert {"same", "other"}.isdisjoint(v for name, v in page.attributes if name == "class")


def test_a_run_that_was_killed_at_once_has_a_page(copy_run: Copy) -> None:
    """Without a record and a checkpoint the rest is there, and the way to go on."""
    run = copy_run()
    shutil.rmtree(run / "checkpoints")
    (run / "log.jsonl").unlink()
    main(ReportOptions(run=run, images=16))
    page = Page(run / "report.html")
    assert "stopped before its end" in page.read
    assert "The run has no record yet." in page.read
    assert "There is no network to look with: " in page.read
    assert f"python -m train.pretrain --resume --out {run}" in page.read
    assert "0 of 3" in page.read


@pytest.mark.parametrize("images", [16, 64])
@pytest.mark.parametrize("data_in", ["memory", "stream"])
def test_images_that_are_not_those_of_the_run_are_said(
    copy_run: Copy, tmp_path: Path, data_in: DataIn, images: int,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By their hash, or by their number where more images are in memory than the page looks at."""
    uri = folder_of_images(tmp_path / "photos", ("cat", "dog"))
    run = copy_run(uri)
    config = json.loads((run / "config.json").read_text())
    spec = RunDirectory(path=run).read_config().preprocessing
    data = open_training_data(
        open_source(uri), spec, data_in=data_in, limit_images=None, val_images=0, bank_images=0,
        seed=0,
    )  # fmt: skip
    config["data"] |= {"sha256": data.sha256, "images": data.images}
    config["options"]["data_in"] = data_in
    (run / "config.json").write_text(json.dumps(config))
    options = ReportOptions(run=run, images=images, json=True)
    main(options)
    assert NOT_ITS_IMAGES not in Page(run / "report.html").read
    capsys.readouterr()
    next((tmp_path / "photos/cat").iterdir()).unlink()
    main(options)
    assert NOT_ITS_IMAGES in Page(run / "report.html").read
    assert NOT_ITS_IMAGES in json.loads(capsys.readouterr().out)["warnings"]
    assert warnings_of(caplog) == [NOT_ITS_IMAGES]


def test_held_out_images_are_not_called_training_images(whole_page: Page) -> None:
    """The page shows images from all over the source."""
    assert "C correlates two random views of 64 images: " in whole_page.read
    assert "An image at the left, and the nearest of 63 others" in whole_page.read
    assert NOT_ITS_IMAGES not in whole_page.read


def test_images_that_are_gone_are_said(
    copy_run: Copy, finished_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log is shown all the same; the command says what the page lacks, and how to mend it."""
    uri = kept_options(finished_run).source
    run = copy_run(f"folder:{tmp_path / 'gone'}")
    main(ReportOptions(run=run, images=16))
    page = Page(run / "report.html")
    assert page.read.count("The run's images cannot be read now: ") == 3
    assert "Loss" in page.read
    (message,) = warnings_of(caplog)
    assert message.startswith("The run's images cannot be read now: image folder ")
    assert "name their new place with --source" in message
    assert NOT_ITS_IMAGES not in page.read
    main(ReportOptions(run=run, images=16, source=uri))
    assert "cannot be read now" not in Page(run / "report.html").read


@pytest.mark.parametrize(
    ("first", "beside"),
    [
        ({"knn_pixels": 0.8, "knn_random": 0.7}, "raw pixels 80.0, untrained 70.0; k=20"),
        ({"knn_pixels": 0.8, "knn_start": 0.75},
         "raw pixels 80.0, weights it starts from 75.0; k=20"),
        ({"knn_pixels": 0.8}, "raw pixels 80.0; k=20"),
        ({}, "k=20"),
    ],
)  # fmt: skip
def test_accuracy_stands_beside_the_baselines_that_were_measured(
    copy_run: Copy, first: dict[str, float], beside: str
) -> None:
    """A run that starts from weights has no untrained encoder."""
    run = copy_run()
    lines = [json.dumps({"step": 0, **first}), '{"step": 9, "epoch": 1, "knn_top1": 0.9}']
    (run / "log.jsonl").write_text("\n".join(lines))
    name, value, more = at_a_glance(read_facts(RunDirectory(path=run)), None)[0]
    assert (name, value) == ("kNN top-1", "90.0 %")
    assert more.startswith(beside)


def test_a_damaged_checkpoint_is_said(copy_run: Copy) -> None:
    """The views are shown all the same."""
    run = copy_run()
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"torn")
    main(ReportOptions(run=run, images=16))
    page = Page(run / "report.html")
    assert "There is no network to look with: " in page.read
    assert "Images, each with random views" in page.text


def test_a_run_at_work_is_left_alone(copy_run: Copy) -> None:
    """Its status is that training goes on, and its lock stays its own."""
    run = copy_run()
    with RunDirectory(path=run).held(resume=True):
        main(ReportOptions(run=run, images=0))
        assert read_facts(RunDirectory(path=run)).is_held
    page = Page(run / "report.html")
    assert "training goes on" in page.read
    assert "Left out, as asked by --images 0." in page.read
    assert not read_facts(RunDirectory(path=run)).is_held


def test_a_full_gpu_leaves_out_what_the_network_shows(
    copy_run: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says why; curves and views are there."""

    def find_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")

    monkeypatch.setattr("train.report.model.find_out", find_out)
    run = copy_run()
    main(ReportOptions(run=run, images=16))
    page = Page(run / "report.html")
    assert "There is no network to look with: memory of the GPU: expected room" in page.read


def test_a_report_prepares_the_device(copy_run: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes in fp32 is float32 on a GPU, too."""
    prepared: list[str] = []
    monkeypatch.setattr("train.device.prepare_device", lambda c, **_: prepared.append(c.precision))
    main(ReportOptions(run=copy_run(), images=0))
    assert prepared == ["fp32"]


def test_views_and_c_of_a_stream_are_of_whole_photographs(copy_run: Copy, tmp_path: Path) -> None:
    """Photographs that differ in their margins alone have one middle, and views that differ."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(16):
        pixels = np.zeros((20, 60), np.uint8)
        pixels[:, 42:] = 15 * i + 30
        Image.fromarray(pixels).save(photos / f"{i:02d}.png")
    run = RunDirectory(path=copy_run(f"folder:{photos}"))
    source = open_source(f"folder:{photos}")
    diagonal, black = {}, {}
    for data_in in ("memory", "stream"):
        facts = read_facts(run)
        facts = replace(facts, options=replace(facts.options, data_in=data_in))
        sample = draw_sample(source, facts.config.preprocessing, 16, limit=None)
        assert sample.images_NHWC.max() == 0
        diagonal[data_in] = find_out(run, facts, sample, source).correlation.diagonal_mean
        with Image.open(io.BytesIO(draw_views(facts, sample, source))) as picture:
            black[data_in] = (np.asarray(picture.convert("L")) == 0).sum()
    assert diagonal["memory"] == 0 < diagonal["stream"]
    assert black["memory"] > black["stream"]


def test_warnings_stand_on_the_page(copy_run: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """What the log shows of trouble is said with its step, also as JSON."""
    run = copy_run()
    with (run / "log.jsonl").open("w") as file:
        file.write('{"step": 41, "epoch": 3, "loss": 2.0, "spread": 0.001}\n')
        file.write('{"step": 42, "epoch": 3, "loss": null}\n')
    main(ReportOptions(run=run, images=0, json=True))
    summary = json.loads(capsys.readouterr().out)
    assert summary["report"] == str(run / "report.html")
    collapse, broken = summary["warnings"]
    assert collapse.startswith("Step 41: the features of all images are nearly equal")
    assert broken == "Step 42: the loss was no finite number."
    assert broken in Page(run / "report.html").read


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 1, one line, and no page."""
    status = run_command(
        ReportOptions, main, prog="python -m train.report", argv=[str(tmp_path / "nothing")]
    )
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a run directory, found no such directory" in line
    assert not (tmp_path / "nothing").exists()


def test_a_page_that_cannot_be_written_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in the place of a file is named."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/page.html"
    argv = [str(finished_run), "--out", str(out), "--images", "0"]
    assert run_command(ReportOptions, main, prog="python -m train.report", argv=argv) == 1
    assert str(out) in capsys.readouterr().err


def test_a_handful_of_images_is_refused() -> None:
    """Neighbours among three images show nothing."""
    with pytest.raises(UsageError) as error:
        ReportOptions(run=Path("run"), images=3)
    assert str(error.value) == "--images: expected 0, or at least 16, found 3"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.2, "7 s"), (89, "89 s"), (720, "12 min"), (12_240, "3.4 h")]
)
def test_times_are_said_as_people_do(seconds: float, text: str) -> None:
    """Seconds, minutes or hours."""
    assert duration(seconds) == text


def test_numbers_are_short() -> None:
    """Four digits, commas for thousands, and a word for what is no number."""
    assert [number(x) for x in (0.00123456, 12.3456, 12345.6, float("nan"))] == [
        "0.001235", "12.35", "12,346", "not finite",
    ]  # fmt: skip
