"""An adapter and its base model as one ordinary model, for whatever loads no adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fish_tuning.errors import ConfigurationError
from fish_tuning.files.atomic import whole_folder
from fish_tuning.sharing.card import CARD, CardFacts, Described, card_text
from fish_tuning.sharing.folder import PROCESSING_FILES, check_new, copy_processing, read_adapter_config
from fish_tuning.sharing.hub import fetched
from fish_tuning.sharing.loading import load_whole_adapter
from fish_tuning.sharing.sources import adapter_folder
from fish_tuning.sharing.tasks import task_kind


def merge_adapter(folder: str | os.PathLike[str], output: str | os.PathLike[str], **loading: Any) -> Path:
    """Write the base model with the adapter in its weights, label names and tokenizer with it, whole or not at all.

    `AutoModelFor...from_pretrained(output)` and `pipeline(..., model=output)` take the folder as it is.

    Args:
        folder: an adapter's folder, a sparse adapter's file, or a repository of the hub.
        output: a new or empty folder.
        **loading: for `load_adapter`: `base_model`, `revision`, `token`, `dtype`, ...

    Returns:
        `output`.

    Raises:
        ConfigurationError: a method that cannot be merged into weights, quantised base weights, or an output folder
            with something in it.

    Example:
        >>> merge_adapter("adapter", "merged")  # doctest: +SKIP
    """
    output = Path(output)
    check_new(output)
    with adapter_folder(folder, loading.get("base_model")) as source:
        _merge(source, output, loading)
    return output


def _merge(folder: str | os.PathLike[str], output: Path, loading: dict[str, Any]) -> None:
    path = fetched(folder, revision=loading.get("revision"), token=loading.get("token"))
    settings = read_adapter_config(path)
    method, base_name = str(settings["peft_type"]), loading.get("base_model") or settings["base_model_name_or_path"]
    model = load_whole_adapter(folder, **loading)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigurationError("The base model's weights are quantised: merging would round the adapter away.")
    cannot = f"{method} cannot be merged into weights: what it does is no part of a layer's weight. Keep the adapter."
    if not callable(getattr(model.base_model, "merge_and_unload", None)) or model.active_peft_config.is_prompt_learning:
        raise ConfigurationError(cannot)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{cannot} ({' '.join(str(error).split())[:200]})") from error
    kind = task_kind(merged)
    auto_class = type(merged).__name__
    usage = f'```python\nfrom transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("...")\n```'
    rows = {"made of": f"the base model and an adapter ({method}), merged"}
    described = Described(rows, usage, "A whole model", "transformers", pipeline_tag=kind and kind.pipeline_tag)
    facts = CardFacts(title="Merged FISH-Tuning model", base_model=str(base_name), revision=settings.get("revision"))
    with whole_folder(output) as unfinished:
        merged.save_pretrained(str(unfinished))
        own = any((path / name).is_file() for name in PROCESSING_FILES)
        copy_processing(str(path if own else base_name), None if own else settings.get("revision"), unfinished)
        (unfinished / CARD).write_text(card_text(described, facts))
