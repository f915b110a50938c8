"""Smaller LoRAs: the same function, in stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import bert, classification_batch, llama, lora, tensors
from torch import nn

from fish_tuning import (
    MaskError,
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
    save_compact_adapter,
)

BATCH = classification_batch()


def trained(steps: int = 3, budget: int = 128, **config: Any) -> Any:
    """A LoRA of which whole components were trained from B = 0."""
    model = lora(bert(), init_lora_weights=True, target_modules=["query", "value", "intermediate.dense"], **config)
    scores = calculate_fisher_information(model, [BATCH], progress=False)
    head = sum(tensor.numel() for name, tensor in scores.items() if "classifier" in name)
    mask = create_mask_from_fisher(
        scores, num_trainable=head + budget, names_to_exclude=["classifier"], granularity="component"
    )
    apply_mask(model, mask)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**BATCH).logits
    return result


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 7}], ids=str)
def test_stock_peft_computes_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**config)
    before = tensors(model)
    ranks = save_compact_adapter(model, tmp_path / "small")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    kept = sum(int(m.any(1).sum()) for name, m in get_mask(model).items() if "lora_A" in name)
    assert sum(ranks.values()) == kept < 3 * 2 * 4
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "whole")
    small, whole = ((tmp_path / f / "adapter_model.safetensors").stat().st_size for f in ("small", "whole"))
    assert small < whole
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_what_is_frozen_and_not_zero_stays(tmp_path: Path) -> None:
    model = lora(bert(), init_lora_weights=False)
    ranks = save_compact_adapter(model, tmp_path / "same")
    assert set(ranks.values()) == {4}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path / "same")), logits(model))


def test_embeddings_and_top_layers(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, target_modules=["embed_tokens", "q_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    model: Any = get_peft_model(llama(), config)
    base = model.base_model.model.model
    with torch.no_grad():
        for layer in (base.layers[1].self_attn.q_proj,):
            layer.lora_B["default"].weight[:, 1] = 0.3
    ranks = save_compact_adapter(model, tmp_path / "small")
    assert ranks == {"model.layers.1.self_attn.q_proj": 1}
    ids = {"input_ids": torch.arange(12, device=DEVICE).view(2, 6)}
    with torch.no_grad():
        found = PeftModel.from_pretrained(llama(), tmp_path / "small").eval()(**ids).logits
        torch.testing.assert_close(found, model.eval()(**ids).logits, rtol=1e-5, atol=1e-6)
    embedding: Any = get_peft_model(llama(), LoraConfig(r=3, target_modules=["embed_tokens"]))
    with torch.no_grad():
        embedding.base_model.model.model.embed_tokens.lora_embedding_A["default"][2] = 0.2
        embedding.base_model.model.model.embed_tokens.lora_embedding_B["default"][:, 2] = 0.5
    assert save_compact_adapter(embedding, tmp_path / "rows") == {"model.embed_tokens": 1}
    with torch.no_grad():
        found = PeftModel.from_pretrained(llama(), tmp_path / "rows").eval()(**ids).logits
        torch.testing.assert_close(found, embedding.eval()(**ids).logits, rtol=1e-5, atol=1e-6)


def test_another_adapter_by_name(tmp_path: Path) -> None:
    model = lora(bert(), init_lora_weights=True)
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"], init_lora_weights=False))
    ranks = save_compact_adapter(model, tmp_path / "second", adapter_name="second")
    assert set(ranks.values()) == {2}
    assert all("key" in name for name in ranks)
    with pytest.raises(MaskError, match="third"):
        save_compact_adapter(model, tmp_path / "third", adapter_name="third")


def test_what_cannot_be_made_smaller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="No component of the adapter 'default' does anything"):
        save_compact_adapter(lora(bert(), init_lora_weights=True), tmp_path / "a")
    with pytest.raises(MaskError, match="DoRA's magnitudes"):
        save_compact_adapter(lora(bert(), init_lora_weights=False, use_dora=True), tmp_path / "a")
    with pytest.raises(MaskError, match="trained biases belong to whole layers"):
        save_compact_adapter(lora(bert(), init_lora_weights=False, bias="lora_only"), tmp_path / "a")
    with pytest.raises(MaskError, match="init_lora_weights='pissa' changes the base weights"):
        save_compact_adapter(lora(bert(), init_lora_weights="pissa"), tmp_path / "a")
    ia3 = get_peft_model(bert(), IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[]))
    with pytest.raises(MaskError, match="it is IA3"):
        save_compact_adapter(ia3, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def chain() -> nn.Sequential:
    """Layers `0` and `1.0`: the name of one is the end of the other's."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("columns", [{"0": [0], "1.0": [1, 2]}, {"0": [0]}, {"1.0": [2]}], ids=str)
def test_names_that_end_alike(columns: dict[str, list[int]], tmp_path: Path) -> None:
    model: Any = get_peft_model(chain(), LoraConfig(r=3, target_modules=["0"]))
    with torch.no_grad():
        for name, which in columns.items():
            model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight[:, which] = 0.5
    assert save_compact_adapter(model, tmp_path / "small") == {name: len(which) for name, which in columns.items()}
    loaded = PeftModel.from_pretrained(chain(), tmp_path / "small")
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(loaded(inputs), model.eval()(inputs))
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(columns)


def test_tied_embeddings(tmp_path: Path) -> None:
    def base() -> Any:
        made = llama()
        made.config.tie_word_embeddings = True
        made.tie_weights()
        return made

    torch.manual_seed(0)
    model: Any = get_peft_model(
        base(), LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    )
    assert set(save_compact_adapter(model, tmp_path / "tied")) == {"model.embed_tokens", "lm_head"}
    ids = {"input_ids": torch.arange(12, device=DEVICE).view(2, 6)}
    with torch.no_grad():
        found = PeftModel.from_pretrained(base(), tmp_path / "tied").eval()(**ids).logits
        torch.testing.assert_close(found, model.eval()(**ids).logits, rtol=1e-5, atol=1e-6)


def test_a_masked_head_goes_with_it(tmp_path: Path) -> None:
    model = lora(bert(), init_lora_weights=True)
    scores = calculate_fisher_information(model, [BATCH], progress=False)
    apply_mask(model, create_mask_from_fisher(scores, keep_ratio=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_compact_adapter(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def test_what_is_not_made_of_components_is_refused(tmp_path: Path) -> None:
    convolution: Any = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    with pytest.raises(MaskError, match="its A has 4 rows, its B 2 columns, as in a convolution with groups"):
        save_compact_adapter(convolution, tmp_path / "a")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

    experts: Any = get_peft_model(
        nn.ModuleDict({"experts": Experts()}), LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    )
    with pytest.raises(MaskError, match="target_parameters"):
        save_compact_adapter(experts, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_new_words_of_an_embedding_that_is_left_out(tmp_path: Path) -> None:
    """PEFT saves the base weights of adapted embeddings, by a name that only an adapted layer has."""
    base = llama()
    model: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])).eval()
    with torch.no_grad():
        base.get_input_embeddings().weight[3:] = 1.5
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[:, 1] = 0.3
    assert set(save_compact_adapter(model, tmp_path / "small")) == {"model.layers.0.self_attn.q_proj"}
    ids = {"input_ids": torch.arange(12, device=DEVICE).view(2, 6)}
    with torch.no_grad():
        found = PeftModel.from_pretrained(llama(), tmp_path / "small").eval()(**ids).logits
        torch.testing.assert_close(found, model(**ids).logits, rtol=1e-5, atol=1e-6)
