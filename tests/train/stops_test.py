import errno
import os
import signal
import threading

import pytest

from anyexperts_jax.train.stops import RunInterruptedError, StopRequests, no_room


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append("outside"))
    try:
        with StopRequests() as requests:
            assert requests.signal_number is None
            os.kill(os.getpid(), number)
            assert (requests.signal_number, acted) == (number, [])
            os.kill(os.getpid(), number)
            assert acted == ["outside"]
        os.kill(os.getpid(), number)
        assert acted == ["outside"] * 2
    finally:
        signal.signal(number, before)


def test_another_thread_can_train_too():
    noted = []

    def enter():
        with StopRequests() as requests:
            noted.append(requests.signal_number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noted == [None]


def test_exit_codes_are_the_shells():
    assert RunInterruptedError("", signal.SIGTERM).exit_code == 143
    assert RunInterruptedError("", signal.SIGINT).exit_code == 130


def test_a_full_disk_is_found_among_the_causes():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert no_room(full) == "No space left on device"
    wrapped = ValueError("RESOURCE_EXHAUSTED: Error writing \"d/1\": No space left on device [source locations='x']")
    assert no_room(wrapped) == "No space left on device"
    outer = RuntimeError("save failed")
    outer.__cause__ = full
    assert no_room(outer) == "No space left on device"
    assert no_room(OSError(errno.ENOENT, "No such file or directory")) is None
    circle = ValueError("a")
    circle.__context__ = circle
    assert no_room(circle) is None
