"""Predictions of a saved adapter on texts and images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from fish_tuning.errors import ConfigurationError, FishTuningWarning
from fish_tuning.sharing.folder import PROCESSING_FILES, read_adapter_config
from fish_tuning.sharing.hub import fetched
from fish_tuning.sharing.lengths import check_room, positions_of
from fish_tuning.sharing.loading import base_arguments, load_whole_adapter
from fish_tuning.sharing.rows import IMAGE, Row, check_columns, has_images, read_image, text_columns
from fish_tuning.sharing.sources import adapter_folder
from fish_tuning.sharing.tasks import task_kind

# What a prediction adds to a row.
PREDICTION, PROBABILITY = "prediction", "probability"
_ON_TEXTS = ("text-classification", "token-classification", "text-generation")
_ON_IMAGES = ("image-classification",)


def predict(
    folder: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    columns: Sequence[str] = (),
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    chat_template: bool | None = None,
    **loading: Any,
) -> list[Row]:
    """The rows, each with what the adapter in `folder` predicts for it, on the GPU where there is one.

    Images are prepared by the adapter's image processor, as in training. Classes give `prediction` (the label's name),
    `probability` and `probability_<label>`; numbers give `prediction`; tagged words, which are the text's parts between
    blanks, give a list of labels and one of probabilities; a causal language model gives the text that it writes,
    always taking the most probable token.

    Args:
        folder: an adapter's folder, a sparse adapter's file, or a repository of the hub.
        rows: with a column of texts, or two for pairs, or a column `image` of image files or PIL images.
        columns: the columns to read; found from the rows by default, where a column of nothing but label names or
            numbers is none.
        batch_size: rows at a time.
        max_length: tokens that a text is cut to; by default those of `model_max_length` beside the adapter, which an
            experiment sets to its `max_seq_length`, or as many as the model takes.
        max_new_tokens: that a language model may write.
        chat_template: whether a text is put into the tokenizer's chat template; where there is one by default.
        **loading: for `load_adapter`: `base_model`, `revision`, `token`, `dtype`, ...

    Raises:
        ConfigurationError: a model for something else, rows without texts or images, or tensors that are random.

    Warns:
        FishTuningWarning: two columns are read as pairs of texts that nobody named.

    Example:
        >>> predict("adapter", [{"text": "a fine film"}])  # doctest: +SKIP
        [{'text': 'a fine film', 'prediction': 'positive', 'probability': 0.93, ...}]
    """
    images = has_images(rows, columns)
    if not images:
        check_columns(rows, columns)
    taken = {name for row in rows for name in row if name == PREDICTION or name.startswith(PROBABILITY)}
    if taken:
        raise ConfigurationError(f"The rows have a column {sorted(taken)[0]!r} already. Rename it, or take it out.")
    with adapter_folder(folder, loading.get("base_model")) as path:
        model = load_whole_adapter(path, **loading)
        names = (IMAGE,) if images else _text_columns(rows, columns, model.config)
        kind = _kind(model.get_base_model(), images, names)
        processor = _processor(AutoImageProcessor if images else AutoTokenizer, path, loading)
        if max_length is not None and not images:
            _check_length(model, processor, kind, max_length, len(names))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not getattr(model, "hf_device_map", None):
        model.to(device)
    inputs = [tuple(row[name] for name in names) for row in rows]
    found: list[Row] = []
    with torch.inference_mode():
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            if kind == "text-generation":
                found += _generated(model, processor, [text for (text,) in batch], max_new_tokens, chat_template)
            elif kind == "token-classification":
                found += _tagged(model, processor, [text.split() for (text,) in batch], max_length)
            elif images:
                pixels = processor(images=[read_image(image) for (image,) in batch], return_tensors="pt")
                found += _classes(model, pixels)
            else:
                texts = [list(column) for column in zip(*batch, strict=True)]
                cut = _cut(model, processor, max_length)
                found += _classes(model, processor(*texts, return_tensors="pt", padding=True, **cut))
    return [{**row, **prediction} for row, prediction in zip(rows, found, strict=True)]


def _text_columns(rows: Sequence[Row], asked: Sequence[str], config: Any) -> tuple[str, ...]:
    names = text_columns(rows, asked, {str(label) for label in (getattr(config, "id2label", None) or {}).values()})
    if len(names) == 2 and not asked:
        warnings.warn(
            f"The columns {names[0]!r} and {names[1]!r} are read as pairs of texts. If the adapter was trained on one "
            f"of them, name it: --text-column {names[0]} (in Python columns=[{names[0]!r}]).",
            FishTuningWarning,
            stacklevel=3,
        )
    return names


def _kind(base: Any, images: bool, names: Sequence[str]) -> str:
    """What the model is for. Refuses one that is for something else, or that reads other inputs than there are."""
    kind = task_kind(base)
    if kind is None or kind.pipeline_tag not in (*_ON_TEXTS, *_ON_IMAGES):
        raise ConfigurationError(
            f"{type(base).__name__} is for something else than what predict does: {', '.join(_ON_TEXTS + _ON_IMAGES)}."
        )
    if images != (kind.pipeline_tag in _ON_IMAGES):
        wants, way_out = ("texts", f"Name the column of texts, if it is not {IMAGE!r}, with --text-column")
        if not images:
            wants, way_out = (
                "images",
                f"Give image files, a folder of them, or rows with a column {IMAGE!r} of such files",
            )
        raise ConfigurationError(f"{type(base).__name__} reads {wants}, not {', '.join(names)}. {way_out}.")
    if kind.pipeline_tag != "text-classification" and len(names) != 1:
        raise ConfigurationError(f"One column of texts is needed, not {', '.join(names)}. Name it with --text-column.")
    return kind.pipeline_tag


def _classes(model: Any, encoded: Any) -> Iterator[Row]:
    logits = model(**encoded.to(model.device)).logits
    logits = _finite((logits[0] if isinstance(logits, tuple) else logits).float().cpu())
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        for numbers in logits.tolist():
            yield {PREDICTION: numbers[0] if len(numbers) == 1 else numbers}
        return
    several = config.problem_type == "multi_label_classification"
    for shares in (logits.sigmoid() if several else logits.softmax(-1)).tolist():
        named = {config.id2label[number]: share for number, share in enumerate(shares)}
        if several:
            yield {PREDICTION: [name for name, share in named.items() if share > 0.5], **_each(named)}
        else:
            best = max(named, key=named.__getitem__)
            yield {PREDICTION: best, PROBABILITY: named[best], **_each(named)}


def _finite(logits: Tensor) -> Tensor:
    """Refuse outputs that say nothing, which JSON could not hold either."""
    if not bool(logits.isfinite().all()):
        raise ConfigurationError(
            "The model's outputs are not finite, so they are no predictions: the adapter or its base model holds "
            "numbers that are not, or its dtype is too narrow for it."
        )
    return logits


def _each(named: dict[str, float]) -> Row:
    return {f"{PROBABILITY}_{name}": share for name, share in named.items()}


def _tagged(model: Any, tokenizer: Any, words: Sequence[list[str]], max_length: int | None) -> Iterator[Row]:
    encoded = tokenizer(
        list(words),
        is_split_into_words=True,
        return_tensors="pt",
        padding=True,
        **_cut(model, tokenizer, max_length),
    )
    shares = _finite(model(**encoded.to(model.device)).logits.float().cpu()).softmax(-1)
    for number, row in enumerate(words):
        first: dict[int, int] = {}
        for position, word in enumerate(encoded.word_ids(number)):
            if word is not None:
                first.setdefault(word, position)
        best = [shares[number, first[word]].max(-1) for word in range(len(row)) if word in first]
        if len(best) < len(row):
            most = _cut(model, tokenizer, max_length)["max_length"]
            raise ConfigurationError(
                f"A text of {len(row)} words is longer than the {most} tokens that it is cut to. Split it, or set "
                "--max-length."
            )
        yield {
            PREDICTION: [model.config.id2label[int(each.indices)] for each in best],
            PROBABILITY: [float(each.values) for each in best],
        }


def _generated(
    model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int, chat_template: bool | None
) -> Iterator[Row]:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template and not has_template:
        raise ConfigurationError("The tokenizer has no chat template.")
    if has_template if chat_template is None else chat_template:
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for text in texts
        ]
    else:
        ids = [_without_end(tokenizer(text)["input_ids"], tokenizer) for text in texts]
    encoded = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(model.device)
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    for written in out[:, encoded["input_ids"].shape[1] :]:
        yield {PREDICTION: tokenizer.decode(written, skip_special_tokens=True).strip()}


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Of a tokenizer that ends every text: the model is to write on."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _cut(model: Any, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    most = positions_of(model.config) or 10**9
    return {"truncation": True, "max_length": max_length or min(tokenizer.model_max_length, most)}


def _check_length(model: Any, tokenizer: Any, kind: str, max_length: int, columns: int) -> None:
    """Refuse a length that cannot be cut to, or that the model would break at; what writes texts cuts none."""
    if kind == "text-generation":
        return
    check_room(tokenizer, "--max-length", max_length, columns)
    positions = positions_of(model.config)
    if positions is not None and max_length > positions:
        raise ConfigurationError(
            f"--max-length={max_length} is more than the {positions} positions of the model; set it to {positions} or "
            "less."
        )


def _of_base(auto_class: Any, path: Path, loading: dict[str, Any]) -> Any:
    settings = read_adapter_config(path)
    asked = loading.get("base_model")
    name = os.path.expanduser(str(asked or settings.get("base_model_name_or_path")))
    revision = None if asked else settings.get("revision")  # an adapter's own revision is another repository's
    token = {} if loading.get("token") is None else {"token": loading["token"]}
    return auto_class.from_pretrained(
        name, revision=revision or "main", **token, **base_arguments(name, revision, loading)
    )


def _processor(auto_class: Any, folder: str | os.PathLike[str], loading: dict[str, Any]) -> Any:
    """The tokenizer or image processor beside the adapter, else the base model's."""
    hub = {name: loading[name] for name in ("revision", "token") if loading.get(name) is not None}
    path = fetched(folder, **hub)
    own = any((path / name).is_file() for name in PROCESSING_FILES)
    try:
        found = auto_class.from_pretrained(str(path)) if own else _of_base(auto_class, path, loading)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "tokenizer" if auto_class is AutoTokenizer else "image processor"
        raise ConfigurationError(
            f"There is no {what} in {str(path)!r} that can be read: {reason} Save it there: "
            f"{what.replace(' ', '_')}.save_pretrained(folder)."
        ) from error
    if auto_class is AutoTokenizer and found.pad_token is None:
        found.pad_token = found.eos_token or found.unk_token
    return found
