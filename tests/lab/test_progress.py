"""The time left is arithmetic, and what is shown fits where it is shown."""

import io
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from surefoot.lab.progress import QUIET_SECONDS, Pace, roughly, shown, wall_seconds


def ended(seconds, status="finished"):
    return SimpleNamespace(seconds=seconds, status=status)


@pytest.mark.parametrize(
    ("estimates", "workers", "seconds"),
    [
        ([], 2, 0),
        ([3.0], 2, 3),  # one run cannot be shared
        ([1.0] * 10, 2, 5),
        ([1.0] * 10, 100, 1),
        ([10.0, 1.0, 1.0], 2, 10),  # never less than the longest
    ],
)
def test_wall_seconds(estimates, workers, seconds):
    assert wall_seconds(estimates, workers) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (45, "45 s"),
        (89.4, "89 s"),
        (89.6, "1 min"),
        (200, "3 min"),
        (5400, "1 h 30 min"),
        (7800, "2 h 10 min"),
        (3 * 86400, "3 days"),
    ],
)
def test_roughly(seconds, text):
    assert roughly(seconds) == text


class TestPace:
    def test_before_anything_ended_it_is_the_estimate_counting_down(self):
        pace = Pace([4.0] * 4, workers=2, now=100.0)
        assert pace.left(100.0) == 8.0
        assert pace.left(103.0) == 5.0

    def test_runs_slower_than_estimated_correct_the_rest(self):
        pace = Pace([4.0] * 4, workers=2, now=0.0)
        pace.finished(4.0, ended(8.0), 8.0)
        assert pace.left(8.0) == 3 * 4.0 / 2 * 2
        assert (pace.done, pace.total, pace.runs) == (4.0, 16.0, 1)

    def test_a_diverged_run_says_nothing_about_the_speed(self):
        pace = Pace([4.0] * 4, workers=1, now=0.0)
        pace.finished(4.0, ended(0.1, "diverged"), 0.1)
        assert pace.left(0.1) == 12.0

    def test_never_below_zero_and_zero_at_the_end(self):
        pace = Pace([4.0], workers=1, now=0.0)
        assert pace.left(1000.0) == 0.0
        pace.finished(4.0, ended(1000.0), 1000.0)
        assert pace.left(1000.0) == 0.0

    @given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=8), st.integers(1, 4))
    def test_the_bar_ends_full(self, estimates, workers):
        pace = Pace(estimates, workers, now=0.0)
        for count, estimate in enumerate(estimates, 1):
            pace.finished(estimate, ended(estimate), float(count))
            assert pace.left(float(count)) >= 0.0
        assert pace.done == pytest.approx(pace.total)
        assert pace.runs == len(estimates)


class TestShown:
    def test_where_there_is_no_terminal_a_plain_line_now_and_then(self):
        output, now = io.StringIO(), 0.0
        with shown(Console(file=output), [5.0] * 6, 1, clock=lambda: now) as advance:
            for _ in range(6):
                now += 0.8 * QUIET_SECONDS
                advance(5.0, ended(8.0))
        lines = output.getvalue().splitlines()
        assert lines == ["2 of 6 runs, about 32 s left", "4 of 6 runs, about 16 s left"]

    def test_a_quick_comparison_prints_nothing_there(self):
        output = io.StringIO()
        with shown(Console(file=output), [1.0] * 3, 1, clock=lambda: 0.0) as advance:
            for _ in range(3):
                advance(1.0, ended(1.0))
        assert output.getvalue() == ""

    def test_a_terminal_gets_a_bar_with_counts_and_time_left(self):
        output, now = io.StringIO(), 0.0
        console = Console(file=output, force_terminal=True, width=80)
        with shown(console, [30.0] * 4, 2, clock=lambda: now) as advance:
            now = 30.0
            advance(30.0, ended(30.0))
        assert "1/4 runs" in output.getvalue()
        assert "about 45 s left" in output.getvalue()
