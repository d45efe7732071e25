"""Signals between two steps: the first asks, a second insists, and both say so in the status."""

from __future__ import annotations

import signal
import threading

import pytest

from train.stop import SIGNALS, StopRequest, end_process


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    """Nothing is interrupted; afterwards the handlers are those that were there."""
    before = [signal.getsignal(other) for other in SIGNALS]
    with StopRequest() as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_second_ctrl_c_acts_at_once() -> None:
    """Whoever presses it twice does not want to wait for the step."""
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sigusr1_says_nothing_new() -> None:
    """SLURM may send it to several processes that pass it on."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1


def test_under_torchrun_no_signal_acts_at_once() -> None:
    """It hands on what the terminal has sent to its workers, too."""
    with StopRequest(is_managed=True) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_outside_of_the_main_thread_nothing_is_asked() -> None:
    """Python has no signals there: entering and leaving changes nothing."""
    before = signal.getsignal(signal.SIGTERM)
    requests: list[int] = []

    def work() -> None:
        with StopRequest() as stop:
            requests.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requests == [0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_exit_status_names_the_signal() -> None:
    """130 (through KeyboardInterrupt), 143 and 138, as shells have it."""
    with pytest.raises(KeyboardInterrupt):
        end_process(signal.SIGINT)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138)):
        with pytest.raises(SystemExit) as leaving:
            end_process(number)
        assert leaving.value.code == status
