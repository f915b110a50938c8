"""vLLM's own loader on the folders that are written here; skipped where vLLM is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import random_mask
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fish_tuning import apply_mask, create_mask_from_fisher, export_adapter, save_compact_adapter

peft_helper = pytest.importorskip("vllm.lora.peft_helper", reason="needs vLLM: pip install vllm", exc_type=ImportError)
lora_model = pytest.importorskip("vllm.lora.lora_model", reason="needs vLLM: pip install vllm", exc_type=ImportError)

pytestmark = pytest.mark.slow

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS = {*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}  # of vLLM's LlamaForCausalLM


def load(folder: Path, max_lora_rank: int = 16) -> Any:
    """As vLLM's worker does: read the configuration, validate it, load the tensors."""
    helper = peft_helper.PEFTHelper.from_local_dir(str(folder), 128)
    helper.validate_legal(SimpleNamespace(max_lora_rank=max_lora_rank))
    return lora_model.LoRAModel.from_local_checkpoint(
        str(folder), LAYERS, peft_helper=helper, device="cpu", dtype=torch.float32
    )


def written(llama_folder: Path, folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, "init_lora_weights": False} | settings)
    model = get_peft_model(kind.from_pretrained(llama_folder), config)
    apply_mask(model, random_mask(model))
    model.save_pretrained(folder)
    return folder


def compact(llama_folder: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), LoraConfig(target_modules=ATTENTION))
    scores = {name: torch.rand(each.shape) for name, each in model.named_parameters() if each.requires_grad}
    apply_mask(model, create_mask_from_fisher(scores, keep_ratio=0.3125, granularity="component"))
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_()
    save_compact_adapter(model, folder)
    return folder


def exported(llama_folder: Path, folder: Path) -> Path:
    export_adapter(written(llama_folder, folder.with_name("whole"), r=8), folder, rank=0.9)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        written,
        lambda base, folder: written(base, folder, use_rslora=True, lora_alpha=5),
        lambda base, folder: written(base, folder, target_modules="all-linear"),
        lambda base, folder: written(base, folder, target_modules=[*ATTENTION, "embed_tokens"]),
        compact,
        exported,
    ],
    ids=["masked", "rslora", "all-linear", "embeddings", "compact", "exported"],
)
def test_vllm_loads_the_change_that_peft_loads(
    make: Callable[[Path, Path], Path], llama_folder: Path, tmp_path: Path
) -> None:
    folder = make(llama_folder, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.r
    }
    loaded = load(folder)
    assert loaded.loras.keys() == layers.keys()
    for name, layer in layers.items():
        found: Any = loaded.loras[name]
        assert found.rank == layer.r["default"] == len(found.lora_a)
        change = layer.get_delta_weight("default")
        made = found.scaling * found.lora_b @ found.lora_a
        assert torch.allclose(made.T if made.shape != change.shape else made, change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias is not supported"),
        ({"trainable_token_indices": [1, 2]}, "unsupported LoRA weight"),
        ({"r": 32}, "LoRA rank 32 is greater than max_lora_rank 16"),
    ],
)
def test_what_the_page_says_vllm_refuses(
    settings: dict[str, Any], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(written(llama_folder, tmp_path / "adapter", **settings))


def test_vllm_refuses_what_is_no_lora(llama_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = get_peft_model(base, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Missing required configuration fields"):
        load(tmp_path)


def test_a_classifiers_head_is_loaded_whole(llama_folder: Path, tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    folder = written(llama_folder, tmp_path / "adapter", kind, task_type="SEQ_CLS")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    loaded = load(folder)
    assert list(loaded.modules_to_save) == ["score"]
    assert loaded.modules_to_save["score"].weight.shape[0] == 2
