"""A masked tensor: the values that train, and the whole tensor that they are part of.

What is read is made once and written once a step. Here is when and how; `masked_tensors.py` has where it sits.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

STEPS = [
    0
]  # of optimizers that hold no values: an engine may have changed them behind, so what was read is out of date
_AT_ONCE = 2**62
_of_values: weakref.WeakValueDictionary[int, MaskedTensor] = weakref.WeakValueDictionary()


def entries_digest(entries: Tensor) -> str:
    """`dtype:sha256` of the entries' own bytes; empty for a tensor without data (on the meta device)."""
    if entries.is_meta:
        return ""
    stored = entries.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return f"{str(entries.dtype).removeprefix('torch.')}:{hashlib.sha256(stored.data).hexdigest()}"


_DATA: Any = torch.Tensor.data


class _Watched(Tensor):
    """A tensor that also counts what is done to it through `.data`, which autograd does not."""

    # What is computed of it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        increment_version(self)
        plain: Tensor = _DATA.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        increment_version(self)
        _DATA.__set__(self, value)


class _Values(_Watched, nn.Parameter):
    """The selected entries: of a vector (k,), of a tensor of more dimensions (k, 1).

    Optimizers tell matrices from vectors by that, as LoRA+ does and some rules for weight decay.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Values, (_DATA.__get__(self), self.requires_grad)


class MaskedTensor:
    """One masked tensor: the trainable `values`, where they belong, and the whole tensor that reads give.

    `values` is the module's parameter, under the tensor's own name. Whoever reads that name gets `tensor`, which
    shares its memory with `frozen` and hands its gradient at the selected entries on to `values`. The values are
    written into it after every step of an optimizer, and when a read finds that they have changed otherwise.
    """

    replaced = False  # whether another mask stood here before, whose entries were trained too

    def __init__(self, dense: nn.Parameter, selected: Tensor) -> None:
        index = selected.flatten().nonzero()[:, 0].to(dense.device)
        entries = dense.detach().take(index)
        self.index = index.to(torch.int32) if dense.numel() < 2**31 else index
        self.shape = dense.shape
        self.dense = dense  # the object that an unmasked model gets back
        self.digest = entries_digest(entries)  # of the entries before training: tells a delta's base from others
        entries = entries if dense.dim() == 1 else entries[:, None]
        self.values: nn.Parameter | None = _Values(entries) if len(index) else None
        self.frozen = dense.detach().contiguous()
        self.hooks: tuple[RemovableHandle, ...] = ()
        self.group = Group([self])
        self.tensor: Any = None  # what reads give
        self.plain: Any = None  # the same for compiled models, which take no tensors of other classes
        self.trains = False  # whether `tensor` has a gradient
        self.seen = self.step = self.written = -1

    def read(self) -> Tensor:
        """The whole tensor, whatever has happened to it or to the values."""
        if self.tensor is None:
            self.group.bind()
        if self.values is not None and not is_dynamo_compiling():
            if self.values.requires_grad is not self.trains:
                self.group.bind()
            self.group.write()
        tensor: Tensor = self.plain if is_dynamo_compiling() else self.tensor
        return tensor

    def take_entries(self) -> None:
        """Somebody wrote into the tensor itself, so its entries are the values now."""
        values: Any = self.values
        if self.tensor.data_ptr() != self.frozen.data_ptr():  # or put another memory in its place
            self.frozen.data.copy_(_DATA.__get__(self.tensor))
            _DATA.__set__(self.tensor, self.frozen)
        values.copy_(self.frozen.view(-1).index_select(0, self.index).view_as(values))

    def read_with(self, values: Any) -> Any:
        """What a read gives while something else stands in the place of the values, as sharding engines have it."""
        if not isinstance(values, Tensor) or values.numel() != len(self.index) or hasattr(values, "full_tensor"):
            return values  # another parameter, or a part of it on each device, which FSDP wants to see as it is
        index, frozen = self.index.to(values.device), self.frozen.to(values.device)
        frozen.data.view(-1).index_copy_(0, index.long(), values.detach().flatten().to(frozen.dtype))
        return _Selected.apply([index], None, [frozen], values)[0]  # type: ignore[no-untyped-call]

    def dense_of(self, values: Any) -> Tensor:
        """The whole tensor with these values, in memory of its own."""
        values = values.full_tensor() if hasattr(values, "full_tensor") else values
        dense = self.frozen.detach().clone()
        dense.view(-1).index_copy_(0, self.index.long(), values.detach().flatten().to(dense))
        return dense

    def move(self, change: Any, values: nn.Parameter | None) -> None:
        """Follow the module to another device or dtype, where its parameter is `values`."""
        self.frozen = change(self.frozen).contiguous()
        self.index = self.index.to(change(self.index).device)  # its numbers stay, even where memory is given up
        self.values = values
        self.group.bind()

    def selected(self) -> Tensor:
        selected = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        selected.view(-1)[self.index.long()] = True
        return selected

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensor of reads, which is made again: a tensor with a history cannot be copied."""
        return {**vars(self), "tensor": None, "plain": None}


class Group:
    """Masked tensors that are written, and hand on their gradients, in one go.

    Small ones of a layer are, and share memory for it; a large one is alone in its group.
    """

    def __init__(self, members: list[MaskedTensor]) -> None:
        self.members = members
        self.joined: tuple[Tensor, Tensor] | None = None  # the memory that all share, and the selected entries in it
        for member in members:
            member.group = self

    def bind(self) -> None:
        """Make the tensors that reads give; each lasts until its parameter moves, thaws or freezes."""
        self._join()
        for member in self.members:
            member.trains = member.values is not None and member.values.requires_grad
        for member, tensor, plain in zip(self.members, self._tensors(), self._tensors(), strict=True):
            tensor.__class__ = _Watched
            member.tensor, member.plain, member.written = tensor, plain, tensor._version
            if member.values is not None:
                _of_values[id(member.values)] = member
        self.write()

    def _tensors(self) -> list[Tensor]:
        """The members' whole tensors, in their memory; the gradient of those that train goes to the values."""
        tensors = [member.frozen.detach() for member in self.members]
        training = [(place, member) for place, member in enumerate(self.members) if member.trains]
        if training:
            joined = self.joined[1] if self.joined is not None and len(training) == len(tensors) else None
            indices, frozen = [each.index for _, each in training], [each.frozen for _, each in training]
            with torch.inference_mode(False), torch.enable_grad():
                made = _Selected.apply(indices, joined, frozen, *[each.values for _, each in training])  # type: ignore[no-untyped-call]
            # Autograd runs what was made last first; this is to run as soon as it can, and let dense gradients go.
            made[0].grad_fn._set_sequence_nr(_AT_ONCE)
            for (place, _), tensor in zip(training, made, strict=True):
                tensors[place] = tensor
        return tensors

    def write(self) -> None:
        """Write the values into the tensors.

        Past autograd, which need not see a change of what it saved where an optimizer has stepped since.
        """
        members = [member for member in self.members if member.values is not None]
        with torch.no_grad():
            for member in members:
                if member.tensor._version != member.written:
                    member.take_entries()
                    member.written = member.tensor._version
            if self.joined is not None:
                memory, index = self.joined
                values = torch.cat([member.values for member in members])  # type: ignore[misc]
                memory.index_copy_(0, index.long(), values.view(-1).to(memory.dtype))
            else:
                for member in members:
                    values = member.values.detach().view(-1).to(member.frozen.dtype)  # type: ignore[union-attr]
                    member.frozen.data.view(-1).index_copy_(0, member.index.long(), values)
        for member in members:
            member.seen, member.step = member.values._version, STEPS[0]  # type: ignore[union-attr]

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


class _Selected(torch.autograd.Function):
    """Whole tensors, of which only the selected entries have a gradient, that of `values`.

    It saves nothing of a forward pass, so one node serves every pass: what it computes depends on positions alone.
    """

    @staticmethod
    def forward(
        ctx: Any, indices: list[Tensor], joined: Tensor | None, frozen: list[Tensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.indices, ctx.joined, ctx.shapes = indices, joined, [tensor.shape for tensor in values]
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.joined is not None and all(grad is not None for grad in grads):
            entries = torch._utils._flatten_dense_tensors(grads).index_select(0, ctx.joined)
            shapes = ctx.shapes
            return (None, None, None, *entries.view(-1, *shapes[0][1:]).split([shape[0] for shape in shapes]))
        return (None, None, None, *map(_gathered, grads, ctx.indices, ctx.shapes))


def _gathered(grad: Tensor | None, index: Tensor, shape: torch.Size) -> Tensor | None:
    if grad is None:
        return None
    # take() reads any layout in place, where reshape(-1) would copy the whole gradient; index_select is faster.
    flat = grad.view(-1).index_select(0, index) if grad.is_contiguous() else grad.take(index.long())
    return flat.view(shape)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """After every step of every optimizer of the process."""
    groups = {
        masked.group
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (masked := _of_values.get(id(parameter))) is not None and masked.values is parameter
    }
    if not groups:  # an engine's own copy of the parameters may have been changed
        STEPS[0] += 1
    for group in groups:
        group.write()  # now, because compiled models do not look whether they are out of date


register_optimizer_step_post_hook(_after_step)
