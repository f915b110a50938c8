"""A layer that is watched during a batched pass, and what it does with the gradients that the backward pass brings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from fish_tuning.devices import multiplies_bf16
from fish_tuning.errors import FisherError
from fish_tuning.scores.checks import Check
from fish_tuning.scores.example_gradients import Each, ExampleGradients, OuterProducts
from fish_tuning.scores.layer_rules import LayerRule
from fish_tuning.scores.loss_scale import LossScale
from fish_tuning.scores.mixed_precision import without_autocast
from fish_tuning.scores.row_order import Known, ordered_by_data
from fish_tuning.scores.small_products import SmallProducts
from fish_tuning.scores.totals import Totals

Relation = tuple[str, int]
Arrived = tuple[Any, tuple[Tensor, ...], Tensor]  # what a layer wrote down of a call, what it kept, the gradient
Call = tuple[nn.Module, Tensor, Tensor]
_WINDOWS: Relation = ("", 0)
BY_DATA = "data decide where an example's rows are"


@dataclass
class Pass:
    """What the watched layers of a model share during one forward and backward pass.

    `broken` maps tensors whose layer was called in a way that cannot be scored in a batch to the reason; nothing is
    added for them.
    """

    batch_size: int = 0
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the batch's tensors
    given: list[Tensor] = field(default_factory=list)  # to the model, of the batch's
    anchor: Tensor | None = None  # None between passes
    scale: LossScale = field(default_factory=lambda: LossScale(fp16=False))  # of the losses whose gradients come
    small: SmallProducts = field(default_factory=SmallProducts)
    into: Totals | None = None  # set during the backward pass
    check: Check | None = None
    broken: dict[str, str] = field(default_factory=dict)
    expanded: list[WatchedLayer] = field(default_factory=list)  # whose one row became a row an example
    repeated: set[nn.Module] = field(default_factory=set)  # whose one row the model repeats itself: it stays one
    by_data: set[nn.Module] = field(default_factory=set)  # that see images, of which data decide which rows have any
    order: Known = field(default_factory=Known)
    tracked: bool = False  # whether the pass is one that tells the order of rows

    def is_of_batch(self, x: Tensor) -> bool:
        """Whether it is a tensor of the batch, or that in another shape: then its rows are the examples'."""
        return x.is_contiguous() and any(
            value.data_ptr() == x.data_ptr() and value.numel() == x.numel() and value.is_contiguous()
            for value in self.given
            if value.dtype == x.dtype and value.device == x.device
        )

    def relations(self, shape: torch.Size) -> set[Relation]:
        """Why a layer's tensor may have several rows an example.

        That is the tensors of the batch, and how many of their dimensions after the first, that multiply to as many
        rows. For a layer of three dimensions and more `_WINDOWS` is enough: with one image an example, no data decide
        how many parts of it there are. Of several, or of a text's parts, blank ones may be left out.
        """
        rows, rest = divmod(shape[0] if shape else 1, self.batch_size)
        if rest:
            return set()
        found: set[Relation] = set()
        for key, own in self.shapes.items():
            found |= {(key, end) for end in range(2, len(own) + 1) if own[1:end].numel() == rows}
        if len(shape) > 2 and 2 < max(map(len, self.shapes.values()), default=0) < 5:
            found.add(_WINDOWS)
        return found


class WatchedLayer(ABC):
    """Collects what the backward pass brings and adds it up once all its calls are there.

    `names` maps the names of its tensors, relative to the module, to those in the model.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], state: Pass) -> None:
        self.module, self.names, self.state = module, names, state
        self.handles: list[RemovableHandle] = []
        self.calls = 0
        self.arrived: list[Arrived] = []
        self.relations: set[Relation] | None = None  # what an example's rows of the layer are as many as
        self.a_row_an_example = False  # whether it had as many rows as there were examples
        self.by_data: bool | None = None  # whether data decide where these are; None where it was not looked at
        self.untold = False  # whether a graph would have to tell it that was not there
        self.settled = False  # whether an earlier pass told it

    @property
    def of_users(self) -> bool:
        """Whether it goes by a rule that did not come with this library."""
        return False

    def watch(self) -> None:
        self.handles = [self.module.register_forward_hook(self.after_forward, with_kwargs=True)]

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def start(self) -> None:
        self.calls, self.arrived, self.settled = 0, [], self.by_data is not None

    @abstractmethod
    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: puts probes behind the module's outputs."""

    @abstractmethod
    def add_up(self) -> None:
        """Add what has arrived to the totals."""

    def probe(self, output: Tensor, call: Any, kept: tuple[Tensor, ...]) -> Tensor:
        """`output`, which hands its gradient, with `call` and what was `kept` of the call, to `receive`."""
        if is_functorch_wrapped_tensor(output):
            self.fail("it is called within a transform of torch.func, such as torch.vmap")
            return output
        if self.state.into is None:  # not a recomputation, which checkpointing does in the backward pass
            self.calls += 1
        probed: Tensor = _Probe.apply(output, self.state.anchor, self, call, *kept)  # type: ignore[no-untyped-call]
        return probed

    def look_at_order(self, *inputs: Tensor) -> None:
        """Of inputs whose rows are as many as the examples, or as all their tokens.

        In one pass; where rows are picked one by one, in each, whose numbers alone tell that they are in order.
        """
        size, known = self.state.batch_size, self.state.order
        if self.by_data or (self.settled and not known.picked) or self.state.into is not None:
            return
        if any(map(is_functorch_wrapped_tensor, inputs)):
            return
        doubtful = [x for x in inputs if self._is_doubtful(x.shape)]
        without = [x for x in doubtful if self._is_untold(x)]
        if any(ordered_by_data(x, size, known) for x in doubtful):
            self.by_data = True
        elif doubtful and self.state.tracked:
            # A graph that has to be made does not come with each batch, and there may be none.
            self.by_data = self.untold and (known.picked or len(without) == len(doubtful))
        elif without and not self.settled:  # tokens in one row of rows
            self.untold, self.by_data = True, None
        elif doubtful and not self.untold:
            self.by_data = False

    def _is_doubtful(self, shape: torch.Size) -> bool:
        rows, size = shape[:1].numel(), self.state.batch_size
        return len(shape) >= 2 if rows == size else rows != 1 and bool(self.state.relations(shape))

    def _is_untold(self, x: Tensor) -> bool:
        tokens = x.dim() == 2 and x.is_floating_point()
        return tokens and not x.requires_grad and not self.state.is_of_batch(x)

    def is_proving(self) -> bool:
        """Whether this backward pass proves the layer."""
        check, own = self.state.check, self.names.values()
        return check is not None and not (check.alone.isdisjoint(own) and check.together.isdisjoint(own))

    def receive(self, call: Any, kept: tuple[Tensor, ...], g: Tensor) -> None:
        if self.state.into is None:  # a force, say, on which the model trains: it hangs on the layer by that way too
            self.fail("a gradient is taken through it to get the loss")
            return
        self.arrived.append((call, kept, g))
        if len(self.arrived) == self.calls:
            self.add_up()

    def serves_all(self, output: Tensor) -> bool:
        """Whether the output is one row of positions for all examples."""
        one_row = isinstance(self.module, nn.Embedding) and output.shape[:1].numel() == 1 < self.state.batch_size
        return one_row and not is_functorch_wrapped_tensor(output) and self.module not in self.state.repeated

    def a_row_each(self, output: Tensor) -> Tensor:
        """Of such an output: then each example's gradient arrives by itself."""
        self.state.expanded.append(self)
        return output.expand(self.state.batch_size, *output.shape[1:])

    def fail(self, reason: str) -> None:
        self.state.broken.update(dict.fromkeys(self.names.values(), reason))

    @property
    def failed(self) -> bool:
        broken = self.state.broken
        return bool(broken) and not broken.keys().isdisjoint(self.names.values())

    def examples_in_order(self, shape: torch.Size) -> bool:
        """Whether the rows of the layer's first dimension may be the examples', one after another; else it fails.

        They may be several an example where the batch's shapes say how many, and always in the same way: windows,
        choices, or all tokens. Not where data decide, as with tokens that are routed to experts: a number that fits by
        chance is no batch. Whether they are in that order, the layer's proof shows.
        """
        rows, size = shape[0] if shape else 1, self.state.batch_size
        self.a_row_an_example |= rows == size
        if rows != size:
            found = self.state.relations(shape)
            unproven = self.a_row_an_example and self.relations is None and not self.is_proving()
            self.relations = found if self.relations is None else self.relations & found
            if not self.relations:
                self.fail(f"it was called with first dimension {rows}, not with the {size} examples of the batch")
                return False
            if unproven:
                self.fail("an example has several rows, which none had in its proof")
                return False
        by_data = self.by_data or (rows == size and self.module in self.state.by_data)
        if by_data:
            self.fail(BY_DATA)
        return not by_data


class BatchedLayer(WatchedLayer):
    """A layer whose examples' gradients follow from its inputs and its outputs' gradients, all at once."""

    @abstractmethod
    def calls_by_example(self, arrived: list[Arrived]) -> list[Call]:
        """What has arrived, each call as its module, its input (n, P, ...) and its output's gradient (n, P, ...).

        Empty where it fails.
        """

    @abstractmethod
    def gradients(self, calls: list[Call]) -> Iterator[tuple[str, ExampleGradients]]:
        """Each tensor's name in the model and its gradients."""

    def add_up(self) -> None:
        """Of small layers, which hundreds may be, what Python does here takes longer than the products."""
        arrived, self.arrived = self.arrived, []
        if not arrived or self.failed:
            return
        calls = self.calls_by_example(arrived)
        if not calls:
            return
        into, check = self.state.into, self.state.check
        with without_autocast(calls[0][2].device):
            if check is not None:
                calls = self._add_checksums(check, calls)
            for name, gradients in self.gradients(calls):
                outer = check is None and isinstance(gradients, OuterProducts)
                if outer and self.state.small.take(into, name, gradients):  # type: ignore[arg-type]
                    continue
                squares = gradients.squares()
                if squares.shape != into.squares[name].shape:  # type: ignore[union-attr]
                    # A layer derived from one that has a rule may use its weight in another way.
                    self.fail(f"its rule gave a gradient of shape {tuple(squares.shape)}")
                    return
                into.add(name, squares, gradients.sum)  # type: ignore[union-attr]
                if check is not None and name in check.together:
                    check.made.add(check.of_batch, name, squares, gradients.sum)

    def _add_checksums(self, check: Check, calls: list[Call]) -> list[Call]:
        """Of one row, and of the batch's sum; gives the calls freed of the weights."""
        own = self.names.values()
        if not check.together.isdisjoint(own):
            for name, gradients in self.gradients(calls):
                if name in check.together:
                    check.made.add_gradient(check.of_sum, name, gradients.sum())
        if check.together:
            calls = [(m, x, g / check.weights.to(g).view(-1, *[1] * (g.dim() - 1))) for m, x, g in calls]
        if not check.alone.isdisjoint(own):
            few = [(module, _of_rows(x, check.rows), _of_rows(g, check.rows)) for module, x, g in calls]
            for name, gradients in self.gradients(few):
                if name in check.alone:
                    check.made.add(check.of_row, name, gradients.squares(), gradients.sum)
        return calls


class RuleLayer(BatchedLayer):
    """A layer whose type has a rule."""

    def __init__(self, module: nn.Module, names: dict[str, str], state: Pass, rule: LayerRule) -> None:
        super().__init__(module, names, state)
        self.rule = rule
        self._in_bf16 = False  # what has arrived

    @property
    def of_users(self) -> bool:
        return not self.rule.gradients.__module__.startswith("fish_tuning.")

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = self.state
        if not self.names or state.anchor is None:
            return None
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not isinstance(output, Tensor):
            self.fail("its input or output is no tensor")
            return None
        if is_functorch_wrapped_tensor(output):  # whose shape and graph tell nothing of the batch
            return self.probe(output, None, ())
        self.look_at_order(x)
        if self.serves_all(output) and x.shape[0] == 1:
            x, output = x.expand(state.batch_size, *x.shape[1:]), self.a_row_each(output)
        return self.probe(output, None, (self.rule.keep(module, x, output),))

    def calls_by_example(self, arrived: list[Arrived]) -> list[Call]:
        calls, dtypes = [], set()
        for _, (kept,), gradient in arrived:
            if kept.shape[0] != gradient.shape[0]:
                self.fail(f"its input has first dimension {kept.shape[0]}, its output {gradient.shape[0]}")
            if self.failed or not self.examples_in_order(gradient.shape):
                return []
            x = as_multiplied(kept, gradient.dtype)
            dtypes |= {x.dtype, gradient.dtype}
            pair = self.rule.positions(self.module, exactly(x), self.state.scale.unscaled(exactly(gradient)))
            calls.append([_by_example(side, self.state.batch_size) for side in pair])
        x, g = calls[0] if len(calls) == 1 else (torch.cat(side, dim=1) for side in zip(*calls, strict=True))
        self._in_bf16 = dtypes == {torch.bfloat16} and multiplies_bf16(g.device)
        return [(self.module, x, g)]

    def gradients(self, calls: list[Call]) -> Iterator[tuple[str, ExampleGradients]]:
        ((_, x, g),) = calls
        for local, gradients in self.rule.gradients(self.module, x, g).items():
            if local not in self.names:
                continue
            if isinstance(gradients, Tensor):
                shape = (x.shape[0], *self.module.get_parameter(local).shape)
                if gradients.shape != shape:
                    raise FisherError(
                        f"The rule of {type(self.module).__name__} gave a tensor of shape {tuple(gradients.shape)} for "
                        f"{local!r}; it must give each example's gradient, here {shape} (no squares, no sum)."
                    )
                gradients = Each(gradients)
            if self._in_bf16 and isinstance(gradients, OuterProducts):
                weighted = self.state.check is not None and self.state.check.together  # freed of it: other numbers
                gradients = gradients if weighted else replace(gradients, dtype=torch.bfloat16)
            yield self.names[local], gradients


class _Probe(torch.autograd.Function):
    """Identity on `output` whose backward pass hands what was kept of the call, and the gradient, to the layer."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, layer: WatchedLayer, call: Any, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.call = layer, call
        return output.detach()  # not a view, which in-place layers behind it (ReLU) could not change

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        try:
            kept = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            ctx.layer.fail("its input is changed in place")
        else:
            ctx.layer.receive(ctx.call, kept, grads[0])
        return grads[0], *[None] * len(ctx.needs_input_grad[1:])


def _of_rows(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """Without a copy of the numbers to a device, as indexing with them is."""
    parts = [tensor[number, None] for number in numbers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    """(n * m, P, ...) as (n, m * P, ...)."""
    return tensor if tensor.shape[0] == examples else tensor.reshape(examples, -1, *tensor.shape[2:])


def as_multiplied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An input as a layer with outputs of `dtype` multiplied it: an autocast has rounded it to as few bits first."""
    if tensor.dtype == dtype:
        return tensor
    floats = tensor.is_floating_point() and dtype.is_floating_point
    return tensor.to(dtype) if floats and torch.finfo(dtype).bits < torch.finfo(tensor.dtype).bits else tensor


def exactly(tensor: Tensor) -> Tensor:
    """Floats in fp32, for exact sums of squares."""
    return tensor.float() if tensor.dtype != torch.float32 and tensor.is_floating_point() else tensor
