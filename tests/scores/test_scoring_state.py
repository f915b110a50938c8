"""Scoring leaves no trace, whether it ends well or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import bert, causal_batch, classification_batch, image_batch, llama, lora, rebatch, vit
from torch import nn
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForSequenceClassification

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


def test_key_value_cache_is_off_within() -> None:
    model = lora(llama())
    assert model.config.use_cache
    with scoring_state(model):
        assert not model.config.use_cache
        assert not model.training
    assert model.config.use_cache
