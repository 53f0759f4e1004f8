"""What a person reads: the sentences, the numbers as they are rounded, the page's content, the terminal's table."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from surefoot.lab.errors import UserError
from surefoot.lab.report import words
from surefoot.lab.report.figures import figures, style
from surefoot.lab.report.html import render, write_report
from surefoot.lab.report.terminal import print_summary
from surefoot.lab.runs import Study
from surefoot.lab.stats import Estimate, analyse

INF = math.inf


def by_seed(*losses):
    return dict(enumerate(losses))


CLEAR = {"adam": {1e-3: by_seed(0.200, 0.204, 0.202)}, "sgd": {1e-2: by_seed(0.250, 0.255, 0.251)}}
CLOSE = {"adam": {1e-3: by_seed(0.200, 0.230, 0.202)}, "sgd": {1e-2: by_seed(0.213, 0.209, 0.215)}}


def headline(make_study, losses):
    return words.headline(analyse(make_study(losses)))


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "1e-3"),
        (2.5e-4, "2.5e-4"),
        (0.01, "0.01"),
        (0.05, "0.05"),
        (1.0, "1"),
        (10.0, "10"),
        (1e5, "1e5"),
    ],
)
def test_rates_are_written_as_one_types_them(value, text):
    assert words.rate(value) == text
    assert float(text) == value


def test_a_mean_has_the_decimals_that_its_spread_deserves():
    def of(mean, spread):
        return words.with_sd(Estimate(3, mean, spread, mean, mean))

    assert of(0.0312345, 0.00112) == ("0.0312", "± 0.0011")
    assert of(12.3456, 3.21) == ("12.3", "± 3.2")
    assert of(1234.5, 210.0) == ("1234", "± 210")
    assert of(3.2e-8, 1.1e-9) == ("3.2e-08", "± 1.1e-09")
    assert of(0.3, 0.0) == ("0.3", "± 0")
    assert of(0.123456, math.nan) == ("0.1235", "")
    assert of(INF, math.nan) == ("diverged", "")
    assert of(math.nan, math.nan) == ("–", "")


def test_intervals_and_half_intervals_agree():
    e = Estimate(5, 0.5, 0.1, 0.376, 0.624)
    assert words.with_interval(e) == ("0.50", "0.38 to 0.62")
    assert words.with_half_interval(e) == ("0.50", "± 0.12")


def test_durations():
    assert [words.duration(s) for s in (0.5, 59.0, 61.0, 3725.0)] == [
        "0.5 s",
        "59 s",
        "1 min 1 s",
        "1 h 2 min",
    ]


def test_listings():
    assert [words.listing(list(letters)) for letters in ("", "a", "ab", "abc")] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


# ----------------------------------------------------------------------------------------------------- sentences


def test_a_clear_winner_by_how_much_and_how_sure(make_study):
    # Differences .050 .051 .049: mean .05, s.d. .001, interval .05 +- 4.303 * .001 / sqrt 3, relative to .252.
    text = headline(make_study, CLEAR)
    assert text == (
        "adam wins with the lowest final validation loss, 0.2020 at rate 1e-3: 0.0500 (20 %) below the next best, sgd "
        "(95 % interval 0.0475 to 0.0525, p < 0.001, 3 seeds)."
    )


def test_a_lead_that_is_noise_is_no_win(make_study):
    text = headline(make_study, CLOSE)
    assert text.startswith("No sure winner: adam has the lowest final validation loss")
    assert re.search(
        r"lead of 0\.002 on sgd is not more than noise \(p = 0\.\d+, 3 seeds; about \d+ would tell\)", text
    )
    assert "wins" not in text


def test_what_is_sure_beside_what_is_not(make_study):
    text = headline(make_study, CLOSE | {"worst": {1e-3: by_seed(9.0, 9.01, 9.02)}})
    assert text.startswith("No sure winner")
    assert text.endswith("It is better than worst by more than noise.")


def test_one_seed_is_never_a_win(make_study):
    text = headline(make_study, {"adam": {1e-3: by_seed(0.1)}, "sgd": {1e-2: by_seed(9.0)}})
    assert text.startswith("adam has the lowest final validation loss, 0.1")
    assert "fewer than 2 seeds in common nobody can say" in text


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (
            {"adam": {1e-3: by_seed(0.1, 0.2)}},
            "adam alone was run: its best final validation loss, 0.15 at rate 1e-3.",
        ),
        (
            {"a": {1e-3: by_seed(INF, 0.1)}, "b": {1e-3: by_seed(INF, INF)}},
            "No winner: every method diverged",
        ),
        ({"a": {}, "b": {}}, "No run has finished yet"),
        ({"a": {1e-3: by_seed(1, 2, 3, 4)}, "b": {1e-3: by_seed(*[INF] * 4)}}, "a wins with the lowest"),
    ],
)
def test_headlines_at_the_edges(make_study, losses, text):
    assert headline(make_study, losses).startswith(text)


def test_the_sentence_of_each_kind_of_pair(make_study):
    def sentence(a, b):
        return words.sentence(
            analyse(make_study({"a": {1e-3: by_seed(*a)}, "b": {1e-3: by_seed(*b)}})).pairs[0]
        )

    assert re.fullmatch(r"a is better than b by 0\.0500 \(95 % interval 0\.0475 to 0\.0525, p < 0\.001\)\.",
                        sentence((0.200, 0.204, 0.202), (0.250, 0.255, 0.251)))  # fmt: skip
    assert re.fullmatch(r"a and b: the difference of .* \(95 % interval -.* to .*\) is not more than noise \(p = .*; "
                        r"about \d+ seeds would tell\)\.", sentence((1, 2, 3), (2, 1, 3.5)))  # fmt: skip
    assert sentence((1, 2), (1, 2)) == "a and b: the same loss in all 2 seeds, no difference at all."
    assert sentence((1,), (2,)) == "a and b: cannot tell, they have fewer than 2 seeds in common."
    assert "at their best rates 0 and 1 of 2 runs diverged; by ranks that is not more than noise" in sentence(
        (1, 2), (1, INF)
    )
    assert sentence((1, 2, 3, 4), [INF] * 4).startswith("a is better than b by ranks")


def test_a_lead_of_zero_has_no_minus_sign(make_study):
    study = make_study({"a": {1e-3: by_seed(1, 2)}, "b": {1e-3: by_seed(1, 2)}})
    assert words.with_interval(words.lead(analyse(study).pairs[0])) == ("0", "0 to 0")
    assert words.rounded([-0.001, -0.5], 0.3) == ["0.00", "-0.50"]
    assert "-0<" not in render(study)


def test_equals_at_the_top_are_all_named(make_study):
    same = {1e-3: by_seed(0.200, 0.204, 0.202)}
    alike = {"adam-upd": same, "adam": same}
    assert headline(make_study, alike) == (
        "adam and adam-upd end alike, with the same final validation loss in all 3 seeds: 0.2020 on average."
    )
    text = headline(make_study, alike | CLEAR | {"adam": same, "near": {1e-3: by_seed(0.201, 0.230, 0.200)}})
    assert text == (
        "adam and adam-upd end alike, with the lowest final validation loss in all 3 seeds: 0.2020 on average. "
        "They are better than sgd by more than noise. They are not surely ahead of near."
    )
    one = {label: {1e-3: by_seed(0.1)} for label in "abcdef"} | {"last": {1e-3: by_seed(0.2)}}
    assert headline(make_study, one) == (
        "a and 5 others end alike, with the lowest final validation loss in the only seed: 0.1. "
        "With fewer than 2 seeds in common nobody can say whether their lead is more than noise."
    )


def test_a_like_mean_of_other_losses_is_not_alike(make_study):
    text = headline(make_study, {"a": {1e-3: by_seed(1, 2)}, "b": {1e-3: by_seed(2, 1)}})
    assert text.startswith("No sure winner: a")


def test_notes_say_what_to_beware_of(make_study):
    def notes(losses, **options):
        study = make_study(losses, **options)
        return " ".join(words.notes(study, analyse(study)))

    assert notes(CLEAR) == ""
    assert "adam 3 of 4" in notes(CLEAR, seeds=[0, 1, 2, 3])
    edge = notes({"a": {1e-3: by_seed(1), 1e-2: by_seed(2)}})
    assert "Best at the edge of the rates tried" in edge
    assert "a (1e-3)" in edge
    assert "chosen on the same seeds" in edge
    assert "Diverged in at least one run at every rate: a." in notes({"a": {1e-3: by_seed(1, INF)}})


# ----------------------------------------------------------------------------------------------------- the page

GRID = {
    "adam": {1e-4: by_seed(0.9, 0.8, 0.85), 1e-3: by_seed(0.20, 0.21, 0.19), 1e-2: by_seed(0.3, INF, 0.31)},
    "sgd": {1e-3: by_seed(0.9, 0.92, 0.91), 1e-2: by_seed(0.25, 0.24, 0.27), 1e-1: by_seed(INF, INF, INF)},
}


def figure(study, name):
    return next(figure.plot for figure in figures(study, analyse(study)) if figure.id == name)


def lines(plot):
    """Traces that are no bands, by name."""
    return {
        trace["name"]: trace
        for trace in plot["data"]
        if trace.get("fill") != "toself" and trace.get("yaxis") != "y2"
    }


def test_the_page_loads_nothing_and_carries_plotly_once(make_study):
    page = render(make_study(GRID))
    outside = re.sub(
        r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL
    )  # the first script is Plotly itself
    assert len(page) - len(outside) > 1_000_000
    assert len(outside) < 100_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", outside)
    assert "default-src 'none'" in outside


def test_the_page_says_what_was_run(make_study):
    environment = {"torch": "2.13.0", "threads": 1, "device": "cpu"}
    study = make_study(GRID, command="surefoot compare made-up --rates '1e-4:1e-1'", environment=environment)
    page = render(study)
    for text in ("surefoot compare made-up --rates &#39;1e-4:1e-1&#39;", "21840", "2.13.0", "etas=0.5:1.2",
                 "window=50", "number=1", "0, 1, 2", "18, of which 4 diverged"):  # fmt: skip
        assert text in page
    assert words.headline(analyse(study)) in page.replace("&lt;", "<")


def test_the_page_sorts_diverged_as_infinite_and_nothing_as_nothing(make_study):
    page = render(make_study({"a": {1e-3: by_seed(INF, 1.0)}, "b": {1e-3: by_seed(1.0, 2.0)}}))
    assert '<td data-key="Infinity" class="number">diverged</td>' in page
    assert '<td data-key="" class="number">–</td>' in page
    assert not re.search(r'data-key="-?(inf|nan)"', page)


def test_facts_that_differ_between_runs_are_all_told(make_study):
    study = make_study(GRID)
    runs = [
        replace(run, environment={"device": ("cpu", "cuda")[i % 2], "started": f"2026-01-{i + 1:02}"})
        for i, run in enumerate(study.results["adam"])
    ]
    page = render(replace(study, results={**study.results, "adam": runs}))
    assert "<dd>cpu, cuda</dd>" in page
    assert "<dd>2026-01-01 to 2026-01-09</dd>" in page


@pytest.mark.parametrize(
    ("losses", "on_the_page"),
    [
        ({label: {1e-3: by_seed(i)} for i, label in enumerate("abc")}, None),
        (CLEAR, None),
        (CLEAR | {"c": {1e-3: by_seed(1.0, 2.0)}}, "The 3 p values carry"),
        (CLEAR | {"c": {1e-3: {7: 1.0}}}, None),  # one pair only has seeds in common
    ],
)
def test_only_p_values_that_exist_are_counted(make_study, losses, on_the_page):
    study = make_study(losses)
    page, terminal = render(study), printed(study, 100)
    assert ("Holm's correction over all pairs" in terminal) is (on_the_page is not None)
    if on_the_page:
        assert on_the_page in page
    else:
        assert "p values carry" not in page
    assert ("there is nothing to test" in page) is ("a" in losses)


def test_what_has_no_curve_has_a_sentence_instead_of_a_plot(make_study):
    study = make_study({label: {1e-3: by_seed(INF, INF), 1e-2: by_seed(INF, 1.0)} for label in "ab"})
    at_once = replace(
        study,
        results={
            label: [
                replace(run, patterns=[], train_loss=[], validation_loss=[], validation_metric=[], rate_mean=[],
                        rate_std=[], rate_min=[], rate_max=[], steps=0) if run.status == "diverged" else run
                for run in runs
            ]
            for label, runs in study.results.items()
        },
    )  # fmt: skip
    found = {figure.id: figure for figure in figures(at_once, analyse(at_once))}
    assert set(found) == {"train-loss", "validation-loss", "metric", "sensitivity", "rates"}
    assert all(figure.plot is None and figure.caption.startswith("Not drawn: ") for figure in found.values())
    page = render(at_once)
    assert page.count("Not drawn: ") == 5
    assert 'class="plot"' not in page
    assert "cross marks" not in page
    assert '<td data-key="" class="number">–<small>1 and 1 of 2 runs diverged</small></td>' in page


def test_labels_are_text_not_markup(make_study):
    label = "<img src=x>&[a=1]</script>"
    page = render(
        make_study({label: {1e-3: by_seed(1.0, 2.0)}, "b": {1e-3: by_seed(1.0, 2.5)}}, command="<b>&")
    )
    assert "<img" not in page
    assert "<pre><code>&lt;b&gt;&amp;</code></pre>" in page
    data = re.search(r'<script type="application/json" id="plots-data">(.*?)</script>', page, re.DOTALL)
    names = {trace["name"] for plot in json.loads(data[1]).values() for trace in plot["data"]}
    assert names == {"&lt;img src=x&gt;&amp;[a=1]&lt;/script&gt;", "b"}  # as Plotly wants its text escaped


@pytest.mark.parametrize(
    "losses",
    [
        {},
        {"a": {}},
        {"a": {1e-3: by_seed(INF, INF)}, "b": {1e-3: by_seed(INF, 1.0), 1e-2: by_seed(INF, INF)}},
        {"a": {1e-3: by_seed(1.0)}},
        {"a": {1e-3: by_seed(0.0, 0.0), 1e-2: by_seed(-1.0, 1.0)}},
        {"a": {1e-3: by_seed(1e30, 1e31), 1e-2: by_seed(1e-9, 2e-9)}},
    ],
)
@pytest.mark.parametrize("metric_name", ["accuracy", None])
def test_every_study_has_a_page_of_valid_json(make_study, losses, metric_name):
    page = render(make_study(losses, metric_name=metric_name, seeds=[0, 1]))
    data = re.search(r'id="plots-data">(.*?)</script>', page, re.DOTALL)
    json.loads(data[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert ('id="metric-title"' in page) == (metric_name is not None)


def test_curves_are_means_over_the_seeds_against_epochs(make_study):
    study = make_study(GRID)
    adam = lines(figure(study, "train-loss"))["adam"]
    assert list(adam["x"]) == [0.5, 1.0, 1.5, 2.0]
    assert list(adam["y"]) == [2.0, 1.0, 0.5, 0.6]
    validation = lines(figure(study, "validation-loss"))
    assert list(validation["adam"]["y"]) == pytest.approx([3.0, 1.0, 0.5, 0.2])
    assert list(validation["sgd"]["y"])[-1] == pytest.approx(0.76 / 3)


def test_a_diverged_run_cuts_its_methods_curve_and_marks_the_end(make_study):
    losses = {"a": {1e-3: by_seed(0.1, INF)}, "b": {1e-3: by_seed(0.2, 0.3)}}
    study = make_study(losses)
    a, b = (lines(figure(study, "train-loss"))[name] for name in "ab")
    assert list(a["x"]) == [0.5]
    assert a["marker"]["symbol"][-1] == "x"
    assert len(b["x"]) == 4
    assert "x" not in b["marker"]["symbol"]
    assert any("cross marks" in figure.caption for figure in figures(study, analyse(study)))


def test_the_sensitivity_plot_has_a_gap_and_a_cross_where_runs_diverged(make_study):
    plot = figure(make_study(GRID), "sensitivity")
    adam = lines(plot)["adam"]
    assert list(adam["x"]) == [1e-4, 1e-3, 1e-2]
    assert list(adam["y"]) == [pytest.approx(0.85), pytest.approx(0.2), None]
    assert adam["error_y"]["array"][1] == pytest.approx(0.01)
    assert list(adam["marker"]["symbol"]).index("star") == 1
    crosses = {t["name"]: t for t in plot["data"] if t.get("yaxis") == "y2"}
    assert (list(crosses["adam"]["x"]), list(crosses["sgd"]["x"])) == ([1e-2], [1e-1])
    assert list(crosses["adam"]["customdata"]) == ["1 of 3 runs diverged"]
    assert crosses["adam"]["y"] != crosses["sgd"]["y"]


def test_there_is_no_sensitivity_plot_of_single_rates(make_study):
    study = make_study(CLEAR)
    assert "sensitivity" not in [figure.id for figure in figures(study, analyse(study))]


def test_the_rates_band_is_the_spread_over_weights_and_stays_above_zero(make_study):
    study = make_study({"a": {1e-3: by_seed(1.0, 2.0)}}, rates=(1.0, 2.0, 3.0, 4.0), spread=1.5)
    plot = figure(study, "rates")
    band = next(trace for trace in plot["data"] if trace.get("fill") == "toself")
    high, low = list(band["y"][:4]), list(band["y"][4:])
    assert plot["layout"]["yaxis"]["type"] == "log"
    assert high == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 10e-3])
    assert min(low) > 0
    assert max(low) < 10 ** plot["layout"]["yaxis"]["range"][0]  # it runs off the bottom


def test_a_rate_of_zero_is_drawn_on_a_linear_axis(make_study):
    plot = figure(make_study({"a": {1e-3: by_seed(1.0, 2.0)}}, rates=(0.0, 0.0, 0.0, 0.0)), "rates")
    assert plot["layout"]["yaxis"].get("type") != "log"
    assert list(lines(plot)["a"]["y"]) == [0.0] * 4


def test_what_exploded_does_not_flatten_the_rest(make_study):
    losses = {"a": {1e-3: by_seed(0.01, 0.02), 1e-2: by_seed(0.1, 0.2), 1e-1: by_seed(1e20, 2e20)}}
    low, high = figure(make_study(losses), "sensitivity")["layout"]["yaxis"]["range"]
    assert high - low < 6


def test_many_methods_are_told_apart():
    looks = [style(position) for position in range(35)]
    assert len({(look.colour, look.dash) for look in looks}) == 35
    assert len({(look.colour, look.symbol) for look in looks}) == 35


def test_a_method_keeps_its_colour_whatever_its_rank(make_study):
    def colours(losses):
        return {
            name: t["line"]["color"] for name, t in lines(figure(make_study(losses), "train-loss")).items()
        }

    good, bad = {1e-3: by_seed(1.0, 1.1)}, {1e-3: by_seed(2.0, 2.2)}
    assert colours({"a": good, "b": bad}) == colours({"a": bad, "b": good})


# ------------------------------------------------------------------------------------------------------- the file


def test_the_report_is_written_whole_with_its_folder(make_study, tmp_path):
    path = write_report(make_study(CLEAR), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_is_one_sentence(make_study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The report cannot be written to .*file.*report\.html': .*\.$"):
        write_report(make_study(CLEAR), tmp_path / "file" / "report.html")


def test_a_full_disk_leaves_the_old_report_and_no_rubbish(make_study, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(make_study(CLEAR), path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "old")]


def test_a_command_with_bytes_that_are_no_text_does_not_cost_the_report(make_study, tmp_path):
    path = write_report(
        make_study(CLEAR, command="surefoot compare caf\udce9.py:task"), tmp_path / "report.html"
    )
    assert r"caf\udce9.py" in path.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- the terminal


def printed(study: Study, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(study, console)
    return console.file.getvalue()


LONGEST = "adam-upd[batch=5,rate=0.001,window=3000,etas=0.5:1.2,step_sizes=1e-10:1]"
LONG = {"srprop[window=600,etas=0.7375:1.2]": GRID["adam"], "momentum": GRID["sgd"]}


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_every_row_has_its_name_and_nothing_is_cut_off_at_any_width(make_study, width):
    text = printed(make_study(GRID | {LONGEST: GRID["sgd"]}), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    rows = lines[next(i for i, line in enumerate(lines) if "───" in line) + 1 :]
    assert [line.split()[1] for line in rows if line.startswith(("adam ", "sgd "))] == ["1e-3", "0.01"]
    for piece in ("rate=0.001,", "window=3000,", "etas=0.5:1.2,"):  # a long name is broken after its commas
        assert piece in text
    assert "decades" in text
    header = text[: text.index("───")].rpartition("\n\n")[2]
    for column, least in {"ms a": 80, "accuracy": 80, "epoch": 80, "diver-": 50, "min train": 60}.items():
        assert (column in header) is (width >= least), column
    assert ("The report has the columns" in text) is (width < 80)


@pytest.mark.parametrize("width", [80, 120])
def test_sentences_break_long_names_after_commas_only(make_study, width):
    losses = {LONGEST: CLOSE["adam"], LONGEST.replace("]", ",undo=none]"): CLOSE["sgd"]}
    text = printed(make_study(losses), width)
    assert max(map(len, text.splitlines())) <= width
    for line in text[text.rindex("───") :].splitlines():
        assert line.count("[") or not re.search(r"(step_|step_sizes|1e-|etas|=)$", line.strip())
    assert LONGEST in text  # it fits on a line of its own


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_is_whole_at_every_width(make_study, width):
    text = printed(make_study(LONG), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # nothing was cut off
    for value in ("0.200", "± 0.025", "0.5", "momentum", "2", "1/9", "3/9", "0.8 "):
        assert value in text
    assert "\x1b" not in text  # no colours where there is no terminal


def test_labels_are_not_taken_for_richs_markup(make_study):
    text = printed(make_study({"core[red]": CLEAR["adam"], "sgd[/bold]": CLEAR["sgd"]}), 100)
    assert "core[red]" in text
    assert "sgd[/bold]" in text


def test_the_terminal_says_the_headline_the_pairs_and_the_notes(make_study):
    study = make_study(GRID)
    text = " ".join(printed(study, 100).split())
    analysis = analyse(study)
    assert words.headline(analysis) in text
    assert words.sentence(analysis.pairs[0]) in text
    assert "Note: Each best rate was chosen" in text


def test_columns_without_content_are_left_out(make_study):
    text = printed(make_study(CLEAR, metric_name=None), 100)
    assert "accuracy" not in text
    assert "diver-" not in text
    assert "accuracy" in printed(make_study(CLEAR), 100)


def test_of_very_many_pairs_only_the_winners_are_printed(make_study):
    losses = {f"m{i}": {1e-3: by_seed(i, i + 0.1, i + 0.3)} for i in range(1, 9)}
    text = printed(make_study(losses), 100)
    assert text.count("\n- m1 is better than") + text.count("\n- m1 and") == 7
    assert "21 more pairs are in the report" in text
