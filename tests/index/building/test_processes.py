import contextlib
import json
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from index.build import BuildOptions, build
from index.building import processes
from index.building.part_file import RunKey
from index.building.part_set import Share
from index.building.pipeline import Crew
from index.building.processes import Worker, share_jobs
from index.building.worker import HeldLock, Job
from index.collection import Collection
from index.errors import CollectionError
from models.errors import UsageError

ROOT = Path(__file__).parents[3]
N_IMAGES = 3000


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """3,000 images of noise in an IDX file: enough to be killed among."""
    path = tmp_path_factory.mktemp("idx") / "noise-images-idx3-ubyte"
    header = np.array([0x00000803, N_IMAGES, 14, 14], ">u4").tobytes()
    path.write_bytes(header + np.random.default_rng(0).bytes(N_IMAGES * 14 * 14))
    return f"idx:{path}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, bundle, many_images):
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("whole") / "c"
    build(BuildOptions(images=many_images, encoder=str(bundle.path), out=out, batch_size=4))
    return content(out)


def content(collection):
    """Give the bytes of every file but the manifest, and the manifest without its report."""
    contents = {
        str(file.relative_to(collection)): file.read_bytes()
        for file in sorted(collection.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }
    document = json.loads((collection / "manifest.json").read_text())
    return contents, {k: v for k, v in document.items() if k not in ("build", "checksum")}


def start(images, bundle, out):
    """Start a build of two processes as people do."""
    return subprocess.Popen(
        [sys.executable, "-m", "index.build", "--images", images, "--encoder", str(bundle.path),
         "--out", str(out), "--batch-size", "4", "--processes", "2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def workers_of(pid):
    """Give the processes that a build has started to embed with."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in command_line(child)]


def command_line(pid):
    """Give the command line of a process; empty where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def wait_until(holds, process):
    """Look again and again, until it holds."""
    deadline_s = time.monotonic() + 60
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "not within a minute"
        time.sleep(0.001)


def has_parts(out, n):
    """Tell whether a build has so many parts."""
    return len(list(out.with_name(f"{out.name}.parts").glob("part-*.parquet"))) >= n


def test_a_killed_worker_is_followed_by_another(tmp_path, bundle, many_images, undisturbed):
    """Two processes, one of them killed, make the files of one that was left alone."""
    out = tmp_path / "c"
    process = start(many_images, bundle, out)
    wait_until(lambda: has_parts(out, 2), process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "of 2 died of SIGKILL; another goes on from its last part" in log
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_workers_end_with_their_parent_and_the_next_build_goes_on(
    tmp_path, bundle, many_images, undisturbed
):
    """After a SIGKILL of the parent alone nobody writes on, and the lock is soon free."""
    out = tmp_path / "c"
    process = start(many_images, bundle, out)
    wait_until(lambda: has_parts(out, 2), process)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    options = BuildOptions(
        images=many_images, encoder=str(bundle.path), out=out, batch_size=4, processes=2
    )
    assert build(options).reused >= 2 * 64
    assert len(workers) == 2
    assert not any("spawn_main" in command_line(worker) for worker in workers)
    assert content(out) == undisturbed


def test_an_interrupt_is_the_parents(tmp_path, bundle, many_images):
    """Ctrl-C reaches the whole group: one line says what is kept, and no worker cries out."""
    out = tmp_path / "c"
    process = start(many_images, bundle, out)
    wait_until(lambda: has_parts(out, 2), process)
    for pid in (*workers_of(process.pid), process.pid):
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "images are embedded and kept; the same command goes on" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_worker_that_dies_again_and_again_ends_the_build(
    tmp_path, monkeypatch, bundle, train_folder
):
    """It is not started for ever: the line says how it died and what may help."""
    monkeypatch.setattr(processes, "run_worker", operator.itemgetter)  # ends, and says nothing
    options = BuildOptions(
        images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c", processes=2
    )
    with pytest.raises(CollectionError) as error:
        build(options)
    assert "of 2: expected a process that finishes its parts, found one that ended with" in (
        str(error.value)
    )
    assert "3 times without a new part; check the machine's memory, or use fewer --processes" in (
        str(error.value)
    )
    assert list(tmp_path.iterdir()) == []


def test_what_a_worker_says_ends_the_build(tmp_path, bundle, train_folder):
    """A source that is cut short is one line, also where a process of its own has read it."""
    shard = tmp_path / "cut.tar.gz"
    subprocess.run(["tar", "-czf", shard, "-C", train_folder, "."], check=True)
    shard.write_bytes(shard.read_bytes()[:-2_000])
    options = BuildOptions(
        images=str(shard), encoder=str(bundle.path), out=tmp_path / "c", batch_size=2, processes=2
    )
    with pytest.raises(CollectionError, match=r"cut\.tar\.gz: expected a whole tar file, found "):
        build(options)


def test_rejects_and_repeats_are_those_of_one_process(tmp_path, bundle, new_folder):
    """What is left out, and why, does not depend on who found it."""
    folder = new_folder(per_class=20)
    (folder / "blue" / "003.png").write_text("no image")
    summaries = [
        build(
            BuildOptions(
                images=str(folder), encoder=str(bundle.path), out=tmp_path / f"{n}" / "c",
                batch_size=1, processes=n,
            )
        )
        for n in (1, 2)
    ]  # fmt: skip
    assert [(one.images, one.rejects) for one in summaries] == [(59, 1)] * 2
    assert content(tmp_path / "1" / "c") == content(tmp_path / "2" / "c")
    with Collection.open(tmp_path / "2" / "c") as collection:
        assert collection.count == 59


def test_shares_add_up_to_the_whole(tmp_path):
    """Workers and requests are cut as evenly as they go, and nobody is left without."""
    job = Job(images="", encoder="", directory=tmp_path, key=None, share=Share(),
              crew=Crew(workers=8, encoding=2))  # fmt: skip
    crews = [each.crew for each in share_jobs(job, 3)]
    assert [crew.workers for crew in crews] == [3, 3, 2]
    assert [crew.encoding for crew in crews] == [1, 1, 1]
    assert [each.share for each in share_jobs(job, 2)] == [Share(number=n, of=2) for n in (0, 1)]


def test_parts_are_counted_by_their_names(tmp_path):
    """To open thousands took seconds for each process, before the first began."""
    for start in (0, 4, 8, 12, 16):
        (tmp_path / f"part-{start:012}.parquet").touch()
    key = RunKey(source="made", source_count=None, fingerprint="f", dim=2,
                 batch_size=2, part_size=4)  # fmt: skip
    job = Job(images="", encoder="", directory=tmp_path, key=key, share=Share(),
              crew=Crew(workers=2, encoding=2))  # fmt: skip
    assert [Worker(each, HeldLock(0))._count_parts() for each in share_jobs(job, 2)] == [3, 2]


@pytest.mark.parametrize("option", ["processes", "requests"])
def test_absurd_numbers_are_refused(tmp_path, option):
    """One a billion is a slip."""
    with pytest.raises(UsageError, match=f"--{option}: expected 1 to 1024, found 0"):
        BuildOptions(images="x", encoder="x", out=tmp_path / "c", **{option: 0})
