"""What the statistics say, in words and rounded numbers: shared by the page and the terminal. Plain text, no markup."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surefoot.lab.runs import Study
from surefoot.lab.stats import MOST_SEEDS, Analysis, Estimate, Pair, Summary

MOST_NAMES = 4
"""So many are listed by name in a sentence."""
NOTHING = "–"
DIVERGED = "diverged"


def number(value: float, digits: int = 4) -> str:
    """Significant digits; a dash for NaN, a word for infinity."""
    if math.isnan(value):
        return NOTHING
    return DIVERGED if math.isinf(value) else f"{value:.{digits}g}"


def rate(value: float) -> str:
    """An initial rate as one types it: ``0.01``, ``1e-3``, ``2.5e-4``."""
    if math.isnan(value):
        return NOTHING
    if 0.01 <= abs(value) < 1000 or value == 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def rounded(values: Sequence[float], spread: float) -> list[str]:
    """``values`` with as many decimals as two significant digits of their ``spread`` have."""
    if not (math.isfinite(spread) and spread > 0):
        return [number(value) for value in values]
    decimals = 1 - math.floor(math.log10(spread))
    if decimals > 6 or max(abs(value) for value in values) >= 1e6:
        return [number(value) for value in values]
    decimals = max(decimals, 0)
    # Rounded before: what rounds to nothing has no sign. "+ 0.0" turns -0.0 into 0.0.
    return [f"{round(value, decimals) + 0.0:.{decimals}f}" for value in values]


def with_sd(estimate: Estimate) -> tuple[str, str]:
    """The mean, and ``± s.d.`` or nothing."""
    mean, sd = rounded([estimate.mean, estimate.sd], estimate.sd)
    return mean, "" if math.isnan(estimate.sd) else f"± {sd}"


def with_interval(estimate: Estimate) -> tuple[str, str]:
    """The mean, and its interval or nothing."""
    mean, low, high = rounded([estimate.mean, estimate.low, estimate.high], estimate.half_width)
    return mean, "" if math.isnan(estimate.low) else f"{low} to {high}"


def with_half_interval(estimate: Estimate) -> tuple[str, str]:
    """The mean, and half its interval after a ``±``, or nothing."""
    mean, half = rounded([estimate.mean, estimate.half_width], estimate.half_width)
    return mean, "" if math.isnan(estimate.half_width) else f"± {half}"


def milliseconds(seconds: float) -> str:
    """A step's time, without its unit."""
    return number(1e3 * seconds, 3)


def decades(value: float) -> str:
    """Decades of initial rate."""
    return NOTHING if math.isnan(value) else f"{value:.1f}"


def p_number(p: float) -> str:
    """``0.012``, ``< 0.001``, or a dash."""
    return "< 0.001" if p < 0.001 else number(p, 2)


def p_value(p: float) -> str:
    """``p = 0.012`` or ``p < 0.001``."""
    return f"p {p_number(p)}" if p < 0.001 else f"p = {p_number(p)}"


def seeds(count: float) -> str:
    """How many seeds would tell."""
    if math.isnan(count):
        return NOTHING
    return f"more than {MOST_SEEDS}" if math.isinf(count) else f"about {count:.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the largest two."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(n: int, noun: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listing(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def lead(pair: Pair) -> Estimate:
    """By how much the first's loss is the lower: the difference with its sign turned."""
    d = pair.difference
    return Estimate(d.n, 0.0 - d.mean, d.sd, 0.0 - d.high, 0.0 - d.low)  # not "-x", which makes a zero "-0"


def verdict(pair: Pair) -> str:
    """Who is better, in a few words."""
    return {
        "first": f"{pair.first} is better",
        "second": f"{pair.second} is better",
        "noise": "not more than noise",
        "unknown": "cannot tell",
    }[pair.verdict]


def sentence(pair: Pair) -> str:
    """The comparison of two methods as one sentence."""
    first, second, n = pair.first, pair.second, pair.difference.n
    if pair.verdict == "unknown":
        return f"{first} and {second}: cannot tell, they have fewer than 2 seeds in common."
    if any(pair.diverged):
        counts = f"at their best rates {pair.diverged[0]} and {pair.diverged[1]} of {n} runs diverged"
        if pair.verdict == "noise":
            return f"{first} and {second}: {counts}; by ranks that is not more than noise ({p_value(pair.p_holm)})."
        better, worse = (first, second) if pair.verdict == "first" else (second, first)
        return f"{better} is better than {worse} by ranks ({p_value(pair.p_holm)}): of {first} and {second}, {counts}."
    if pair.difference.mean == pair.difference.sd == 0:
        return f"{first} and {second}: the same loss in all {n} seeds, no difference at all."
    better, worse, gain = (first, second, lead(pair)) if pair.lead < 0 else (second, first, pair.difference)
    size, interval = with_interval(gain)
    if pair.verdict == "noise":
        return (
            f"{better} and {worse}: the difference of {size} (95 % interval {interval}) is not more than noise "
            f"({p_value(pair.p_holm)}; {seeds(pair.seeds_to_tell)} seeds would tell)."
        )
    return f"{better} is better than {worse} by {size} (95 % interval {interval}, {p_value(pair.p_holm)})."


def headline(analysis: Analysis) -> str:
    """Which method wins, by how much, and how sure that is."""
    ran = [summary for summary in analysis.summaries if summary.runs]
    if not ran:
        return "No run has finished yet: there is nothing to compare."
    winner, *others = ran
    if math.isinf(winner.final_loss.mean):
        return "No winner: every method diverged in at least one run at every rate it was given."
    reached = f"final validation loss, {with_interval(winner.final_loss)[0]} at rate {rate(winner.best_rate)}"
    alike = [other for other in others if other.losses == winner.losses]
    if alike:
        return _alike(analysis, [winner, *alike], [other for other in others if other not in alike])
    if not others:
        return f"{winner.label} alone was run: its best {reached}."
    pairs = [analysis.pair(winner.label, other.label) for other in others]
    beaten = [pair.second for pair in pairs if pair.verdict == "first"]
    if len(beaten) == len(pairs):
        every = " It is better than every other by more than noise." if len(beaten) > 1 else ""
        return f"{winner.label} wins with the lowest {reached}{_lead(pairs[0], others[0])}{every}"
    open_pairs = [pair for pair in pairs if pair.verdict != "first"]
    if all(pair.verdict == "unknown" for pair in pairs):
        return (
            f"{winner.label} has the lowest {reached}, but with fewer than 2 seeds in common "
            "nobody can say whether that is more than noise."
        )
    text = f"No sure winner: {winner.label} has the lowest {reached}, but {_but(open_pairs[0])}"
    if len(open_pairs) > 1:
        text += f" Nor is it surely ahead of {_names([pair.second for pair in open_pairs[1:]])}."
    if beaten:
        text += f" It is better than {_names(beaten)} by more than noise."
    return text


def notes(study: Study, analysis: Analysis) -> list[str]:
    """What a reader should know before trusting the numbers, a sentence each."""
    found = []
    planned = {method.label: len(method.rates) * len(study.seeds) for method in study.methods}
    short = [s for s in analysis.summaries if s.runs < planned[s.label]]
    if short:
        counts = listing([f"{s.label} {s.runs} of {planned[s.label]}" for s in short])
        found.append(f"Not every run was made: {counts}.")
    edge = [s for s in analysis.summaries if s.best_is_at_the_edge]
    if edge:
        names = listing([f"{s.label} ({rate(s.best_rate)})" for s in edge])
        found.append(f"Best at the edge of the rates tried, so a better rate may lie outside: {names}.")
    lost = [s.label for s in analysis.summaries if math.isinf(s.final_loss.mean)]
    if lost:
        found.append(f"Diverged in at least one run at every rate: {listing(lost)}.")
    if study.chosen_from is not None and study.chosen_from > 1:
        found.append(
            f"The best {len(study.methods)} of {study.chosen_from} trials, chosen on the same seeds that they are judged "
            "by, which flatters them the more the more trials there were."
        )
    if any(len(s.rates) > 1 for s in analysis.summaries):
        found.append(
            "Each best rate was chosen on the same seeds that it is judged by, "
            "which flatters a method the more rates it was given."
        )
    return found


def _alike(analysis: Analysis, first: Sequence[Summary], others: Sequence[Summary]) -> str:
    """The headline where the best ones have the same loss in every seed. What holds of one of them holds of all."""
    labels, best = [summary.label for summary in first], first[0]
    who = listing(labels) if len(labels) <= MOST_NAMES else f"{labels[0]} and {len(labels) - 1} others"
    text = (
        f"{who} end alike, with {'the lowest' if others else 'the same'} final validation loss in "
        f"{'the only seed' if best.final_loss.n == 1 else f'all {best.final_loss.n} seeds'}: "
        f"{with_interval(best.final_loss)[0]}{' on average' if best.final_loss.n > 1 else ''}."
    )
    pairs = [analysis.pair(best.label, other.label) for other in others]
    beaten = [pair.second for pair in pairs if pair.verdict == "first"]
    unsure = [pair.second for pair in pairs if pair.verdict == "noise"]
    if beaten:
        text += f" They are better than {_names(beaten)} by more than noise."
    if unsure:
        text += f" They are not surely ahead of {_names(unsure)}."
    if len(beaten) + len(unsure) < len(pairs):
        text += " With fewer than 2 seeds in common nobody can say whether their lead is more than noise."
    return text


def _lead(pair: Pair, other: Summary) -> str:
    """How far the winner is ahead of the next best, as the end of a sentence."""
    if any(pair.diverged):
        return f"; the next best, {pair.second}, diverged in {pair.diverged[1]} of {pair.difference.n} runs."
    size, interval = with_interval(lead(pair))
    percent = -100 * pair.difference.mean / other.final_loss.mean if other.final_loss.mean > 0 else math.nan
    share = "" if math.isnan(percent) else f" ({percent:.{1 if percent < 10 else 0}f} %)"
    return (
        f": {size}{share} below the next best, {pair.second} (95 % interval {interval}, {p_value(pair.p_holm)}, "
        f"{pair.difference.n} seeds)."
    )


def _names(labels: Sequence[str]) -> str:
    return listing(labels) if len(labels) <= MOST_NAMES else f"the other {len(labels)}"


def _but(pair: Pair) -> str:
    """Why the lead over this pair's second is not sure."""
    if pair.verdict == "unknown":
        return f"it has fewer than 2 seeds in common with {pair.second}."
    if any(pair.diverged) or pair.lead >= 0:  # on the seeds that both have, it may even be behind
        return sentence(pair)
    size = with_interval(lead(pair))[0]
    return (
        f"its lead of {size} on {pair.second} is not more than noise ({p_value(pair.p_holm)}, "
        f"{pair.difference.n} seeds; {seeds(pair.seeds_to_tell)} would tell)."
    )
