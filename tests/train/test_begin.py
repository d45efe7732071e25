"""How a run begins or goes on: what the machine decides, streams, other weights, views."""

from __future__ import annotations

import logging
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import HoraceError, UsageError
from models.images import open_source
from models.preprocess import PreprocessSpec
from tests.train.states import final_state
from train.begin import (
    agree_data_in,
    agree_statistics,
    goes_on,
    input_spec,
    make_trainer,
    read_data,
    require_same_images,
    say_if_others,
    settle,
    start_or_resume,
)
from train.checkpoint import list_checkpoints, load_weights
from train.config import NetworkOptions, PretrainOptions, ViewOptions
from train.data import training_data
from train.data.batches import Batch, Pixels
from train.data.catalogue import Catalogue
from train.data.rejects import Rejects
from train.errors import RunError, TrainError
from train.log import read_log
from train.loop import pretrain
from train.ranks import Ranks
from train.run import RunDirectory
from train.trainer import StepOutcome, Trainer

RunOptions = Callable[..., PretrainOptions]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def last_network(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint."""
    return load_weights(list_checkpoints(run / "checkpoints")[-1])["network"]


@dataclass(frozen=True)
class BesideAnother(Ranks):
    """Ranks of which another one gives a value of its own."""

    other: int = 0

    def largest(self, value: int) -> int:
        """Give the larger of both; what is asked for by its negative is the smaller."""
        return max(value, self.other if value >= 0 else -self.other)


def test_ranks_with_other_images_are_refused() -> None:
    """By hash, on every rank, whichever has the larger one."""
    sha256 = "5" * 64
    require_same_images(sha256, "folder:photos", BesideAnother(other=int(sha256[:15], 16)))
    for other in ("4", "6"):
        with pytest.raises(TrainError, match=r"photos: expected the same on all ranks, found oth"):
            require_same_images(sha256, "folder:photos", BesideAnother(other=int(other * 15, 16)))


def test_a_run_keeps_what_the_machine_decided(finished_run: Path, run_options: RunOptions) -> None:
    """What was `auto` at the start is what it was, on whatever machine the run goes on."""
    kept = RunDirectory(path=finished_run).read_config()
    options = run_options(finished_run, threads=None)
    assert (options.device, options.precision, options.data_in) == ("auto", "auto", "auto")
    settled, compute = settle(options, kept, Ranks())
    for name in ("device", "precision", "data_in"):
        assert getattr(settled, name) == kept.options[name] != "auto"
    assert settled.threads == kept.options["threads"] == 1
    assert (compute.name, compute.precision) == (settled.device, settled.precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_run_of_a_gpu_goes_on_where_one_is(finished_run: Path, run_options: RunOptions) -> None:
    """Elsewhere its weights can start another run."""
    run = RunDirectory(path=finished_run).read_config()
    kept = replace(run, options={**run.options, "device": "cuda"})
    with pytest.raises(TrainError) as error:
        settle(run_options(finished_run, resume=True), kept, Ranks())
    assert str(error.value) == (
        f"resuming {finished_run}: CUDA devices of this machine: expected one, as where the run "
        "began, found none; go on where one is, or start another run with another --out and "
        f"--init-from {finished_run}"
    )


def test_another_precision_is_another_run(finished_run: Path, run_options: RunOptions) -> None:
    """It would give other bits: refused by name."""
    with pytest.raises(
        RunError, match=r"precision: expected '(bf16|fp32)', found 'fp16'; leave it"
    ):
        pretrain(run_options(finished_run, resume=True, precision="fp16"))


def test_ranks_of_a_machine_share_its_threads(tmp_path: Path, run_options: RunOptions) -> None:
    """Each has at least one."""
    options = run_options(tmp_path, threads=None)
    settled, _ = settle(options, None, Ranks(world=32, local_world=32))
    assert settled.threads == 1


def test_a_restart_goes_on_with_its_own_run_alone(
    tmp_path: Path, run_options: RunOptions, finished_run: Path
) -> None:
    """Torchrun also restarts ranks that were refused for a directory that holds a run."""
    options, run = run_options(tmp_path), RunDirectory(path=tmp_path / "run")
    again = Ranks(restarts=1, job="mine")
    assert not goes_on(options, run, again), "no run was begun"
    config = RunDirectory(path=finished_run).read_config()
    run.write_config(config)
    assert not goes_on(options, run, again), "a run without torchrun"
    run.write_config(replace(config, environment={**config.environment, "torchrun": "other"}))
    assert not goes_on(options, run, again)
    run.write_config(replace(config, environment={**config.environment, "torchrun": "mine"}))
    assert goes_on(options, run, again)
    assert not goes_on(options, run, replace(again, restarts=0)), "a start is no restart"
    assert goes_on(replace(options, resume=True), run, Ranks())


@dataclass(frozen=True, kw_only=True)
class RankBesideAStream(Ranks):
    """One of two ranks on one machine, the other of which says that it has to stream."""

    def largest(self, value: int) -> int:
        """The other rank has 1 to say."""
        return max(value, 1)


def test_ranks_agree_on_where_the_images_are(tmp_path: Path, run_options: RunOptions) -> None:
    """Each finds another amount of memory free; one that has to stream is enough for all."""
    options = run_options(tmp_path / "run")
    source, spec = open_source(options.source), input_spec(options)
    assert agree_data_in(options, source, spec, Ranks()) == "memory"
    both = RankBesideAStream(world=2, local_world=2)
    assert agree_data_in(options, source, spec, both) == "stream"
    asked = replace(options, data_in="memory")
    assert agree_data_in(asked, source, spec, both) == "memory"


def test_other_ranks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """As many as before are not worth a word."""
    say_if_others(2, 2)
    assert not caplog.text
    say_if_others(2, 1)
    assert "was started with 2 ranks and goes on with 1" in caplog.text


def test_views_made_by_workers_need_a_stream(tmp_path: Path, run_options: RunOptions) -> None:
    """Where nothing is said the images are streamed; held in memory they cannot be."""
    options = run_options(tmp_path, views=ViewOptions(views_in="workers"))
    settled, _ = settle(options, None, Ranks())
    assert settled.data_in == "stream"
    with pytest.raises(UsageError) as error:
        settle(replace(options, data_in="memory"), None, Ranks())
    assert str(error.value) == (
        "--views.views-in workers: expected images that are streamed, found --data-in memory; "
        "give --data-in stream, or --views.views-in batch"
    )


def broken_photos(folder: Path) -> Path:
    """Write 24 pictures of unlike sizes, and a file that is none."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(24):
        pixels = draw.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def pack(folder: Path, n_shards: int) -> str:
    """Deal the files of a folder out to tar files; give them as a source."""
    for shard in range(n_shards):
        with tarfile.open(folder.with_name(f"shard-{shard}.tar"), "w") as archive:
            for path in sorted(folder.iterdir())[shard::n_shards]:
                archive.add(path, path.name)
    return f"wds:{folder.with_name('shard-*.tar')}"


def stream_options(
    run: Path, run_options: RunOptions, source: str, **more: object
) -> PretrainOptions:
    """Options of a short run over photographs that are streamed."""
    return run_options(
        run, source=source, image_size_px=16, channels=3, batch_size=8, epochs=3,
        data_in="stream", workers=2, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("views_in", "is_packed"), [("batch", False), ("workers", False), ("batch", True)]
)
def test_a_streamed_run_goes_on_to_the_same_bits(
    tmp_path: Path, run_options: RunOptions, views_in: str, is_packed: bool
) -> None:
    """From an earlier checkpoint, with another number of threads that decode."""
    folder = broken_photos(tmp_path / "photos")
    options = stream_options(
        tmp_path / "run", run_options, pack(folder, 2) if is_packed else f"folder:{folder}",
        checkpoint_every_steps=2, keep_checkpoints=9,
        views=ViewOptions(views_in=views_in, blur_probability=(0.5, 0.5)),  # type: ignore[arg-type]  # cases
    )  # fmt: skip
    pretrain(options)
    whole = last_network(options.run_path)
    for path in list_checkpoints(options.run_path / "checkpoints")[2:]:
        path.unlink()
    pretrain(replace(options, resume=True, workers=1))
    for name, value in last_network(options.run_path).items():
        assert torch.equal(value, whole[name]), name
    assert "broken" in (options.run_path / "rejects.jsonl").read_text()


def test_a_run_goes_on_with_the_statistics_of_its_start(
    tmp_path: Path, run_options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a stream finds an image unreadable that they were taken of."""
    source = f"folder:{broken_photos(tmp_path / 'photos')}"
    options = stream_options(tmp_path / "run", run_options, source)
    run = RunDirectory(path=options.run_path)
    settled, compute = settle(options, None, Ranks())
    _, _, kept = read_data(settled, run, None, Ranks())
    read_rows = training_data.read_rows

    def without_one(
        catalogue: Catalogue, rows: np.ndarray, spec: PreprocessSpec, rejects: Rejects
    ) -> tuple[Pixels, np.ndarray]:
        return read_rows(catalogue, rows[1:], spec, rejects)

    monkeypatch.setattr(training_data, "read_rows", without_one)
    data, resumed, config = read_data(replace(settled, resume=True), run, kept, Ranks())
    assert data.channel_mean != kept.channel_mean
    normaliser = make_trainer(resumed, config, compute, Ranks(), steps_per_epoch=1).normaliser
    assert torch.equal(normaliser.mean.flatten(), torch.tensor(kept.channel_mean))
    assert torch.equal(normaliser.std.flatten(), torch.tensor(kept.channel_std))


def test_ranks_take_the_statistics_of_the_first(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; each may have found other images of a stream unreadable."""
    config = RunDirectory(path=finished_run).read_config()
    assert agree_statistics(config, Ranks()) == config
    monkeypatch.setattr("train.begin.gather", lambda own, _: torch.cat([own / 3, own]))
    agreed = agree_statistics(config, Ranks(rank=1))
    assert agreed.channel_mean == tuple(x / 3 for x in config.channel_mean)
    assert agreed.channel_std == tuple(x / 3 for x in config.channel_std)


def test_a_run_outlives_a_damaged_checkpoint(
    tmp_path: Path, run_options: RunOptions, finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on from the one before, says so, and ends in the same bits."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    before, last = list_checkpoints(run / "checkpoints")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with caplog.at_level(logging.INFO, logger="horace"):
        pretrain(run_options(run, resume=True))
    assert f"{last} cannot be used: damage" in caplog.text
    assert f"resuming {run} after step {int(before.stem[-8:])} of " in caplog.text
    assert final_state(run) == final_state(finished_run)


def test_ranks_go_on_from_the_last_checkpoint_that_all_can_read(
    tmp_path: Path, run_options: RunOptions, finished_run: Path
) -> None:
    """The earliest of what each finds."""
    options = run_options(finished_run, resume=True)
    run = RunDirectory(path=finished_run)
    config = run.read_config()
    _, compute = settle(options, config, Ranks())
    trainer = make_trainer(options, config, compute, Ranks(), steps_per_epoch=11)
    before, _ = list_checkpoints(run.checkpoints)
    step = int(before.stem[-8:])
    trainer.ranks = BesideAnother(other=step)
    assert start_or_resume(run, config, trainer).step == step


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"network": NetworkOptions(layout="torchvision:resnet19")}, "--network.layout"),
        ({"init_from": Path("absent.pth")}, "weights absent.pth: expected a run"),
    ],
    ids=["backbone", "weights"],
)
def test_a_network_that_cannot_be_is_refused_before_the_images(
    tmp_path: Path, run_options: RunOptions, changes: dict[str, object], refusal: str
) -> None:
    """They are not even looked for, and no directory is left."""
    options = run_options(tmp_path / "run", source=f"folder:{tmp_path / 'absent'}", **changes)
    with pytest.raises(HoraceError, match=refusal):
        pretrain(options)
    assert not options.run_path.exists()


def test_skipped_images_are_written_down_before_the_end(
    tmp_path: Path, run_options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each checkpoint, for a kill, and where an error ends the run."""
    options = stream_options(
        tmp_path / "run", run_options, f"folder:{broken_photos(tmp_path / 'photos')}",
        checkpoint_every_steps=1,
    )  # fmt: skip
    rejects = options.run_path / "rejects.jsonl"
    step = Trainer.step

    def fail(trainer: Trainer, batch: Batch) -> StepOutcome:
        if batch.step == 1:
            assert "broken.jpg" in rejects.read_text()
            rejects.unlink()
            raise TrainError("a step", expected="an outcome", found="a fault")
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", fail)
    monkeypatch.setattr("train.loop.keep_rejects", lambda *_: None)  # of a run's start and end
    with pytest.raises(TrainError, match="a step: "):
        pretrain(options)
    assert "broken.jpg" in rejects.read_text()


def test_a_run_starts_from_the_weights_of_another(
    tmp_path: Path, run_options: RunOptions, finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are said, scored before the first step, and no untrained baseline is claimed."""
    options = run_options(tmp_path / "run", init_from=finished_run, epochs=1, lr_peak=1e-9)
    with caplog.at_level(logging.INFO, logger="horace"):
        pretrain(options)
    assert ": took " in caplog.text
    first = read_log(options.run_path / "log.jsonl")[0]
    before = [r["knn_top1"] for r in read_log(finished_run / "log.jsonl") if "knn_top1" in r]
    assert first["knn_start"] == pytest.approx(before[-1])
    assert "knn_random" not in first
    name = "backbone.conv1.weight"
    given = last_network(finished_run)[name]
    torch.testing.assert_close(last_network(options.run_path)[name], given)
    initial = load_weights(options.run_path / "initial.pt")["network"]
    assert not torch.allclose(initial[name], given), "the random twin of an export stays random"


def test_a_run_without_a_checkpoint_begins_as_it_began(
    tmp_path: Path, run_options: RunOptions, finished_run: Path
) -> None:
    """Killed before its first checkpoint, it still starts from the weights it was given."""
    options = run_options(tmp_path / "run", init_from=finished_run, epochs=1)
    pretrain(options)
    whole, first = last_network(options.run_path), read_log(options.run_path / "log.jsonl")[0]
    for path in list_checkpoints(options.run_path / "checkpoints"):
        path.unlink()
    pretrain(replace(options, resume=True))
    assert read_log(options.run_path / "log.jsonl")[0]["knn_start"] == first["knn_start"]
    for name, value in last_network(options.run_path).items():
        assert torch.equal(value, whole[name]), name


def test_a_run_of_small_images_in_bf16_on_a_cpu_is_refused_before_it_begins(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """Its weights would be none: in float32 it trains."""
    network = NetworkOptions(layout="resnet10", width=8, stem="large", projector_widths=(8, 8))
    options = run_options(
        tmp_path / "run", network=network, image_size_px=16, precision="bf16", device="cpu"
    )
    with pytest.raises(UsageError, match=r"before layer4\.0\.conv1; give --precision fp32"):
        pretrain(options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data_in", ["stream", "memory"])
def test_the_picture_shows_what_training_sees(
    tmp_path: Path, run_options: RunOptions, data_in: str
) -> None:
    """A red margin is outside the middle, which memory holds, and inside what a stream cuts."""
    photos, picture = tmp_path / "photos", tmp_path / "views.png"
    photos.mkdir()
    for i in range(4):
        pixels = np.zeros((32, 96, 3), np.uint8)
        pixels[:, 70:] = 255, 0, 0
        Image.fromarray(pixels).save(photos / f"{i}.png")
    views = ViewOptions(crop_area=(0.1, 0.3), jitter_probability=0, grey_probability=0)
    changes: dict[str, object] = {"image_size_px": 32, "channels": 3, "views": views}
    pretrain(
        run_options(
            tmp_path / "run", source=str(photos), show_views=picture, data_in=data_in, **changes
        )
    )
    with Image.open(picture) as drawn:
        is_red = (np.asarray(drawn.convert("RGB")) == (255, 0, 0)).all(axis=2)
    assert is_red.any() == (data_in == "stream")


@pytest.mark.parametrize("data_in", ["stream", "memory"])
def test_a_picture_of_no_images_is_one_line(
    tmp_path: Path, run_options: RunOptions, data_in: str
) -> None:
    """As a shard may be that holds none."""
    shard = tmp_path / "empty.tar"
    with tarfile.open(shard, "w"):
        pass
    options = run_options(
        tmp_path / "run", source=str(shard), show_views=tmp_path / "views.png", data_in=data_in
    )
    with pytest.raises(TrainError, match=r"empty\.tar: expected at least 2 images.*, found 0"):
        pretrain(options)


def test_a_picture_of_the_views_is_all_that_is_made(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """`--show-views` writes a PNG and starts no run."""
    picture = tmp_path / "views.png"
    pretrain(run_options(tmp_path / "run", show_views=picture))
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    assert not (tmp_path / "run").exists()
