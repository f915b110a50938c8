"""Which statistic of paired differences holds its 5 % at 3 to 10 seeds, and finds the most: a simulation.

    python benchmarks/statistics_of_comparisons.py --size 4000 > table.md

Writes the tables of docs/statistics.md. The differences of a comparison are simulated task by task and seed by seed;
a statistic is right when it calls at most 5 % of the differences real where there is none. `--size` is the number of
simulated comparisons of each kind: 4,000 take some minutes on one core. The seed is fixed, so the tables repeat.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.special import polygamma
from scipy.stats import rankdata, t

Array = Any  # of NumPy
Tasks = list[Array]  # for each task: simulated comparisons x arms x seeds
Noise = Callable[[np.random.Generator, tuple[int, ...]], Array]
ALPHA = 0.05


# --- what differences look like where there is no difference ---------------------------------------------------------


def _pair(scores: Noise) -> Noise:
    """The difference of two such scores: symmetric, however skewed the scores are."""
    return lambda g, shape: scores(g, shape) - scores(g, shape)


def _exponential(g: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return 1 - g.exponential(size=shape)  # a long tail of bad seeds


def _lognormal(g: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.exp(0.5) - g.lognormal(size=shape)


def _collapsing(g: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return g.normal(size=shape) - 10.0 * ((g.random(shape) < 0.05) - 0.05)  # of mean zero


SYMMETRIC: dict[str, Noise] = {
    "normal": lambda g, shape: g.normal(size=shape),
    "heavy tails (t, 3 df)": lambda g, shape: g.standard_t(3, size=shape),
    "steps as wide as the spread": lambda g, shape: np.round(g.normal(size=shape)),
    "skewed scores in both arms": _pair(_exponential),
    "1 seed in 20 collapses, in both arms": _pair(_collapsing),
}
SKEWED: dict[str, Noise] = {
    "skewed scores, spread 1 and 3": lambda g, shape: 3 * _exponential(g, shape) - _exponential(g, shape),
    "exponential differences": _exponential,
    "lognormal differences": _lognormal,
    "1 seed in 20 collapses, in one arm": lambda g, shape: _collapsing(g, shape) - g.normal(size=shape),
}
SPREADS = {"equal": 1.0, "uneven": 10.0}  # the largest task's standard deviation over the smallest's
DESIGNS = [(1, 3), (1, 5), (1, 10), (2, 3), (3, 3), (3, 5), (6, 3), (6, 5)]  # tasks, seeds


def simulate(
    g: np.random.Generator, noise: Noise, tasks: int, seeds: Sequence[int], spread: float, size: int, arms: int = 1
) -> Tasks:
    """Differences of each task with mean zero; the tasks' standard deviations lie evenly from 1 to `spread`."""
    scales = np.geomspace(1, spread, tasks)
    return [scale * noise(g, (size, arms, n)) for scale, n in zip(scales, seeds, strict=True)]


# --- the statistics: each gives a p for every simulated comparison and arm -------------------------------------------


def _parts(data: Tasks) -> tuple[Array, Array, Array]:
    """The mean of the task means, and each task's variance over seeds and degrees of freedom."""
    mean = np.mean([x.mean(-1) for x in data], axis=0)
    shares = np.stack([x.var(-1, ddof=1) / x.shape[-1] for x in data])
    degrees = np.array([x.shape[-1] - 1 for x in data], float)[:, None, None]
    return mean, shares, degrees


def _t_p(mean: Array, squared_error: Array, degrees: Array | float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2 * t.sf(np.abs(mean) / np.sqrt(squared_error), degrees), nan=1.0)


def _known(p: Array, shares: Array) -> Array:
    """Differences that are all equal on every task tell nothing of their spread."""
    return np.where(shares.sum(0) > 1e-24, p, 1.0)


def satterthwaite(data: Tasks) -> Array:
    mean, shares, nu = _parts(data)
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = shares.sum(0) ** 2 / (shares**2 / nu).sum(0)
    return _known(_t_p(mean, shares.sum(0) / len(data) ** 2, degrees), shares)


def reduced_degrees(data: Tasks) -> Array:
    """Satterthwaite's degrees are too many where few seeds tell which task is the noisiest; 0.85 of them are not."""
    mean, shares, nu = _parts(data)
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.maximum(nu.min(), 0.85 * shares.sum(0) ** 2 / (shares**2 / nu).sum(0))
    return _known(_t_p(mean, shares.sum(0) / len(data) ** 2, degrees), shares)


def unbiased_degrees(data: Tasks) -> Array:
    """Welch 1947: squares of estimated variances are too large by (nu + 2) / nu, which makes the degrees too few."""
    mean, shares, nu = _parts(data)
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = shares.sum(0) ** 2 / (shares**2 / (nu + 2)).sum(0) - 2
    return _known(_t_p(mean, shares.sum(0) / len(data) ** 2, degrees), shares)


def fewest_degrees(data: Tasks) -> Array:
    mean, shares, nu = _parts(data)
    return _known(_t_p(mean, shares.sum(0) / len(data) ** 2, float(nu.min())), shares)


def skew_adjusted(data: Tasks) -> Array:
    """Johnson 1978, with the third moment of the mean of the task means."""
    mean, shares, nu = _parts(data)
    third = sum(
        x.shape[-1] * ((x - x.mean(-1, keepdims=True)) ** 3).sum(-1) / ((x.shape[-1] - 1) * max(1, x.shape[-1] - 2))
        / x.shape[-1] ** 2
        for x in data
    ) / len(data) ** 3  # fmt: skip
    squared = shares.sum(0) / len(data) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = mean + third / (6 * squared) + third * mean**2 / (3 * squared**2)
        degrees = shares.sum(0) ** 2 / (shares**2 / nu).sum(0)
    return _known(_t_p(moved, squared, degrees), shares)


def pooled_arms(data: Tasks) -> Array:
    """Analysis of variance with seeds as blocks: every arm has the mean variance of all arms."""
    mean, shares, nu = _parts(data)
    arms = shares.shape[-1]
    pooled = np.broadcast_to(shares.mean(-1, keepdims=True), shares.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = pooled.sum(0) ** 2 / (pooled**2 / (nu * arms)).sum(0)
    return _known(_t_p(mean, pooled.sum(0) / len(data) ** 2, degrees), shares)


def moderated(data: Tasks) -> Array:
    """Smyth 2004: each variance is drawn towards that of all arms and tasks, as far as these look alike."""
    mean, shares, nu = _parts(data)
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(shares, 1e-24))
    logs = np.moveaxis(logs, 1, 0).reshape(shares.shape[1], -1)  # all variances of one simulated family
    excess = logs.var(-1, ddof=1) - polygamma(1, nu.mean() / 2) if logs.shape[1] > 1 else np.zeros(len(logs))
    grid = np.geomspace(0.1, 1000, 400)
    prior_degrees = 2 * grid[np.abs(polygamma(1, grid)[None] - np.maximum(excess, 1e-3)[:, None]).argmin(-1)]
    prior = np.exp(logs.mean(-1) + np.log(prior_degrees / 2) - np.log(nu.mean() / 2))
    drawn = (prior_degrees[:, None] * prior[:, None] + nu * shares) / (prior_degrees[:, None] + nu)
    total = nu + prior_degrees[:, None]
    degrees = drawn.sum(0) ** 2 / (drawn**2 / total).sum(0)
    return _known(_t_p(mean, drawn.sum(0) / len(data) ** 2, degrees), shares)


def sign_flips(data: Tasks) -> Array:
    """Fisher 1935: all sign patterns of up to 12 differences, 1,000 drawn ones beyond."""
    terms = np.concatenate([x / x.shape[-1] for x in data], -1)
    pairs = terms.shape[-1]
    if pairs <= 12:
        flips = np.array(list(product((1, -1), repeat=pairs)))
    else:
        flips = np.random.default_rng(1).choice((1, -1), (1000, pairs))
        flips[0] = 1
    reached = np.abs(terms.sum(-1, keepdims=True)) * (1 - 1e-9)
    return (np.abs(terms @ flips.T) >= reached).mean(-1)


def wilcoxon(data: Tasks) -> Array:
    """Signed ranks within each task, by sign flips, so that unequal spreads do not matter."""
    ranked = [np.sign(x) * rankdata(np.abs(x), axis=-1) / (x.shape[-1] + 1) for x in data]
    return sign_flips(ranked)


def bootstrap_t(data: Tasks, resamples: int = 200) -> Array:
    """Efron and Tibshirani 1993, chapter 12, symmetric; each task resampled by itself."""
    g = np.random.default_rng(2)
    mean, shares, _ = _parts(data)
    error = np.sqrt(shares.sum(0)) / len(data)
    beyond = np.ones_like(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.abs(mean) / error
        for _ in range(resamples):
            drawn = [x[..., g.integers(0, x.shape[-1], x.shape[-1])] for x in data]
            again, spread, _ = _parts(drawn)
            # A resample of one value has no spread: its t is endless.
            beyond += np.nan_to_num(np.abs(again - mean) / (np.sqrt(spread.sum(0)) / len(data)), nan=np.inf) >= observed
    return _known(beyond / (resamples + 1), shares)


STATISTICS: dict[str, Callable[[Tasks], Array]] = {
    "t, Satterthwaite": satterthwaite,
    "t, 0.85 of its degrees": reduced_degrees,
    "t, unbiased degrees": unbiased_degrees,
    "t, fewest degrees": fewest_degrees,
    "t, skew-adjusted": skew_adjusted,
    "bootstrap-t": bootstrap_t,
    "sign flips": sign_flips,
    "signed ranks": wilcoxon,
}
OF_FAMILIES: dict[str, Callable[[Tasks], Array]] = {
    "t, Satterthwaite": satterthwaite,
    "t, 0.85 of its degrees": reduced_degrees,
    "t, unbiased degrees": unbiased_degrees,
    "variance pooled over arms": pooled_arms,
    "moderated variances": moderated,
    "sign flips": sign_flips,
}


# --- corrections, of p for each simulated family (comparisons x arms) ------------------------------------------------


def bonferroni_rejects(p: Array, alpha: float = ALPHA) -> Array:
    return p * p.shape[-1] <= alpha


def holm_levels(p: Array, alpha: float = ALPHA) -> Array:
    """The level at which Holm decides each comparison; its interval at that level leaves out zero if it is found."""
    arms = p.shape[-1]
    order = p.argsort(-1)
    ordered = np.take_along_axis(p, order, -1)
    steps = alpha / (arms - np.arange(arms))
    kept = ordered > steps
    first = np.where(kept.any(-1), kept.argmax(-1), arms - 1)
    levels = np.take(steps, np.minimum(np.arange(arms), first[:, None]))
    return np.take_along_axis(levels, order.argsort(-1), -1)


def holm_rejects(p: Array) -> Array:
    return p <= holm_levels(p)


# --- the tables ------------------------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float, limit: float | None = None) -> str:
    text = f"{100 * share:.1f}"
    return f"**{text}**" if limit is not None and share > limit else text


def _limit(size: int) -> float:
    """Three standard errors above 5 %: more is not chance."""
    return float(ALPHA + 3 * (ALPHA * (1 - ALPHA) / size) ** 0.5)


def single(kinds: dict[str, Noise], size: int) -> str:
    """False findings of one comparison: for every kind of noise the worst over designs and spreads, and the mean."""
    rows = []
    for kind, noise in kinds.items():
        rates: dict[str, list[float]] = {name: [] for name in STATISTICS}
        for number, ((tasks, seeds), spread) in enumerate(product(DESIGNS, SPREADS.values())):
            if tasks == 1 and spread > 1:
                continue
            data = simulate(np.random.default_rng(number), noise, tasks, [seeds] * tasks, spread, size)
            for name, statistic in STATISTICS.items():
                rates[name].append(float((statistic(data) <= ALPHA).mean()))
        rows.append([kind, *(_percent(max(rate), _limit(size)) for rate in rates.values())])
    return table(["differences", *STATISTICS], rows)


def by_design(noise: Noise, size: int) -> str:
    """False findings of one comparison by design."""
    rows = []
    for number, ((tasks, seeds), (how, spread)) in enumerate(product(DESIGNS, SPREADS.items())):
        if tasks == 1 and spread > 1:
            continue
        data = simulate(np.random.default_rng(number), noise, tasks, [seeds] * tasks, spread, size)
        rates = [float((statistic(data) <= ALPHA).mean()) for statistic in STATISTICS.values()]
        where = f"{tasks} x {seeds}" + (f", {how}" if tasks > 1 else "")
        rows.append([where, *(_percent(rate, _limit(size)) for rate in rates)])
    return table(["tasks x seeds", *STATISTICS], rows)


def power(size: int) -> str:
    """How often a difference of two standard deviations over the root of the tasks is found, normal noise."""
    rows = []
    for number, (tasks, seeds) in enumerate(DESIGNS):
        g = np.random.default_rng(100 + number)
        data = simulate(g, SYMMETRIC["normal"], tasks, [seeds] * tasks, 1.0, size)
        moved = [x + 2 / tasks**0.5 for x in data]
        rates = [float((statistic(moved) <= ALPHA).mean()) for statistic in STATISTICS.values()]
        rows.append([f"{tasks} x {seeds}", *map(_percent, rates)])
    return table(["tasks x seeds", *STATISTICS], rows)


def family(g: np.random.Generator, arms: int, tasks: int, seeds: int, size: int, spreads: Array, real: int) -> Tasks:
    """Arms against one baseline, so their differences go together; the first `real` arms truly differ."""
    data = []
    for _ in range(tasks):
        baseline = g.normal(size=(size, 1, seeds))
        own = spreads[:, None] * g.normal(size=(size, arms, seeds))
        effect = np.where(np.arange(arms) < real, 4.0 / tasks**0.5, 0.0)[:, None]
        data.append(own - baseline + effect)
    return data


def families(size: int) -> str:
    """Any false finding in a family of arms against one baseline, with Holm's correction; half of the arms differ."""
    rows = []
    for number, (arms, (tasks, seeds), uneven) in enumerate(
        product((3, 7), [(1, 3), (1, 5), (3, 3), (6, 3)], (False, True))
    ):
        spreads = np.where(np.arange(arms) == arms - 1, 5.0, 1.0) if uneven else np.ones(arms)
        data = family(np.random.default_rng(200 + number), arms, tasks, seeds, size, spreads, real=0)
        rates = [float(holm_rejects(statistic(data)).any(-1).mean()) for statistic in OF_FAMILIES.values()]
        how = "one arm's spread five times the others'" if uneven else "equal spreads"
        rows.append([f"{arms} arms, {tasks} x {seeds}, {how}", *(_percent(rate, _limit(size)) for rate in rates)])
    return table(["family, tasks x seeds", *OF_FAMILIES], rows)


def corrections(size: int) -> str:
    """Holm beside Bonferroni on the t with reduced degrees: false findings, real ones, intervals that hold."""
    rows = []
    for number, (arms, (tasks, seeds)) in enumerate(product((1, 3, 7), [(1, 3), (1, 5), (3, 3), (6, 3), (6, 5)])):
        real = (arms + 1) // 2
        data = family(np.random.default_rng(300 + number), arms, tasks, seeds, size, np.ones(arms), real)
        centred = [x - np.where(np.arange(arms) < real, 4.0 / tasks**0.5, 0.0)[:, None] for x in data]
        p, true = reduced_degrees(data), reduced_degrees(centred)
        cells = []
        for levels in (np.full_like(p, ALPHA / arms), holm_levels(p)):
            found = p <= levels
            false = found[:, real:].any(-1).mean() if real < arms else 0.0
            cells += [_percent(float(false), _limit(size)), _percent(float(found[:, :real].mean()))]
            cells += [_percent(float((true > levels).mean())), _percent(float((true > levels).all(-1).mean()))]
        rows.append([f"{arms}, {tasks} x {seeds}", *cells])
    each = ["false", "found", "each holds", "all hold"]
    return table(["arms, tasks x seeds", *(f"{how}: {what}" for how in ("Bonferroni", "Holm") for what in each)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4000, help="simulated comparisons of each kind")
    size = parser.parse_args().size
    parts = {
        "False findings, symmetric differences (worst design), %": single(SYMMETRIC, size),
        "False findings, skewed differences with mean zero (worst design), %": single(SKEWED, size),
        "False findings by design, normal differences, %": by_design(SYMMETRIC["normal"], size),
        "False findings by design, exponential differences, %": by_design(SKEWED["exponential differences"], size),
        "Real differences found, %": power(size),
        "Any false finding in a family, %": families(size),
        "Corrections, %": corrections(size),
    }
    for title, text in parts.items():
        print(f"## {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
