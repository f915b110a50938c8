"""A masked tensor: the values that train, and the whole tensor that they are part of.

What is read is made once and written once a step. Here is when and how, and in `groups.py` for several of them in one
go; `masked_tensors.py` has where it sits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.parallel import DistributedDataParallel

from fish_tuning.errors import MaskError
from fish_tuning.sparse.frozen_parts import with_entries
from fish_tuning.sparse.groups import Group
from fish_tuning.sparse.selected_gradients import backward_pass, whole_tensor
from fish_tuning.sparse.sharding import is_sharded, local_part, shard_like, whole
from fish_tuning.sparse.values import DATA, Values, Whole, entries_digest, frozen_sum

# Entries of what is kept in another dtype until the next read, to see whether it was written into: PEFT writes into
# small ones alone.
_KEPT_FOR_A_LOOK = 2**16
# Private of torch, so that a version may come without them; more nodes than are needed are made then.
_hooks_on_saved: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignored: None
)
_transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class MaskedTensor:
    """One masked tensor: the trainable `values`, where they belong, and the whole tensor that reads give.

    `values` is the module's parameter, under the tensor's own name. Whoever reads that name gets `tensor`, which
    shares its memory with `frozen` and hands its gradient at the selected entries on to `values`. The values are
    written into it after every step of an optimizer, and when a read finds that they have changed otherwise.
    """

    in_group: weakref.ref[Group]  # modules hold the group, which holds its members
    frozen_sum: tuple[torch.dtype, int] | None = None  # of the frozen entries before training
    replaced = False  # whether another mask stood here before, whose entries were trained too

    def __init__(self, dense: nn.Parameter, selected: Tensor) -> None:
        index = selected.flatten().nonzero()[:, 0].to(dense.device)
        entries = dense.detach().take(index)
        self.num_selected = len(index)
        self.index = index.to(torch.int32) if dense.numel() < 2**31 else index
        self.shape = dense.shape
        self.dense = dense  # the object that an unmasked model gets back
        self.digest = entries_digest(entries)  # of the entries before training: tells a delta's base from others
        self.frozen_sum = frozen_sum(dense, index)
        entries = entries if dense.dim() == 1 else entries[:, None]
        self.values: nn.Parameter | None = Values(entries) if len(index) else None
        self.frozen: Tensor = dense.data.contiguous()  # with a count of changes of its own
        self.split_up = False  # whether FSDP2 has `frozen`: a part of it, or for the moment all, with the values in it
        self.by_engine = False  # whether FSDP2 splits the values
        # By stored dtypes, those that FSDP1's mixed precision computes in now: a record of the whole model, since of a
        # tensor without a selected entry no values tell.
        self.computed_in: dict[torch.dtype, torch.dtype] = {}
        self.tensor: Any = None  # what reads give
        self.plain: Any = None  # the same for compiled models and nn.Linear, of no class of its own
        self.trains = False  # whether `tensor` has a gradient
        self.written = self.seen = -1  # the counts of changes of `tensor` and of `values` when they were equal
        # What was read last while an engine has the values, and its count of changes then; None where it is not kept.
        self.given: tuple[Tensor, int] | None = None
        self.passes: set[int] = set()  # the backward passes of this step that reached a read with a node of its own

    @property
    def group(self) -> Group:
        return self.in_group()  # type: ignore[return-value]

    @property
    def index(self) -> Tensor:
        """The positions of the selected entries in the flattened tensor, ascending."""
        return self.own_index if self.own_index is not None else self.group.index_of(self)

    @index.setter
    def index(self, index: Tensor) -> None:
        self.own_index: Tensor | None = index  # None where the group has it among those of all its members

    def read(self) -> Tensor:
        """The whole tensor, whatever has happened to it or to the values."""
        if self.group.scattered:
            return self.read_with(self.values)  # type: ignore[no-any-return]
        if self.tensor is None:
            self.group.bind()
        values, group = self.values, self.group
        if values is None and self.computed_in:
            return self.frozen.to(self.computed_in.get(self.frozen.dtype, self.frozen.dtype))
        if values is None:
            if is_compiling():  # torch.export takes no constant of another class
                return self.plain  # type: ignore[no-any-return]
        elif group.one_count or group.stale:
            group.settle()
        elif values.requires_grad is not self.trains:
            group.bind()
        elif values._version != self.seen or self.tensor._version != self.written:
            group.follow()
        tensor: Tensor = self.tensor
        return tensor

    def read_apart(self, usual: Any) -> Any:
        """What a read gives in a backward pass, or while its group is apart: `usual`, or one with a node of its own."""
        again, group = backward_pass() != -1, self.group
        if group.apart and not (dist.is_available() and dist.is_initialized()):
            group.apart = False
        if not (again or (group.apart and _in_ddp())) or not self.trains or not torch.is_grad_enabled():
            return usual
        # Of what has hooks, these are to run. A transform of torch.func takes no such node.
        if len(group.with_values) == 1 or usual._backward_hooks or usual.retains_grad or _transforms():
            return usual
        if again and _is_thrown_away():
            return usual
        if again and not group.apart_for_good:
            group.keep_apart()
        made: Any = whole_tensor(self.index, self.frozen, self.values, self.passes)
        made.__class__ = Whole
        made.of, made.instead_of = usual.of, weakref.ref(usual)
        return made

    def gives(self, value: Any) -> bool:
        """Whether a read has given this."""
        apart = isinstance(value, Whole) and value.instead_of is not None
        return self.tensor is (value.instead_of() if apart else value)

    def settle(self) -> bool:
        """Look before a compiled model runs; whether what it reads is the same object still."""
        group, plain = self.group, self.plain
        flat: Any = group.flat
        if plain is not None and group.settled and flat._version == group.seen and plain._version == self.written:
            return True
        if not group.scattered and not group.managed:
            self.read()
        return self.plain is plain

    def take_entries(self) -> None:
        """Somebody wrote into the tensor itself, so its entries are the values now."""
        self.keep_memory()
        values: Any = self.values
        with torch.no_grad():
            values.copy_(self.frozen.view(-1).index_select(0, self.index).view_as(values))

    def keep_memory(self) -> None:
        """What somebody has written into the tensor itself is seen."""
        if self.tensor.data_ptr() != self.frozen.data_ptr():  # or put another memory in its place
            self.frozen.data.copy_(DATA.__get__(self.tensor))
            DATA.__set__(self.tensor, self.frozen)
        self.written = self.plain._version

    def read_with(self, values: Any, copy: bool = False) -> Any:
        """What a read gives while an engine moves the values: the whole tensor, where the values are there.

        Else they themselves: another parameter, a part of them on each device, or memory that is given up, which the
        engine wants to see as it is. `copy` for those of a replica on another device.

        Raises MaskError where the last tensor that was given has been written into: the engine has the values, which
        would not follow.
        """
        if is_sharded(self.frozen):
            return self.frozen if values is None else values
        if self.split_up and values is None:
            return self.frozen
        if not isinstance(values, Tensor) or values.numel() != self.num_selected or is_sharded(values):
            return values
        if values.is_meta or not values.untyped_storage().nbytes():
            return values
        index, frozen = self.index.to(values.device), self.frozen.to(values.device)
        own = frozen is self.frozen or not copy
        looks = own and not is_dynamo_compiling()  # what is compiled writes where it likes
        if looks:
            self._check_unwritten()
        if not copy:
            self.index, self.frozen = index, frozen
        if self.split_up:
            read, kept = frozen, True  # which `take_gathered` has written into
        elif values.dtype != frozen.dtype:  # FSDP's mixed precision computes in another dtype than is stored
            read = frozen.to(values.dtype)
            read.view(-1).index_copy_(0, index.long(), values.detach().flatten())
            kept = read.numel() <= _KEPT_FOR_A_LOOK
        else:
            read, kept = frozen, True
            read.data.view(-1).index_copy_(0, index.long(), values.detach().flatten().to(read.dtype))
        self.given = (read, read._version) if looks and kept else None
        return whole_tensor(index, read, values)

    def read_other(self, values: Any) -> Any:
        """What a read gives while others have put values there for a call: `torch.func.functional_call`.

        The whole tensor in memory of its own, so that the model keeps its values, and calls with several of them may be
        in one graph. Where an engine moves the values, `read_with`.
        """
        if self.by_engine or self.group.managed or self.group.scattered or values.numel() != self.num_selected:
            return self.read_with(values)
        if self.frozen.is_meta and not values.is_meta:  # on the way to another device (to_empty), as nn.GRU looks
            return torch.empty(self.shape, dtype=values.dtype, device=values.device)
        frozen, index = self.frozen.detach().to(values.device, values.dtype), self.index.to(values.device).long()
        return frozen.view(-1).index_copy(0, index, values.reshape(-1)).view(self.shape)

    def _check_unwritten(self) -> None:
        """MaskError where what was given at the last read has been written into; it is told once."""
        given, self.given = self.given, None
        if given is not None and given[0]._version != given[1]:
            raise MaskError(
                f"A masked tensor of shape {tuple(self.shape)} was written into while FSDP, DeepSpeed or "
                "DataParallel has its values (constrained OFT does so in each forward pass). That would not reach the "
                "values: remove_mask(model) before they have the model, or train without them."
            )

    def note_dtype(self, dtype: torch.dtype) -> None:
        """FSDP1 has put values of this dtype in the place of its own."""
        if dtype != self.frozen.dtype:
            self.computed_in[self.frozen.dtype] = dtype
        else:
            self.computed_in.pop(dtype, None)

    def take_gathered(self, frozen: Tensor, values: Any) -> None:
        """FSDP2 has put its part, or what it has gathered, in the place of the frozen tensor.

        The values are gathered with it and before it, and are written into it here, for the forward pass and again for
        the backward pass: what either computes with is freed after it.
        """
        if not self.split_up:
            self.split_up, self.tensor, self.plain = True, None, None
            self.group.split_up()
        self.frozen = frozen
        self._check_unwritten()
        if is_sharded(frozen) or values is None or is_sharded(values):
            return
        self.index = self.index.to(frozen.device)
        frozen.data.view(-1).index_copy_(0, self.index.long(), values.detach().flatten().to(frozen.dtype))

    def dense_of(self, values: Any) -> Tensor:
        """The whole tensor with these values, in memory of its own; of one that is split, this process's part."""
        if is_sharded(self.frozen):
            return with_entries(self.frozen, self.index, values)
        values = whole(values)
        dense = self.frozen.detach().to(values.device, copy=True)
        dense.view(-1).index_copy_(0, self.index.to(values.device).long(), values.detach().flatten().to(dense))
        return dense

    def unselected(self) -> Tensor:
        """The entries that do not train, one after another."""
        return self.frozen.detach().flatten()[~self.selected().flatten().to(self.frozen.device)]

    def put_unselected(self, entries: Tensor) -> None:
        positions = (~self.selected().flatten()).nonzero()[:, 0].to(self.frozen.device)
        self.frozen.data.view(-1).index_copy_(0, positions, entries.to(self.frozen))

    def put_dense(self, dense: Tensor) -> None:
        """Take the frozen entries of this tensor, which may be split; all processes must call this then."""
        if is_sharded(self.frozen):
            part = shard_like(whole(dense), self.frozen)
            if self.frozen.is_meta:
                self.frozen = nn.Parameter(part, requires_grad=False)
            else:
                local_part(self.frozen).copy_(local_part(part))
        elif self.frozen.is_meta:
            self.frozen = dense.detach().clone(memory_format=torch.contiguous_format)
            self.index = self.index.to(dense.device)
            if not self.group.scattered and not (self.values is not None and self.values.is_meta):
                self.group.bind()
        else:
            self.frozen.data.copy_(dense)

    def entries_of(self, dense: Tensor) -> Tensor:
        """The selected entries of this tensor, in the shape of the values."""
        dense = whole(dense)
        return dense.detach().flatten()[self.index.to(dense.device).long()].view(-1, *(1,) * (dense.dim() > 1))

    def move(self, change: Any, values: nn.Parameter | None) -> None:
        """Follow the module to another device or dtype, where its parameter is `values`."""
        frozen = change(self.frozen)
        if frozen is self.frozen and values is self.values:
            return
        self.frozen = nn.Parameter(frozen, requires_grad=False) if self.split_up else frozen.contiguous()
        device = change(self.index).device  # its numbers stay, even where memory is given up
        self.index = self.index if device.type == "meta" else self.index.to(device)
        self.tensor, self.group.settled = None, False
        if self.split_up or is_sharded(values):
            return
        self.values = values
        if self.group.is_together():  # the last of the group: what is compiled cannot do this when it reads
            self.group.flatten()
            self.group.bind()

    def selected(self) -> Tensor:
        selected = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        selected.view(-1)[self.index.long()] = True
        return selected

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensor of reads, which is made again: a tensor with a history cannot be copied."""
        state = {name: value for name, value in vars(self).items() if name != "in_group"}  # which its group sets
        return {**state, "tensor": None, "plain": None, "given": None, "passes": set()}


def _in_ddp() -> bool:
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def _is_thrown_away() -> bool:
    """Whether what is computed in this backward pass is for its saved tensors alone: checkpoints that are not reentrant
    recompute so, and no gradient goes through the graph that this makes."""
    hooks = _hooks_on_saved(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_recomputation_hook.")
