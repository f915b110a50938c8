"""A start that its seed gives again to the bit, on every machine, so that a sparse adapter need not store it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fish_tuning.errors import ConfigurationError
from fish_tuning.files.seeded import SEEDS, uniform
from fish_tuning.files.sparse_adapter_file import key_of
from fish_tuning.sparse.adapter_names import adapters_of, check_adapter
from fish_tuning.sparse.masked_tensors import is_masked
from fish_tuning.sparse.seeded_starts import PROMPT, seeded_bound, starts_at_zero


def start_from_seed(model: nn.Module, seed: int, adapter_name: str | None = None) -> None:
    """Set an adapter to a start that `seed` alone decides; call it right after `get_peft_model`.

    PEFT draws its start from torch's generator, whose numbers may change with version and device. These come of
    integer arithmetic (SplitMix64 of the seed, the tensor's name and the entry's position), so that
    `save_sparse_adapter` stores the seed in place of all frozen entries. The distributions are PEFT's: LoRA's A is
    kaiming-uniform, within 1/sqrt(in), and B is 0; where a normal distribution is drawn from (LoRA of embeddings,
    prefixes, prompts, the adapters of this package), a uniform one of that variance takes its place. Tensors that start
    at a constant stay as they are, and so do DoRA's magnitudes, which come of the base weights.

    Args:
        model: with a LoRA (rsLoRA, DoRA), prefix, prompt, serial or UniPELT adapter, without a mask.
        seed: from 0 to 65,535, so few that a file's seed is found by looking at its entries. Adapters of one seed share
            their start in memory (`add_sparse_adapter`).
        adapter_name: the adapter to set. Default: the active one.

    Raises:
        ConfigurationError: another PEFT method, a start that comes of the base weights or of text (PiSSA and its kin),
            a DoRA that is not at B = 0, a masked model, or an impossible seed. The model is then unchanged.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from fish_tuning import start_from_seed
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0"]))
        >>> start_from_seed(model, seed=7)
        >>> (model.base_model.model[0].lora_A["default"].weight * 2**24).tolist()
        [[-3249152.5, -5706376.5, -3027401.5, -6845482.5]]
    """
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise ConfigurationError(f"The seed {seed!r} is impossible: give a whole number from 0 to {SEEDS - 1:,}.")
    if is_masked(model):
        raise ConfigurationError("The model has a mask. Set its start before apply_mask, or call remove_mask(model).")
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        raise ConfigurationError(f"{type(model).__name__} has no PEFT adapter; make it with get_peft_model first.")
    if adapter_name is None:
        active: Any = getattr(model, "active_adapter", None) or next(iter(configs))
        adapter_name = active if isinstance(active, str) else active[0]
    check_adapter(model, adapter_name)
    config: dict[str, Any] = configs[adapter_name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    _check_start(model, config, adapter_name)
    prompt = f"prompt_encoder.{adapter_name}.embedding.weight"
    found = False
    with torch.no_grad():
        for name, parameter in _own(model, adapter_name):
            key = PROMPT if name == prompt else key_of(name, adapter_name)
            bound = seeded_bound(key, parameter.shape, config)
            if bound is not None:
                found = True
                numbers = torch.from_numpy(uniform(seed, key, bound, parameter.numel()))
                parameter.copy_(numbers.reshape(parameter.shape).to(parameter.dtype))
            elif starts_at_zero(key, config):
                parameter.zero_()
    if not found:
        raise ConfigurationError(
            f"The adapter {adapter_name!r} is {config['peft_type']}, whose start no seed decides here: it is constant, "
            "as (IA)³'s, and needs none, or only PEFT can draw it. LoRA, rsLoRA, DoRA, prefix and prompt tuning, "
            "serial adapters and UniPELT start from a seed."
        )


def _own(model: nn.Module, adapter_name: str) -> list[tuple[str, nn.Parameter]]:
    """The adapter's own parameters: a module of the base model, above another adapter's, may have its name."""
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name, of in adapters_of(model, parameters).items() if of == adapter_name]


def _check_start(model: nn.Module, config: dict[str, Any], adapter_name: str) -> None:
    init = config.get("init_lora_weights", True)
    prompt = getattr(config.get("prompt_tuning_init"), "value", config.get("prompt_tuning_init"))
    if init not in (True, False, None, "gaussian"):
        raise ConfigurationError(
            f"init_lora_weights={init!r} makes its start of the base weights or of data, which a seed would overwrite. "
            "Use init_lora_weights=True."
        )
    if prompt not in (None, "RANDOM"):
        raise ConfigurationError(
            f"prompt_tuning_init={prompt!r} makes its start of embeddings, which a seed would overwrite. Use 'RANDOM'."
        )
    if config.get("use_dora"):
        factors = [
            parameter
            for name, parameter in _own(model, adapter_name)
            if starts_at_zero(key_of(name, adapter_name), config)
        ]
        if any(bool(factor.any()) for factor in factors):
            raise ConfigurationError(
                "DoRA's magnitudes belong to B as it is, which is not 0. Use init_lora_weights=True, and set the start "
                "before training."
            )
