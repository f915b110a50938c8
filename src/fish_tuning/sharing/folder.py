"""What is put beside an adapter so that its folder works alone: task type, labels, tokenizer, card.

The labels lie in a folder of their own, as the base model's `config.json` with the adapter's labels. Beside the adapter
that file would have transformers look for whole weights there.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fish_tuning.errors import ConfigurationError, FishTuningWarning, MaskError
from fish_tuning.files.adapter_folders import MODEL_CONFIG
from fish_tuning.files.atomic import write_atomically
from fish_tuning.files.delta_file import DELTA_FILE_NAME
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.sharing.card import CARD, CardFacts, Described, card_text, is_hub_name, joined, users_card
from fish_tuning.sharing.tasks import task_kind, task_type
from fish_tuning.sharing.usage import OWN_METHODS, usage
from fish_tuning.sparse.adapter_names import check_saved_names
from fish_tuning.sparse.masked_tensors import count_trainable_parameters

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's names; importing it takes seconds
# Of tokenizers and image processors, as transformers names them.
PROCESSING_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
TOLD = "_fish_tuning_told"  # an attribute of a model: what a Trainer's callback has for the card
_ONE_OF = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def read_adapter_config(folder: Path, shown: str | None = None) -> dict[str, Any]:
    """The content of `adapter_config.json`. Raises ConfigurationError where there is none that can be read."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        depths = ("*", "*/*")
        below = [str(found.parent) for depth in depths for found in sorted(folder.glob(f"{depth}/{ADAPTER_CONFIG}"))]
        hint = f" Folders below have one, e.g. {below[0]!r}." if below and shown is None else ""
        raise ConfigurationError(f"There is no adapter in {shown or str(folder)!r}: it has no {ADAPTER_CONFIG}.{hint}")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{str(file)!r} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or "peft_type" not in content:
        raise ConfigurationError(f"{str(file)!r} is no adapter's configuration: it has no peft_type.")
    for key, kind, shown in (
        ("peft_type", str, "a name"),
        ("base_model_name_or_path", str, "a name or a path"),
        ("revision", str, "a name"),
        ("auto_mapping", dict, "an object"),
    ):
        if not isinstance(content.get(key), (kind, type(None))):
            raise ConfigurationError(f"{str(file)!r}: {key}={content[key]!r} must be {shown}.")
    return content


def check_weights(folder: Path, shown: str | None = None) -> None:
    """Refuse a folder without an adapter's weights, for which PEFT would ask the hub."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigurationError(
            f"The adapter in {shown or str(folder)!r} has no weights: there is no {WEIGHTS[0]} beside "
            f"its {ADAPTER_CONFIG}."
        )


def complete_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    processing_class: Any = None,
    facts: CardFacts | None = None,
) -> None:
    """Put beside a saved adapter what it needs to stand alone; the adapter's weights and its mask stay as they are.

    `save_pretrained` of a masked model does this by itself. Call it for an adapter without a mask, or to give the
    tokenizer and more facts for the card. In `folder` there are then, beside PEFT's files:

    - `task_type` in `adapter_config.json`, where PEFT has one for the model and it changes nothing of the adapter,
      and the base model's `revision`, where `facts` give one;
    - `model_config/config.json`, the base model's configuration with this adapter's label names;
    - the tokenizer or image processor: `processing_class`, else the base model's files where they are on this machine;
    - `README.md`, the model card. One that a user has written or changed is left as it is.

    Args:
        model: the PEFT model that was saved, or the base model whose delta was.
        folder: where the adapter lies.
        adapter_name: which of the model's adapters it is.
        processing_class: the tokenizer or image processor.
        facts: what the card is to tell beside what the adapter's own files and its Trainer tell.

    Raises:
        MaskError: there is no adapter, and no delta, in the folder.

    Warns:
        FishTuningWarning: PEFT loses parts of an adapter of that name when it is loaded.

    Example:
        >>> complete_adapter(model, "adapter", processing_class=tokenizer)  # doctest: +SKIP
    """
    folder, base = Path(folder), base_of(model)
    facts = joined(getattr(model, TOLD, None) or CardFacts(), facts or CardFacts())
    if not (folder / ADAPTER_CONFIG).is_file() and not (folder / DELTA_FILE_NAME).is_file():
        raise MaskError(f"The folder {str(folder)!r} has neither {ADAPTER_CONFIG} nor {DELTA_FILE_NAME}.")
    name = facts.base_model or getattr(base, "name_or_path", "") or None
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        _tell_of_lost_names(model, adapter_name)
        facts = replace(facts, revision=facts.revision or config.revision)
        _complete_config(folder / ADAPTER_CONFIG, config, task_type(base, config), facts.revision)
    _write_model_config(base, folder / MODEL_CONFIG)
    if processing_class is not None:
        with _cutting_nothing(processing_class):
            processing_class.save_pretrained(str(folder))
    elif name is not None and not any((folder / each).is_file() for each in _ONE_OF):
        copy_processing(getattr(base, "name_or_path", name), facts.revision, folder)
    facts = replace(facts, base_model=name)
    if users_card(folder / CARD) is None:
        card = card_text(_described(model, base, config, folder), facts)
        write_atomically(folder / CARD, card.encode())


def _tell_of_lost_names(model: Any, adapter_name: str) -> None:
    """Masks are refused beforehand. Of what was trained without one, or lies beside it, nothing is to end here."""
    try:
        check_saved_names(model, [adapter_name])
    except MaskError as error:
        warnings.warn(f"What PEFT has saved will not load. {error}", FishTuningWarning, stacklevel=3)


@contextmanager
def completed(model: Any, folder: Path, adapters: Mapping[str, str]) -> Iterator[None]:
    """While PEFT saves adapters (their subfolders by their names): complete them when it has, and keep a user's card.

    PEFT adds to whatever card lies in the folder, the path of the base model among it.
    """
    own = users_card(folder / CARD)
    if own is None:
        (folder / CARD).unlink(missing_ok=True)  # ours, which is written anew; with PEFT's additions it would be none
    yield
    if own is not None:
        write_atomically(folder / CARD, own)
    for adapter, subfolder in adapters.items():
        if (folder / subfolder / ADAPTER_CONFIG).is_file():
            complete_adapter(model, folder / subfolder, adapter)


@contextmanager
def _cutting_nothing(processing_class: Any) -> Iterator[None]:
    """A fast tokenizer without the truncation and padding of what it did last, which its file would hold.

    Whether it did anything depends on what `datasets` has in its cache. transformers sets both at each call.
    """
    fast = getattr(getattr(processing_class, "tokenizer", processing_class), "backend_tokenizer", None)
    if fast is None:
        yield
        return
    truncation, padding = fast.truncation, fast.padding
    fast.no_truncation()
    fast.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            fast.enable_truncation(**truncation)
        if padding is not None:
            fast.enable_padding(**padding)


def check_new(folder: Path) -> None:
    """Refuse a folder with something in it: what is written there is a whole of its own."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{str(folder)!r} is there already. Give a new folder, or remove it first.")


def base_of(model: Any) -> Any:
    """The model below the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _complete_config(file: Path, config: Any, kind: str | None, revision: str | None) -> None:
    before = json.loads(file.read_bytes())
    # PEFT writes sets as they come, in another order in each process: the same adapter would have other bytes.
    after = {
        key: sorted(value, key=str) if isinstance(getattr(config, key, None), set | frozenset) else value
        for key, value in before.items()
    }
    if kind is not None and before.get("task_type") is None:
        after |= {"task_type": kind, "auto_mapping": None}
    if revision is not None and before.get("revision") is None:
        after["revision"] = revision
    if after != before:
        write_atomically(file, json.dumps(after, indent=2, sort_keys=True).encode())


def _write_model_config(base: Any, folder: Path) -> None:
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "to_json_string"):
        return  # no model of transformers
    content = json.loads(config.to_json_string(use_diff=True))
    content.pop("_name_or_path", None)
    content["architectures"] = [type(base).__name__]
    # Said in any case: what is as transformers has it by default is left out of the difference.
    for name in ("id2label", "label2id"):
        if getattr(config, name, None):
            content[name] = {str(key): value for key, value in getattr(config, name).items()}
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "config.json", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def copy_processing(name: str, revision: str | None, folder: Path) -> None:
    """The files of the base model's own tokenizer or image processor, from where they lie on this machine."""
    for file in PROCESSING_FILES:
        local = Path(os.path.expanduser(name), file)
        cached = try_to_load_from_cache(name, file, revision=revision) if is_hub_name(name) else None
        found = local if local.is_file() else cached
        if isinstance(found, str | Path) and not (folder / file).exists():
            shutil.copyfile(found, folder / file)


def _described(model: Any, base: Any, config: Any, folder: Path) -> Described:
    kind, rows = task_kind(base), dict(_adapter_rows(config))
    mask = load_mask(folder / MASK_FILE_NAME) if (folder / MASK_FILE_NAME).is_file() else {}
    # A head trains whole beside the adapter; a tensor of the adapter that is kept whole has been chosen so.
    chosen = [
        selected
        for name, selected in mask.items()
        if "modules_to_save" not in name and not (config is None and selected.all())
    ]
    trained = sum(int(selected.sum()) for selected in mask.values()) or count_trainable_parameters(model)
    if not all(selected.all() for selected in chosen):
        kept, pool = sum(int(s.sum()) for s in chosen), sum(s.numel() for s in chosen)
        rows["chosen entries"] = f"{kept:,} of the {pool:,} of the pool ({kept / pool:.2%})"
    if trained:
        rows["trained entries"] = f"{trained:,} in all"
    rows["versions"] = ", ".join(_versions())
    loading, tag = usage(base, config, masked=bool(mask)), kind and kind.pipeline_tag
    if config is None:
        what = "Weights of a base model, as their difference from it"
        return Described(rows, loading, what, "transformers", bool(chosen), tag)
    method = _method(config)
    what = f"A {method} adapter" if method in OWN_METHODS else "An ordinary PEFT adapter"
    return Described(rows, loading, what, "peft", bool(chosen), tag, (method.lower(),))


def _adapter_rows(config: Any) -> Iterable[tuple[str, str]]:
    if config is None:
        yield "method", "the base model's own weights, saved as their difference"
        return
    yield "method", _method(config)
    for name in ("r", "lora_alpha", "num_virtual_tokens", "bottleneck_size", "target_modules", "modules_to_save"):
        value = getattr(config, name, None)
        if value:
            values = sorted(set(value)) if isinstance(value, set | list | tuple) else [value]
            yield name, ", ".join(f"`{each}`" if isinstance(each, str) else str(each) for each in values)


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _versions() -> Iterator[str]:
    import peft
    import torch
    import transformers

    import fish_tuning

    for package in (fish_tuning, torch, transformers, peft):
        yield f"{package.__name__.replace('_', '-')} {package.__version__}"
