"""A masked tensor: the values that train, and the whole tensor that they are part of.

What is read is made once and written once a step. Here is when and how; `masked_tensors.py` has where it sits.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from fish_tuning.errors import MaskError
from fish_tuning.sparse.frozen_parts import with_entries
from fish_tuning.sparse.optimizer_steps import held_by_others, look_again, watch_optimizers
from fish_tuning.sparse.selected_gradients import whole_tensor, whole_tensors
from fish_tuning.sparse.sharding import is_sharded, local_part, shard_like, whole
from fish_tuning.sparse.values import DATA, Values, Whole, entries_digest, watch_again

# Entries of what is kept in another dtype until the next read, to see whether it was written into: PEFT writes into
# small ones alone.
_KEPT_FOR_A_LOOK = 2**16


class MaskedTensor:
    """One masked tensor: the trainable `values`, where they belong, and the whole tensor that reads give.

    `values` is the module's parameter, under the tensor's own name. Whoever reads that name gets `tensor`, which
    shares its memory with `frozen` and hands its gradient at the selected entries on to `values`. The values are
    written into it after every step of an optimizer, and when a read finds that they have changed otherwise.
    """

    in_group: weakref.ref[Group]  # modules hold the group, which holds its members
    replaced = False  # whether another mask stood here before, whose entries were trained too

    def __init__(self, dense: nn.Parameter, selected: Tensor) -> None:
        index = selected.flatten().nonzero()[:, 0].to(dense.device)
        entries = dense.detach().take(index)
        self.index = index.to(torch.int32) if dense.numel() < 2**31 else index
        self.shape = dense.shape
        self.dense = dense  # the object that an unmasked model gets back
        self.digest = entries_digest(entries)  # of the entries before training: tells a delta's base from others
        entries = entries if dense.dim() == 1 else entries[:, None]
        self.values: nn.Parameter | None = Values(entries) if len(index) else None
        self.frozen: Tensor = dense.detach().contiguous()
        self.split_up = False  # whether FSDP2 has `frozen`: a part of it, or for the moment all, with the values in it
        # By stored dtypes, those that FSDP1's mixed precision computes in now: a record of the whole model, since of a
        # tensor without a selected entry no values tell.
        self.computed_in: dict[torch.dtype, torch.dtype] = {}
        self.tensor: Any = None  # what reads give
        self.plain: Any = None  # the same for compiled models, which take no tensors of other classes
        self.trains = False  # whether `tensor` has a gradient
        self.written = self.seen = -1  # the counts of changes of `tensor` and of `values` when they were equal
        # What was read last while an engine has the values, and its count of changes then; None where it is not kept.
        self.given: tuple[Tensor, int] | None = None

    @property
    def group(self) -> Group:
        return self.in_group()  # type: ignore[return-value]

    def read(self) -> Tensor:
        """The whole tensor, whatever has happened to it or to the values."""
        if self.group.scattered:
            return self.read_with(self.values)  # type: ignore[no-any-return]
        if self.tensor is None:
            self.group.bind()
        if is_dynamo_compiling():
            plain: Tensor = self.plain
            return plain
        values, group = self.values, self.group
        if values is None and self.computed_in:
            return self.frozen.to(self.computed_in.get(self.frozen.dtype, self.frozen.dtype))
        if values is None:
            pass
        elif group.one_count or group.stale:
            group.settle()
        elif values.requires_grad is not self.trains:
            group.bind()
        elif values._version != self.seen or self.tensor._version != self.written:
            group.write()
        tensor: Tensor = self.tensor
        return tensor

    def take_entries(self) -> None:
        """Somebody wrote into the tensor itself, so its entries are the values now."""
        values: Any = self.values
        if self.tensor.data_ptr() != self.frozen.data_ptr():  # or put another memory in its place
            self.frozen.data.copy_(DATA.__get__(self.tensor))
            DATA.__set__(self.tensor, self.frozen)
        values.copy_(self.frozen.view(-1).index_select(0, self.index).view_as(values))

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
        if not isinstance(values, Tensor) or values.numel() != len(self.index) or is_sharded(values):
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
            self.split_up = self.group.scattered = True
            self.tensor = self.plain = self.group.joined = None
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
        if is_sharded(values):
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
        return {**state, "tensor": None, "plain": None, "given": None}


class Group:
    """Masked tensors that are written, and hand on their gradients, in one go.

    Small ones are, and share memory for it; a large one is alone in its group. Their values are slices of one memory,
    too, with one count of changes for all, so that a read need not look at each of them.
    """

    def __init__(self, members: list[MaskedTensor]) -> None:
        self.members = members
        self.with_values: list[MaskedTensor] = []
        self.joined: tuple[Tensor, Tensor] | None = None  # the memory that all share, and the selected entries in it
        self.flat: Tensor | None = None  # all values, where they are slices of one memory
        self.one_count = False  # whether all values and `flat` share one count of changes
        self.seen = -1  # that count when the values were written last
        self.stale = False  # whether the values may have changed without being counted
        # Whether FSDP (its first version) moves the values: their memory is its own, and it looks for them where the
        # tensor is read. While it gathers them for a forward pass, it puts other tensors in their place.
        self.managed = False
        # Whether an engine gives up the values' memory, one by one, and brings it back when it is needed (ZeRO-3): each
        # read then writes the values of its own tensor.
        self.scattered = False
        self.held = False  # whether somebody has had the `.data` of any value since `flat` was looked for
        self.switched = False  # whether any value has been frozen or thawed since the tensors were made
        self.settled = False  # whether `flat` and the count tell all that a read must know of the values
        for member in members:
            member.in_group = weakref.ref(self)

    def share_values(self) -> None:
        """Make new values for all members: slices of one memory, with one count of changes."""
        old: list[Any] = [member.values for member in self.members]
        memory = torch.cat([values.detach() for values in old])
        for member, entries in zip(self.members, memory.split([len(values) for values in old]), strict=True):
            member.values = Values(entries)

    def is_together(self) -> bool:
        """Whether all members are on one device, in one dtype."""
        return len({(member.frozen.dtype, member.frozen.device) for member in self.members}) < 2

    def flatten(self) -> None:
        """Make the values slices of one memory again, after they have moved."""
        values: list[Any] = [member.values for member in self.members]
        if len(values) > 1 and all(type(each) is Values for each in values):
            memory = torch.cat([each.detach() for each in values])
            for each, entries in zip(values, memory.split([len(each) for each in values]), strict=True):
                DATA.__set__(each, entries)

    def bind(self) -> None:
        """Make the tensors that reads give; each lasts until its parameter moves, thaws or freezes."""
        watch_optimizers()
        self._join()
        self.with_values = [member for member in self.members if member.values is not None]
        for member in self.members:
            values: Any = member.values
            member.trains = values is not None and values.requires_grad
            if values is not None:
                values.masked_group = weakref.ref(self)
        watch_again(member.values for member in self.with_values)  # others may have taken the place of ours
        look_again()
        for member, tensor, plain in zip(self.members, self._tensors(), self._tensors(), strict=True):
            tensor.__class__ = Whole
            tensor.of = None if member.values is None else weakref.ref(member.values)
            member.tensor, member.plain, member.written = tensor, plain, tensor._version
        self._find_flat()
        self.switched = False
        self.write()

    def _tensors(self) -> list[Any]:
        """The members' whole tensors, in their memory; the gradient of those that train goes to the values."""
        tensors: list[Any] = [member.frozen.detach() for member in self.members]
        training = [(place, member) for place, member in enumerate(self.members) if member.trains]
        if training:
            joined = self.joined[1] if self.joined is not None and len(training) == len(tensors) else None
            indices, frozen = [each.index for _, each in training], [each.frozen for _, each in training]
            made = whole_tensors(indices, joined, frozen, [each.values for _, each in training])
            for (place, _), tensor in zip(training, made, strict=True):
                tensors[place] = tensor
        return tensors

    def settle(self) -> None:
        """Look at every member, and write what has changed."""
        if any(
            m.tensor is None or (m.values is not None and m.values.requires_grad is not m.trains) for m in self.members
        ):
            self.bind()
        else:
            watch_again(member.values for member in self.with_values)
            self.switched = False
            self.write()

    def write(self) -> None:
        """Write the values into the tensors.

        Past autograd, which need not see a change of what it saved where an optimizer has stepped since.
        """
        if self.managed or self.scattered:
            return
        members = self.with_values
        parameters: list[Any] = [member.values for member in members]
        with torch.no_grad():
            for member in members:
                # `plain` has the same count as `tensor`, and is asked for it in a third of the time.
                if member.plain._version != member.written:
                    member.take_entries()
                    member.written = member.plain._version
            if self.held:
                self._find_flat()
            if self.joined is not None:
                memory, index = self.joined
                # An engine that takes a model to its device moves one layer after the other.
                parts = [values.detach().to(memory.device) for values in parameters] if self.flat is None else []
                flat = self.flat if self.flat is not None else torch.cat(parts)
                memory.scatter_(0, index.long(), flat.view(-1).to(memory.dtype))
            else:
                for member, values in zip(members, parameters, strict=True):
                    entries = values.detach().view(-1).to(member.frozen.device, member.frozen.dtype)
                    member.frozen.data.view(-1).scatter_(0, member.index.long(), entries)
        self.stale = False
        self.settled = self.one_count and not self.switched
        if self.one_count and self.flat is not None:
            self.seen = self.flat._version
        else:
            for member, values in zip(members, parameters, strict=True):
                member.seen = values._version

    def _find_flat(self) -> None:
        """See whether the values are slices of one memory, with one count of changes."""
        parameters: list[Any] = [member.values for member in self.with_values]
        self.flat, self.one_count = None, False
        if any(values.held for values in parameters):
            held_by_others.add(self)
        for values in parameters:
            values.held = False
        self.held = False
        if not parameters:
            return
        first, counts = parameters[0], [values._version for values in parameters]
        increment_version(first)
        sizes = [values.numel() * values.element_size() for values in parameters]
        places = [first.data_ptr() + start for start in itertools.accumulate(sizes[:-1], initial=0)]
        memories = {values.untyped_storage().data_ptr() for values in parameters}
        if len(memories) == 1 and places == [values.data_ptr() for values in parameters]:
            entries = sum(values.numel() for values in parameters)
            self.flat = first.detach().as_strided((entries, *first.shape[1:]), first.stride())
            self.one_count = [values._version for values in parameters] == [count + 1 for count in counts]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "flat": None, "settled": False, "one_count": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for member in self.members:
            member.in_group = weakref.ref(self)

    def _join(self) -> None:
        """Put the tensors into one memory, unless they are there, or cannot be."""
        tensors = [member.frozen for member in self.members]
        if len(tensors) < 2 or len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            self.joined = None
            return
        memories = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if self.joined is not None and memories == {self.joined[0].untyped_storage().data_ptr()}:
            return
        starts = list(itertools.accumulate((tensor.numel() for tensor in tensors), initial=0))
        memory = tensors[0].new_empty(starts[-1])
        for member, start in zip(self.members, starts, strict=False):
            place = memory[start : start + member.frozen.numel()].view(member.shape)
            member.frozen = place.copy_(member.frozen).data  # with a count of changes of its own
        index = torch.cat([member.index + start for member, start in zip(self.members, starts, strict=False)])
        self.joined = memory, index
