"""FSDP2 (`fully_shard`): its groups of parameters forget what trains for a while, and gather the rest as ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_module
from fish_tuning.sparse.fsdp2 import check_no_gradients, groups_of, other_parameters, reshard, roots_of, state_of
from fish_tuning.sparse.sharding import FSDP2, whole


class Fsdp2:
    """What scoring asks of it."""

    name = FSDP2

    def gathers(self, module: nn.Module) -> bool:
        """Whether `fully_shard` has been called on the module or a part of it."""
        return any(state_of(each) is not None for each in every_module(module))

    @contextmanager
    def only_frozen(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Whole copies of what trains, in the dtype that it computes in."""
        roots = roots_of(model)
        for root in roots:
            state_of(root)._lazy_init()  # it goes by what trains, so it comes before that is taken out
        reshard(model)
        with ExitStack() as stack:
            try:
                dtypes = _take_out(model, {id(each) for each in trained}, stack)
                yield [whole(each.detach()).clone().to(dtypes.get(id(each), each.dtype)) for each in trained]
            except BaseException:
                for root in roots:
                    if hasattr(root, "reset_iter_state"):  # newer versions of torch
                        root.reset_iter_state()
                raise
            finally:
                reshard(model)


def _take_out(model: nn.Module, trained: set[int], stack: ExitStack) -> dict[int, torch.dtype]:
    """Takes what trains out of the groups until the stack closes; gives all dtypes that they compute in."""
    dtypes: dict[int, torch.dtype] = {}
    for group in groups_of(model):
        own = {id(each.sharded_param): each for each in group.fsdp_params}
        dtypes |= {key: each.param_dtype or each.orig_dtype for key, each in own.items()}
        left = [each for key, each in own.items() if key not in trained]
        if len(left) < len(own):
            check_no_gradients((own[key] for key in own.keys() & trained), "Score", FisherError)
            stack.enter_context(other_parameters(group, left))
        if not left:
            group.unshard = _nothing
            stack.callback(delattr, group, "unshard")
    return dtypes


def _nothing(*_: Any, **__: Any) -> None:
    """Of a group that is all taken out, there is nothing to gather."""
