"""Both methods as PEFT methods: files, several adapters, training, masks, scores."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import adapter_models as models
import pytest
import tiny
import torch
from device import DEVICE
from peft import PeftConfig, PeftModel, get_model_status, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainingArguments

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
)
from fish_tuning.adapters import AdapterError, SerialAdapterConfig, UniPELTConfig

METHODS = pytest.mark.parametrize("method", models.CONFIGS)
EVERY_FAMILY = pytest.mark.parametrize("family", models.FAMILIES)


@METHODS
@EVERY_FAMILY
def test_a_saved_adapter_loads_bit_equal(method: str, family: str, tmp_path: Path) -> None:
    model, batch = models.adapted(method, family), models.batch(family)
    model.save_pretrained(tmp_path)
    for extra in ({}, {"low_cpu_mem_usage": True}):
        # PEFT leaves a head that it loads so on the GPU, wherever the model is.
        loaded = PeftModel.from_pretrained(models.FAMILIES[family][0](), tmp_path, **extra).eval().to(DEVICE)
        assert torch.equal(models.logits(loaded, batch), models.logits(model, batch))
    assert count_trainable_parameters(loaded) == 0
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is {"serial": SerialAdapterConfig, "unipelt": UniPELTConfig}[method]
    own = model.peft_config["default"].to_dict()
    assert config.to_dict() == own | {"inference_mode": True, "auto_mapping": config.auto_mapping}


@METHODS
def test_disabling_gives_the_base_model_and_unloading_leaves_it(method: str) -> None:
    base, batch = tiny.bert(attn_implementation="eager"), models.batch()
    keys = list(base.state_dict())
    before = models.logits(base, batch)
    model = models.adapted(method, model=base)
    with model.disable_adapter():
        torch.testing.assert_close(models.logits(model, batch), before)
    assert (models.logits(model, batch) - before).abs().max() > 1e-3
    unloaded = model.unload()
    assert unloaded is base
    assert list(base.state_dict()) == keys
    assert base.config._attn_implementation == "eager"
    torch.testing.assert_close(models.logits(base, batch), before, rtol=0, atol=0)
    models.adapted(method, model=base)  # and it can be adapted again


@METHODS
def test_merging_is_refused(method: str) -> None:
    model, batch = models.adapted(method), models.batch()
    before = models.logits(model, batch)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match=r"cannot be merged .* unload\(\)"):
            merge()
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    with pytest.raises(AdapterError, match="cannot be merged"):
        layer.merge()
    model.unmerge_adapter()
    assert torch.equal(models.logits(model, batch), before)


@METHODS
def test_several_adapters_live_side_by_side(method: str, tmp_path: Path) -> None:
    model, batch = models.adapted(method), models.batch()
    first = models.logits(model, batch)
    model.add_adapter("second", models.CONFIGS[method](task_type="SEQ_CLS", init_std=0.2, layers_to_transform=[1]))
    assert torch.equal(models.logits(model, batch), first)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".default." in name for name in trainable)
    model.set_adapter("second")
    model.eval()
    second = models.logits(model, batch)
    assert not torch.equal(second, first)
    status = get_model_status(model)
    assert (status.active_adapters, status.available_adapters) == (["second"], ["default", "second"])
    assert status.trainable_params == count_trainable_parameters(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(models.logits(model, batch), first)
    model.load_adapter(str(tmp_path / "second"), "again")
    model.set_adapter("again")
    assert torch.equal(models.logits(model, batch), second)
    other = models.CONFIGS["serial" if method == "unipelt" else "unipelt"](task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", other)


@METHODS
def test_adapters_can_be_active_together(method: str) -> None:
    model, batch = models.adapted(method, "llama", layers_to_transform=[0]), models.batch("llama")
    model.add_adapter("second", models.CONFIGS[method](init_std=0.2))
    assert not any(".second." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    alone = models.logits(model, batch)
    outputs = []
    for names in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        outputs.append(models.logits(model, batch))
        assert (outputs[-1] - alone).abs().max() > 1e-3
    model.base_model.set_adapter("default")
    assert torch.equal(models.logits(model, batch), alone)


@METHODS
def test_the_head_is_trained_and_saved_whole_and_the_counts_are_right(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.adapted(method)
    model.print_trainable_parameters()
    head = 3 * 16 + 3
    d, inner, tokens, rank = 16, 3, 5, 2
    bottleneck = 2 * d * inner + d + inner
    lora = 2 * d * rank + (d + 1)
    prefix = 2 * tokens * d + (d + 1)
    layer = {"serial": 2 * bottleneck, "unipelt": 2 * lora + prefix + bottleneck + (d + 1)}[method]
    assert count_trainable_parameters(model) == 2 * layer + head
    assert f"trainable params: {2 * layer + head:,} " in capsys.readouterr().out


@METHODS
def test_a_model_without_weights_gives_the_same_names_and_shapes(method: str) -> None:
    with torch.device("meta"):
        empty = models.adapted(method, model=tiny.bert())
    full = models.adapted(method)
    shapes = [{name: tensor.shape for name, tensor in model.named_parameters()} for model in (empty, full)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in empty.parameters())


@METHODS
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen2", "vit"])
def test_every_score_comes_from_a_batched_rule_and_is_exact(
    method: str, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.adapted(method, family)
    batches = tiny.rebatch(models.batch(family), 3)
    with caplog.at_level(logging.INFO, logger="fish_tuning"):
        scores = calculate_fisher_information(model, batches)
    assert re.search(rf"\b{len(scores)} tensors by rules of their layers", caplog.text)
    assert "by the loop" not in caplog.text
    tiny.assert_scores_close(scores, calculate_fisher_information(model, batches, method="loop"))


@METHODS
@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(method: str, family: str, reentrant: bool) -> None:
    model, batch = models.adapted(method, family).train(), models.batch(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            base = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch, **({"use_cache": False} if family == "llama" else {})).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    copy.deepcopy(model)


def trainer(model: nn.Module, folder: Path, batch: tiny.Batch, **own: Any) -> Trainer:
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", weight_decay=0.1, disable_tqdm=True, **(settings | own)
    )
    return Trainer(model=model, args=arguments, train_dataset=tiny.Rows(batch))


@METHODS
def test_the_trainer_trains_it_and_resumes_from_its_checkpoint(method: str, tmp_path: Path) -> None:
    batch = models.batch()
    straight = models.adapted(method)
    before = tiny.tensors(straight)
    trainer(straight, tmp_path, batch).train()
    moved = [
        name for name, tensor in tiny.tensors(straight).items() if not torch.equal(tensor.cpu(), before[name].cpu())
    ]
    assert set(moved) == {name for name, parameter in straight.named_parameters() if parameter.requires_grad}
    resumed = models.adapted(method)
    trainer(resumed, tmp_path, batch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_same_tensors(tiny.tensors(resumed), tiny.tensors(straight))
    loaded = PeftModel.from_pretrained(tiny.bert(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(models.logits(loaded, batch), models.logits(straight.eval().to(DEVICE), batch))


@METHODS
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_mask_trains_its_entries_alone_and_the_adapter_reloads(method: str, family: str, tmp_path: Path) -> None:
    model, batch = models.adapted(method, family), models.batch(family)
    mask = create_mask_from_fisher(calculate_fisher_information(model, [batch]), keep_ratio=0.2)
    before = tiny.tensors(model)
    apply_mask(model, mask)
    assert count_trainable_parameters(model) == sum(int(selected.sum()) for selected in mask.values())
    trainer(model, tmp_path, batch, max_steps=2, save_strategy="no").train()
    tiny.assert_only_selected_moved(before, tiny.tensors(model), mask)
    model.eval().to(DEVICE).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.FAMILIES[family][0](), tmp_path).eval()
    assert torch.equal(models.logits(loaded, batch), models.logits(model, batch))


def test_two_models_with_prefixes_do_not_meet() -> None:
    batch = models.batch()
    one, plain = models.adapted("unipelt"), tiny.bert()
    expected = models.logits(one, batch), models.logits(plain, batch)
    models.adapted("unipelt", gate_bias=2.0)
    assert torch.equal(models.logits(one, batch), expected[0])
    assert torch.equal(models.logits(plain, batch), expected[1])
    again = copy.deepcopy(one)
    assert torch.equal(models.logits(again, batch), expected[0])


def test_the_name_of_the_attention_is_not_saved_with_the_model() -> None:
    model = models.adapted("unipelt", "llama")
    assert "fish_prefix" not in model.get_base_model().config.to_json_string()


def test_lists_in_a_configuration_keep_their_order() -> None:
    config = SerialAdapterConfig(target_modules={"b", "a"}, modules_to_save=("y", "x"), layers_to_transform=range(2))
    assert (config.target_modules, config.modules_to_save, config.layers_to_transform) == (
        ["a", "b"],
        ["y", "x"],
        [0, 1],
    )


def test_prefix_only_layers_take_no_lora() -> None:
    model = get_peft_model(tiny.bert(), UniPELTConfig(target_modules=["value"], task_type="SEQ_CLS")).eval()
    names = [name for name, _ in model.named_parameters()]
    assert not any("query.unipelt_lora" in name for name in names)
    assert any("query.unipelt_prefix_key" in name for name in names)
    models.logits(model, models.batch())
