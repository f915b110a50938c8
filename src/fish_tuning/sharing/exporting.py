"""An adapter as an ordinary LoRA of a lower rank, and what that loses."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model_state_dict
from peft.tuners.adalora import SVDLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper, load_peft_weights
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fish_tuning.errors import ConfigurationError, FishTuningWarning
from fish_tuning.files.adapter_folders import MODEL_CONFIG
from fish_tuning.files.atomic import whole_folder
from fish_tuning.sharing.card import CARD, CardFacts, public_name, read_card
from fish_tuning.sharing.folder import (
    PROCESSING_FILES,
    WEIGHTS,
    check_new,
    check_weights,
    complete_adapter,
    read_adapter_config,
)
from fish_tuning.sharing.hub import fetched
from fish_tuning.sharing.loading import load_adapter
from fish_tuning.sharing.low_rank import distance, norm, truncated
from fish_tuning.sharing.mutated_starts import as_ordinary_lora, is_recomputed
from fish_tuning.sharing.sources import adapter_folder
from fish_tuning.sharing.usage import OWN_METHODS
from fish_tuning.sparse.compact import CHANGES_THE_BASE, PREFIX, Factors, lora_factors, why_whole, write_lora

_ADAPTER = "default"  # what load_adapter calls it
_ROUNDING = 1e-6  # of the singular values that PEFT computes in 32 bits, as a share of the largest


@dataclass(frozen=True)
class ExportedAdapter:
    """What `export_adapter` wrote, and what was lost.

    Args:
        ranks: of each layer that has a change.
        errors: of each of these layers the Frobenius norm of what was lost, divided by that of its whole change.
        error: the same for all layers together; 0.0 where nothing was cut.
        bytes_before, bytes_after: of the file of weights.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    bytes_before: int
    bytes_after: int

    @property
    def worst_layer(self) -> str:
        """The layer that lost the largest part of its change."""
        return max(self.errors, key=self.errors.__getitem__)


def export_adapter(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], *, rank: float, **loading: Any
) -> ExportedAdapter:
    """Write an adapter as an ordinary LoRA of a lower rank, the nearest one there is, whole or not at all.

    Of each layer's change of its weight the largest singular components are kept (truncated SVD). Stock PEFT loads what
    is written; it stands alone like every adapter here, with label names, tokenizer, `modules_to_save` and a card that
    tells what it was made of and what was lost. The mask does not go with it: it is of other entries. Components that
    are zero are left out in any case, which loses nothing, and so are layers without a change.

    LoRA (started from PiSSA or OLoRA too), rsLoRA, AdaLoRA and the methods whose layers PEFT's `convert_to_lora` takes
    (LoHa, LoKr, VeRA, ...) can be exported. The errors say how far the weights are off, not what that costs on a task.

    Args:
        folder: an adapter's folder, a checkpoint, a sparse adapter's file, or a repository of the hub.
        output: a new or empty folder.
        rank: an int from 1 is the highest rank of a layer; a float above 0 and up to 1 is the share of each layer's
            squared singular values that is kept, at the lowest rank that does, as PEFT's `convert_to_lora` has it.
        **loading: for `load_adapter`: `base_model`, `revision`, `token`, `dtype`, ...

    Returns:
        Ranks, relative errors and sizes.

    Raises:
        ConfigurationError: a rank that cannot be, an output folder with something in it, a method whose change is no
            LoRA's, values that are not finite, or an adapter that changes nothing.
        MaskError: a damaged sparse adapter.

    Example:
        >>> lost = export_adapter("adapter", "small", rank=4)  # doctest: +SKIP
        >>> lost.error  # doctest: +SKIP
        0.081
    """
    rank, output = _checked(rank), Path(output)
    check_new(output)
    hub: dict[str, Any] = {name: loading.pop(name) for name in ("revision", "token") if name in loading}
    with _as_folder(folder, hub, loading.get("base_model")) as (path, weights):
        settings = read_adapter_config(path)
        loading |= {"token": hub["token"]} if hub.get("token") is not None else {}
        with as_ordinary_lora(path, settings, loading) as ordinary:
            if ordinary != path:
                _copy_what_lies_beside(path, ordinary)
            model = load_adapter(ordinary, **loading)
            lora = _lora_of(model, ordinary, rank)
        factors = {name: cut.factors for name, cut in lora.layers.items()}
        if not any(each.rank for each in factors.values()):
            raise ConfigurationError(f"The adapter in {str(folder)!r} changes nothing: each layer's change is zero.")
        with whole_folder(output) as unfinished:
            ranks = write_lora(model, lora.config, factors, lora.others, unfinished)
            after = (unfinished / SAFETENSORS_WEIGHTS_NAME).stat().st_size
            done = ExportedAdapter(ranks, *lora.errors(), weights.stat().st_size, after)
            _copy_what_lies_beside(path, unfinished)
            del model
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FishTuningWarning)  # which is told of the adapter that came already
                small = load_adapter(unfinished, **loading)  # what stock PEFT cannot load is never put in its place
            facts = _facts(Path(os.fspath(folder)).name, path, weights, settings, done)
            complete_adapter(small, unfinished, facts=facts)
    return done


class _Cut(NamedTuple):
    """What is left of a layer's change, and the Frobenius norms of what was cut and of the whole."""

    factors: Factors
    lost: float
    whole: float


class _Lora(NamedTuple):
    """What is to be written: configuration, layers, and all else that the file holds."""

    config: Any
    layers: dict[str, _Cut]
    others: dict[str, Tensor]

    def errors(self) -> tuple[dict[str, float], float]:
        """Relative errors, by layer and of all together."""
        each = {name: cut.lost / cut.whole for name, cut in self.layers.items() if cut.whole}
        cuts = self.layers.values()
        return each, math.hypot(*(cut.lost for cut in cuts)) / math.hypot(*(cut.whole for cut in cuts))


def parse_rank(text: str) -> float:
    """The rank that a command line names: a whole number, or a share with a point."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return _checked(text)  # which tells what is allowed


def _checked(rank: Any) -> float:
    if isinstance(rank, int | np.integer) and not isinstance(rank, bool) and rank >= 1:
        return int(rank)
    if isinstance(rank, float | np.floating) and 0 < rank <= 1:
        return float(rank)
    raise ConfigurationError(
        f"rank={rank!r} cannot be: allowed are a whole number from 1, the highest rank of a layer, and a number with a "
        "point above 0 and up to 1, the share of each layer's squared singular values that is kept (0.99)."
    )


@contextmanager
def _as_folder(
    source: str | os.PathLike[str], hub: Mapping[str, Any], base_model: Any = None
) -> Iterator[tuple[Path, Path]]:
    """The adapter's folder and the file of its weights, as they came; of a sparse adapter the folder is rebuilt."""
    if Path(source).is_file():
        with adapter_folder(source, base_model) as made:
            yield Path(made), Path(source)
        return
    path = fetched(source, **hub)
    read_adapter_config(path)
    check_weights(path)
    files = (path / name for name in WEIGHTS)
    yield path, next(file for file in files if file.is_file())


def _lora_of(model: PeftModel, path: Path, rank: float) -> _Lora:
    config: Any = model.peft_config[_ADAPTER]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    stored = {key: tensor.dtype for key, tensor in load_peft_weights(str(path), device="cpu").items()}
    if kind != "LORA":
        return _converted(model, kind, stored, rank)
    if reason := why_whole(model, _ADAPTER):
        if str(config.init_lora_weights).startswith(CHANGES_THE_BASE):
            reason = (
                f"{reason}. Where the start was saved before training, PEFT itself converts it: "
                "model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)"
            )
        raise _refusal(model, kind, reason)
    found, others = lora_factors(model, _ADAPTER)
    # PEFT computes in 32 bits with what lies there in 16; what is written has the file's own dtypes again.
    dtypes = {name: [stored.get(f"{PREFIX}{name}.{key}") for key in each.keys] for name, each in found.items()}
    cut = {name: _cut(name, each, rank, dtypes[name]) for name, each in found.items()}
    return _Lora(config, cut, _as_stored(others, stored))


def _cut(
    name: str, factors: Factors, rank: float, dtypes: Sequence[torch.dtype | None], rounding: float | None = None
) -> _Cut:
    if not all(bool(tensor.isfinite().all()) for tensor in (factors.a, factors.b)):
        raise ConfigurationError(f"The adapter has values that are not finite in {name!r}; it cannot be exported.")
    small, working = truncated(factors, rank, rounding), factors.working()
    a, b = (tensor.to(dtype or tensor.dtype) for tensor, dtype in zip((small.a, small.b), dtypes, strict=True))
    same = (
        small.rank == working.rank
        and torch.equal(a.to(working.a), working.a)
        and torch.equal(b.to(working.b), working.b)
    )
    made = small._replace(a=a, b=b)
    return _Cut(made, 0.0 if same else distance(factors, made), norm(factors))


def _converted(model: PeftModel, kind: str, stored: Mapping[str, torch.dtype], rank: float) -> _Lora:
    """By PEFT's own conversion, layer by layer, so that a rank may be more than the smallest layer can have."""
    config: Any = model.peft_config[_ADAPTER]
    layers: dict[str, Any] = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    refused = sorted(
        {
            type(each).__name__
            for each in layers.values()
            if not (isinstance(each, SVDLinear) or each.supports_lora_conversion(_ADAPTER))
        }
    )
    if not layers or refused:
        why = f"PEFT converts no {kind} layer of the type {', '.join(refused)}" if refused else "it changes no weights"
        raise _refusal(model, kind, why)
    if getattr(config, "bias", "none") != "none":
        raise _refusal(model, kind, "its biases are trained, which a LoRA has none of")
    floats = [each for each in stored.values() if each.is_floating_point]
    dtype = max(floats, key=lambda each: each.itemsize, default=torch.float32)
    cut = {name: _cut(name, _full(layer), rank, (dtype, dtype), _ROUNDING) for name, layer in layers.items()}
    wrappers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    others = {key: tensor for key, tensor in state.items() if key.startswith(wrappers)}
    lora = LoraConfig(
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        modules_to_save=getattr(config, "modules_to_save", None),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
    )
    return _Lora(lora, cut, _as_stored(others, stored))


def _full(layer: Any) -> Factors:
    """The layer's whole change."""
    is_adalora = isinstance(layer, SVDLinear)
    if is_adalora:  # which PEFT leaves out of its conversion; the formula is that of its forward pass
        a = layer.lora_A[_ADAPTER] * layer.lora_E[_ADAPTER]
        scaling = layer.scaling[_ADAPTER] / (float(layer.ranknum[_ADAPTER]) + 1e-5)
        return Factors(a.detach(), layer.lora_B[_ADAPTER].detach(), scaling)
    base = layer.get_base_layer()
    most = min(base.weight.shape) if isinstance(base, Conv1D) else min(base.in_features, base.out_features)
    _, state = convert_to_lora(layer, rank=most, adapter_name=_ADAPTER)
    return Factors(state[".lora_A.weight"], state[".lora_B.weight"], 1.0)


def _as_stored(tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    return {key: tensor.to(stored.get(key, tensor.dtype)) for key, tensor in tensors.items()}


def _refusal(model: PeftModel, kind: str, reason: str) -> ConfigurationError:
    tuner: Any = model.base_model
    merges = (
        callable(getattr(tuner, "merge_and_unload", None))
        and not model.active_peft_config.is_prompt_learning
        and kind not in OWN_METHODS
    )
    way_out = (
        "fish-tuning merge FOLDER --output DIR writes it and its base model as one ordinary model."
        if merges
        else "Keep the adapter as it is."
    )
    return ConfigurationError(f"{kind} cannot be exported as an ordinary LoRA here: {reason}. {way_out}")


def _copy_what_lies_beside(path: Path, folder: Path) -> None:
    """Label names, tokenizer or image processor; where there are none, the base model's are looked for later."""
    if (path / MODEL_CONFIG).is_dir():
        shutil.copytree(path / MODEL_CONFIG, folder / MODEL_CONFIG)
    for name in PROCESSING_FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)


def lost_text(done: ExportedAdapter) -> str:
    """What was lost, in a sentence's part."""
    if not done.error:
        return "nothing: no layer's change has a higher rank"
    worst = done.worst_layer
    return (
        f"{_share(done.error)} of the change of the weights (relative Frobenius error of all layers together; most in "
        f"{worst}: {_share(done.errors[worst])})"
    )


def _share(part: float) -> str:
    return f"{part:.2%}" if part >= 1e-4 else f"{part:.0e}"


def ranks_text(done: ExportedAdapter) -> str:
    low, high = min(done.ranks.values()), max(done.ranks.values())
    ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
    return f"{ranks} in {len(done.ranks):,} layer{'s' if len(done.ranks) != 1 else ''}"


def _facts(name: str, path: Path, weights: Path, settings: Mapping[str, Any], done: ExportedAdapter) -> CardFacts:
    """What the card tells: of what it was made, what was lost, and what the card of that one told."""
    card = read_card((path / CARD).read_bytes()) if (path / CARD).is_file() else None
    method = str(settings["peft_type"])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    rows = {
        "made of": f"the adapter `{public_name(name)}` ({method}, {done.bytes_before:,} bytes), by truncated SVD of "
        "each layer's change",
        "fingerprint of that adapter's weights": digest,
        "ranks": ranks_text(done),
        "lost": lost_text(done),
    }
    if is_recomputed(settings):
        init = settings["init_lora_weights"]
        rows["start of that adapter"] = f"`{init}`, which PEFT made an ordinary LoRA of twice the rank of first"
    result = ""
    if card and card.result:
        told = "was not measured" if done.error else "computes the same as the one that it was made of"
        quoted = "\n".join(f"> {line}".rstrip() for line in card.result.splitlines())
        result = f"This adapter {told}. The card of that one told:\n\n{quoted}"
    return CardFacts(
        title=f"{card.title if card else 'FISH-Tuning adapter'}, exported as a LoRA of {ranks_text(done)}",
        base_model=settings.get("base_model_name_or_path"),
        revision=settings.get("revision"),
        rows={**rows, **(card.rows if card else {})},
        result=result,
    )
