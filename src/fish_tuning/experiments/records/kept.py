"""Where the kept entries of a mask are: by layer and module type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping

from torch import Tensor

from fish_tuning.experiments.records.run_record import KeptShare
from fish_tuning.masks.budgets import module_type

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def kept_shares(mask: Mapping[str, Tensor], dense: Container[str] = ()) -> list[KeptShare]:
    """One share for each layer number and module type (`query.lora_A`), without the tensors named in `dense`.

    A weight and its bias, or two modules of a type, count together.
    """
    kept: Counter[tuple[int, str]] = Counter()
    total: Counter[tuple[int, str]] = Counter()
    for name, selected in mask.items():
        if name not in dense:
            layer = _LAYER.search(name)
            key = (int(layer.group(1)) if layer else -1, module_type(name))
            kept[key] += int(selected.sum())
            total[key] += selected.numel()
    return [KeptShare(None if key[0] < 0 else key[0], key[1], kept[key], total[key]) for key in sorted(total)]
