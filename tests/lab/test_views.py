"""The plots of a search: what is in them, what they say of what is not, and when there are none."""

import json
import math

import pytest

from surefoot.lab.report.html import render, write_report
from surefoot.lab.report.views import Searched, views
from surefoot.lab.runs import Trial
from surefoot.lab.search import Outcome
from surefoot.lab.spaces import Choices, Range

INF = math.inf
SPACE = {
    "rate": Range(1e-5, 1.0, log=True),
    "betas": Choices(((0.9, 0.99), (0.8, 0.9))),
    "undo": Choices(("exact",)),
    "window": Choices((50, 600)),
}


@pytest.fixture
def searched(make_run):
    def make(losses, space=SPACE, seeds=1, pruned=()):
        def value(dimension, i):
            if isinstance(dimension, Choices):
                return dimension.values[i % len(dimension.values)]
            return dimension.low * (dimension.high / dimension.low) ** ((i + 1) / (len(losses) + 1))

        return Searched(
            space,
            [
                Outcome(
                    Trial(i, {name: value(d, i) for name, d in space.items()}, seeds, i in pruned),
                    tuple(make_run(loss, seed=seed) for seed in range(seeds)),
                    seeds,
                )
                for i, loss in enumerate(losses)
            ],
        )

    return make


def by_id(searched):
    return {figure.id: figure for figure in views(searched)}


def numbers(plot):
    """All y values of a plot."""
    return [y for trace in plot["data"] for y in trace.get("y", ()) if isinstance(y, int | float)]


class TestViews:
    def test_which(self, searched):
        found = by_id(searched([3.0, 1.0, 2.0, 1.5, 2.5, 1.2]))
        assert list(found) == ["history", "importances", "parallel", "contour"]
        assert all(figure.plot and figure.caption.endswith(".") for figure in found.values())
        json.dumps(
            [figure.plot for figure in found.values()], allow_nan=False
        )  # or no browser reads the page

    def test_the_history_has_every_trial_and_the_best_so_far(self, searched):
        history = by_id(searched([3.0, 1.0, 2.0, 0.5]))["history"].plot
        points, line, *_ = history["data"]
        assert points["y"] == [3.0, 1.0, 2.0, 0.5]
        assert line["y"] == [3.0, 1.0, 1.0, 0.5]

    def test_what_has_one_value_only_is_in_no_plot(self, searched):
        figures = by_id(searched([3.0, 1.0, 2.0, 1.5]))
        for id in ("importances", "parallel", "contour"):
            assert "undo" not in json.dumps(figures[id].plot)
            assert "rate" in json.dumps(figures[id].plot)

    def test_tuples_are_shown_as_they_are_written(self, searched):
        assert "0.9:0.99" in json.dumps(by_id(searched([3.0, 1.0, 2.0, 1.5]))["parallel"].plot)

    def test_a_single_setting_is_drawn_over_its_range(self, searched):
        figures = by_id(searched([3.0, 1.0, 2.0], {"rate": SPACE["rate"]}))
        assert list(figures) == ["history", "slice"]
        assert figures["slice"].plot["layout"]["xaxis"]["type"] == "log"

    def test_numbers_to_choose_from_that_span_decades_have_a_logarithmic_axis(self, searched):
        decades = {"rate": Choices((1e-5, 1e-3, 1e-1))}
        assert by_id(searched([3.0, 1.0, 2.0], decades))["slice"].plot["layout"]["xaxis"]["type"] == "log"
        few = {"window": Choices((50, 100))}
        assert by_id(searched([3.0, 1.0, 2.0], few))["slice"].plot["layout"]["xaxis"].get("type") != "log"

    def test_the_diverged_are_drawn_at_the_ceiling_and_it_is_said(self, searched):
        figures = by_id(searched([3.0, 1.0, 2.0, INF, 1e9]))
        assert max(numbers(figures["history"].plot)) < 1e3
        for id in ("history", "parallel", "contour"):
            assert " 2 of 5 trials, diverged or far off, are drawn at" in figures[id].caption

    def test_losses_that_span_much_have_a_logarithmic_axis(self, searched):
        assert by_id(searched([5.0, 4.0, 0.3]))["history"].plot["layout"]["yaxis"]["type"] == "log"
        assert by_id(searched([5.0, 4.0, 3.0]))["history"].plot["layout"]["yaxis"].get("type") != "log"

    @pytest.mark.parametrize("losses", [[], [1.0], [1.0, 2.0], [INF, INF, INF]])
    def test_of_next_to_nothing_there_is_no_plot(self, searched, losses):
        assert views(searched(losses)) == []

    def test_losses_that_are_all_alike_can_be_drawn(self, searched):
        assert by_id(searched([1.0] * 4))["history"].plot


class TestPage:
    def test_it_has_every_trial_and_how_it_ended(self, make_study, searched):
        study = make_study({"a": {1e-2: {0: 1.0, 1: 1.1}}})
        page = render(study, searched([3.0, 1.0, INF, 2.0], seeds=2, pruned=[3]))
        table = page[page.index('id="trials"') : page.index("</table>", page.index('id="trials"'))]
        assert table.count("<tr>") == 5
        for text in ("complete", "diverged in 2 runs", "pruned", "0.9:0.99", "exact"):
            assert f">{text}<" in table
        assert "4, of which 1 pruned" in page
        assert "1e-05 to 1.0, logarithmic" in page

    def test_without_a_search_there_is_none_of_it(self, make_study):
        page = render(make_study({"a": {1e-2: {0: 1.0, 1: 1.1}}}))
        assert "The search" not in page
        assert "Optimizers at their best initial rate" in page

    def test_it_is_written_where_a_comparison_would_be(self, make_study, searched, tmp_path):
        study = make_study({"a": {1e-2: {0: 1.0, 1: 1.1}}})
        path = write_report(study, tmp_path / "report.html", searched([3.0, 1.0, 2.0]))
        assert "The best trials" in path.read_text()
