import pytest

from anyexperts_jax.train.goodput import Clock, StepTimes


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_every_second_is_counted_once():
    time = Time()
    clock = Clock(time)
    with clock.spending("compile"):  # before the steps begin all is "start"
        time.now += 4
    clock.begin_steps()
    with clock.spending("compile"):
        time.now += 10
    for seconds in (3, 1, 1, 2):
        time.now += seconds
        clock.add("data", 0.5)
        with clock.spending("checkpoint"):
            time.now += 5
        clock.step_done()
    report = clock.report()
    expected = {"step": 5.0, "start": 4.0, "compile": 10.0, "data": 2.0, "validation": 0.0, "checkpoint": 20.0}
    assert report.seconds == expected
    assert sum(report.seconds.values()) == time.now - 100 == 41
    assert report.steps == 4
    assert report.goodput == pytest.approx(5 / 41)
    assert report.record()["goodput"] == report.goodput
    assert report.record()["time_shares"]["checkpoint"] == pytest.approx(20 / 41)


def test_a_steps_time_excludes_checkpoints_and_waits():
    time = Time()
    clock = Clock(time)
    clock.begin_steps()
    assert clock.window() is None
    for seconds in (9, 1, 1, 1, 3):  # the first has no step before it
        time.now += seconds
        with clock.spending("validation"):
            time.now += 7
        clock.step_done()
    times = clock.window()
    assert (times.median, times.p95, times.slowest) == (1.0, pytest.approx(2.7), 3.0)
    assert clock.window() is None
    time.now += 2
    clock.step_done()
    assert clock.window() == StepTimes(2.0, 2.0, 2.0)
    assert clock.report().step_times.slowest == 3.0


def test_a_run_without_a_step_is_all_start():
    time = Time()
    clock = Clock(time)
    time.now += 3
    report = clock.report()
    assert (report.steps, report.step_times, report.goodput) == (0, None, 0.0)
    assert report.seconds["start"] == 3.0
