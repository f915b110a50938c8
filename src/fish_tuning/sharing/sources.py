"""What an adapter is read from: a folder, or the file of a sparse adapter, of which a folder is made meanwhile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer

from fish_tuning.files.sparse_adapter_file import load_sparse_adapter
from fish_tuning.sparse.sparse_adapters import write_adapter_folder


@contextmanager
def adapter_folder(
    source: str | os.PathLike[str], base_model: str | os.PathLike[str] | None = None
) -> Iterator[str | os.PathLike[str]]:
    """`source` itself; where it is a sparse adapter's file, the ordinary folder that it stands for, for a while.

    The base model's tokenizer is put there, with the length that the file tells.
    """
    if not Path(source).is_file():
        yield source
        return
    adapter = load_sparse_adapter(source)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "adapter")
        write_adapter_folder(adapter, folder)
        if adapter.max_length is not None:
            named = adapter.peft_config
            revision = None if base_model else named.get("revision")
            name = os.fspath(base_model or named.get("base_model_name_or_path") or "")
            _put_tokenizer(name, revision, adapter.max_length, folder)
        yield folder


def _put_tokenizer(base_model: str, revision: str | None, max_length: int, folder: Path) -> None:
    """Nothing where the base model's cannot be read: whoever needs one is told."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(base_model), revision=revision or "main")
    except (OSError, ValueError, HFValidationError):
        return
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(str(folder))
