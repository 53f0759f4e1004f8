"""The scoring, where benchmarks go wrong: hand-made cases, error rates by simulation, and what must not matter."""

import math
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.lab import stats
from surefoot.lab.runs import Method

INF = math.inf


@pytest.fixture(autouse=True)
def _no_warnings():
    """A warning out of the statistics would end up in the middle of a user's progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by_seed(*losses):
    return dict(enumerate(losses))


def study_of(make_study, **losses):
    """One rate each: ``a=(0.1, 0.2)`` are the losses of a's seeds 0 and 1."""
    return make_study({label: {1e-3: by_seed(*values)} for label, values in losses.items()})


# ---------------------------------------------------------------------------------------------------- estimates


def test_estimate_by_hand():
    # 1, 2, 3: mean 2, s.d. 1; Student's 97.5 % point for 2 degrees of freedom is 4.302653 (tables).
    e = stats.estimate([3, 1, 2])
    assert (e.n, e.mean, e.sd) == (3, 2.0, 1.0)
    assert e.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert (e.low + e.high) / 2 == pytest.approx(2)


def test_one_value_has_no_spread_and_none_has_no_mean():
    one, none = stats.estimate([0.3]), stats.estimate([])
    assert one.mean == 0.3
    assert all(map(math.isnan, (one.sd, one.low, one.high)))
    assert none.n == 0
    assert all(map(math.isnan, (none.mean, none.sd, none.low, none.high)))


def test_equal_values_have_exactly_no_spread():
    e = stats.estimate([0.1] * 3)  # 0.1 + 0.1 + 0.1 is not 0.3
    assert (e.mean, e.sd, e.low, e.high) == (0.1, 0.0, 0.1, 0.1)


def test_a_diverged_run_is_never_averaged_away():
    e = stats.estimate([0.1, 0.1, INF])
    assert e.mean == INF
    assert all(map(math.isnan, (e.sd, e.low, e.high)))


def test_the_interval_holds_the_truth_in_95_percent():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(4000, 4))
    held = sum(e.low < 5.0 < e.high for e in map(stats.estimate, draws))
    assert held / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


# ---------------------------------------------------------------------------------------------------- summaries


def summary_of(make_study, rates, **options):
    return stats.analyse(make_study({"a": rates}, **options)).summaries[0]


def test_the_best_rate_has_the_lowest_mean_not_the_lowest_run(make_study):
    # The single best run (0.1) belongs to 1e-3, whose mean is 0.4; 1e-2 has 0.3.
    s = summary_of(make_study, {1e-3: by_seed(0.1, 0.7), 1e-2: by_seed(0.3, 0.3)})
    assert s.best_rate == 1e-2
    assert s.final_loss.mean == 0.3
    assert [(p.rate, p.loss.mean) for p in s.rates] == [(1e-3, pytest.approx(0.4)), (1e-2, 0.3)]


def test_of_equal_rates_the_smaller_is_chosen(make_study):
    assert summary_of(make_study, {1e-2: by_seed(0.3, 0.5), 1e-3: by_seed(0.5, 0.3)}).best_rate == 1e-3


def test_a_rate_with_a_diverged_run_loses_to_any_that_has_none(make_study):
    s = summary_of(make_study, {1e-3: by_seed(9.0, 9.0, 9.0), 1e-2: by_seed(0.1, 0.1, INF)})
    assert s.best_rate == 1e-3
    assert (s.runs, s.diverged) == (6, 1)
    assert [(p.loss.mean, p.diverged) for p in s.rates] == [(9.0, 0), (INF, 1)]


def test_a_method_that_diverged_everywhere_is_still_summarised(make_study):
    s = summary_of(make_study, {1e-2: by_seed(INF, INF), 1e-1: by_seed(0.5, INF), 1.0: by_seed(INF, 0.5)})
    assert s.best_rate == 1e-1  # fewest diverged runs, then the smaller rate
    assert s.final_loss.mean == s.min_train_loss.mean == INF
    assert math.isnan(s.final_metric.mean)
    assert math.isnan(s.min_train_epoch)
    assert s.decades == 0
    assert (s.runs, s.diverged) == (6, 4)


def test_a_method_without_a_run_is_summarised_and_comes_last(make_study):
    analysis = stats.analyse(
        make_study({"none": {}, "diverged": {1e-3: by_seed(INF, INF)}, "a": {1e-3: by_seed(1, 2)}})
    )
    assert [s.label for s in analysis.summaries] == ["a", "diverged", "none"]
    none = analysis.summaries[-1]
    assert none.final_loss.n == none.runs == 0
    assert math.isnan(none.best_rate)
    assert analysis.pair("a", "none").verdict == "unknown"


def test_the_minimum_of_the_training_loss_and_its_epoch(make_run):
    # Minima 0.5 after block 3 and 0.3 after block 4, of half an epoch each: epochs 1.5 and 2.
    runs = [make_run(0.2, seed=0), make_run(0.2, seed=1, train=(2.0, 1.0, 0.5, 0.3))]
    s = stats.summarise(Method("a", "adam", {}, 100, (1e-3,)), runs, train_patterns=1000)
    assert s.min_train_loss.mean == pytest.approx(0.4)
    assert s.min_train_loss.sd == pytest.approx(0.2 / math.sqrt(2))
    assert s.min_train_epoch == 1.75


def test_step_time_is_the_median_over_all_rates(make_run):
    runs = [make_run(0.1, rate=r, step_seconds=t) for r, t in [(1e-3, 0.001), (1e-2, 0.002), (1e-1, 0.9)]]
    s = stats.summarise(Method("a", "adam", {}, 100, (1e-3, 1e-2, 1e-1)), runs, 1000)
    assert s.step_seconds == 0.002


def test_a_metric_has_a_mean_and_interval_and_no_value_where_there_is_none(make_study):
    assert summary_of(make_study, {1e-3: by_seed(1, 2)}).final_metric.mean == 0.8
    assert summary_of(make_study, {1e-3: by_seed(1, 2)}, metric_name=None).final_metric.n == 0


def test_a_best_rate_at_the_edge_is_told(make_study):
    grid = {1e-3: by_seed(3), 1e-2: by_seed(1), 1e-1: by_seed(2)}
    assert not summary_of(make_study, grid).best_is_at_the_edge
    assert summary_of(make_study, grid | {1e-2: by_seed(9)}).best_is_at_the_edge
    assert not summary_of(make_study, {1e-3: by_seed(3)}).best_is_at_the_edge


# ------------------------------------------------------------------------------------------------- sensitivity


def test_decades_of_a_grid_of_decades_are_counted():
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert stats.decades_within(rates, [1.0, 0.21, 0.2, 0.2199, 9.0]) == pytest.approx(3)
    assert stats.decades_within(rates, [1.0, 0.21, 0.2, 0.2201, INF]) == pytest.approx(2)
    assert stats.decades_within(rates, [0.2] * 5) == pytest.approx(5)


def test_cells_of_an_uneven_grid_reach_half_way():
    rates = [1e-3, 1e-2, 10**-1.5]  # gaps of 1 and 0.5 decades: cells of 1, 0.75 and 0.5
    assert stats.decades_within(rates, [1, 9, 9]) == pytest.approx(1.0)
    assert stats.decades_within(rates, [9, 1, 9]) == pytest.approx(0.75)
    assert stats.decades_within(rates, [9, 9, 1]) == pytest.approx(0.5)
    assert stats.decades_within(rates, [1, 9, 1]) == pytest.approx(1.5)  # cells need not be neighbours


def test_decades_of_a_negative_loss_count_upwards_from_it():
    assert stats.decades_within([1, 10, 100], [-1.0, -0.95, -0.85]) == pytest.approx(2)


def test_decades_where_there_is_nothing_to_count():
    assert math.isnan(stats.decades_within([1e-3], [0.1]))
    assert stats.decades_within([1e-3, 1e-2], [INF, INF]) == 0


# ------------------------------------------------------------------------------------------------------- pairs

A = by_seed(0.30, 0.32, 0.31, 0.29, 0.33)
B = by_seed(0.35, 0.36, 0.37, 0.33, 0.36)


def test_paired_t_test_by_hand():
    # Differences -.05 -.04 -.06 -.04 -.03: mean -.044, variance 520e-6 / 4 = 130e-6, t^2 = .044^2 * 5 / 130e-6.
    # For 4 degrees of freedom p has a closed form: 1 - sin(x) (1 + cos(x)^2 / 2) with tan(x) = t / 2.
    pair = stats.compare("a", A, "b", B)
    x = math.atan(math.sqrt(0.044**2 * 5 / 130e-6) / 2)
    assert pair.difference.mean == pytest.approx(-0.044)
    assert pair.difference.sd == pytest.approx(math.sqrt(130e-6))
    assert pair.difference.half_width == pytest.approx(2.776445 * math.sqrt(130e-6 / 5), rel=1e-6)  # tables
    assert pair.p == pytest.approx(1 - math.sin(x) * (1 + math.cos(x) ** 2 / 2), rel=1e-9)
    assert pair.p == pytest.approx(0.00099, abs=1e-5)
    assert pair.verdict == "first"


def test_swapping_the_names_flips_the_signs():
    pair, swapped = stats.compare("a", A, "b", B), stats.compare("b", B, "a", A)
    assert swapped.difference.mean == -pair.difference.mean
    assert (swapped.difference.low, swapped.difference.high) == (-pair.difference.high, -pair.difference.low)
    assert (swapped.p, swapped.verdict) == (pair.p, "second")


def test_pairing_is_what_makes_seeds_comparable():
    """Seeds that differ far more than the methods do: unpaired there is nothing to see."""
    a, b = by_seed(1.0, 2.0, 3.0, 4.0), by_seed(1.10, 2.11, 3.09, 4.10)
    assert stats.compare("a", a, "b", b).verdict == "first"
    assert stats.compare("a", a, "b", by_seed(*reversed(b.values()))).verdict == "noise"


def test_only_common_seeds_count():
    pair = stats.compare("a", {0: 1.0, 1: 1.1, 2: 50.0}, "b", {0: 2.0, 1: 2.2, 7: -50.0})
    assert pair.difference.n == 2
    assert pair.difference.mean == pytest.approx(-1.05)


@pytest.mark.parametrize("b", [{}, {0: 2.0}, {5: 2.0, 6: 3.0}])
def test_fewer_than_two_common_seeds_cannot_tell(b):
    pair = stats.compare("a", by_seed(1.0, 1.1), "b", b)
    assert pair.verdict == "unknown"
    assert math.isnan(pair.p)


def test_identical_runs_do_not_differ():
    pair = stats.compare("a", A, "b", A)
    assert (pair.difference.mean, pair.difference.sd, pair.p) == (0, 0, 1)
    assert pair.verdict == "noise"
    assert pair.seeds_to_tell == INF


def test_a_constant_difference_is_beyond_doubt():
    pair = stats.compare("a", by_seed(1.0, 2.0, 3.0), "b", by_seed(1.5, 2.5, 3.5))
    assert (pair.difference.mean, pair.difference.sd, pair.p) == (-0.5, 0, 0)
    assert (pair.verdict, pair.seeds_to_tell) == ("first", 2)


def test_holm_by_hand():
    # Sorted: .005 x 4, .01 x 3, .03 x 2, then .04 x 1 may not fall below .06. What was not tested does not count.
    assert stats.holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_verdicts_are_drawn_after_correction_over_all_pairs(make_study):
    """A p of 4 % is a finding between two methods and none among four."""
    a, b = (0.0, 0.0, 0.0), (0.1, 0.15, 0.2)
    two = stats.analyse(study_of(make_study, a=a, b=b)).pair("a", "b")
    four = stats.analyse(study_of(make_study, a=a, b=b, c=(0.3, 9.0, 4.0), d=(9.0, 0.4, 5.0))).pair("a", "b")
    assert two.p == four.p
    assert 0.03 < two.p < 0.05
    assert two.verdict == "first"
    assert four.p_holm > 0.15
    assert four.verdict == "noise"


def test_pairs_are_all_pairs_at_each_ones_best_rate(make_study):
    grid = {1e-3: by_seed(*[9.0] * 4), 1e-2: by_seed(1.0, 1.2, 1.1, 1.0)}
    analysis = stats.analyse(
        make_study(
            {"c": {1.0: by_seed(2.0, 2.1, 2.3, 2.2)}, "a": grid, "b": {1e-1: by_seed(3.0, 3.0, 3.3, 3.1)}}
        )
    )
    assert [(p.first, p.second) for p in analysis.pairs] == [("a", "c"), ("a", "b"), ("c", "b")]
    assert analysis.pair("a", "c").difference.mean == pytest.approx(-1.075)
    assert {p.verdict for p in analysis.pairs} == {"first"}


# ------------------------------------------------------------------------------------------------ diverged pairs


def test_finishing_beats_diverging_and_three_seeds_are_too_few_to_say():
    def verdict(n):
        return stats.compare("a", by_seed(*np.linspace(1, 2, n)), "b", by_seed(*[INF] * n)).verdict

    assert [verdict(n) for n in (1, 2, 3, 4, 5)] == ["unknown", "noise", "noise", "first", "first"]


def test_rank_test_by_hand():
    # 5 finite against 5 tied: |U - 12.5| = 12.5, variance 25/12 (11 - (125 - 5)/90) = 20.1389, z = 12 / 4.4876.
    p, lead = stats.rank_test(np.arange(5.0), np.full(5, INF))
    assert lead == -12.5
    assert p == pytest.approx(math.erfc(12 / math.sqrt(20.138889) / math.sqrt(2)), rel=1e-6)
    assert stats.rank_test(np.full(3, INF), np.full(4, INF)) == (1.0, 0.0)


def test_a_pair_with_diverged_runs_has_no_finite_difference():
    one = stats.compare("a", by_seed(1, 1, 1, 1, 1), "b", by_seed(1, 1, 1, 1, INF))
    assert one.difference.mean == -INF
    assert one.diverged == (0, 1)
    assert one.verdict == "noise"
    assert math.isnan(one.seeds_to_tell)
    both = stats.compare("a", by_seed(1, INF), "b", by_seed(INF, INF))
    assert math.isnan(both.difference.mean)
    assert both.verdict == "noise"


def test_diverged_runs_do_not_find_differences_that_are_not_there():
    """One method under two names, a third of whose runs diverge: at most 5 % of verdicts."""
    random = np.random.default_rng(1)
    losses = np.where(random.random((2000, 2, 8)) < 1 / 3, INF, random.normal(size=(2000, 2, 8)))
    found = sum(stats.compare("a", by_seed(*a), "b", by_seed(*b)).verdict != "noise" for a, b in losses)
    assert 0 < found / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


# ------------------------------------------------------------------------------------------------ how many seeds


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_to_tell_are_the_textbooks_sample_sizes(effect, seeds):
    """Cohen's small, medium and large effect in a paired t test at 5 % and 80 % power, as power tables have them."""
    assert stats.seeds_to_tell(effect, 1.0) == seeds
    assert stats.seeds_to_tell(-3 * effect, 3.0) == seeds


def test_seeds_to_tell_at_its_ends():
    assert stats.seeds_to_tell(1e6, 1.0) == 2
    assert stats.seeds_to_tell(1e-6, 1.0) == INF
    assert stats.seeds_to_tell(0.0, 1.0) == INF
    assert math.isnan(stats.seeds_to_tell(1.0, math.nan))
    assert math.isnan(stats.seeds_to_tell(INF, math.nan))


def test_seeds_to_tell_are_more_than_did_not_tell(make_study):
    """A p of 4 % before correction is noise among four methods: more seeds than these three are needed, never fewer."""
    a, b = (0.0, 0.0, 0.0), (0.1, 0.15, 0.2)
    four = stats.analyse(study_of(make_study, a=a, b=b, c=(0.3, 9.0, 4.0), d=(9.0, 0.4, 5.0)))
    assert all(pair.seeds_to_tell > 3 for pair in four.pairs if pair.verdict == "noise")
    two = stats.analyse(study_of(make_study, a=a, b=b))
    assert two.pair("a", "b").seeds_to_tell < four.pair("a", "b").seeds_to_tell


def test_that_many_seeds_do_tell_in_80_percent():
    n = int(stats.seeds_to_tell(0.7, 1.0))
    draws = np.random.default_rng(2).normal(0.7, 1.0, size=(2000, n))
    zeros = by_seed(*[0.0] * n)
    found = sum(stats.compare("a", by_seed(*draw), "b", zeros).verdict == "second" for draw in draws)
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


# -------------------------------------------------------------------------------------------------- A/A studies


def deal(make_study, random, names, base, noise, seeds=5):
    """One optimizer under several names: the same distribution at each rate, a part of it shared within a seed."""
    shared = random.normal(size=seeds)
    return make_study(
        {
            name: {
                rate: by_seed(*noise(mean, shared, random.normal(size=seeds)))
                for rate, mean in zip((1e-3, 1e-2, 1e-1), base, strict=True)
            }
            for name in names
        }
    )


def normal(mean, shared, own):
    return mean + 0.05 * shared + 0.05 * own


def lognormal(mean, shared, own):
    return mean * np.exp(0.1 * shared + 0.05 * own)


@pytest.mark.parametrize("noise", [normal, lognormal])
def test_one_optimizer_under_two_names_differs_in_5_percent_of_studies(make_study, noise):
    random = np.random.default_rng(3)
    trials, found = 4000, {"first": 0, "second": 0, "noise": 0, "unknown": 0}
    for _ in range(trials):
        study = deal(make_study, random, "ab", (1.6, 1.0, 1.3), noise)
        found[stats.analyse(study).pairs[0].verdict] += 1
    band = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert (found["first"] + found["second"]) / trials == pytest.approx(0.05, abs=band)
    assert found["unknown"] == found["second"] == 0  # the better placed one is named first


def test_choosing_among_equal_rates_finds_no_more(make_study):
    """Each name picks its luckiest of three equal rates on the seeds that it is judged by."""
    random = np.random.default_rng(4)
    trials = 1000
    found = sum(
        stats.analyse(deal(make_study, random, "ab", (1.0, 1.0, 1.0), normal)).pairs[0].verdict != "noise"
        for _ in range(trials)
    )
    assert 0 < found / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_four_names_are_all_alike_in_95_percent_of_studies(make_study):
    """Without Holm's correction some of the six pairs would differ in a fifth of the studies."""
    random = np.random.default_rng(5)
    trials, any_found, any_raw = 600, 0, 0
    for _ in range(trials):
        pairs = stats.analyse(deal(make_study, random, "abcd", (1.6, 1.0, 1.3), normal)).pairs
        any_found += any(pair.verdict != "noise" for pair in pairs)
        any_raw += any(pair.p < 0.05 for pair in pairs)
    assert any_found / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert any_raw / trials > 0.12


# ------------------------------------------------------------------------------------------- what must not matter

sixteenths = st.integers(-1600, 1600).map(lambda i: i / 16)  # sums and shifts of these are exact
loss = st.one_of(sixteenths, sixteenths, sixteenths, st.just(INF))
studies = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(
        st.sampled_from([1e-3, 1e-2, 1e-1]), st.dictionaries(st.integers(0, 4), loss, max_size=4), max_size=3
    ),
    min_size=1,
)


@settings(deadline=None, max_examples=60)
@given(losses=studies, random=st.randoms(use_true_random=False))
def test_the_order_of_runs_and_methods_does_not_matter(make_study, losses, random):
    study = make_study(losses)
    shuffled = {label: random.sample(runs, len(runs)) for label, runs in study.results.items()}
    methods = random.sample(study.methods, len(study.methods))
    # As text, in which NaN equals NaN.
    assert repr(stats.analyse(replace(study, results=shuffled, methods=methods))) == repr(
        stats.analyse(study)
    )


@settings(deadline=None, max_examples=60)
@given(losses=studies)
def test_renaming_changes_names_only(make_study, losses):
    names = {"a": "w", "b": "x", "c": "y", "d": "z"}  # in the same order: the last tie-break is the name
    before = stats.analyse(make_study(losses))
    after = stats.analyse(make_study({names[label]: rates for label, rates in losses.items()}))
    assert [names[s.label] for s in before.summaries] == [s.label for s in after.summaries]
    assert [(p.p, p.verdict) for p in before.pairs if p.p == p.p] == [
        (p.p, p.verdict) for p in after.pairs if p.p == p.p
    ]


@settings(deadline=None, max_examples=60)
@given(losses=studies)
def test_swapping_two_methods_swaps_the_verdict(make_study, losses):
    opposite = {"first": "second", "second": "first", "noise": "noise", "unknown": "unknown"}
    for a, b in combinations(stats.analyse(make_study(losses)).summaries, 2):
        there, back = stats.compare("a", a.losses, "b", b.losses), stats.compare("b", b.losses, "a", a.losses)
        assert back.verdict == opposite[there.verdict]
        assert [back.p, back.difference.mean, back.difference.low] == pytest.approx(
            [there.p, -there.difference.mean, -there.difference.high], nan_ok=True, rel=0, abs=0
        )


@settings(deadline=None, max_examples=60)
@given(losses=studies, shift=sixteenths)
def test_a_constant_added_to_every_loss_moves_no_verdict(make_study, losses, shift):
    moved = {
        label: {rate: {seed: loss + shift for seed, loss in runs.items()} for rate, runs in rates.items()}
        for label, rates in losses.items()
    }
    before, after = stats.analyse(make_study(losses)), stats.analyse(make_study(moved))
    assert [(s.label, repr(s.best_rate)) for s in before.summaries] == [
        (s.label, repr(s.best_rate)) for s in after.summaries
    ]
    assert [p.verdict for p in before.pairs] == [p.verdict for p in after.pairs]


# ------------------------------------------------------------------------------------------------------ curves


def test_a_mean_curve_ends_where_the_first_run_diverged(make_run):
    curve = stats.mean_curve(
        [make_run(1.0), make_run(INF), make_run(1.0, train=(5.0, 1.0, 1.0, 1.0))], "train_loss"
    )
    assert (curve.n, curve.patterns) == (3, (500,))
    assert curve.mean == (3.0,)
    assert curve.sd == (pytest.approx(math.sqrt(3)),)


def test_a_mean_curve_of_nothing_is_empty(make_run):
    assert stats.mean_curve([], "train_loss").mean == ()
    assert stats.mean_curve([make_run(1.0, metric=())], "validation_metric").mean == ()


def test_curves_with_different_points_are_not_averaged(make_run):
    with pytest.raises(ValueError, match="different points"):
        stats.mean_curve([make_run(1.0), replace(make_run(1.0), patterns=[1, 2, 3, 4])], "train_loss")
