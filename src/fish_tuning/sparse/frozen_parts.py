"""The frozen part of a masked tensor where FSDP2 (`fully_shard`) splits the model.

Large ones are split and gathered with the layer that they are in, as the unmasked tensor would be, and computed with in
FSDP's dtype; so are those without a selected entry, of whose dtype no values tell. FSDP2 finds them when it asks the
module for its parameters, and puts what it gathers where it found them. They are no parameters to anybody else: neither
`set_adapter` nor an optimizer reaches them. `whole_tensors.py` has what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.sparse.sharding import local_part, whole

FROZEN = "_fish_tuning_frozen_"  # with a tensor's local name: the attribute of its module that FSDP2 has it under
_FSDP2 = "torch.distributed.fsdp._fully_shard."
_THROUGH = "torch.distributed.fsdp._common_utils"
# Of a smaller one each device keeps all, since a record of FSDP's costs more than its memory.
_LARGE = 2**6


def is_split_up(frame: FrameType | None) -> bool:
    """Whether it is FSDP2 that asks for parameters."""
    if frame is not None and frame.f_globals.get("__name__") == _THROUGH:
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_FSDP2)


def is_large(tensor: Tensor) -> bool:
    """Whether it is split though values tell of its dtype."""
    return tensor.numel() > _LARGE


def with_frozen_parts(
    module: nn.Module, named: Iterable[tuple[str, Any]], masked: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """A module's parameters, then the frozen parts that are split with them: of these the values come first."""
    yield from named
    for local, tensor in masked:
        if (part := frozen_part(module, local, tensor)) is not None:
            yield FROZEN + local, part


def frozen_part(module: nn.Module, local: str, masked: Any) -> nn.Parameter | None:
    """What FSDP2 is given of a masked tensor besides its values; None where each device keeps it."""
    own = vars(module)
    if FROZEN + local not in own:
        frozen: Tensor = masked.frozen
        if not frozen.dim() or not (is_large(frozen) or masked.values is None):
            return None
        own[FROZEN + local] = nn.Parameter(frozen, requires_grad=False)
    part: nn.Parameter = own[FROZEN + local]
    return part


def keep_frozen_part(module: nn.Module, local: str, masked: Any) -> None:
    """Another tensor has come for the frozen one, from another device or a file: FSDP2 looks for it in its place."""
    if masked.split_up:
        vars(module)[FROZEN + local] = masked.frozen
    else:
        vars(module).pop(FROZEN + local, None)


def with_entries(frozen: Any, index: Tensor, values: Any) -> Tensor:
    """A copy of a DTensor in which the entries `index`, counted over the whole, are the values; None: it has none."""
    copy: Tensor = frozen.detach().clone()
    if values is not None and not copy.is_meta:
        part, entries = local_part(copy), whole(values).detach().flatten()
        here, places = _entries_here(copy, index.to(part.device))
        part.view(-1).index_copy_(0, places, entries[here].to(part))
    return copy


def _entries_here(tensor: Any, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the entries are in this process's part, and their places in that."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    here = torch.ones(len(index), dtype=torch.bool, device=index.device)
    places = torch.zeros(len(index), dtype=torch.long, device=index.device)
    for own, first, along in zip(shape, offset, torch.unravel_index(index.long(), tensor.shape), strict=True):
        here &= (along >= first) & (along < first + own)
        places = places * own + along - first
    return here, places[here]
