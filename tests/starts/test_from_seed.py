from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapter_models import adapted
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import assert_same_tensors, bert, classification_batch, llama, lora, random_mask, tensors

from fish_tuning import ConfigurationError, apply_mask, start_from_seed

BATCH = classification_batch()


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(model).items() if "default" in name}


def test_the_seed_alone_decides() -> None:
    one, other = lora(bert(), seed=1), lora(bert(), seed=2)
    start_from_seed(one, 5)
    torch.manual_seed(99)
    start_from_seed(other, 5)
    factors = [{n: t for n, t in adapter(model).items() if "lora_" in n} for model in (one, other)]
    assert_same_tensors(*factors)
    start_from_seed(other, 6)
    assert all(
        torch.equal(tensor, factors[0][name]) == ("lora_B" in name)
        for name, tensor in adapter(other).items()
        if "lora_" in name
    )


def test_lora_starts_as_pefts_does() -> None:
    model = lora(bert(hidden_size=256, intermediate_size=32), rank=16, init_lora_weights=False)
    before = adapter(model)
    with torch.no_grad():
        base = bert(hidden_size=256, intermediate_size=32)(**BATCH).logits
    start_from_seed(model, 1)
    own = [(name, tensor) for name, tensor in adapter(model).items() if "lora_A" in name]
    assert len(own) == 4
    for _, tensor in own:
        bound = 1 / math.sqrt(256)
        assert 0.98 * bound < tensor.abs().max() < bound
        assert abs(tensor.std() * math.sqrt(3) / bound - 1) < 0.03
    assert not torch.equal(own[0][1], own[1][1])
    for name, tensor in adapter(model).items():
        if "lora_B" in name:
            assert not tensor.any()
        elif "lora_A" not in name:
            assert torch.equal(tensor, before[name])
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, base)


def test_another_adapter_by_name_and_dtype() -> None:
    model = lora(bert())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    before = adapter(model)
    start_from_seed(model, 3, "second")
    assert_same_tensors(adapter(model), before)
    second = {n.replace("second", "default"): t for n, t in tensors(model).items() if ".second." in n and "lora_" in n}
    reference = lora(bert())
    start_from_seed(reference.to(torch.bfloat16), 3)
    rounded = {n: t for n, t in adapter(reference).items() if "lora_" in n}
    assert_same_tensors({name: tensor.bfloat16() for name, tensor in second.items()}, rounded)


def test_an_adapter_named_like_a_module_of_the_base() -> None:
    model = lora(bert())
    model.add_adapter("bert", copy.deepcopy(model.peft_config["default"]))
    before = adapter(model)
    start_from_seed(model, 3, "bert")
    assert_same_tensors(adapter(model), before)


@pytest.mark.parametrize("method", ["serial", "unipelt"])
def test_own_adapters(method: str) -> None:
    one, other = adapted(method), adapted(method)
    before = adapter(one)
    start_from_seed(one, 1)
    start_from_seed(other, 1)
    assert_same_tensors(adapter(one), adapter(other))
    moved = [name for name, tensor in adapter(one).items() if not torch.equal(tensor, before[name])]
    assert len(moved) == {"serial": 8, "unipelt": 16}[method]
    for name in moved:
        if "lora_A" not in name:
            assert adapter(one)[name].abs().max() < math.sqrt(3) * 0.3


def test_embeddings_and_prompts() -> None:
    embedding = lora(bert(), target_modules=["word_embeddings"], init_lora_weights=True)
    start_from_seed(embedding, 1)
    state = adapter(embedding)
    (a,) = (tensor for name, tensor in state.items() if "lora_embedding_A" in name)
    (b,) = (tensor for name, tensor in state.items() if "lora_embedding_B" in name)
    assert not a.any()
    assert 1 < b.abs().max() < math.sqrt(3)
    for config in (PrefixTuningConfig, PromptTuningConfig):
        model: Any = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=20))
        start_from_seed(model, 1)
        weight = model.prompt_encoder["default"].embedding.weight
        assert abs(weight.std() - 1) < 0.1
        assert weight.abs().max() < math.sqrt(3)


def test_dora_keeps_its_magnitudes() -> None:
    model = lora(bert(), use_dora=True, init_lora_weights=True)
    before = adapter(model)
    start_from_seed(model, 1)
    magnitudes = {name: tensor for name, tensor in adapter(model).items() if "magnitude" in name}
    assert magnitudes
    assert_same_tensors(magnitudes, {name: before[name] for name in magnitudes})


def refused(model: Any, seed: Any, message: str) -> None:
    before = tensors(model)
    with pytest.raises(ConfigurationError, match=message):
        start_from_seed(model, seed)
    assert_same_tensors(tensors(model), before)


def test_what_cannot_start_from_a_seed_is_refused() -> None:
    model = lora(bert())
    for seed in (-1, 2**16, True, 1.0, None):
        refused(model, seed, "The seed .* is impossible: give a whole number from 0 to 65,535")
    apply_mask(model, random_mask(model))
    refused(model, 1, "has a mask")
    refused(bert(), 1, "BertForSequenceClassification has no PEFT adapter")
    refused(lora(bert(), init_lora_weights="pissa"), 1, "init_lora_weights='pissa' makes its start of the base")
    refused(lora(bert(), use_dora=True), 1, "DoRA's magnitudes belong to B as it is")
    ia3 = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    refused(get_peft_model(bert(), ia3), 1, "is IA3, whose start no seed decides here")
