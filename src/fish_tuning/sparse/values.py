"""The tensors of a masked tensor that notice what autograd does not count: changes through `.data`."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fish_tuning.errors import MaskError

DATA: Any = torch.Tensor.data
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_A_TIME, _ON_GPU = 2**16, 2**20  # entries whose bits are added at a time: in a processor's cache, and in few calls
_FACTOR, _SHIFT = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D  # any odd numbers of 63 bits
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad


def entries_digest(entries: Tensor) -> str:
    """`dtype:sha256` of the entries' own bytes; empty for a tensor without data (on the meta device)."""
    if entries.is_meta:
        return ""
    stored = entries.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return f"{str(entries.dtype).removeprefix('torch.')}:{hashlib.sha256(stored.data).hexdigest()}"


def frozen_sum(whole: Tensor, index: Tensor) -> tuple[torch.dtype, int] | None:
    """The dtype, and the sum of the bits of all entries but those at `index`, each with a weight that its place gives.

    Some nanoseconds an entry, where the tensor lies; a digest would have it copied to the CPU. None for one without
    data (on the meta device).
    """
    if whole.is_meta or whole.element_size() not in _BITS:
        return None
    bits = whole.detach().reshape(-1).view(_BITS[whole.element_size()])
    size = _AT_A_TIME if bits.device.type == "cpu" else _ON_GPU
    weights = torch.arange(min(len(bits), size), device=bits.device).mul_(_FACTOR).add_(_SHIFT)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), size):
        part = bits[start : start + size]
        total += (part * weights[: len(part)]).sum() + part.sum() * start * _FACTOR  # all of it modulo 2**64
    for places in index.to(bits.device).split(size):
        total -= (places.long() * _FACTOR + _SHIFT).mul_(bits[places.long()]).sum()
    return whole.dtype, int(total)


def frozen_as_before(whole: Tensor, index: Tensor, before: tuple[torch.dtype, int] | None) -> bool:
    """Whether the entries but those at `index` have that sum; in another dtype, where it can be told."""
    if before is not None and whole.element_size() > before[0].itemsize:
        whole = whole.to(before[0])
    return before is None or whole.dtype != before[0] or frozen_sum(whole, index) in (before, None)


class Watched(Tensor):
    """A tensor that also counts what is done to it through `.data`, and whose `requires_grad` is set in one place."""

    # What is computed of it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        increment_version(self)
        self._hand_out()
        plain: Tensor = DATA.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.numel() != self.numel():
            self._resized(value.shape)
        increment_version(self)
        self._hand_out()
        DATA.__set__(self, value)
        self._assigned()

    def _hand_out(self) -> None:
        """Somebody has its `.data`, and may keep it."""

    def _resized(self, shape: torch.Size) -> None:
        """Its memory is given up, or comes back."""

    def _assigned(self) -> None:
        """It has other memory now."""

    @property
    def requires_grad(self) -> bool:
        flag: bool = _REQUIRES_GRAD.__get__(self)
        return flag

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)


class Whole(Watched):
    """The whole tensor that reads give. Who asks it for gradients, or not, asks the values."""

    of: weakref.ref[Values] | None = None
    without_values: weakref.ref[Any] | None = None  # the masked tensor that it is read of, if no entry of that trains
    instead_of: weakref.ref[Whole] | None = None  # what other reads give, where this one has a node of its own

    def requires_grad_(self, requires_grad: bool = True) -> Whole:
        values = self.of() if self.of is not None else None
        if values is not None:
            values.requires_grad_(requires_grad)
        return self

    def _resized(self, shape: torch.Size) -> None:
        raise MaskError(
            f"A masked tensor of shape {tuple(self.shape)} would get another size (resize_token_embeddings does so), "
            "of which its mask tells nothing. remove_mask(model) first, or resize before you score."
        )

    def _assigned(self) -> None:
        masked = self.without_values() if self.without_values is not None else None
        if masked is not None and masked.tensor is self:
            masked.keep_memory()  # now, since nothing is looked at for values later
        usual = self.instead_of() if self.instead_of is not None else None
        if usual is not None:
            usual.data = DATA.__get__(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By itself it is copied as the parameter that it stands for; its values go with the module (nn.LSTM)."""
        return nn.Parameter, (DATA.__get__(self), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(DATA.__get__(self).clone(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]


class MaskedGroup(Protocol):
    """What values and optimizers know of the group of masked tensors that values belong to."""

    settled: bool
    stale: bool
    managed: bool
    scattered: bool
    held: bool
    switched: bool
    one_count: bool
    flat: Tensor | None

    def end_step(self) -> None:
        """An optimizer has stepped: whether the gradients of all came in one backward pass is known now."""

    def all_values(self) -> list[Any]:
        """The values of its tensors, in the order of `flat`."""

    def check_not_whole(self, values: Any, shape: torch.Size) -> None:
        """MaskError where what takes the memory of values has the shape of the whole tensor."""

    def notice_moved(self) -> None:
        """See whether values have other memory while they were not watched."""

    def find_flat(self) -> None:
        """See whether the values are slices of one memory, with one count of changes."""

    def take_written(self) -> None:
        """Where somebody has written into a tensor itself, its entries are the values now."""

    def take_last(self) -> None:
        """The same, unless the values have changed since they were written."""

    def write(self) -> None:
        """Write the values into the tensors."""


class GroupReference(weakref.ref[MaskedGroup]):
    """To the group of values, which finds them again where it is loaded: an error in a step leaves them ordinary
    parameters until the next read, and these are pickled with all that they know."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _no_group, ()


def _no_group() -> None: ...


class Values(Watched, nn.Parameter):
    """The selected entries: of a vector (k,), of a tensor of more dimensions (k, 1).

    Optimizers tell matrices from vectors by that, as LoRA+ does and some rules for weight decay.
    """

    masked_group: GroupReference | None = None
    held = False  # whether somebody has had its `.data`, and may have kept it

    def requires_grad_(self, requires_grad: bool = True) -> Values:
        _REQUIRES_GRAD.__set__(self, requires_grad)
        group = self.masked_group() if self.masked_group is not None else None
        if group is not None:
            group.switched, group.settled = True, False
        return self

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """As `Tensor.register_hook`. One node hands on the gradients of a group, and None where a pass gives none."""
        return super().register_hook(lambda gradient: None if gradient is None else hook(gradient))  # type: ignore[no-untyped-call]

    def _hand_out(self) -> None:
        self.held = True
        group = self.masked_group() if self.masked_group is not None else None
        if group is not None:
            group.held = True

    def _resized(self, shape: torch.Size) -> None:
        group = self.masked_group() if self.masked_group is not None else None
        if group is not None:
            group.check_not_whole(self, shape)
            group.scattered, group.settled = True, False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Values, (DATA.__get__(self), self.requires_grad)


def watch_again(parameters: Iterable[Any]) -> None:
    """Have ordinary parameters notice what autograd does not count; any other is left as it is."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter:
            parameter.__class__ = Values


def stop_watching(parameters: Iterable[Any]) -> None:
    """Make ordinary parameters of values, until `watch_again`."""
    for parameter in parameters:
        if type(parameter) is Values:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
