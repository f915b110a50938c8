"""A LoRA without the components that do nothing: an ordinary, smaller adapter for stock PEFT."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.files.adapter_folders import check_replaceable
from fish_tuning.files.atomic import whole_folder
from fish_tuning.sparse.adapter_names import check_adapter, check_saved_names

# Starts that change the base model's weights too, which a smaller adapter could not repeat.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "orthogonal", "loftq", "lora_ga")
PREFIX = "base_model.model."


def save_compact_adapter(model: PeftModel, save_directory: str | Path, adapter_name: str = "default") -> dict[str, int]:
    """Save a LoRA with its working components alone; PEFT loads it as any other, and it computes the same.

    Component j of a layer is row j of A with column j of B. Where either is all zero it adds exactly nothing, as every
    component does that a mask of whole components (`granularity="component"`) left at PEFT's start, B = 0. What is left
    is a LoRA of fewer ranks (`rank_pattern`, `alpha_pattern`), in fewer layers (`target_modules`), which costs less at
    inference; `modules_to_save` go with it.

    Args:
        model: with a LoRA or rsLoRA adapter, masked or not; it is left as it is.
        save_directory: the folder, which takes the place of an earlier one as a whole.
        adapter_name: the adapter to save.

    Returns:
        {name of each layer that is left: its rank}.

    Raises:
        MaskError: another PEFT method, DoRA, trained biases, `target_parameters`, grouped convolutions, a start that
            changes the base weights (PiSSA and its kin), an adapter without any working component, or a folder that
            holds something else than an adapter.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from fish_tuning import save_compact_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> model = get_peft_model(base, LoraConfig(r=3, target_modules=["0", "1"]))
        >>> with torch.no_grad():
        ...     _ = model.base_model.model[1].lora_B["default"].weight[:, 2].fill_(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compact_adapter(model, f"{folder}/adapter")
        {'1': 1}
    """
    check_adapter(model, adapter_name)
    check_saved_names(model, [adapter_name])
    check_replaceable(Path(save_directory))
    if reason := why_whole(model, adapter_name):
        raise MaskError(f"The adapter {adapter_name!r} cannot be made smaller: {reason}. Use save_pretrained.")
    factors, others = lora_factors(model, adapter_name)
    working = {name: each.working() for name, each in factors.items()}
    if not any(each.rank for each in working.values()):
        raise MaskError(
            f"No component of the adapter {adapter_name!r} does anything: in all of its {len(working)} layers A or B "
            "is zero. Train it first; save_pretrained saves it as it is."
        )
    with whole_folder(Path(save_directory)) as folder:
        return write_lora(model, model.peft_config[adapter_name], working, others, folder)


class Factors(NamedTuple):
    """A layer's change of its weight, `scaling` B A: A is (r, ...), B (out, r, ...); and what a file calls the two."""

    a: Tensor
    b: Tensor
    scaling: float
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def working(self) -> Factors:
        """Without the components that are zero in A or in B, which add exactly nothing."""
        kept = self.a.flatten(1).any(1) & self.b.transpose(0, 1).flatten(1).any(1)
        return self._replace(a=self.a[kept], b=self.b[:, kept])


def why_whole(model: PeftModel, adapter_name: str) -> str | None:
    """Why an adapter cannot be written as a plain LoRA by its factors alone; None where it can."""
    config: Any = model.peft_config[adapter_name]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    init = config.init_lora_weights if kind == "LORA" else None
    if kind != "LORA":
        return f"it is {kind}; only LoRA and rsLoRA are made of rank-1 components"
    if config.use_dora or config.lora_bias or config.bias != "none":
        return "DoRA's magnitudes and trained biases belong to whole layers"
    if getattr(config, "target_parameters", None):
        return "of target_parameters, row j of A and column j of B are not one component where there are experts"
    if isinstance(init, str) and init.startswith(CHANGES_THE_BASE):
        return f"init_lora_weights={init!r} changes the base weights, which PEFT repeats by the whole adapter"
    variants = {type(variant).__name__ for layer in _layers(model, adapter_name).values()
                if (variant := getattr(layer, "lora_variant", {}).get(adapter_name)) is not None}  # fmt: skip
    if variants:
        return f"{', '.join(sorted(variants))} of PEFT computes something else than B A"
    return None


def lora_factors(model: PeftModel, adapter_name: str) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors of each of a plain LoRA's layers, and all else that its file holds.

    Raises MaskError for convolutions with groups, whose A and B are no factors of one change.
    """
    others: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    found = {}
    for name, layer in _layers(model, adapter_name).items():
        keys = _keys(name, others)
        a, b = (others.pop(f"{PREFIX}{name}.{key}") for key in keys)
        if a.shape[0] != b.shape[1]:
            raise MaskError(
                f"{name!r} cannot be made smaller: its A has {a.shape[0]} rows, its B {b.shape[1]} columns, as in a "
                "convolution with groups. Use save_pretrained."
            )
        found[name] = Factors(a, b, float(layer.scaling[adapter_name]), keys)
    return found, others


def write_lora(
    model: PeftModel, config: Any, factors: Mapping[str, Factors], others: Mapping[str, Tensor], folder: Path
) -> dict[str, int]:
    """Write a LoRA of these factors, without the layers that have none left, as PEFT reads it.

    Args:
        model: whose layers they are.
        config: of a LoRA; its ranks, alphas and targets are set anew.
        factors: by layer; at least one has a rank above zero.
        others: all else that the file is to hold, such as `modules_to_save`.
        folder: to write to.

    Returns:
        {name of each layer that is left: its rank}.
    """
    state, ranks, alphas = dict(others), {}, {}
    for name, each in factors.items():
        if not each.rank:
            _unwrap(name, state)
            continue
        state |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in zip(each.keys, (each.a, each.b), strict=True)}
        ranks[name] = each.rank
        alphas[name] = each.scaling * (math.sqrt(each.rank) if config.use_rslora else each.rank)
    _smaller(config, model, ranks, alphas).save_pretrained(str(folder))
    # Copies: tied weights of the base model, which PEFT saves with adapted embeddings, share memory.
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return ranks


def _layers(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def _keys(name: str, state: Mapping[str, Tensor]) -> tuple[str, str]:
    """What the state calls a layer's A and B."""
    for keys in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if f"{PREFIX}{name}.{keys[0]}" in state:
            return keys
    raise MaskError(f"The adapter's state has no lora_A of {name!r}; is it a layer of another kind of LoRA?")


def _unwrap(name: str, state: dict[str, Tensor]) -> None:
    """A left-out layer's base weights, which PEFT saves of embeddings, by the names they have without an adapter."""
    prefix = f"{PREFIX}{name}."
    wrapped = f"{prefix}base_layer."
    for key in [key for key in state if key.startswith(wrapped)]:
        state[prefix + key.removeprefix(wrapped)] = state.pop(key)


def _smaller(config: Any, model: Any, ranks: dict[str, int], alphas: dict[str, float]) -> Any:
    made = copy.deepcopy(config)
    made.r = max(ranks.values())
    made.lora_alpha = alphas[max(ranks, key=ranks.__getitem__)]
    made.rank_pattern, made.alpha_pattern, made.target_modules = ranks, alphas, set(ranks)
    if any(module.endswith(f".{name}") for module, _ in model.get_base_model().named_modules() for name in ranks):
        # PEFT takes a name for the end of one, too. Here one layer's is the end of another's: whole names alone match.
        made.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        made.alpha_pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
        made.target_modules = "|".join(map(re.escape, sorted(ranks)))
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        made.rank_pattern, made.alpha_pattern = {}, {}  # not every server reads them
    if made.modules_to_save:  # PEFT names a task's own head anew whenever it loads an adapter
        made.modules_to_save = list(dict.fromkeys(made.modules_to_save))
    made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    made.init_lora_weights = True
    made.inference_mode = True
    if made.base_model_name_or_path is None:
        made.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    return made
