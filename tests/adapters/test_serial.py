"""The serial adapter: where it sits, what it computes, where it starts."""

from __future__ import annotations

import adapter_models as models
import pytest
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fish_tuning.adapters import SerialAdapterConfig

TARGETS = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


def wrapped(model: nn.Module) -> list[str]:
    """Names of the adapted modules, from their layer's number on."""
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return sorted(
        ".".join(name.split(".")[next(i for i, part in enumerate(name.split(".")) if part.isdigit()) :])
        for name in names
    )


@pytest.mark.parametrize("family", TARGETS)
def test_both_outputs_of_every_layer_are_adapted_and_nothing_else(family: str) -> None:
    model = models.adapted("serial", family)
    assert wrapped(model) == sorted(f"{layer}.{target}" for layer in (0, 1) for target in TARGETS[family])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("serial_adapter_" in name or "modules_to_save" in name for name in trainable)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_output_equals_hooks_that_add_the_bottleneck(family: str) -> None:
    model = models.adapted("serial", family, non_linearity="relu")
    expected = models.FAMILIES[family][0]()
    state = model.get_submodule("base_model.model").state_dict()
    for name, module in expected.named_modules():
        if f"{name}.serial_adapter_up.default.weight" in state:
            module.register_forward_hook(_bottleneck(state, f"{name}.serial_adapter_"))
    batch = models.batch(family)
    torch.testing.assert_close(models.logits(model, batch), models.logits(expected, batch))


def _bottleneck(state: dict[str, torch.Tensor], prefix: str):  # type: ignore[no-untyped-def]
    down, down_bias, up, up_bias = (
        state[f"{prefix}{part}.default.{kind}"] for part in ("down", "up") for kind in ("weight", "bias")
    )
    return lambda module, args, h: h + torch.relu(h @ down.T + down_bias) @ up.T + up_bias


@pytest.mark.parametrize("family", models.FAMILIES)
def test_it_starts_near_the_identity_and_every_tensor_has_a_gradient(family: str) -> None:
    batch = models.batch(family)
    before = models.logits(models.FAMILIES[family][0](), batch)
    model = models.adapted("serial", family, init_std=SerialAdapterConfig.init_std)
    assert 0 < (models.logits(model, batch) - before).abs().max() < 5e-3 * before.abs().max()
    model(**batch).loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable.values())  # type: ignore[union-attr]


def test_layers_to_transform_takes_the_layers_by_number_in_a_model_without_head_too() -> None:
    assert wrapped(models.adapted("serial", layers_to_transform=[1])) == ["1.attention.output.dense", "1.output.dense"]
    assert wrapped(models.adapted("serial", layers_to_transform=0)) == ["0.attention.output.dense", "0.output.dense"]
    headless = models.adapted("serial", "llama", model=tiny.llama().model, layers_to_transform=[1], task_type=None)
    assert wrapped(headless) == ["1.mlp.down_proj", "1.self_attn.o_proj"]


def test_targets_can_be_chosen_and_excluded() -> None:
    assert wrapped(models.adapted("serial", target_modules=["intermediate.dense"])) == [
        "0.intermediate.dense",
        "1.intermediate.dense",
    ]
    chosen = models.adapted("serial", target_modules=r".*attention\.output\.dense", layers_to_transform=[0])
    assert wrapped(chosen) == ["0.attention.output.dense"]
    assert wrapped(models.adapted("serial", exclude_modules=["attention.output.dense"])) == [
        "0.output.dense",
        "1.output.dense",
    ]
    everything = models.adapted("serial", "gpt2", target_modules="all-linear")
    assert wrapped(everything)[:4] == ["0.attn.c_attn", "0.attn.c_proj", "0.mlp.c_fc", "0.mlp.c_proj"]


def test_dropout_acts_in_training_only() -> None:
    model, batch = models.adapted("serial", dropout=0.5), models.batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.1:
            module.p = 0.0
    torch.testing.assert_close(models.logits(model, batch), models.logits(model, batch), rtol=0, atol=0)
    model.train()
    assert (models.logits(model, batch) - models.logits(model, batch)).abs().max() > 0


def test_a_half_precision_model_keeps_its_dtype() -> None:
    model = models.adapted("serial", "llama", model=tiny.llama().bfloat16())
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert models.logits(model, models.batch("llama")).dtype == torch.bfloat16
