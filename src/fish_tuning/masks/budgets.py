"""How many entries to keep, and of which tensors: names, exclusions, budgets, quotas and floors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

from fish_tuning import patterns
from fish_tuning.errors import MaskError

# Parts of a tensor's name that say nothing about what kind of module it belongs to.
_NOT_A_TYPE = ("weight", "bias", "default")


def module_type(name: str) -> str:
    """What kind of tensor a name stands for, whichever the layer: `query.lora_A`, `mlp.serial_adapter_down`."""
    parts = [part for part in name.split(".") if part not in _NOT_A_TYPE and not part.isdigit()]
    return ".".join(parts[-2:])


def layer_of(name: str) -> str:
    """The number of a tensor's layer; "none" where its name has no number."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return found[1] if found else "none"


def _itself(name: str) -> str:
    return name


# What quotas and floors can be asked for of each of, by name.
KINDS: Mapping[str, Callable[[str], str]] = {"tensor": _itself, "layer": layer_of, "module_type": module_type}


def groups_of(names: Iterable[str], kind: str) -> dict[str, list[str]]:
    """The names by what `kind` of KINDS tells apart."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(KINDS[kind](name), []).append(name)
    return groups


def matching_names(
    names: Iterable[str], names_to_exclude: Sequence[str], argument: str = "names_to_exclude"
) -> set[str]:
    """The names that any of the regular expressions is found in. Raises MaskError for one that is found in none."""
    names = list(names)
    matching: set[str] = set()
    for pattern in [names_to_exclude] if isinstance(names_to_exclude, str) else names_to_exclude:
        try:
            matches = set(patterns.matching(pattern, names))
        except ValueError as error:
            raise MaskError(f"{argument}: {pattern!r} is {error}.") from error
        if not matches:
            raise MaskError(f"{argument}: {pattern!r} matches none of the {len(names)} tensors, e.g. {names[0]!r}.")
        matching |= matches
    return matching


def resolve_budget(pool: int, dense: int, *, keep_ratio: float | None = None, num_trainable: int | None = None) -> int:
    """Entries to keep of a pool of `pool` entries, beside `dense` entries that always train.

    Raises MaskError when not exactly one of `keep_ratio` and `num_trainable` is given or it cannot be met.
    """
    if (keep_ratio is None) == (num_trainable is None):
        raise MaskError("Give exactly one of keep_ratio (share of the pool) and num_trainable (parameters in all).")
    if num_trainable is not None and (not isinstance(num_trainable, int) or isinstance(num_trainable, bool)):
        raise MaskError(f"num_trainable={num_trainable!r} must be a whole number.")
    if keep_ratio is not None and (not isinstance(keep_ratio, int | float) or isinstance(keep_ratio, bool)):
        raise MaskError(f"keep_ratio={keep_ratio!r} must be a number in (0, 1].")
    if not pool:
        raise MaskError("No tensor is left to select from: names_to_exclude matches all of them.")
    if keep_ratio is not None:
        if not 0 < keep_ratio <= 1:
            raise MaskError(f"keep_ratio={keep_ratio} is outside (0, 1].")
        return max(1, round(keep_ratio * pool))
    if not dense < num_trainable <= dense + pool:  # type: ignore[operator]
        raise MaskError(
            f"num_trainable={num_trainable:,} cannot be met: {dense:,} parameters outside the pool always train, "
            f"and the pool has {pool:,} entries, so {dense + 1:,} to {dense + pool:,} are possible."
        )
    return num_trainable - dense  # type: ignore[operator]


def split_budget(
    sizes: Mapping[str, int], budget: int, quotas: Mapping[str, float] | str
) -> list[tuple[list[str], int]]:
    """Groups of names with their parts of the budget, which add up to it exactly (largest remainders round up).

    Args:
        sizes: entries of each tensor of the pool.
        budget: entries to keep in all.
        quotas: {regular expression: share of the budget}, or one of KINDS for the same keep ratio in each of them.

    Raises MaskError for shares that do not add up to 1, tensors that match none or several of them, and a group that
    has fewer entries than its share.
    """
    if isinstance(quotas, str):
        if quotas not in KINDS:
            known = ", ".join(map(repr, KINDS))
            raise MaskError(f"quotas={quotas!r} is not known; allowed are {known} and a mapping of shares.")
        groups = groups_of(sizes, quotas)
        total = sum(sizes.values())
        shares = {group: sum(sizes[name] for name in names) / total for group, names in groups.items()}
    else:
        shares = dict(quotas)
        groups = _groups_by_pattern(sizes, shares)
    parts = _largest_remainders(shares, budget)
    for group, names in groups.items():
        available = sum(sizes[name] for name in names)
        if parts[group] > available:
            raise MaskError(
                f"quotas: {group!r} = {shares[group]:g} of the {budget:,} entries to keep is {parts[group]:,}, but its "
                f"{len(names)} tensors have only {available:,}. Lower its share to {available / budget:.4g} or less."
            )
    return [(names, parts[group]) for group, names in groups.items()]


def floor_parts(sizes: Mapping[str, int], budget: int, floors: Mapping[str, float]) -> list[tuple[list[str], int]]:
    """Groups of names with the number of entries that are kept in each at least.

    Args:
        sizes: entries of each tensor of the pool.
        budget: entries to keep in all.
        floors: {one of KINDS, or a regular expression: how many}; a whole number is one of entries, a number below 1 a
            share of the group's entries, rounded up.

    Raises MaskError for numbers that are none, a tensor with two floors, a group that is smaller than its floor, and
    floors that are together above the budget.
    """
    parts: list[tuple[list[str], int]] = []
    for key, amount in floors.items():
        whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
        if not whole and not (isinstance(amount, float) and 0 < amount < 1):
            raise MaskError(f"floors: {key!r} = {amount!r} must be a whole number from 1, or a share between 0 and 1.")
        groups = groups_of(sizes, key) if key in KINDS else {key: sorted(matching_names(sizes, [key], "floors"))}
        for group, names in groups.items():
            there = sum(sizes[name] for name in names)
            least = int(amount) if whole else math.ceil(Fraction(repr(float(amount))) * there)  # 0.07 of 100 are 7
            if least > there:
                raise MaskError(f"floors: {key!r} = {amount:,} is more than the {there:,} entries of {group!r}.")
            parts.append((names, least))
    named = Counter(name for names, _ in parts for name in names)
    twice = next((name for name, number in named.items() if number > 1), None)
    if twice is not None:
        raise MaskError(f"floors: {twice!r} has more than one; each tensor may have one floor.")
    needed = sum(least for _, least in parts)
    if needed > budget:
        raise MaskError(
            f"floors: they keep {needed:,} entries in {len(parts)} groups, more than the {budget:,} to keep in all. "
            "Lower them, or keep more."
        )
    return parts


def _groups_by_pattern(names: Iterable[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    if not (all(share >= 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= 1e-6):  # NaN is none
        listed = " + ".join(f"{share:g}" for share in shares.values()) or "nothing"
        raise MaskError(f"quotas must be shares from 0 that add up to 1; {listed} = {sum(shares.values()):g}.")
    names = list(names)
    groups = {pattern: sorted(matching_names(names, [pattern], argument="quotas")) for pattern in shares}
    for name in names:
        matching = [pattern for pattern, members in groups.items() if name in members]
        if len(matching) != 1:
            found = "none" if not matching else "more than one: " + ", ".join(map(repr, matching))
            raise MaskError(
                f"quotas: {name!r} of the pool matches {found} of {', '.join(map(repr, shares))}; it must match one. "
                "Tensors outside the pool belong in names_to_exclude."
            )
    return groups


def _largest_remainders(shares: Mapping[str, float], budget: int) -> dict[str, int]:
    total = sum(shares.values())
    exact = {group: share / total * budget for group, share in shares.items()}
    parts = {group: int(value) for group, value in exact.items()}
    left = budget - sum(parts.values())
    for group in sorted(exact, key=lambda group: (parts[group] - exact[group], group))[:left]:
        parts[group] += 1
    return parts
