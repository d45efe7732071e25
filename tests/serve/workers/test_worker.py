from __future__ import annotations

import logging
import multiprocessing
import signal
import threading

import pytest

from serve.config import ServeOptions
from serve.workers import worker as module
from serve.workers.messages import Answer, Failed, Order, Ready
from serve.workers.place import WorkerPlace
from serve.workers.worker import run_worker

PLACE = WorkerPlace(index=0, count=2)


@pytest.fixture
def working(make_bundle, monkeypatch, caplog):
    """A function that runs a worker here while a thread plays its supervisor."""
    monkeypatch.setattr(module, "set_up_logs", lambda options, **_: None)
    caplog.set_level(logging.INFO, "horace.serve")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(script, path: str | None = None) -> list[object]:
        ours, theirs = multiprocessing.Pipe()
        heard = []
        supervisor = threading.Thread(target=script, args=(ours, heard))
        supervisor.start()
        try:
            bundle = path or str(make_bundle().path)
            run_worker(ServeOptions(port=0, bundle=(f"m={bundle}",)), PLACE, theirs)
        finally:
            theirs.close()
            supervisor.join()
        return heard

    yield run
    logging.captureWarnings(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_worker_reports_reloads_and_drains(working, caplog):
    """Ready with its line; then it answers, and does as it is told."""

    def script(pipe, heard):
        heard.append(pipe.recv())
        pipe.send(Order.ANSWER)
        heard.append(pipe.recv())
        pipe.send(Order.RELOAD)
        pipe.send(Order.STOP)
        pipe.send(Order.STOP)

    ready, answer = working(script)
    assert answer == Answer()
    assert isinstance(ready, Ready)
    assert ready.line.startswith("horace serving on 127.0.0.1:")
    assert ready.line.endswith(" models=m collections=none")
    assert "stopping on the supervisor's order" in caplog.text
    assert "every call was answered, 0 in all" in caplog.text


def test_a_worker_without_a_supervisor_drains(working, caplog):
    """The pipe ends: nobody will tell it to stop any more."""

    def script(pipe, heard):
        heard.append(pipe.recv())
        pipe.close()

    working(script)
    assert "stopping on the end of the supervisor" in caplog.text


def test_a_worker_that_cannot_start_says_why(working, tmp_path):
    """In one line, and with an exit status; nothing is printed."""
    heard = []

    def script(pipe, _):
        heard.append(pipe.recv())

    with pytest.raises(SystemExit) as end:
        working(script, path=str(tmp_path / "none"))
    assert end.value.code == 1
    (failed,) = heard
    assert isinstance(failed, Failed)
    assert "expected a bundle directory, found no such directory" in failed.line
    assert not failed.bad_use


def test_a_worker_that_is_cut_off_before_it_is_ready_ends(working, caplog):
    """Both orders wait in the pipe: it never serves."""

    def script(pipe, heard):
        pipe.send(Order.CUT_OFF)

    working(script)
    assert "before the server was ready" in caplog.text
