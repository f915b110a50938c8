"""ZeRO-3's hooks for a while, where a model is split and no engine has it: none yet, or none any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from fish_tuning.errors import FisherError
from fish_tuning.sparse.sharding import ZERO3
from fish_tuning.sparse.zero import deepspeed_hooks, forget_engine, is_split


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    """Until this is left, each module's frozen tensors are gathered for its passes, as an engine does it.

    Afterwards the model is as it was: an engine may have it next. Tensors that are not split stay as they are.

    Raises FisherError for ways of splitting that this has not been tried with.
    """
    modules = list(model.modules())
    for parameter in filter(is_split, model.parameters()):
        _check_tried(parameter)
    for module in modules:
        forget_engine(module)
    kept = [(module, set(vars(module)), module._parameters, dict(module._parameters)) for module in modules]
    for _, _, own, content in kept:  # DeepSpeed would split whatever it finds
        own.update({name: None for name, each in content.items() if each is not None and not is_split(each)})
    running: list[nn.Module] = deepspeed_hooks().FWD_MODULE_STACK
    before = list(running)
    hooks: Any = None
    try:
        hooks = deepspeed_hooks().DeepSpeedZeRoOffload(
            model,
            timers=import_module("deepspeed.utils.timer").NoopTimer(),
            ds_config=None,
            overlap_comm=False,
            param_persistence_threshold=0,
        )
        for module, _, _, content in kept:
            module._parameters.update(content)
            module._parameters._in_forward = True  # type: ignore[attr-defined]
        yield
    finally:
        if hooks is not None:
            hooks.destroy()
        running[:] = before
        for module, names, own, content in kept:
            for name in vars(module).keys() - names:
                del vars(module)[name]
            own.clear()
            own.update(content)
            vars(module)["_parameters"] = own


def _check_tried(parameter: Any) -> None:
    quantized = hasattr(parameter.ds_tensor, "ds_quant_scale")
    if quantized or getattr(parameter, "ds_secondary_tensor", None) is not None:
        setting = "zero_quantized_weights" if quantized else "zero_hpz_partition_size"
        raise FisherError(
            f"A model that {ZERO3} has split with {setting} cannot be scored. Split it under a configuration without, "
            "for scoring, or score a model that is whole."
        )
