"""The table of methods that cannot train on quantised weights, proven on the installed PEFT."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny import causal_batch, llama, tensors
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.models.peft_methods import _config_class, _field_names, method_names
from fish_tuning.experiments.models.quantized import quantization_of
from fish_tuning.peft_methods import ATTENTION, BASE, NEEDS_WHOLE_WEIGHTS, peft_method

pytest.importorskip("bitsandbytes", reason="base weights in 4 and 8 bits need bitsandbytes")

# Sizes that fit layers 64 wide, where PEFT's own do not.
SIZES: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "waveft": {"n_frequency": 100},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
}
METHODS = [name for name in method_names() if name != BASE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast in 8 bits
    path = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=64).cpu().save_pretrained(path)
    return path


def arguments(method: str) -> dict[str, Any]:
    known, names = peft_method(method), _field_names(method)
    given = dict(known.arguments(4) if callable(known.arguments) else known.arguments)
    if known.virtual_tokens is not None:
        given["num_virtual_tokens"] = 4
    elif known.targets == ATTENTION and "target_modules" in names and method != "shadow":
        given["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    if "task_type" in names and method != "shadow":
        given["task_type"] = "CAUSAL_LM"
    return given | SIZES.get(method, {})


def train(method: str, bits: int, folder: Path) -> None:
    """Two steps; raises whatever PEFT raises."""
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, device_map="cpu")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    model = get_peft_model(base, _config_class(method)(**arguments(method))).train()
    batch = {name: tensor.cpu() for name, tensor in causal_batch().items()}
    before = tensors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_few_bits_or_is_in_the_table(method: str, bits: int, folder: Path) -> None:
    if method in NEEDS_WHOLE_WEIGHTS[bits]:
        with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)):
            train(method, bits, folder)
    else:
        train(method, bits, folder)


def test_what_is_stored_is_told_whatever_stored_it() -> None:
    model = ModelConfig(name="a")
    assert quantization_of(model, SimpleNamespace()) is None
    found = quantization_of(model, SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 3}))
    assert found is not None
    assert (found.method, found.bits, found.text) == ("gptq", 3, "3 bits, stored by gptq")
