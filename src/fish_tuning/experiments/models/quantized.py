"""Base weights of fewer bits: what a file asks for, what a model is stored in, and what cannot be trained on either."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.models.targets import head_names
from fish_tuning.peft_methods import BASE, NEEDS_WHOLE_WEIGHTS
from fish_tuning.scores.quantized import keep_unpacked

BITSANDBYTES = "bitsandbytes"
_SKIPPED = "llm_int8_skip_modules"  # of 4 bits too


class Quantization(NamedTuple):
    """How a model's weights are quantised.

    Args:
        method: `bitsandbytes`, or whatever else wrote the stored weights.
        bits: of a weight; None where that is not known.
        settings: of transformers' configuration of the method, those that count with so many bits.
        is_stored: whether the weights lie in fewer bits already, instead of being quantised when they are loaded.
    """

    method: str
    bits: int | None
    settings: Mapping[str, Any]
    is_stored: bool

    @property
    def text(self) -> str:
        """In words, for a reader."""
        words = [f"{self.bits or 'few'} bits"]
        if self.bits == 4 and self.method == BITSANDBYTES:
            double = ", doubly quantised" if self.settings["bnb_4bit_use_double_quant"] else ""
            kind, dtype = self.settings["bnb_4bit_quant_type"], self.settings["bnb_4bit_compute_dtype"]
            words = [f"4 bits ({kind}{double}), computed in {dtype}"]
        return ", ".join([*words, f"stored by {self.method}" if self.is_stored else f"by {self.method}"])


def quantization_of(model: ModelConfig, model_config: Any) -> Quantization | None:
    """What `model.quantization_config` asks for, or what `model_config` says of the stored weights; None for neither.

    Raises ConfigurationError for both.
    """
    stored: Any = getattr(model_config, "quantization_config", None)
    asked = model.quantization_config
    if stored is None:
        return None if asked is None else _of_bitsandbytes(asked.model_dump(), is_stored=False)
    values = _plain(stored)
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", BITSANDBYTES)))
    found = (
        _of_bitsandbytes(values, is_stored=True)
        if method == BITSANDBYTES
        else Quantization(method, values.get("bits"), values, is_stored=True)
    )
    if asked is not None:
        raise ConfigurationError(
            f"model.quantization_config asks for {asked.bits} bits, but the weights of {model.name!r} are quantised "
            f"already: {found.text}. Leave it out, or name a model that is stored in 16 or 32 bits."
        )
    return found


def _plain(stored: Any) -> dict[str, Any]:
    return dict(stored if isinstance(stored, Mapping) else stored.to_dict())


def _of_bitsandbytes(values: Mapping[str, Any], *, is_stored: bool) -> Quantization:
    """With the defaults that transformers fills in, and without what does nothing with so many bits."""
    known = {name: value for name, value in values.items() if not name.startswith("_") and name != "quant_method"}
    settings = BitsAndBytesConfig(**known).to_dict()
    bits = 4 if settings["load_in_4bit"] else 8
    of_bits = ("bnb_4bit_", _SKIPPED) if bits == 4 else ("llm_int8_threshold", _SKIPPED)
    kept = {name: value for name, value in settings.items() if name.startswith(of_bits)}
    return Quantization(BITSANDBYTES, bits, {f"load_in_{bits}bit": True, **kept}, is_stored)


def check_quantized(config: ExperimentConfig, quantization: Quantization | None) -> None:
    """Refuse arms that cannot train on quantised weights, before anything is loaded."""
    if quantization is None:
        return
    for arm in config.arms:
        section = config.method_of(arm)
        arguments = {**section.args, **(section.baseline_args if config.variant_of(arm).small else section.fish_args)}
        method = "dora" if arguments.get("use_dora") else section.method
        way_out = "Leave the arm out, or take a model whose weights are stored in 16 or 32 bits."
        if section.method == BASE:
            raise ConfigurationError(
                f"peft.method={BASE!r}: {arm} would train the model's own weights, which are quantised "
                f"({quantization.text}) and have no gradient. {way_out}"
            )
        if quantization.method == BITSANDBYTES and method in NEEDS_WHOLE_WEIGHTS[quantization.bits or 4]:
            raise ConfigurationError(
                f"peft.method={method!r}: PEFT's {method} cannot train on weights of {quantization.bits} bits "
                f"(asked for by {arm}). Methods that can are lora, ia3, vera, serial_adapter and more. {way_out}"
            )
        init = config.initialisation(arm)
        if str(init).startswith("pissa") or init == "orthogonal":
            raise ConfigurationError(
                f"init_lora_weights={init!r}: PEFT cannot start {arm} so on quantised weights ({quantization.text}). "
                "Starts that can are true, gaussian, olora, eva and gradient; or leave out model.quantization_config."
            )


def is_installed(quantization: Quantization | None) -> bool:
    """Whether what the weights need is there, as far as that is known here."""
    needs = quantization is not None and quantization.method == BITSANDBYTES
    return not needs or importlib.util.find_spec(BITSANDBYTES) is not None


def check_installed(quantization: Quantization | None) -> None:
    """Counting does not need bitsandbytes, loading does."""
    if quantization is not None and not is_installed(quantization):
        key = "model.name" if quantization.is_stored else "model.quantization_config"
        raise ConfigurationError(
            f"{key}: weights of {quantization.bits} bits need the package {BITSANDBYTES}, which is not installed; "
            "pip install 'fish-tuning[quantized]' brings it. --dry-run counts without it."
        )


def kept_whole(base: Any, quantization: Quantization, *, brings_head: bool) -> list[str]:
    """The modules of a model that are never quantised, whatever `llm_int8_skip_modules` says.

    Those of a new head are trained: transformers by itself spares some of them, or none, and PEFT's copy of a quantised
    one cannot compute. Of a language model's output layer trl takes the weight itself; transformers spares it too,
    unless it is told what to skip.
    """
    if brings_head:
        return head_names(base)
    output = base.get_output_embeddings()
    if quantization.is_stored or not quantization.settings.get(_SKIPPED):
        return []
    return [name for name, module in base.named_modules() if module is output]


def loading_arguments(model: ModelConfig, model_config: Any, head: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` takes to load such weights, its `config` included: a copy, which adapters may change.

    `head` are the modules that stay as they are, from `kept_whole`.
    """
    model_config = copy.deepcopy(model_config)
    quantization = quantization_of(model, model_config)
    if quantization is None or quantization.method != BITSANDBYTES:
        return {"config": model_config}
    asked = quantization.settings[_SKIPPED] or ()
    skipped = {_SKIPPED: sorted({*head, *asked})} if head else {}
    if quantization.is_stored:
        model_config.quantization_config = {**_plain(model_config.quantization_config), **skipped}
        return {"config": model_config}
    return {"config": model_config, "quantization_config": BitsAndBytesConfig(**{**quantization.settings, **skipped})}


def prepared(base: Any) -> Any:
    """A quantised model, made fit for training as PEFT does it; any other as it is.

    The Trainer turns activation checkpointing on, where the arguments ask for it, and has the inputs require gradients
    then; so neither is done here.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        return base
    if not quantizer.is_trainable:
        raise ConfigurationError(
            f"model.name: no adapter can be trained on weights that {quantizer.quantization_config.quant_method} has "
            "quantised, transformers says. Name a model that is stored in 16 or 32 bits."
        )
    model = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    keep_unpacked(model)
    return model
