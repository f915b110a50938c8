"""LoRA that starts along the loss's gradient: A spans what the frozen weight would be moved along first."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from fish_tuning.errors import FisherError, FishTuningWarning
from fish_tuning.scores.bare_model import unwrapped
from fish_tuning.scores.batches import batch_size, calibration_batches
from fish_tuning.scores.loss_vectors import UNREAD, LossFunction, LossVectors
from fish_tuning.scores.losses import TokenReduction
from fish_tuning.scores.prepared import prepared
from fish_tuning.scores.scoring_state import scoring_state
from fish_tuning.scores.validation import check_arguments, device_errors_explained
from fish_tuning.starts.weight_gradients import WeightGradients

# PEFT's start draws A from U(-1/sqrt(in), 1/sqrt(in)): the expected squared norm of a row is 1/3, whatever `in`.
ROW_NORM = 3**-0.5


def start_along_gradient(
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    device: torch.device | str | None = None,
    *,
    num_samples: int | None = None,
    adapter_name: str | None = None,
    token_reduction: TokenReduction = "mean",
    loss_fn: LossFunction | None = None,
    progress: bool = True,
) -> None:
    """Set A of every LoRA layer to the leading right singular vectors of its weight's mean gradient, with B = 0.

    At B = 0 the model computes what it did before. The first step of B then moves the weight by the gradient projected
    onto A's rows, which these rows keep as much of as r rows can. Every row has the norm 1/sqrt(3), which the rows of
    PEFT's default start have on average, so learning rates carry over. The adapter stays an ordinary LoRA: no base
    weight changes, and stock PEFT loads it. LoRA-GA (arXiv 2407.05000), from which the idea is, starts with both
    factors non-zero and changes the base weights: for that use PEFT's own `preprocess_loraga`.

    A head that is new is still random meanwhile, and the gradient is the one that it lets through. To take the
    gradient elsewhere, call `gradient_directions` there, go back, and pass what it gave to `set_directions`.

    Args:
        model: a PEFT model with LoRA, rsLoRA or DoRA on linear layers (`nn.Linear` or a quantised subclass, `Conv1D`),
            with B = 0 as PEFT's default start leaves it.
        calibration_dataloader: as `calculate_fisher_information` takes it.
        device: where to compute. The model is moved there. Default: where the first trainable tensor is.
        num_samples: stop after that many examples. Default: all of the loader.
        adapter_name: the adapter to set, which must be active. Default: the active one.
        token_reduction: whether an example's loss is the "mean" or the "sum" over its tokens.
        loss_fn: `loss_fn(outputs, batch)` giving the (n,) loss of each example, for tasks not known here.
        progress: show a progress bar.

    Raises:
        FisherError: a model without such an adapter, one that is not at its start (B is not 0), has a mask applied or
            is merged, or a loss that is not finite.

    Warns:
        FishTuningWarning: layers whose gradient is zero, or of lower rank than r; rows without a direction stay as
            they were.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning import start_along_gradient
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> base = BertForSequenceClassification(config)
        >>> model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
        >>> batch = {"input_ids": torch.randint(5, 99, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> start_along_gradient(model, [batch], progress=False)
        >>> A = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight
        >>> (3 * A @ A.T).round(decimals=4).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    set_directions(
        model,
        gradient_directions(
            model,
            calibration_dataloader,
            device,
            num_samples=num_samples,
            adapter_name=adapter_name,
            token_reduction=token_reduction,
            loss_fn=loss_fn,
            progress=progress,
        ),
        adapter_name=adapter_name,
    )


def gradient_directions(
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    device: torch.device | str | None = None,
    *,
    num_samples: int | None = None,
    adapter_name: str | None = None,
    token_reduction: TokenReduction = "mean",
    loss_fn: LossFunction | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """{name of a LoRA layer: (at most r, in) orthonormal rows in fp32}; the model is left as it was.

    The rows are the right singular vectors of the mean over examples of d loss_n / d W, largest singular value first,
    at the weights as they are, adapter included. There are fewer than r where the gradient's rank is lower. Evaluation
    mode, losses as in `calculate_fisher_information`. It holds one fp32 gradient of each adapted layer's weight.
    """
    check_arguments(model, "empirical", token_reduction, "auto", loss_fn, num_samples, 0, torch.float32)
    model, _, target = prepared(model, device)
    adapter_name, layers = lora_layers(model, adapter_name)
    losses = LossVectors(model, "empirical", token_reduction, loss_fn, 0)
    gradients = WeightGradients({name: layer.get_base_layer() for name, layer in layers.items()})
    seen = 0
    with scoring_state(model), gradients, tqdm(
        total=num_samples, desc="Gradient", unit="ex", disable=not progress, leave=False
    ) as bar:  # fmt: skip
        for batch in calibration_batches(calibration_dataloader, target, num_samples):
            with device_errors_explained(model, target):
                (loss,) = losses(losses.trimmed(batch), seen)
                gradients.backward(loss.sum())
            losses.check_finite(unread=UNREAD)
            seen += batch_size(batch)
            bar.update(batch_size(batch))
        losses.check_finite()
    for message in losses.own.new_notes():
        warnings.warn(message, FishTuningWarning, stacklevel=2)
    if not seen:
        raise FisherError("The calibration dataloader gave no example.")
    found = {}
    for name, layer in layers.items():  # a gradient is let go once its directions are found
        gradient = gradients.sums.pop(name, None)
        found[name] = (
            torch.zeros(0, layer.in_features, device=target)
            if gradient is None
            else leading_rows(gradient.div_(seen), layer.r[adapter_name], name)
        )
    return found


def set_directions(model: nn.Module, directions: Mapping[str, Tensor], *, adapter_name: str | None = None) -> None:
    """Set A's first rows to the directions of each layer, at the norm that PEFT's start has on average; B stays 0.

    Args:
        model: with the LoRA layers that `directions` names, at B = 0.
        directions: as `gradient_directions` gives them.
        adapter_name: the adapter to set. Default: the active one.

    Raises:
        FisherError: B is not 0, so the model's function would change; or other layers than the directions'.
    """
    adapter_name, layers = lora_layers(unwrapped(model), adapter_name)
    if layers.keys() != directions.keys():
        odd = sorted(layers.keys() ^ directions.keys())
        raise FisherError(
            f"The directions are not of this model's LoRA layers: {odd[0]!r} is on one side only. Take them with "
            "gradient_directions from a model with the same adapter."
        )
    for name, layer in layers.items():
        if bool(layer.lora_B[adapter_name].weight.any()):
            raise FisherError(
                f"B of {name!r} is not 0, so another A would change what the model computes. Start the adapter with "
                "init_lora_weights=True (PEFT's default) or 'gaussian', and set its start before it is trained."
            )
    few = {name: len(rows) for name, rows in directions.items() if len(rows) < layers[name].r[adapter_name]}
    if few:
        name = min(few, key=few.__getitem__)
        warnings.warn(
            f"Start along the gradient: {len(few)} of {len(layers)} layers have gradients of lower rank than their "
            f"adapters; {name!r} has rank {few[name]} for r={layers[name].r[adapter_name]}. The other rows of A stay "
            "as they were. More calibration examples, or a smaller r, would fill them.",
            FishTuningWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A[adapter_name].weight[: len(directions[name])] = ROW_NORM * directions[name]


def leading_rows(gradient: Tensor, rank: int, name: str = "gradient") -> Tensor:
    """(at most rank, in): the leading right singular vectors, each with its largest entry positive.

    Left out are those whose singular value is nothing but rounding. FisherError where the gradient is not finite.
    """
    if not bool(gradient.isfinite().all()):
        raise FisherError(f"The gradient of the weight of {name!r} is not finite, so it gives no start.")
    _, values, rows = torch.linalg.svd(gradient, full_matrices=False)
    rounding = torch.finfo(gradient.dtype).eps * max(gradient.shape) * values[0]
    rows = rows[: min(rank, int((values > rounding).sum()))]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = rows * largest.sign()
    return signed


def lora_layers(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, Any]]:
    """The adapter's name, and {name: layer} of its layers. FisherError for what cannot start along a gradient."""
    all_layers = {where: module for where, module in model.named_modules() if isinstance(module, LoraLayer)}
    name = adapter_name or next(
        (active for layer in all_layers.values() for active in layer.active_adapters), "default"
    )
    layers = {
        where: layer for where, layer in all_layers.items() if name in layer.lora_A or name in layer.lora_embedding_A
    }
    if not layers:
        raise FisherError(
            f"{type(model).__name__} has no LoRA layer of the adapter {name!r}; only LoRA, rsLoRA and DoRA start along "
            "a gradient. Make the model with get_peft_model(model, LoraConfig(...))."
        )
    for where, layer in layers.items():
        base: Any = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D) or type(layer).__name__ == "ParamWrapper":
            raise FisherError(
                f"{where!r} is a {type(base).__name__}; only adapters of linear layers (nn.Linear and its quantised "
                "kin, Conv1D) start along a gradient. Leave it out of target_modules."
            )
        if layer.merged or layer.disable_adapters or layer.active_adapters != [name]:
            state = "merged" if layer.merged else "disabled" if layer.disable_adapters else "not the only active one"
            raise FisherError(
                f"The adapter {name!r} is {state} in {where!r}. Call model.unmerge_adapter(), model.enable_adapters() "
                f"or model.set_adapter({name!r}) first."
            )
    return name, layers
