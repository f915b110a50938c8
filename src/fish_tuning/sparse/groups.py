"""Masked tensors that are written, and hand on their gradients, in one go."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fish_tuning.errors import FishTuningWarning, MaskError
from fish_tuning.sparse.optimizer_steps import held_by_others, look_again, watch_optimizers
from fish_tuning.sparse.selected_gradients import starts_of, whole_tensors
from fish_tuning.sparse.values import DATA, GroupReference, Values, Whole, watch_again

if TYPE_CHECKING:  # which has a group from its beginning
    from fish_tuning.sparse.whole_tensors import MaskedTensor

# A tensor of more entries is a group of its own: there, the entries cost more than the call that gathers them.
_SMALL = 2**16
# Entries of a group at most, since their dense gradients are kept until all are there. On a GPU each group costs the
# same few operations in a step, whatever its size.
_TOGETHER, _TOGETHER_ON_GPU = 2**20, 2**22


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
        # Whether reads in a pass of DDP have a node of their own each. One node has the hooks run of all its values,
        # from which DDP takes it that their gradients are there; so it serves all once a step has shown that they come
        # in one backward pass. They do not where reentrant checkpointing, or a second loss, makes several.
        self.apart, self.apart_for_good = True, False
        self._places_of_values: list[int] = []  # where the values were in memory when `flat` was looked for
        self._plains: list[Tensor] = []  # the tensors of all members with values, and their counts of changes when
        self._counts: list[int] = []  # they were written last: to look at each member takes three times as long
        self._places: dict[MaskedTensor, tuple[int, int, int]] = {}  # of each member's in the joined entries and memory
        for member in members:
            member.index = member.index  # which the group that it was in may have
            member.in_group = weakref.ref(self)

    def index_of(self, member: MaskedTensor) -> Tensor:
        """The positions of a member's selected entries, of which the joined ones tell."""
        (_, joined), (first, last, start) = self.joined, self._places[member]  # type: ignore[misc]
        return joined[first:last] - start

    def take_apart(self) -> None:
        """Each member knows the positions of its entries itself."""
        for member in self.members:
            member.index = member.index
        self.joined, self._places = None, {}

    def share_values(self) -> None:
        """Make new values for all members: slices of one memory, with one count of changes."""
        old: list[Any] = [member.values for member in self.members]
        memory = torch.cat([values.detach() for values in old])
        for member, entries in zip(self.members, memory.split([len(values) for values in old]), strict=True):
            member.values = Values(entries)

    def all_values(self) -> list[Any]:
        """The values of its tensors, in the order of `flat`."""
        return [member.values for member in self.with_values]

    def check_not_whole(self, values: Any, shape: torch.Size) -> None:
        """MaskError where what takes the memory of values has the shape of the whole tensor."""
        for member in self.members:
            if member.values is values:
                self._check_not_whole(member, shape)

    @staticmethod
    def _check_not_whole(member: MaskedTensor, shape: torch.Size) -> None:
        if shape == member.shape and shape.numel() != member.num_selected:
            raise MaskError(
                f"A whole tensor, of shape {tuple(shape)}, was given as the .data of a masked one's parameter, which "
                f"is its {member.num_selected:,} selected entries. model.load_state_dict(weights, strict=False) takes "
                "whole tensors by name; module.weight.data.copy_(weight) writes one."
            )

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
        self.with_values = [member for member in self.members if member.values is not None]
        for member in self.with_values:
            self._check_not_whole(member, member.values.shape)  # type: ignore[union-attr]  # given to a copy that was not read yet
        self._take_each()
        self._join()
        for member in self.members:
            values: Any = member.values
            member.trains = values is not None and values.requires_grad
            if values is not None:
                values.masked_group = GroupReference(self)
        watch_again(member.values for member in self.with_values)  # others may have taken the place of ours
        look_again()
        for member, tensor, plain in zip(self.members, self._tensors(), self._tensors(), strict=True):
            tensor.__class__ = Whole
            tensor.of = None if member.values is None else weakref.ref(member.values)
            tensor.without_values = weakref.ref(member) if member.values is None else None
            member.tensor, member.plain, member.written = tensor, plain, tensor._version
        self._note_counts()
        self.find_flat()
        self.switched = False
        self.write()
        self.apart = sum(member.trains for member in self.members) > 1

    def _tensors(self) -> list[Any]:
        """The members' whole tensors, in their memory; the gradient of those that train goes to the values."""
        tensors: list[Any] = [member.frozen.detach() for member in self.members]
        training = [(place, member) for place, member in enumerate(self.members) if member.trains]
        if training:
            joined = self.joined[1] if self.joined is not None and len(training) == len(tensors) else None
            indices = joined if joined is not None else [each.index for _, each in training]
            made = whole_tensors(indices, [each.frozen for _, each in training], [each.values for _, each in training])
            for (place, _), tensor in zip(training, made, strict=True):
                tensors[place] = tensor
        return tensors

    def keep_apart(self) -> None:
        """Their gradients come in several backward passes."""
        self.apart = self.apart_for_good = sum(member.trains for member in self.members) > 1

    def end_step(self) -> None:
        """An optimizer has stepped: whether the gradients of all came in one backward pass is known now."""
        if not self.apart:
            return
        passes = [member.passes for member in self.with_values if member.trains]
        if any(passes) and not self.apart_for_good:
            self.apart = any(others != passes[0] for others in passes)
            self.apart_for_good = self.apart
        for each in passes:
            each.clear()

    def settle(self) -> None:
        """Look at every member, and write what has changed."""
        if any(
            m.tensor is None or (m.values is not None and m.values.requires_grad is not m.trains) for m in self.members
        ):
            self.bind()
        else:
            if self.stale:
                self.notice_moved()
            watch_again(member.values for member in self.with_values)
            self.switched = False
            self.follow()

    def follow(self) -> None:
        """See what was written into the tensors themselves, and write the values into them."""
        self.take_written()
        self.write()

    def take_written(self) -> None:
        """Where somebody has written into a tensor itself, its entries are the values now."""
        if not self._unwritten():
            self._take_each()

    def take_last(self) -> None:
        """The same, unless the values have changed since they were written."""
        if self.one_count and self.flat is not None:
            unchanged = self.flat._version == self.seen
        else:
            unchanged = all(member.values._version == member.seen for member in self.with_values)  # type: ignore[union-attr]
        if unchanged:
            self.take_written()

    def _take_each(self) -> None:
        if self.managed or self.scattered:
            return
        for member in self.with_values:
            if member.tensor is not None and member.plain._version != member.written:
                member.take_entries()
        self._note_counts()

    def split_up(self) -> None:
        """An engine has the tensors, part by part: nothing of them is kept here."""
        self.scattered = True
        self.take_apart()
        self._plains, self._counts = [], []

    def _unwritten(self) -> bool:
        """Whether nobody has written into a tensor itself since the values were."""
        # `plain` has the same count as `tensor`, and is asked for it in a third of the time.
        return [plain._version for plain in self._plains] == self._counts

    def _note_counts(self) -> None:
        self._plains = [member.plain for member in self.with_values]
        self._counts = [member.written for member in self.with_values]

    def write(self) -> None:
        """Write the values into the tensors, past autograd: it need not see a change of what it saved before a step.

        After a step that is what counts where somebody has written into tensors first and the values were stepped then:
        what the step would have made of that, nobody knows.
        """
        if self.managed or self.scattered:
            return
        if not self._unwritten():
            for member in self.with_values:
                if member.plain._version != member.written:
                    member.keep_memory()
            self._note_counts()
            self._warn_of_lost()
        with torch.no_grad():
            if self.held:
                self.find_flat()
            if self.joined is not None:
                memory, index = self.joined
                # An engine that takes a model to its device moves one layer after the other.
                flat = self.flat
                if flat is None:
                    flat = torch.cat([values.detach().to(memory.device) for values in self.all_values()])
                memory.scatter_(0, index.long(), flat.view(-1).to(memory.dtype))
            else:
                for member, values in zip(self.with_values, self.all_values(), strict=True):
                    entries = values.detach().view(-1).to(member.frozen.device, member.frozen.dtype)
                    member.frozen.data.view(-1).scatter_(0, member.index.long(), entries)
        self.stale = False
        self.settled = self.one_count and not self.switched
        if self.one_count and self.flat is not None:
            self.seen = self.flat._version
        else:
            for member, values in zip(self.with_values, self.all_values(), strict=True):
                member.seen = values._version

    @staticmethod
    def _warn_of_lost() -> None:
        warnings.warn(
            "Within an optimizer's step somebody has written into a masked tensor (or taken its .data), and then its "
            "selected entries were stepped from where they were before; what was written is lost at these. Write "
            "before the step or after it.", FishTuningWarning, stacklevel=2,
        )  # fmt: skip

    def notice_moved(self) -> None:
        """See whether values have got other memory while they were not watched, as some optimizers give it."""
        if list(map(Tensor.data_ptr, self.all_values())) != self._places_of_values:
            self.held = True

    def find_flat(self) -> None:
        """See whether the values are slices of one memory, with one count of changes."""
        parameters: list[Any] = [member.values for member in self.with_values]
        self.flat, self.one_count = None, False
        if any(values.held for values in parameters):
            held_by_others.add(self)
        for values in parameters:
            values.held = False
        self.held, self._places_of_values = False, [values.data_ptr() for values in parameters]
        if not parameters:
            return
        first, counts = parameters[0], [values._version for values in parameters]
        increment_version(first)
        sizes = [values.numel() * values.element_size() for values in parameters]
        places = [first.data_ptr() + start for start in itertools.accumulate(sizes[:-1], initial=0)]
        memories = {values.untyped_storage().data_ptr() for values in parameters}
        if len(memories) == 1 and places == self._places_of_values:
            entries = sum(values.numel() for values in parameters)
            self.flat = first.detach().as_strided((entries, *first.shape[1:]), first.stride())
            self.one_count = [values._version for values in parameters] == [count + 1 for count in counts]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "flat": None, "settled": False, "one_count": False, "_plains": [], "_counts": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_places" not in state:  # whose tensors lie in another order, which gradients would not follow
            raise MaskError(
                "This masked model was pickled by an earlier version of fish-tuning, which kept its tensors otherwise. "
                "Load it with that version, and save its adapter (save_pretrained) or its state dict."
            )
        vars(self).update(state)
        for member in self.members:
            member.in_group = weakref.ref(self)

    def _join(self) -> None:
        """Put the tensors into one memory, unless they are there, or cannot be."""
        tensors = [member.frozen for member in self.members]
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if len(tensors) < 2 or len(kinds) > 1 or not all(tensor.dim() for tensor in tensors):
            self.take_apart()
            return
        memories = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if self.joined is not None and memories == {self.joined[0].untyped_storage().data_ptr()}:
            return
        memory = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
        starts = starts_of([tensor.shape for tensor in tensors])
        for member, start in zip(self.members, starts, strict=True):
            place = memory[start : start + member.frozen.numel()].view(member.shape)
            member.frozen = place.copy_(member.frozen).data  # with a count of changes of its own
        index = torch.cat([member.index + start for member, start in zip(self.members, starts, strict=True)])
        ends = itertools.accumulate(member.num_selected for member in self.members)
        places = [
            (end - each.num_selected, end, start) for each, end, start in zip(self.members, ends, starts, strict=True)
        ]
        self.joined, self._places = (memory, index), dict(zip(self.members, places, strict=True))
        for member in self.members:
            member.own_index = None


def small_groups(sizes: Sequence[int], keys: Sequence[Any], gpu: bool = False) -> list[list[int]]:
    """The places of tensors of these sizes that go together: small neighbours of one key; those of key None, alone."""
    together = _TOGETHER_ON_GPU if gpu else _TOGETHER
    groups: list[list[int]] = []
    open_groups: dict[Any, tuple[int, list[int]]] = {}  # by key: entries and members
    for place, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        members = [place]
        if size <= _SMALL and key is not None:
            entries, others = open_groups.get(key, (0, []))
            if others and entries + size <= together:
                size, members = entries + size, others
                members.append(place)
            open_groups[key] = size, members
        if len(members) == 1:
            groups.append(members)
    return groups
