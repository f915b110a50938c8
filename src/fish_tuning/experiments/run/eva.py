"""PEFT's EVA (arXiv 2410.07170) on an experiment's batches: A along the leading directions of each layer's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fish_tuning.errors import ConfigurationError
from fish_tuning.scores.prepared import move
from fish_tuning.scores.scoring_state import scoring_state


def start_along_inputs(model: Any, batches: Iterable[Mapping[str, Tensor]], device: torch.device | None = None) -> None:
    """Set every A by PEFT's `initialize_lora_eva_weights`; B stays 0. Padding, and labels of -100, do not count.

    The model, with `init_lora_weights="eva"`, is moved to `device`, unless its parts lie where a device_map has put
    them. PEFT would go round for ever on batches of fewer tokens than an adapter has ranks: ConfigurationError.
    """
    if device is not None:
        move(model, device)
    inputs = [_inputs(batch) for batch in batches]
    config = model.peft_config["default"]
    most = max(_positions(model, batch) for batch in inputs)
    if most < config.r * config.eva_config.rho:
        raise ConfigurationError(
            f"init_lora_weights 'eva' needs batches of at least r={config.r} tokens, but the largest of calibration "
            f"examples has {most}. Raise fish_tuning.num_samples, or lower the rank."
        )
    masked = "attention_mask" in inputs[0]
    # Without a mask every position counts.
    options: dict[str, Any] = {} if masked else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    with scoring_state(model):
        targets = config.target_modules
        initialize_lora_eva_weights(model, inputs, show_progress_bar=False, **options)
        config.target_modules = targets  # PEFT lists every layer, should one have lost all its ranks


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without labels, but for those of tokens, which PEFT reads beside the mask."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    of_tokens = mask is not None and labels is not None and labels.shape == mask.shape
    return {name: tensor for name, tensor in batch.items() if of_tokens or name != "labels"}


def _positions(model: Any, batch: Mapping[str, Tensor]) -> int:
    """How many inputs the first adapted layer sees of a batch, padding aside."""
    mask = batch.get("attention_mask")
    if mask is None:
        return _all_positions(model, batch)
    counted = mask.bool() & (batch["labels"] != -100) if "labels" in batch else mask.bool()
    return int(counted.sum())


def _all_positions(model: Any, batch: Mapping[str, Tensor]) -> int:
    seen: list[int] = []
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    try:
        with scoring_state(model), torch.no_grad():
            model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    finally:
        hook.remove()
    return seen[0]
