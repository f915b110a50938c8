"""LoRAs whose start has changed the base weights, as ordinary ones, by PEFT's own conversion."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import load_file, save_file

from fish_tuning.errors import ConfigurationError
from fish_tuning.sharing.loading import load_base

# Starts that PEFT computes from the base weights alone, and so again whenever it loads one. Others draw
# (pissa_niter_4, orthogonal), or need the data that they were computed from (corda, lora_ga).
RECOMPUTED = ("pissa", "olora")


def is_recomputed(settings: Mapping[str, Any]) -> bool:
    """Whether the adapter with this `adapter_config.json` is one that `as_ordinary_lora` converts."""
    return settings.get("peft_type") == "LORA" and settings.get("init_lora_weights") in RECOMPUTED


@contextmanager
def as_ordinary_lora(folder: Path, settings: Mapping[str, Any], loading: Mapping[str, Any]) -> Iterator[Path]:
    """The folder itself; of PiSSA and OLoRA, for a while, one of the ordinary LoRA of twice the rank that is the same.

    PiSSA trains B A from a start B0 A0 that it takes out of the base weight W: the trained weight is
    W - B0 A0 + B A. The ordinary LoRA on W is [B, -B0] with A on top of A0.

    Raises ConfigurationError where PEFT cannot convert it.
    """
    if not is_recomputed(settings):
        yield folder
        return
    given = dict(loading)
    asked = given.pop("base_model", None)
    base, _ = load_base(folder, settings, None if asked is None else os.fspath(asked), given)
    trained = load_peft_weights(str(folder), device="cpu")
    with tempfile.TemporaryDirectory() as parent:
        start, made = Path(parent, "start"), Path(parent, "adapter")
        try:
            model: Any = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
            model.save_pretrained(str(start))
            set_peft_model_state_dict(model, trained)
            model.save_pretrained(str(made), path_initial_model_for_weight_conversion=str(start))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigurationError(
                f"The adapter in {str(folder)!r} starts from {settings['init_lora_weights']!r}, and PEFT cannot make "
                f"an ordinary LoRA of it: {reason}. fish-tuning merge FOLDER --output DIR writes it and its base model "
                "as one ordinary model."
            ) from error
        converted = load_file(made / SAFETENSORS_WEIGHTS_NAME)
        # PEFT leaves heads out of what it converts.
        save_file({**trained, **converted}, made / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        del model, base  # the converted one is loaded onto another
        yield made
