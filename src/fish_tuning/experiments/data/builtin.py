"""The embedded default: real handwritten digits that come with scikit-learn, and a small ViT that knows half of them.

`builtin:digits` is the digits 5-9 as a folder of parquet files, `builtin:digits-vit` a ViT pretrained on 0-4 as a
folder that `from_pretrained` loads. Both are made on first use and cached; after that everything sees ordinary folders.
Each folder holds a digest of its files: one that no longer fits is made again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.data.digests import folder_digest
from fish_tuning.files.atomic import recover_folder, whole_folder

logger = logging.getLogger(__name__)

PREFIX = "builtin:"
DIGEST_FILE = ".digest"  # hidden, so that it is not read as data
PRETRAIN_EPOCHS = 40
TRAIN_EXAMPLES = 300
SEED = 0

# The shape of `builtin:digits-vit`.
VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def resolve_builtin(name: str, *, weights: bool = True) -> str:
    """The folder of a `builtin:` name, made if it is not there yet; any other name as it is.

    Without `weights` the folder need only hold a model's configuration, so that nothing is trained to count parameters.
    """
    if not name.startswith(PREFIX):
        return name
    if name not in _MAKERS:
        raise ConfigurationError(
            f"{name!r} is not built in; built in are {', '.join(_MAKERS)}.{did_you_mean(name, _MAKERS)}"
        )
    folder = cache_directory() / name.removeprefix(PREFIX)
    maker = _MAKERS[name]
    if not weights and name in _CONFIG_MAKERS and not folder.is_dir():
        folder, maker = folder.with_name(f"{folder.name}-config"), _CONFIG_MAKERS[name]
    _make_sure(folder, maker)
    return str(folder)


def cache_directory() -> Path:
    """`FISH_TUNING_CACHE`, else `fish-tuning` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "fish-tuning")
    return Path(os.environ.get("FISH_TUNING_CACHE", default))


def _make_sure(folder: Path, maker: Callable[[Path], None]) -> None:
    """Make the folder where it is missing or damaged; once, also when several processes come to it together."""
    if _is_intact(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        recover_folder(folder)
        if _is_intact(folder):
            return
        if folder.is_dir():
            logger.warning("The files in %s are not those that were made; they are made again.", folder)
        with whole_folder(folder) as unfinished:
            maker(unfinished)
            (unfinished / DIGEST_FILE).write_text(folder_digest(unfinished))


def _is_intact(folder: Path) -> bool:
    digest = folder / DIGEST_FILE
    return digest.is_file() and digest.read_text() == folder_digest(folder, leave_out=(DIGEST_FILE,))


def _digits(classes: range) -> tuple[Any, Any]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels from 0, in an order that mixes the classes."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    wanted = np.isin(labels, list(classes))
    order = np.random.default_rng(SEED).permutation(int(wanted.sum()))
    pixels = images[wanted][order].reshape(-1, 1, 8, 8).astype("float32") / 8 - 1
    return pixels, labels[wanted][order] - classes.start


def _make_digits(folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    pixels, labels = _digits(range(5, 10))
    features = Features(
        {"pixel_values": List(List(List(Value("float32")))), "label": ClassLabel(names=["5", "6", "7", "8", "9"])}
    )
    for split, part in (("train", slice(TRAIN_EXAMPLES)), ("validation", slice(TRAIN_EXAMPLES, None))):
        data = {"pixel_values": pixels[part].tolist(), "label": labels[part].tolist()}
        Dataset.from_dict(data, features=features).to_parquet(folder / f"{split}.parquet")


def _make_digits_vit(folder: Path) -> None:
    """A ViT trained on the digits 0-4 with AdamW; ten seconds or so on one core."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logger.warning("Pretraining a small ViT on the digits 0-4, once; it is kept in %s.", folder.parent)
    pixels, labels = (torch.as_tensor(array) for array in _digits(range(5)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = ViTForImageClassification(ViTConfig(**VIT))
        steps = PRETRAIN_EPOCHS * (len(labels) // 32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in range(PRETRAIN_EPOCHS):
            for batch in torch.randperm(len(labels))[: len(labels) // 32 * 32].split(32):
                model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    model.base_model.save_pretrained(folder)  # without the head: the new digits get a new one


def _make_digits_vit_config(folder: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(**VIT).save_pretrained(folder)


_MAKERS: dict[str, Callable[[Path], None]] = {
    f"{PREFIX}digits": _make_digits,
    f"{PREFIX}digits-vit": _make_digits_vit,
}
_CONFIG_MAKERS: dict[str, Callable[[Path], None]] = {f"{PREFIX}digits-vit": _make_digits_vit_config}
