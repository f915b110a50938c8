"""Fisher masks carried by stock PEFT: its SHiRA adapter trains a fixed set of entries of each base weight."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import ShiraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from fish_tuning.errors import FishTuningWarning, MaskError, did_you_mean
from fish_tuning.masks.create import select_top_k

_MASK_TYPE: Any = (
    "fisher"  # any but "random": PEFT then draws no mask of its own and, on loading, takes the file's indices
)


def create_shira_config(
    model: nn.Module,
    fisher_scores: Mapping[str, Tensor],
    r: int,
    target_modules: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    **config: Any,
) -> ShiraConfig:
    """A config for `peft.get_peft_model` whose SHiRA adapter trains the best-scored entries of each target's weight.

    SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) gives each layer as many entries as LoRA of rank r would have,
    r * (in + out); here they are the layer's own top entries by Fisher information, not a global choice. PEFT stores
    their positions in the adapter file, so a saved adapter is loaded by stock PEFT alone.

    Args:
        model: the very model that is then given to `get_peft_model` (the selection belongs to its layers).
        fisher_scores: {parameter name: scores} from `calculate_fisher_information` on this model, or on one of the same
            names, with the targets' weights trainable.
        r: the rank of the LoRA that costs as much.
        target_modules: as PEFT takes them: a list of (endings of) names, or a regular expression. None and
            "all-linear": every Linear layer whose weight is scored, but for `modules_to_save` and a classifier.
        seed: orders ties.
        **config: everything else that `ShiraConfig` takes (`task_type`, `modules_to_save`, ...).

    Raises:
        MaskError: targets that match nothing or are no Linear layers, a target without scores of its weight's shape, or
            a layer with fewer than r * (in + out) entries.

    Warns:
        FishTuningWarning: layers where fewer entries than needed score above zero, so that the rest is a random choice.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from fish_tuning import create_shira_config
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
        >>> scores = {"0.weight": torch.rand(6, 8)}
        >>> peft_model = get_peft_model(model, create_shira_config(model, scores, r=1))
        >>> peft_model.get_nb_trainable_parameters()[0]
        14
    """
    if not isinstance(r, int) or r < 1:
        raise MaskError(f"r={r!r} must be a whole number of at least 1.")
    if target_modules in (None, "all-linear"):
        target_modules = _scored_linear_layers(model, fisher_scores, config.get("task_type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mask_type.*")  # PEFT asks for the mask_fn that is set below
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        shira = ShiraConfig(r=r, mask_type=_MASK_TYPE, target_modules=targets, **config)
    layers = _target_layers(model, shira)
    selected: dict[nn.Module, Tensor] = {
        layer: _top_entries(f"{name}.weight", layer, fisher_scores, r, seed) for name, layer in layers.items()
    }
    _report_zero_scores(layers, fisher_scores, r)
    shira.mask_fn = _mask_function(selected)
    return shira


def _scored_linear_layers(model: nn.Module, fisher_scores: Mapping[str, Tensor], task_type: str | None) -> list[str]:
    # PEFT trains and saves the heads of these tasks whole.
    heads = ("classifier", "score") if task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in fisher_scores and not set(name.split(".")) & set(heads)
    ]
    if not names:
        raise MaskError(
            f"None of the {len(fisher_scores)} scored tensors is the weight of a Linear layer of this model. Score the "
            "base model with those weights trainable (requires_grad=True)."
        )
    return names


def _target_layers(model: nn.Module, config: ShiraConfig) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules())
    matched = {name: module for name, module in modules.items() if name and check_target_module_exists(config, name)}
    if not matched:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise MaskError(
            f"target_modules={_shown(config)} matches no module of this model; its {len(linear)} Linear layers are "
            f"{', '.join(map(repr, linear[:4]))}{', ...' if len(linear) > 4 else ''}."
        )
    layers = {}
    for name, module in matched.items():
        if not isinstance(module, nn.Linear):
            raise MaskError(
                f"target_modules={_shown(config)} matches {name!r}, a {type(module).__name__}; SHiRA adapts "
                "torch.nn.Linear layers only."
            )
        layers[name] = module
    return layers


def _shown(config: ShiraConfig) -> str:
    targets = config.target_modules
    return repr(targets if isinstance(targets, str) else sorted(targets or ()))


def _top_entries(name: str, layer: nn.Linear, fisher_scores: Mapping[str, Tensor], r: int, seed: int) -> Tensor:
    """The positions of the layer's r * (in + out) best entries in its flattened weight."""
    if name not in fisher_scores:
        raise MaskError(
            f"There are no scores of {name!r}.{did_you_mean(name, fisher_scores)} Score the base model with this "
            "weight trainable (requires_grad=True), or leave its layer out of target_modules."
        )
    scores, shape = fisher_scores[name], (layer.out_features, layer.in_features)
    if scores.shape != shape:
        raise MaskError(f"The scores of {name!r} have the shape {tuple(scores.shape)}; the layer's weight has {shape}.")
    if _number_of_entries(layer, r) > scores.numel():
        raise MaskError(
            f"r={r} asks for r * (in + out) = {_number_of_entries(layer, r):,} entries of {name!r}, which has "
            f"{scores.numel():,}: r can be at most {scores.numel() // sum(shape)} there. Take a smaller r, or leave "
            "the layer out of target_modules (modules_to_save trains it whole)."
        )
    mask = select_top_k({name: scores}, _number_of_entries(layer, r), seed=seed)[name]
    return mask.flatten().nonzero()[:, 0]


def _number_of_entries(layer: nn.Linear, r: int) -> int:
    return r * (layer.in_features + layer.out_features)


def _report_zero_scores(layers: Mapping[str, nn.Linear], fisher_scores: Mapping[str, Tensor], r: int) -> None:
    short = [
        name
        for name, layer in layers.items()
        if int(fisher_scores[f"{name}.weight"].count_nonzero()) < _number_of_entries(layer, r)
    ]
    if short:
        warnings.warn(
            f"In {len(short)} of {len(layers)} layers, e.g. {short[0]!r}, fewer entries score above zero than r={r} "
            "asks for, so the rest is chosen at random. Ways out: more examples, a smaller r, or other target_modules.",
            FishTuningWarning,
            stacklevel=3,
        )


def _mask_function(selected: dict[nn.Module, Tensor]) -> Callable[..., Tensor]:
    # PEFT hands over nothing but the layer. Weak keys: the config lives on in the model, and an id may be used again.
    positions: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary(selected)

    def fisher_mask(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        if base_layer not in positions:
            raise MaskError(
                "This SHiRA config belongs to another model: its entries were chosen for the layers of the model given "
                "to create_shira_config. Call it with the model that get_peft_model is to change."
            )
        weight = base_layer.get_parameter("weight")
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        mask.view(-1)[positions[base_layer].to(weight.device)] = True
        return mask

    return fisher_mask
