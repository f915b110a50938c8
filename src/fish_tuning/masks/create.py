"""From scores and a budget to a mask: exactly k entries, whatever the ties.

Entries are compared by (priority, seeded random key, position). The k-th largest priority is found by radix selection:
a few passes over the scores in chunks that count their 16-bit digits, so there is no sort and no copy of the scores.
The random keys are drawn anew, chunk by chunk, wherever they are needed, and only for ties.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fish_tuning.devices import has_float64, in_float64
from fish_tuning.errors import FishTuningWarning, MaskError, ZeroScoresError
from fish_tuning.masks.budgets import floor_parts, matching_names, module_type, resolve_budget, split_budget
from fish_tuning.masks.groups import (
    Floors,
    Granularity,
    Shapes,
    check_groups,
    chosen_at_random,
    entries_with_scores,
    families,
    select_groups,
)
from fish_tuning.masks.selections import SELECTIONS, Priority, priorities_of

Mask = dict[str, Tensor]

_CHUNK = 2**20  # entries looked at a time: bounds the extra memory at some 100 MB
_FACTORS = (2.0**-126, 2.0**127)  # that fp32 has with all its digits
_DIGIT = 16
_SIGN = 2 ** (_DIGIT - 1)  # added to the top digit, which is signed


def create_mask_from_fisher(
    fisher_scores: Mapping[str, Tensor],
    keep_ratio: float | None = None,
    names_to_exclude: Sequence[str] = (),
    *,
    num_trainable: int | None = None,
    method: str = "fish",
    granularity: Granularity = "entry",
    quotas: Mapping[str, float] | Literal["tensor", "layer", "module_type"] | None = None,
    floors: Mapping[str, float] | None = None,
    normalize: Literal["module_type"] | None = None,
    seed: int = 0,
    zero_scores: Literal["warn", "error", "ignore"] = "warn",
) -> Mask:
    """Boolean mask with exactly the asked number of entries, taken from one global pool of all scored tensors.

    FISH-Tuning, arXiv 2504.04050, eq. 4 and 5. The pool is every entry whose tensor's name matches none of
    `names_to_exclude`; excluded tensors train densely and are all true in the mask, so that the mask's sum is the
    number of trainable parameters. Where modules of different kinds share a pool (UniPELT), the scale of their
    gradients decides which of them are kept at all; `quotas` and `normalize` are two ways out.

    Args:
        fisher_scores: {name: scores}, non-negative, from `calculate_fisher_information`.
        keep_ratio: share of the pool to keep, in (0, 1]: k = round(keep_ratio * pool), at least 1.
        names_to_exclude: regular expressions, searched for in the names (e.g. "classifier").
        num_trainable: instead of `keep_ratio`, the exact number of trainable parameters in all, excluded tensors
            included.
        method: "fish" (largest scores), "rand" (random, seeded), "rev" (smallest scores), or one that was added with
            `register_selection`. All of them keep the same number of entries.
        granularity: what is kept or frozen together: an "entry", a "row" or "column" of a tensor (of a convolution's,
            all but the first dimension are columns), or a "component" of LoRA, row j of A with column j of B. Groups
            are judged by their mean score. The number stays exact; one that no set of groups has is refused.
        quotas: {regular expression: share}, shares adding up to 1: each group of tensors gets that share of the kept
            entries, whatever its scores. Each tensor of the pool must match exactly one of them. "tensor", "layer" and
            "module_type" (`query.lora_A`, all layers together) keep the same ratio of each. The total stays exact.
        floors: {"tensor", "layer", "module_type" or a regular expression: number}: at least so many entries are kept of
            each tensor, layer or module type, or of what matches; a number below 1 is a share of its entries. The rest
            of the budget goes to the best, wherever they are.
        normalize: "module_type" divides each score by the mean over its module type before they are compared.
        seed: orders ties, and is the choice of "rand". The same seed and scores give the same mask.
        zero_scores: what to do when "fish" must keep entries that scored exactly 0, which is a choice at random:
            "warn" (FishTuningWarning), "error" (ZeroScoresError) or "ignore".

    Returns:
        {name: bool tensor of the scores' shape, on their device}, for every name in `fisher_scores`.

    Raises:
        MaskError: unknown method or granularity, bad ratio or budget, an exclusion that matches nothing, quotas that do
            not add up or ask for more than there is, floors above the budget, a granularity that tensors of the pool do
            not have or that the budget is no number of, scores that are not finite.

    Example:
        >>> import torch
        >>> from fish_tuning import create_mask_from_fisher
        >>> scores = {"lora_A": torch.tensor([[4.0, 1.0], [3.0, 2.0]]), "classifier": torch.tensor([9.0, 9.0])}
        >>> create_mask_from_fisher(scores, keep_ratio=0.5, names_to_exclude=["classifier"])["lora_A"]
        tensor([[ True, False],
                [ True, False]])
        >>> sum(int(m.sum()) for m in create_mask_from_fisher(scores, num_trainable=3).values())
        3
    """
    priority = SELECTIONS.find(method, error=MaskError).priority
    if normalize not in (None, "module_type"):
        raise MaskError(f"normalize={normalize!r} is not known; allowed are 'module_type' and None.")
    if zero_scores not in ("warn", "error", "ignore"):
        raise MaskError(f"zero_scores={zero_scores!r} is not known; allowed are 'warn', 'error', 'ignore'.")
    _check_scores(fisher_scores)
    excluded = matching_names(fisher_scores, names_to_exclude)
    pool = {name: scores for name, scores in fisher_scores.items() if name not in excluded}
    budget = resolve_budget(
        sum(scores.numel() for scores in pool.values()),
        sum(fisher_scores[name].numel() for name in excluded),
        keep_ratio=keep_ratio,
        num_trainable=num_trainable,
    )
    shapes = {name: scores.shape for name, scores in pool.items()}
    parts = check_choice(shapes, budget, granularity=granularity, quotas=quotas, floors=floors)
    scales = _scales(pool) if normalize else None
    chosen: Mask = {}
    for names, k in parts.exact:
        part = {name: pool[name] for name in names}
        if granularity == "entry":
            chosen |= _select_entries(part, k, parts.least, priority=priority, seed=seed, scales=scales)
        else:
            chosen |= select_groups(
                part, k, granularity, priority=priority, seed=seed, scales=scales, floors=parts.least
            )
    if method == "fish" and zero_scores != "ignore":
        random = chosen_at_random(pool, chosen, granularity)
        _report_zero_scores(entries_with_scores(pool, granularity), pool, random, budget, zero_scores)
    return {name: chosen[name] if name in chosen else _all_of(scores) for name, scores in fisher_scores.items()}


def _select_entries(
    scores: Mapping[str, Tensor],
    k: int,
    floors: Floors,
    *,
    priority: Priority,
    seed: int,
    scales: Mapping[str, float] | None,
) -> Mask:
    """The k best entries, after those that floors take."""
    if not floors:
        return select_top_k(scores, k, priority=priority, seed=seed, scales=scales)
    taken = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in scores.items()}
    for names, least in floors:
        part = {name: scores[name] for name in names}
        taken |= select_top_k(part, least, priority=priority, seed=seed, scales=scales)
    left = k - sum(least for _, least in floors)
    rest = select_top_k(scores, left, priority=priority, seed=seed, scales=scales, taken=taken)
    return {name: taken[name] | rest[name] for name in scores}


def _all_of(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


class Parts(NamedTuple):
    """Groups of names with numbers of entries: to be kept at least, and, these ones included, exactly."""

    least: list[tuple[list[str], int]]
    exact: list[tuple[list[str], int]]


def check_choice(
    shapes: Shapes,
    budget: int,
    *,
    granularity: str = "entry",
    quotas: Mapping[str, float] | str | None = None,
    floors: Mapping[str, float] | None = None,
) -> Parts:
    """How the budget is split, without any scores; MaskError where it cannot be met, with the numbers.

    Args:
        shapes: of the tensors of the pool, by name.
        budget: entries to keep of the pool.
        granularity, quotas, floors: as in `create_mask_from_fisher`.
    """
    if quotas is not None and floors:
        raise MaskError("quotas fix the numbers that floors would leave open; give one of the two.")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = [(list(sizes), budget)] if quotas is None else split_budget(sizes, budget, quotas)
    least = floor_parts(sizes, budget, floors or {})
    found = families(shapes, granularity)
    if granularity == "entry":
        return Parts(least, exact)
    for what, parts in (("floors", least), ("quotas", exact)):
        for names, k in parts:
            inside = set(names)
            for family in found:
                members = [name for name, _ in family.members]
                if not inside.isdisjoint(members) and not inside.issuperset(members):
                    raise MaskError(
                        f"{what}: a {granularity} lies in {members[0]!r} and {members[-1]!r}, which are in different "
                        "groups. Use 'layer', or patterns that take both."
                    )
            if parts is exact:
                try:
                    check_groups([family for family in found if family.members[0][0] in inside], k, least)
                except MaskError as error:
                    where = f"quotas: {len(names)} tensors, {names[0]!r} first, are to keep {k:,}. " if quotas else ""
                    raise MaskError(f"{where}{error}") from None
    return Parts(least, exact)


def _largest(scores: Tensor) -> Tensor:
    return scores


def select_top_k(
    scores: Mapping[str, Tensor],
    k: int,
    *,
    priority: Priority = _largest,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    taken: Mask | None = None,
) -> Mask:
    """Masks with the k entries of largest priority over all tensors; ties fall in an order drawn from `seed`.

    `scales` gives a factor for each tensor's scores; what is `taken` comes after all others. Needs, beside scores and
    masks, a fixed amount of memory. The result depends neither on the order of the mapping nor on the device.
    """
    names = sorted(scores)
    total = sum(scores[name].numel() for name in names)
    if not 0 <= k <= total:
        raise MaskError(f"Cannot select {k:,} of {total:,} entries.")

    # One precision for all, or the integers of different tensors could not be compared.
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in scores.values()) else torch.float32
    if dtype == torch.float64 and not all(has_float64(tensor.device) for tensor in scores.values()):
        raise MaskError(
            "Some scores are in float64, others on a device that has none (mps), so they cannot be compared. Move "
            "them all to the CPU."
        )

    def priorities() -> Iterator[Tensor]:
        for name in names:
            gone = taken[name].reshape(-1).split(_CHUNK) if taken else repeat(None)
            for chunk, mine in zip(scores[name].detach().reshape(-1).split(_CHUNK), gone, strict=False):
                ordered = _ordered(
                    priorities_of(priority, _scaled(chunk.to(dtype), scales[name] if scales else 1.0), name).to(dtype)
                )
                # Below all floats, -inf included: only the bits of a NaN would be as low.
                yield ordered if mine is None else ordered.masked_fill(mine, torch.iinfo(ordered.dtype).min)

    flat = {name: torch.zeros(scores[name].numel(), dtype=torch.bool, device=scores[name].device) for name in names}
    masks = [chunk for name in names for chunk in flat[name].split(_CHUNK)]
    if k:
        cut, above = _kth_largest(priorities, k, bits=torch.finfo(dtype).bits)
        keys = _TieKeys(priorities, cut, seed)
        key_cut, keys_above = _kth_largest(keys, k - above, bits=32)
        left = k - above - keys_above  # of the entries that tie in priority and key, the first in order
        for mask, chunk, (tied, key) in zip(masks, priorities(), keys.with_positions(), strict=True):
            mask.copy_(chunk > cut)
            mask[tied[key > key_cut]] = True
            last = tied[key == key_cut][:left]
            mask[last] = True
            left -= len(last)
    if sum(int(mask.count_nonzero()) for mask in masks) != k:
        raise MaskError("The selection method gave other priorities when it was called again; it must not draw.")
    return {name: flat[name].view(scores[name].shape) for name in scores}


def _scaled(scores: Tensor, scale: float) -> Tensor:
    """In two steps where fp32 has no such factor: that of scores about 1e-40, say."""
    if scale == 1:
        return scores
    if _FACTORS[0] <= scale <= _FACTORS[1]:
        return scores * scale
    return scores * math.sqrt(scale) * math.sqrt(scale)


class _TieKeys:
    """Random keys of the entries whose priority is exactly `cut`, the same ones at every pass."""

    def __init__(self, priorities: Callable[[], Iterable[Tensor]], cut: int, seed: int) -> None:
        self.priorities, self.cut, self.seed = priorities, cut, seed

    def __call__(self) -> Iterator[Tensor]:
        return (key for _, key in self.with_positions())

    def with_positions(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for chunk in self.priorities():
            tied = (chunk == self.cut).nonzero()[:, 0]
            key = torch.randint(2**31 - 1, (len(tied),), generator=generator, dtype=torch.int32, device="cpu")
            yield tied, key.to(chunk.device)


class _Cut(NamedTuple):
    value: int
    above: int  # number of entries larger than it


def _kth_largest(chunks: Callable[[], Iterable[Tensor]], k: int, bits: int) -> _Cut:
    """The k-th largest of all `bits`-wide integers in `chunks()`, digit by digit from the top."""
    prefix, above = 0, 0
    top = bits - _DIGIT
    for shift in range(top, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device="cpu")
        for chunk in chunks():
            if shift == top:
                digits = (chunk >> shift) + _SIGN
            else:
                digits = (chunk[(chunk >> (shift + _DIGIT)) == prefix] >> shift) & (2**_DIGIT - 1)
            counts += torch.bincount(digits, minlength=2**_DIGIT).cpu()
        down = counts.flip(0).cumsum(0)
        position = min(int(torch.searchsorted(down, k - above)), 2**_DIGIT - 1)
        digit = 2**_DIGIT - 1 - position
        above += int(down[position] - counts[digit])
        prefix = digit - _SIGN if shift == top else (prefix << _DIGIT) + digit
    return _Cut(prefix, above)


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of the floats: the bits of a float are ordered but for the sign."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values + 0.0).view(integer)  # + 0.0 turns -0.0 into 0.0, which ties with it
    return bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & torch.iinfo(integer).max)


def _check_scores(fisher_scores: Mapping[str, Tensor]) -> None:
    if not fisher_scores:
        raise MaskError("fisher_scores is empty: there is nothing to select from.")
    for name, scores in fisher_scores.items():
        for chunk in scores.detach().reshape(-1).split(_CHUNK):
            if not chunk.isfinite().all():
                raise MaskError(f"The scores of {name!r} are not all finite, so they have no order.")


def _scales(pool: Mapping[str, Tensor]) -> dict[str, float]:
    """One over the mean score of each tensor's module type, 1 where that is zero."""
    totals: dict[str, list[float]] = {}  # sum and number
    for name, scores in pool.items():
        total = totals.setdefault(module_type(name), [0.0, 0.0])
        total[0] += sum(float(in_float64(chunk).sum()) for chunk in scores.reshape(-1).split(_CHUNK))
        total[1] += scores.numel()
    means = {group: total / max(entries, 1) for group, (total, entries) in totals.items()}
    scales = {group: min(1 / mean, sys.float_info.max) if mean else 1.0 for group, mean in means.items()}
    return {name: scales[module_type(name)] for name in pool}


def _report_zero_scores(
    nonzero: Mapping[str, int], pool: Mapping[str, Tensor], random: int, budget: int, zero_scores: str
) -> None:
    """`random` of the `budget` entries were judged by a score of 0."""
    if not random:
        return
    dead = [name for name, number in nonzero.items() if not number]
    size = sum(scores.numel() for scores in pool.values())
    message = (
        f"{budget:,} entries are to be kept, but only {sum(nonzero.values()):,} of the pool's {size:,} have a score "
        f"above zero, so {random:,} are chosen at random. {len(dead)} of {len(nonzero)} tensors scored zero throughout"
        + (f", e.g. {dead[0]!r}. " if dead else ". ")
        + "With LoRA's default initialisation B = 0, the gradient of every A is exactly zero. Ways out: score after "
        "warm-up steps (leave out warmup_steps=0), start from init_lora_weights='pissa' (or 'olora', 'orthogonal'), or "
        "keep fewer entries."
    )
    if zero_scores == "error":
        raise ZeroScoresError(message)
    warnings.warn(message, FishTuningWarning, stacklevel=3)
