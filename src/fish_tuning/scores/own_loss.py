"""Whether the loss that is scored is the one that the model itself computes, by one batch's value of it.

transformers' `loss_type` goes by the class's name; what the class does is another matter. The decoders of BART, Whisper
and others, XLNet and XLM compute a loss in their forward pass that shifts no labels, ProphetNet's is of n-grams, and a
user may have set `model.loss_function` or derived a class with weights of its own. No list of these would stay right,
so such a model is given the labels in the first pass, which is made anyway, and its loss compared.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import Batch
from fish_tuning.scores.ctc import ctc_losses
from fish_tuning.scores.labels import LOSS_FN, whole_numbers
from fish_tuning.scores.losses import (
    ANSWER,
    IGNORED,
    LABELS,
    SHIFTED,
    TOKENWISE,
    at_padding,
    labels_of,
    loss_type_of,
    resolve_likelihood,
)

# By which two ways to one loss of the same logits differ, of its size, and where it is next to nothing. (Losses of
# random models lie close together: ProphetNet's is 7e-5 from another.) In 16 bits some models take the loss in these:
# in epsilons, what the roundings of tokens and mean can come to, and what they hardly exceed. Where the loss is the
# small difference of large logits, roundings are of their size: in epsilons again, what they come to at most.
_ROOM, _NOTHING = 1e-5, 3e-6
_ROUNDINGS, _MOST_OFTEN, _AT_MOST = 1.5, 0.6, 3.0
_MOST_LOOKS = 4  # two rows each of two ways of padding may come alone before the first batch


class OwnLoss:
    """Compares the model's own loss with the one scored, until a batch has told; shared by all that score the model.

    `shifted` says whether a token's logits are those of the next label.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, _base(model)
        self.kind = loss_type_of(model)
        self.config: Any = getattr(model, "config", None)
        self.encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.shifted = self.kind in SHIFTED and not self.encoder_decoder
        self.open = not _is_transformers_own(self.base) and _takes_labels(self.base)
        self._notes: list[str] = []
        self._looked, self._looks = False, 0

    def labels_to_give(self, batch: Batch, drawn: bool) -> Batch:
        """What the forward pass is to be given beside its inputs; nothing where no comparison is wanted.

        Where labels are `drawn`, those of tokens only say which count: they may lie outside the classes.
        """
        if (
            not self.open
            or self.encoder_decoder
            or not self._compares(drawn)
            or not any(key in batch for key in LABELS)
        ):
            return {}  # without any, it is told better by what the model gives
        if self.kind == "ForQuestionAnswering":
            return {key: batch[key] for key in ANSWER if key in batch}
        labels = whole_numbers(labels_of(batch))
        if self.kind in TOKENWISE:
            labels = labels.masked_fill(at_padding(labels, batch.get("attention_mask")), IGNORED)
            labels = labels.masked_fill(labels != IGNORED, 0) if drawn else labels
        return {"labels": labels}

    def look(self, outputs: Any, logits: Tensor, given: Batch, drawn: bool) -> None:
        """Settles `shifted` by a pass that was given these labels, as far as it tells.

        Raises FisherError where the model's own loss is none that is known.
        """
        if self._looked and not self.open:
            return
        auxiliary = self._auxiliary(outputs)
        if not self.open:
            return
        own = _of(outputs, "loss")
        if not isinstance(own, Tensor) or own.numel() != 1 or not self._compares(drawn):
            self.open = False  # it says nothing of its loss, or what is scored is not of given labels
            return
        wanted = float(own.detach()) - auxiliary
        if not math.isfinite(wanted):
            return  # no label counts, or the example is told when losses are looked at
        found: dict[bool, float] = {}
        dtypes = _rounded_to(own, logits)
        for shifted in (self.shifted, not self.shifted) if self.kind in SHIFTED else (self.shifted,):
            value = self._of_batch(logits.detach(), given, shifted)
            if value is None:
                return
            found[shifted] = value
            if self.encoder_decoder and _same(value, wanted, own.dtype):
                break  # which shift nothing, where rounding would not tell
        same = next(filter(None, (_all_same(found, wanted, dtype) for dtype in dtypes)), [])
        if not same:
            size = float(logits.detach().abs().max()) + abs(wanted)
            room = _AT_MOST * torch.finfo(dtypes[-1]).eps * size
            same = [shifted for shifted, value in found.items() if abs(value - wanted) <= room]
        if len(same) != 1:
            raise self._refusal(wanted, found, several=bool(same))
        self._looks += 1
        # Of one class alone, what weighs classes is not to be seen.
        self.shifted, self.open = same[0], labels_of(given).numel() == 1 and self._looks < _MOST_LOOKS

    def new_notes(self) -> list[str]:
        """What to tell the user of parts of the loss that no example has."""
        notes, self._notes = self._notes, []
        return notes

    def failed(self, error: Exception) -> FisherError:
        return FisherError(
            f"{type(self.base).__name__} could not compute a loss of these labels ({type(error).__name__}: {error}), "
            f"so it is not known whether the one scored would be its own. Check the labels, or {LOSS_FN}."
        )

    def _compares(self, drawn: bool) -> bool:
        # Of classes that are drawn there is nothing to know. Which token a label belongs to, there is.
        return not drawn or self.kind in TOKENWISE

    def _of_batch(self, logits: Tensor, given: Batch, shifted: bool) -> float | None:
        """The mean over all labels of the batch, as models take it; None where it is not that alone."""
        if self.kind == "ForCTC":
            mean = self.config.ctc_loss_reduction == "mean"
            losses = ctc_losses(self.model, logits, given, "empirical", "mean" if mean else "sum")
            return float(losses.mean() if mean else losses.sum())
        labels = whole_numbers(labels_of(given))
        likelihood = resolve_likelihood(self.model, logits, labels, "mean")
        if likelihood.labels != "tokens":
            return float(likelihood.nll(logits.float(), labels, labels).mean())
        if self.kind == "ForQuestionAnswering":
            if bool((labels >= logits.shape[2]).any()):
                return None  # starts and ends are averaged apart
        else:
            labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted else labels
        counted = (labels != IGNORED).sum(1)
        return float((likelihood.nll(logits, labels, labels) * counted).sum() / counted.sum())

    def _auxiliary(self, outputs: Any) -> float:
        """What the model adds to its loss for its routers' sake; told once."""
        value = _of(outputs, "aux_loss")
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        factor = getattr(self.base, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", 0.0))
        told, self._looked = self._looked, True
        if not isinstance(value, Tensor) or value.numel() != 1 or not factor:
            return 0.0
        if not told:
            self._notes.append(
                f"{type(self.base).__name__} adds {factor} times its routers' balance (aux_loss) to its loss. No "
                "example has a balance by itself, so entries are scored by the loss without it. Where it is not "
                "trained on, model.config.output_router_logits = False leaves it out."
            )
        return float(value.detach()) * float(factor) if self.open else 0.0

    def _refusal(self, wanted: float, found: dict[bool, float], several: bool) -> FisherError:
        name, own = type(self.base).__name__, vars(self.base).get("_loss_function")
        by = f" by its loss_function ({getattr(own, '__qualname__', type(own).__name__)})" if own is not None else ""
        known = " and ".join(
            f"{value:.5g}{(' with' if shifted else ' without') + ' labels shifted' if len(found) > 1 else ''}"
            for shifted, value in found.items()
        )
        if several:
            reason = f"which both known losses are but for rounding ({known}). Score in 32 bits"
        else:
            reason = f"and what would be scored is {known}: the model trains on a loss that is not known here"
        router = ""
        if getattr(self.config, "output_router_logits", False):
            router = " What routers add to it is left out by model.config.output_router_logits = False."
        return FisherError(
            f"{name} itself gives the first batch a loss of {wanted:.5g}{by}, {reason}. "
            f"To score a loss, {LOSS_FN}.{router}"
        )


def _rounded_to(own: Tensor, logits: Tensor) -> list[torch.dtype]:
    """What a loss may have been rounded to, the strictest first.

    CUDA's autocast gives a cross entropy of 16-bit logits in fp32, but its log probabilities are rounded as they are.
    """
    rounds = logits.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(logits.device.type)
    return [own.dtype, logits.dtype] if rounds else [own.dtype]


def _all_same(found: dict[bool, float], wanted: float, dtype: torch.dtype) -> list[bool]:
    """Which of the losses are `wanted` but for rounding; the one that hardly needs any, if there is one."""
    same = [shifted for shifted, value in found.items() if _same(value, wanted, dtype)]
    if len(same) > 1:
        same = [shifted for shifted in same if _same(found[shifted], wanted, dtype, _MOST_OFTEN)] or same
    return same


def _same(one: float, other: float, dtype: torch.dtype, roundings: float = _ROUNDINGS) -> bool:
    room = max(_ROOM, roundings * torch.finfo(dtype).eps)
    return abs(one - other) <= room * max(abs(one), abs(other)) + _NOTHING


def _of(outputs: Any, key: str) -> Any:
    return outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_transformers_own(model: Any) -> bool:
    """Whether the forward pass hands logits and labels as they are to the loss that `loss_type` names.

    Told by the names that its code uses, which costs nothing, where the pass with labels would have large models take a
    second loss. A forward pass that does more is compared: one that shifts by itself, or computes an entropy beside.
    """
    named = getattr(type(model), "loss_function", None)
    if getattr(getattr(named, "fget", None), "__module__", None) != "transformers.modeling_utils":
        return False
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    if code is None or "_loss_function" in vars(model) or getattr(model.config, "is_encoder_decoder", False):
        return False  # an encoder-decoder is given its labels in every pass
    names = {*code.co_names, *code.co_varnames}
    return "loss_function" in names and not any(name.startswith("shift") or "ntropy" in name for name in names)


def _takes_labels(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return any(key in parameters for key in ("labels", *ANSWER)) or (anything and hasattr(model, "main_input_name"))
