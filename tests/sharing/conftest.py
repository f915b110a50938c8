"""A trained, masked adapter of three classes on a local base model, saved as its model saves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, Hub, fake_hub
from folders import write_bert, write_llama
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny import random_mask
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fish_tuning import apply_mask

LABELS = {0: "bad", 1: "fair", 2: "good"}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "my-bert")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "my-llama")


@pytest.fixture
def classifier(base_folder: Path) -> Any:
    """A masked LoRA whose configuration has no task type."""
    labels = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, **labels)
    config = LoraConfig(target_modules=["query", "value"], init_lora_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(base, config).eval()
    apply_mask(model, random_mask(model, dense=["classifier"]))
    return model


@pytest.fixture
def adapter(classifier: Any, tmp_path: Path) -> Path:
    classifier.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def language_adapter(llama_folder: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path / "language-adapter")
    return tmp_path / "language-adapter"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub speaks with in this process, as HF_ENDPOINT has it do in another."""
    with fake_hub() as made:
        for name, value in {
            "ENDPOINT": made.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
