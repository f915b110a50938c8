"""Scoring leaves no trace, whether it ends well or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from device import DEVICE, placed
from tiny import assert_scores_close, bert, causal_batch, classification_batch, image_batch, llama, lora, rebatch, vit
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedConfig,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from fish_tuning import calculate_fisher_information
from fish_tuning.scores.scoring_state import scoring_state

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "bert": (lambda: lora(bert()), classification_batch),
    "llama": (lambda: lora(llama(attention_dropout=0.2)), causal_batch),
    "vit": (lambda: lora(vit()), image_batch),
}


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that scoring could leave changed."""
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) for parameter in model.parameters()],
        "gradient sums": [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
        "weights": [float(parameter.detach().double().sum()) for parameter in model.parameters()],
        "hooks": [list(getattr(module, name)) for module in model.modules() for name in HOOKS],
        "attributes": [
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
            for module in model.modules()
        ],
        "checkpointing": [id(getattr(module, "_gradient_checkpointing_func", None)) for module in model.modules()],
        "use_cache": model.config.use_cache if hasattr(model.config, "use_cache") else None,
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
        "checkpoint function": checkpointing.CheckpointFunction,
    }


def unusual(model: nn.Module) -> None:
    """Mixed modes, a gradient left from before, and some random numbers drawn."""
    model.train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        if number % 2:
            parameter.grad = torch.full_like(parameter, 2.0)
    torch.manual_seed(7)
    torch.rand(3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("case", MODELS)
def test_everything_is_as_it_was(case: str, method: Any, checkpointing: bool) -> None:
    make_model, make_batch = MODELS[case]
    model = make_model()
    if checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    unusual(model)
    before = traces(model)
    rows = [dict(zip(make_batch(), values, strict=True)) for values in zip(*make_batch().values(), strict=True)]
    loader = DataLoader(rows, batch_size=3, shuffle=True)  # type: ignore[arg-type,var-annotated]
    calculate_fisher_information(model, loader, progress=False, method=method)
    assert traces(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["first batch", "later batch", "loader"])
def test_everything_is_as_it_was_after_an_error(where: str, checkpointing: bool) -> None:
    model, batch = lora(llama(attention_dropout=0.2)), causal_batch()
    if checkpointing:
        model.activation_checkpointing_enable()
    unusual(model)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if where == "first batch" else 4):
            raise RuntimeError("on purpose")

    def loader() -> Iterator[Any]:
        yield from rebatch(batch, 2)
        raise RuntimeError("on purpose")

    handle = model.base_model.model.lm_head.register_forward_hook(fail) if where != "loader" else None
    before = traces(model)
    with pytest.raises(RuntimeError, match="on purpose"), torch.no_grad():
        calculate_fisher_information(model, loader(), progress=False)
    assert traces(model) == before
    if handle is not None:
        handle.remove()


def test_scores_under_no_grad() -> None:
    model, batch = lora(bert()), classification_batch()
    with torch.no_grad():
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert all(score.any() and not score.requires_grad for score in scores.values())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])  # type: ignore[no-any-return]


def test_recurrent_layers_drop_nothing_and_are_as_they_were() -> None:
    """They are in training mode meanwhile, the only one in which cuDNN's have a backward pass."""
    model = placed(Recurrent()).eval()
    batch = {"x": torch.randn(3, 5, 8, device=DEVICE), "labels": torch.tensor([0, 1, 1], device=DEVICE)}
    with scoring_state(model):
        assert model.layers.training
        assert not model.head.training
    assert (model.training, model.layers.training, model.layers.dropout) == (False, False, 0.5)

    def losses(outputs: Tensor, given: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, given["labels"], reduction="none")

    found = calculate_fisher_information(model, [batch], loss_fn=losses, progress=False, method="loop")
    model.layers.dropout = 0.0
    model.train()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in range(3):
        loss = losses(model(batch["x"][row : row + 1]), {"labels": batch["labels"][row : row + 1]}).sum()
        for total, gradient in zip(expected.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += gradient.square() / 3
    assert_scores_close(found, expected)


def test_dropout_is_off_in_training_mode() -> None:
    model, batch = lora(bert(hidden_dropout_prob=0.5)), classification_batch()
    evaluation = calculate_fisher_information(model.eval(), [batch], progress=False)
    training = calculate_fisher_information(model.train(), [batch], progress=False)
    assert all(torch.equal(evaluation[name], training[name]) for name in evaluation)


def test_checkpointed_layers_neither_drop_entries_nor_themselves() -> None:
    # BART's layers and encoder drop by their own `training` flag, which checkpointing needs to be set.
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, init_std=0.3,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layerdrop=0.9, dropout=0.5,
        decoder_layerdrop=0.9, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3,
    )  # fmt: skip
    model, batch = BartForSequenceClassification(config), classification_batch((6, 6, 6, 6))
    batch["input_ids"][:, -1] = 2
    evaluation = calculate_fisher_information(model.eval(), [batch], progress=False, method="loop")
    model.train().activation_checkpointing_enable()
    training = calculate_fisher_information(model, [batch], progress=False, method="loop")
    for name, score in evaluation.items():
        torch.testing.assert_close(training[name], score)


def wav2vec2() -> nn.Module:
    """Its encoder drops layers by what its configuration says."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=4, layerdrop=0.5,
        num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=8,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


def falcon() -> nn.Module:
    """Its layers drop entries by what their configuration says."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.5, pad_token_id=0,
        parallel_attn=False,
    )  # fmt: skip
    return FalconForCausalLM(config)


class OfElsewhere(nn.Module):
    """A model whose own code checkpoints its layers, and drops entries and layers by its configuration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PreTrainedConfig(dropout=0.5, layer_dropout=0.9)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        self.checkpointed = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < self.config.layer_dropout:  # type: ignore[attr-defined]
                continue
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer, x)
                self.checkpointed += 1
            else:
                x = layer(x)
            x = nn.functional.dropout(x, self.config.dropout, self.training)  # type: ignore[attr-defined]
        return self.head(x)  # type: ignore[no-any-return]


def sounds() -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(4, 60, generator=torch.Generator().manual_seed(1)),
        "labels": torch.arange(4) % 3,
    }


@pytest.mark.parametrize("make", [wav2vec2, falcon])
def test_checkpointed_layers_drop_nothing_by_their_configuration(make: Callable[[], Any]) -> None:
    model, batch = make(), sounds() if make is wav2vec2 else causal_batch()
    evaluation = calculate_fisher_information(model.eval(), [batch], progress=False, warmup_steps=0)
    model.train().activation_checkpointing_enable()
    before = model.config.to_dict()
    training = calculate_fisher_information(model, [batch], progress=False, warmup_steps=0)
    assert model.config.to_dict() == before
    for name, score in evaluation.items():
        torch.testing.assert_close(training[name], score)


def test_nor_do_models_whose_own_code_checkpoints() -> None:
    batch = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), "labels": torch.arange(4) % 2}
    scores, models = [], [OfElsewhere().eval(), OfElsewhere().train()]
    models[0].gradient_checkpointing = False
    for model in models:
        scores.append(calculate_fisher_information(model, [batch], loss_fn=class_losses, progress=False))
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score)
    assert models[1].checkpointed
    assert models[1].config.layer_dropout == 0.9  # type: ignore[attr-defined]


class Merging(nn.Linear):
    """As loralib's: in evaluation mode the factors are a part of the weight."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.weight.requires_grad_(False)
        self.factor = nn.Parameter(torch.full((2, 4), 0.1))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if mode is self.merged:
            self.weight.data += -self.factor.data if mode else self.factor.data
            self.merged = not mode
        return super().train(mode)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.factor
        return nn.functional.linear(x, weight, self.bias)


def test_layers_that_merge_for_evaluation_are_scored_as_they_train() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(Merging()), {"input": torch.randn(4, 4), "labels": torch.arange(4) % 2}
    weight = model[0].weight.clone()
    scores = calculate_fisher_information(model, [batch], loss_fn=class_losses, progress=False)
    assert scores["0.factor"].all()
    assert torch.equal(model[0].weight, weight)
    assert model[0].training
    assert not model[0].merged


def class_losses(output: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch["labels"], reduction="none")


class Told(nn.Linear):
    """Is told of each attribute that is set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            self.told.append(value)
        super().__setattr__(name, value)


class ElsewhereTraining(nn.Linear):
    """Keeps its mode under another name."""

    @property
    def training(self) -> bool:
        return self.mode

    @training.setter
    def training(self, mode: bool) -> None:
        self.mode = mode


def test_layers_with_a_training_mode_of_their_own() -> None:
    told, elsewhere = Told(2, 2), ElsewhereTraining(2, 2)
    vars(told)["told"] = []
    with scoring_state(nn.Sequential(told, elsewhere)):
        assert told.told == [False]
        assert not told.training
        assert not elsewhere.training
    assert told.told == [False, True]
    assert told.training
    assert elsewhere.training


def test_key_value_cache_is_off_within() -> None:
    model = lora(llama())
    assert model.config.use_cache
    with scoring_state(model):
        assert not model.config.use_cache
        assert not model.training
    assert model.config.use_cache


class Checkpoints(nn.Module):
    """Checkpoints its layers by itself, reentrantly; the first gets nothing that trains, so no gradient comes there."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.checkpoints, self.passes = checkpoints, 0

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.run(self.first, input)
        hidden = self.run(self.middle, nn.functional.relu(hidden) if self.checkpoints else hidden.detach().relu())
        return self.third(hidden)  # type: ignore[no-any-return]

    def middle(self, hidden: Tensor) -> Tensor:
        self.passes += 1
        return self.second(hidden).tanh()  # type: ignore[no-any-return]

    def run(self, layer: Any, hidden: Tensor) -> Any:
        if not self.checkpoints:
            return layer(hidden)
        if layer == self.middle:
            hidden = hidden + 0 * self.third.weight.sum()  # now it hangs on something that trains
        return checkpointing.checkpoint(layer, hidden, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_modules_that_checkpoint_reentrantly_by_themselves(method: Any) -> None:
    batch = {"input": torch.randn(4, 4), "labels": torch.arange(4) % 2}
    plain, model = Checkpoints(False), Checkpoints(True)
    expected = calculate_fisher_information(plain, [batch], loss_fn=class_losses, method=method, progress=False)
    scores = calculate_fisher_information(model, [batch], loss_fn=class_losses, method=method, progress=False)
    assert_scores_close(scores, expected)
    telling = method == "auto"  # the pass that tells the order of rows where hidden states are detached
    assert model.passes == 2 * (plain.passes - telling)
    assert not scores["first.weight"].any()
