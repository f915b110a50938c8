"""DeepSpeed's ZeRO-3: its hooks gather what is frozen for each module's passes; what trains is out of their sight.

At each module, ZeRO's hooks ask a coordinator to gather and to release. That one learns the order of the modules from
every pass and fetches ahead by it, and takes every parameter for one of its own. So another answers while a model is
scored: it goes by what a module holds, and leaves alone what it does not know. Written against DeepSpeed 0.19.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_parameter
from fish_tuning.scores.zero3_hooks import hooked
from fish_tuning.sparse.sharding import ZERO3
from fish_tuning.sparse.zero import behind, deepspeed_hooks, gather, is_split, is_together, left_by_engines, whole_copy

_OFTEN = 2**40  # above 0 however often it is counted down
_UNTRIED = {  # of the object behind the hooks, and how DeepSpeed's configuration calls it
    "zero_quantized_weights": "zero_quantized_weights",
    "zero_quantized_nontrainable_weights": "zero_quantized_nontrainable_weights",
    "zero_param_parallel_group": "zero_hpz_partition_size",
    "zenflow": "zenflow",
}
_COUNTERS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")  # of each module


class Zero3:
    """What scoring asks of it."""

    name = ZERO3

    def gathers(self, module: nn.Module) -> bool:
        """Whether ZeRO-3 has split a tensor of the module or of a part of it."""
        return any(is_split(parameter) for parameter in every_parameter(module))

    @contextmanager
    def only_frozen(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Whole copies of what trains."""
        with ExitStack() as stack:
            if left_by_engines(model):
                stack.enter_context(hooked(model))
            else:
                _check_no_gradients(trained)
            engines = _engines(model)
            for engine in engines:
                engine.get_param_coordinator()._clean_inflight_param_registry()  # what it has fetched ahead
            gatherer = Gatherer(chain.from_iterable(engine.module.parameters() for engine in engines), trained)
            stack.callback(gatherer.release_all)
            for engine in engines:
                _keep_traces(engine.module, stack)
                engine.get_param_coordinator = lambda *_: gatherer
                stack.callback(delattr, engine, "get_param_coordinator")
            yield [whole_copy(parameter) for parameter in trained]


class Gatherer:
    """Answers ZeRO-3's hooks in its coordinator's place, for the parameters that are not in `trained`.

    What was together before stays so, and so does, until the end, what ZeRO is set to keep together once gathered.
    """

    def __init__(self, parameters: Iterator[Any], trained: Sequence[nn.Parameter]) -> None:
        self._trained = set(trained)
        self._parameters = [each for each in dict.fromkeys(parameters) if is_split(each)]
        self._kept = {each for each in self._parameters if is_together(each)}
        self._users: dict[Any, set[tuple[int, bool]]] = defaultdict(set)  # the modules in whose passes it is needed
        self._inputs: dict[nn.Module, int] = {}  # how many of a module's inputs get a gradient

    def reset_step(self) -> None:
        """A pass begins. What the last one has left: modules of which a backward pass reached the outputs alone."""
        self._users.clear()
        for parameter in self._parameters:
            self._release(parameter)

    def trace_prologue(self, module: nn.Module) -> None:
        """The order of the modules is nothing to go by here."""

    def is_record_trace(self) -> bool:
        """Nor to be learnt."""
        return False

    @torch.no_grad()
    def fetch_sub_module(self, module: Any, forward: bool) -> None:
        """Before a module's forward or backward pass."""
        own = self._of(module)
        for parameter in own:
            self._users[parameter].add((id(module), forward))
        gather([parameter for parameter in own if not is_together(parameter)])
        if not forward and module.ds_grads_remaining <= 0:  # another backward pass of the same forward pass
            module.ds_grads_remaining = self._inputs.get(module, 0)

    @torch.no_grad()
    def release_sub_module(self, module: Any, forward: bool = False) -> None:
        """After it."""
        if forward:
            self._inputs[module] = vars(module).get("ds_grads_remaining", 0)
            if torch._C._current_graph_task_id() >= 0:  # activation checkpointing, whose backward pass comes next
                return
        for parameter in self._of(module):
            self._users[parameter] -= {(id(module), True), (id(module), forward)}
            self._release(parameter)

    def release_all(self) -> None:
        """As it was before."""
        self._users.clear()
        for parameter in self._parameters:
            if parameter not in self._kept and is_together(parameter):
                parameter.partition()

    def _of(self, module: Any) -> list[Any]:
        """What ZeRO gathers for a module, of all that is frozen."""
        whole = getattr(module, "_z3_leaf", False)  # it has one hook for all its parts
        own = chain(module.parameters(recurse=whole), (each for _, each in module.ds_external_parameters()))
        return [each for each in dict.fromkeys(own) if is_split(each) and each not in self._trained]

    def _release(self, parameter: Any) -> None:
        stays = parameter.ds_persist or parameter in self._kept or parameter in self._trained
        if not stays and not self._users[parameter] and is_together(parameter):
            parameter.partition()


def _keep_traces(model: nn.Module, stack: ExitStack) -> None:
    """What the hooks themselves write down, and those that would reduce gradients, are back when the stack closes."""
    running: list[nn.Module] = deepspeed_hooks().FWD_MODULE_STACK
    stack.callback(running.__setitem__, slice(None), list(running))  # a pass that failed leaves its modules
    for module in model.modules():
        own: dict[str, Any] = vars(module)
        for name in _COUNTERS:
            stack.callback(_set_or_delete, own, name, own.get(name))
        own["applied_pre_backward_ref_cnt"] = _OFTEN  # several backward passes may follow a forward pass
        if "_external_params" in own:
            stack.callback(_set_back, own["_external_params"], dict(own["_external_params"]))
        if hasattr(module._parameters, "_in_forward"):
            stack.callback(setattr, module._parameters, "_in_forward", module._parameters._in_forward)
        for number, hook in list(module._backward_hooks.items()):
            # That of a leaf module reduces its gradients, of which there are none.
            if str(getattr(hook, "__module__", None)).startswith("deepspeed."):
                stack.callback(_set_back, module._backward_hooks, dict(module._backward_hooks))
                del module._backward_hooks[number]


def _set_or_delete(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        owner.pop(name, None)
    else:
        owner[name] = value


def _set_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    held.clear()
    held.update(before)


def _engines(model: nn.Module) -> list[Any]:
    """ZeRO's objects behind the hooks, one for each engine; FisherError where what is split would not be gathered."""
    found: dict[int, Any] = {}
    gathered: set[nn.Module] = set()
    for module in model.modules():
        engine = behind(module)
        if engine is not None:
            found[id(engine)] = engine
            gathered |= set(module.modules()) if getattr(module, "_z3_leaf", False) else {module}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_split(parameter) and module not in gathered:
                raise FisherError(
                    f"{f'{prefix}.{name}'.lstrip('.')!r} is split by {ZERO3}, and the engine has no hooks that gather "
                    "it for a forward pass (DeepCompile takes them away). Score the engine that "
                    "deepspeed.initialize(model=model, config=...) gives, or the model before it."
                )
    for engine in found.values():
        _check_settings(engine)
    return list(found.values())


def _check_settings(engine: Any) -> None:
    """FisherError for ways of gathering that this has not been tried with."""
    for name, setting in _UNTRIED.items():
        if getattr(engine, name, None):
            raise FisherError(
                f"A model that {ZERO3} has split with {setting} cannot be scored. Score it under a configuration "
                "without, before training, or score a model that is whole."
            )


def _check_no_gradients(trained: Iterable[Any]) -> None:
    optimizers = {id(each._z3_optimizer): each._z3_optimizer for each in trained if hasattr(each, "_z3_optimizer")}
    for optimizer in optimizers.values():
        if optimizer.micro_step_id > 0 or getattr(optimizer, "_epilogue_ran_this_backward", False):
            raise FisherError(
                f"{ZERO3} holds gradients of a step that is not yet done (gradient_accumulation_steps, or backward "
                "without step). Score before or after the accumulation of a step, not within."
            )
