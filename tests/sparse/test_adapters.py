"""Several adapters of one model, each with a mask of its own, and what PEFT switches on and off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import assert_only_selected_moved, assert_same_tensors, bert, classification_batch, lora, random_mask, tensors
from torch import nn

from fish_tuning import (
    FisherError,
    MaskError,
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
    get_mask,
    is_masked,
    remove_mask,
    rename_adapter,
)

BATCH = classification_batch()
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(target_modules=["query"], r=4, init_lora_weights=False, task_type="SEQ_CLS"),
    "dora": lambda: LoraConfig(
        target_modules=["query"], r=4, init_lora_weights=False, use_dora=True, task_type="SEQ_CLS"
    ),
    # These hold their tensors in ParameterDicts.
    "ia3": lambda: IA3Config(target_modules=["query", "key"], feedforward_modules=[], task_type="SEQ_CLS"),
    "loha": lambda: LoHaConfig(target_modules=["query"], r=4, init_weights=False, task_type="SEQ_CLS"),
    "vera": lambda: VeraConfig(target_modules=["query"], r=4, d_initial=0.1, task_type="SEQ_CLS"),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def two_adapters(kind: str = "lora") -> PeftModel:
    model: Any = get_peft_model(bert(), CONFIGS[kind]())
    model.add_adapter("b", CONFIGS[kind]())
    return model.eval()  # type: ignore[no-any-return]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def some_and_none(model: nn.Module) -> dict[str, torch.Tensor]:
    """A mask that keeps nothing of every third tensor and all of the head."""
    mask = random_mask(model, dense=["classifier"])
    return {
        name: selected & (index % 3 > 0 or "classifier" in name) for index, (name, selected) in enumerate(mask.items())
    }


@KINDS
def test_requires_grad_is_as_if_there_had_been_no_mask(kind: str) -> None:
    for then in (["b"], ["b", "default"], []):
        masked, plain = two_adapters(kind), two_adapters(kind)
        apply_mask(masked, some_and_none(masked))
        for name in then:
            masked.set_adapter(name)
            plain.set_adapter(name)
        remove_mask(masked)
        assert flags(masked) == flags(plain)


@KINDS
@pytest.mark.parametrize("of_a_copy", [False, True])
def test_switching_leaves_the_values_of_the_active_adapter_trainable_alone(kind: str, of_a_copy: bool) -> None:
    model = two_adapters(kind)
    apply_mask(model, some_and_none(model))
    if of_a_copy:
        model = copy.deepcopy(model)
    before = flags(model)
    model.set_adapter("b")
    assert is_masked(model)
    assert not [name for name, flag in flags(model).items() if flag and ".default." in f"{name}."]
    model.set_adapter("default")
    assert flags(model) == before
    for on in (False, True):
        model.set_requires_grad("default", on)
        assert {flag for name, flag in flags(model).items() if before[name]} == {on}
    model.set_adapter("default", inference_mode=True)
    assert not any(flags(model).values())


@KINDS
def test_each_adapter_is_scored_masked_and_trained_by_itself(kind: str) -> None:
    model = two_adapters(kind)
    masks = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        scores = calculate_fisher_information(model, [BATCH], progress=False)
        assert all(f".{name}" in key for key in scores)
        masks[name] = create_mask_from_fisher(scores, keep_ratio=0.3, names_to_exclude=["classifier"])
        before = tensors(model)
        apply_mask(model, masks[name])
        assert count_trainable_parameters(model) == sum(int(selected.sum()) for selected in masks[name].values())
        train(model)
        assert_only_selected_moved(before, tensors(model), masks[name])
    for name, mask in masks.items():
        model.set_adapter(name)
        assert_same_tensors(dict(sorted(get_mask(model, name).items())), dict(sorted(mask.items())))
        assert count_trainable_parameters(model) == sum(int(selected.sum()) for selected in mask.values())
    trained = tensors(model)
    remove_mask(model, "default")
    assert_same_tensors(dict(sorted(get_mask(model, "b").items())), dict(sorted(masks["b"].items())))
    assert all(selected.all() for selected in get_mask(model, "default").values())
    remove_mask(model)
    assert not is_masked(model)
    assert_same_tensors(model.state_dict(), trained)


def test_a_second_mask_for_what_trains_is_an_error() -> None:
    model = two_adapters()
    apply_mask(model, some_and_none(model))
    model.set_adapter("b")
    mask = random_mask(model)
    apply_mask(model, mask)
    for name in ("b", "default"):
        model.set_adapter(name)
        with pytest.raises(MaskError, match="has a mask already"):
            apply_mask(model, mask)
        with pytest.raises(FisherError, match="mask"):
            calculate_fisher_information(model, [BATCH], progress=False)


def test_adapters_that_are_not_there() -> None:
    model = two_adapters()
    for function in (get_mask, remove_mask):
        with pytest.raises(MaskError, match=r"no adapter 'c'\. Its adapters: 'default', 'b'\."):
            function(model, "c")
        with pytest.raises(MaskError, match=r"no adapter 'b'\. Its adapters: none"):
            function(nn.Linear(2, 2), "b")


def test_prompts_of_an_adapter_that_is_not_active_still_count_as_masked() -> None:
    # PEFT leaves their tensors trainable, so scoring would meet the masked ones.
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    model: Any = get_peft_model(bert(), config)
    model.add_adapter("b", config)
    apply_mask(model, random_mask(model))
    model.set_adapter("b")
    with pytest.raises(FisherError, match="mask"):
        calculate_fisher_information(model, [BATCH], progress=False)


# Names


def test_a_mask_for_an_adapter_of_another_name() -> None:
    model = two_adapters()
    mask = some_and_none(model)
    renamed = rename_adapter(mask, "default", "b")
    model.set_adapter("b")
    apply_mask(model, renamed)
    assert_same_tensors(dict(sorted(get_mask(model, "b").items())), dict(sorted(renamed.items())))
    assert_same_tensors(rename_adapter(renamed, "b", "default"), mask)


def test_the_name_that_peft_wrote_is_renamed_and_no_other() -> None:
    one = torch.ones(1, dtype=torch.bool)
    assert rename_adapter({"x.a.y.lora_A.a.weight": one, "a.ia3_l.a": one, "b.bias": one}, "a", "c").keys() == {
        "x.a.y.lora_A.c.weight", "a.ia3_l.c", "b.bias"
    }  # fmt: skip
    assert rename_adapter({"x.a": one}, "a", "a").keys() == {"x.a"}


def test_masks_that_cannot_be_renamed() -> None:
    one = torch.ones(1, dtype=torch.bool)
    with pytest.raises(MaskError, match=r"no tensor of an adapter 'b'; its first is 'x.a'"):
        rename_adapter({"x.a": one}, "b", "c")
    with pytest.raises(MaskError, match="tensors of both adapters, 'a' and 'b'"):
        rename_adapter({"x.a": one, "x.b": one}, "a", "b")


@pytest.mark.parametrize(
    ("name", "adapter", "renamed"),
    [
        ("query.lora_A.weight.weight", "weight", "query.lora_A.new.weight"),
        ("query.lora_A.weight", "weight", "query.lora_A.new"),
        ("query.ia3_l.query", "query", "query.ia3_l.new"),
        ("classifier.modules_to_save.weight.weight", "weight", "classifier.modules_to_save.new.weight"),
        ("classifier.modules_to_save.bias.dense.bias", "bias", "classifier.modules_to_save.new.dense.bias"),
        ("classifier.modules_to_save.dense.dense.weight", "dense", "classifier.modules_to_save.new.dense.weight"),
    ],
)
def test_the_adapters_part_of_a_name(name: str, adapter: str, renamed: str) -> None:
    assert list(rename_adapter({name: torch.ones(1)}, adapter, "new")) == [renamed]


def test_an_adapter_that_is_called_as_tensors_are_has_only_its_own() -> None:
    model: Any = lora(bert(), task_type="FEATURE_EXTRACTION")
    first = random_mask(model)
    apply_mask(model, first)
    model.add_adapter("weight", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.set_adapter("weight")
    second = random_mask(model)
    assert all(".weight.weight" in name for name in second)
    apply_mask(model, second)
    assert get_mask(model, "weight").keys() == second.keys()
    assert get_mask(model, "default").keys() == first.keys()
