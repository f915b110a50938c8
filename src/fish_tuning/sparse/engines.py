"""Engines that have a model already when its mask comes: what each gives back, and takes again in another form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fish_tuning.errors import MaskError
from fish_tuning.sparse.fsdp1 import check_idle, flattened_again, fsdp1_parameters, wrappers_of
from fish_tuning.sparse.fsdp2 import check_no_gradients, fsdp_parameters, sharded_again
from fish_tuning.sparse.sharding import FSDP1, FSDP2, engine_of, full_shape
from fish_tuning.sparse.zero import left_by_engines, take_back


class Engines:
    """The engines of a model, and which of its tensors they give back."""

    def __init__(self, model: nn.Module) -> None:
        self._fsdp2, self._fsdp1 = fsdp_parameters(model), fsdp1_parameters(model)
        self.reachable = {*self._fsdp2, *self._fsdp1, *left_by_engines(model)}
        self._wrappers = wrappers_of(model)

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the whole tensor, of which this process may have a part."""
        return self._fsdp1[id(parameter)][1] if id(parameter) in self._fsdp1 else full_shape(parameter)

    def check_between_steps(self, parameters: Iterable[nn.Parameter]) -> None:
        """MaskError within a pass, and where an engine holds gradients of an unfinished step."""
        records = (self._fsdp2[id(each)] for each in parameters if id(each) in self._fsdp2)
        check_no_gradients(records, "Apply the mask", MaskError)
        for wrapper in self._wrappers:
            check_idle(wrapper, "Apply the mask", MaskError)

    def check(self, name: str, parameter: nn.Parameter, left_dense: bool) -> None:
        """MaskError where an engine has taken this tensor and would go on with the whole of it.

        It may, where the mask leaves the tensor dense; but FSDP1 does not tell here what the whole of it is.
        """
        engine = None if id(parameter) in self.reachable else engine_of(parameter)
        if engine is None or (left_dense and engine != FSDP1):
            return
        if engine == FSDP1:
            raise MaskError(
                f"{name!r} lies in a flat tensor of {FSDP1}. Apply the mask to the outermost wrapper (a Trainer's "
                "model_wrapped), not to what is inside, and make the optimizer after that."
            )
        if engine == FSDP2:
            raise MaskError(
                f"Tensor parallelism has taken {name!r} already, and would go on with the whole tensor. Call "
                "apply_mask(model, mask) before the model is sharded, and make the optimizer after that."
            )
        raise MaskError(
            f"{engine} has taken {name!r} already, and its optimizer would go on with the whole tensor. Call "
            "apply_mask(model, mask) before deepspeed.initialize; or engine.destroy(), apply_mask on the model that it "
            "had, and deepspeed.initialize(model=model, ...) again."
        )


def check_names_kept(model: nn.Module) -> None:
    """MaskError where FSDP1 has flattened tensors so that none has its own name."""
    if any(wrapper._handle is not None and not wrapper._handle._use_orig_params for wrapper in wrappers_of(model)):
        raise MaskError(
            f"{FSDP1} has the model without use_orig_params=True, and its tensors have lost their names. Wrap it with "
            "use_orig_params=True."
        )


@contextmanager
def given_back(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Of these tensors, those that an engine has are whole until this is left; what is then in their places it takes.

    What DeepSpeed has left behind stays whole: its next engine takes the model. All processes must enter this.
    """
    take_back(model, names)
    with flattened_again(model, names), sharded_again(model, names):
        yield
