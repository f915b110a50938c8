"""Dense steps before scoring: what they do, that they leave no trace, and when they are taken."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import IA3Config, VeraConfig, get_peft_model
from tiny import Batch, assert_scores_close, bert, classification_batch, lora, rebatch, regression_batch
from torch import Tensor, nn

import fish_tuning.scores.warmup as warmup
from fish_tuning import (
    FisherError,
    FishTuningWarning,
    calculate_fisher_information,
    calculate_scores,
    create_mask_from_fisher,
    measure_moments,
)
from fish_tuning.scores.warmup import warmup_steps_needed

BATCHES = rebatch(classification_batch((5, 9, 3, 7) * 2), 4)


def at_zero() -> Any:
    return lora(bert(), init_lora_weights=True)


def scored(model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, BATCHES, progress=False, **kwargs)


def steps_needed(model: nn.Module) -> int:
    return warmup_steps_needed(model, {name: p for name, p in model.named_parameters() if p.requires_grad})


def everything(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad, len(p._backward_hooks or ())) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return {"tensors": tensors, "flags": flags, "modes": modes, "random": torch.get_rng_state()}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = everything(model)
    assert all(torch.equal(tensor, now["tensors"][name]) for name, tensor in before["tensors"].items())
    assert now["flags"] == before["flags"]
    assert now["modes"] == before["modes"]
    assert torch.equal(now["random"], before["random"])


def test_at_the_usual_start_every_factor_gets_a_score() -> None:
    model = at_zero().train()
    before = everything(model)
    scores = scored(model)
    assert all(bool(score.any()) for score in scores.values())
    assert_untouched(model, before)
    without = scored(model, warmup_steps=0)
    assert all(bool(score.any()) != ("lora_A" in name) for name, score in without.items())


def test_the_printed_script_needs_no_action() -> None:
    """PEFT's default start, then the functions as they are called in the README, with every warning an error."""
    model = at_zero()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scores = calculate_fisher_information(model=model, calibration_dataloader=BATCHES, num_samples=8)
        mask = create_mask_from_fisher(fisher_scores=scores, keep_ratio=0.9, names_to_exclude=["classifier"])
    assert any(bool(selected.any()) for name, selected in mask.items() if "lora_A" in name)


def test_steps_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow, obvious way: an optimizer on a copy of the model, whose scores are then taken as they are."""
    model, steps, seed = at_zero(), 5, 3
    copied = copy.deepcopy(model).eval()
    parameters = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=warmup.WARMUP_LEARNING_RATE, weight_decay=0.0)
    examples = {key: torch.cat([batch[key] for batch in BATCHES]) for key in BATCHES[0]}
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed)).tolist()
    for number in order:
        low, high = 8 * number // steps, 8 * (number + 1) // steps
        copied(**{key: tensor[low:high] for key, tensor in examples.items()}).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = scored(copied, warmup_steps=0)
    assert_scores_close(scored(model, warmup_steps=steps, seed=seed), expected, tolerance=1e-3)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_do_not_depend_on_the_size_of_the_batches(size: int, steps: int) -> None:
    one = calculate_fisher_information(at_zero(), BATCHES, warmup_steps=steps, progress=False)
    batches = rebatch(classification_batch((5, 9, 3, 7) * 2), size)
    other = calculate_fisher_information(at_zero(), batches, warmup_steps=steps, progress=False)
    assert_scores_close(other, one, tolerance=1e-3)


@pytest.mark.parametrize("sizes", [(4, 4), (8,), (1,) * 8, (5, 3)])
@pytest.mark.parametrize("steps", [1, 3, 5, 8, 20])
def test_every_example_is_in_one_step(sizes: tuple[int, ...], steps: int) -> None:
    numbers = torch.arange(8).split(sizes)
    found = warmup.step_parts([{"labels": part} for part in numbers], steps, seed=0)
    assert len(found) == min(steps, 8)
    assert sorted(number for parts in found for part in parts for number in part.rows["labels"].tolist()) == [*range(8)]
    for parts in found:
        assert sum(part.weight for part in parts) == pytest.approx(1)
        assert all(part.first_example == part.rows["labels"][0] for part in parts)


@pytest.mark.parametrize("size", [10, 32, 50])
def test_a_last_batch_is_cut_to_the_examples_of_the_steps(size: int) -> None:
    numbers = torch.arange(100).split(size)
    found = warmup.step_parts([{"labels": part} for part in numbers], 2, seed=0)
    assert [sorted(number for part in parts for number in part.rows["labels"].tolist()) for parts in found] in (
        [[*range(32)], [*range(32, 64)]],
        [[*range(32, 64)], [*range(32)]],
    )


def test_rows_of_several_batches_take_turns() -> None:
    batches = [{"labels": torch.tensor(rows)} for rows in ([0, 2, 4, 6], [1, 3, 5])]
    found = warmup.step_parts(batches, 2, seed=0, places=[[0, 2, 4, 6], [1, 3, 5]])
    runs = sorted([part.rows["labels"].tolist() for part in parts] for parts in found)
    assert runs == [[[0, 2], [1]], [[4, 6], [3, 5]]]


def test_the_seed_orders_the_steps() -> None:
    orders = [[parts[0].first_example for parts in warmup.step_parts(BATCHES, 8, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_both_stages_show_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    calculate_fisher_information(at_zero(), BATCHES, warmup_steps=3)
    told = capsys.readouterr().err
    assert 0 <= told.find("Warm-up before scoring") < told.find("Fisher information")
    assert "/3 [" in told
    assert "/8 [" not in told  # a loader without num_samples has no known end
    scored(at_zero(), warmup_steps=3)
    assert capsys.readouterr().err == ""


def test_the_same_seed_gives_the_same_bits() -> None:
    one, other = scored(at_zero()), scored(at_zero())
    assert all(torch.equal(score, other[name]) for name, score in one.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_sixteen_bits_take_the_steps_of_thirty_two(
    dtype: torch.dtype, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small gradients, whose squares fp16 does not hold, and DoRA's magnitudes, beside which a step is below a bit."""
    train, moves = warmup._train, []

    def spy(model: nn.Module, trainable: dict[str, nn.Parameter], *args: Any) -> None:
        before = {name: parameter.detach().float().clone() for name, parameter in trainable.items()}
        train(model, trainable, *args)
        moves.append({name: parameter.detach().float() - before[name] for name, parameter in trainable.items()})

    monkeypatch.setattr(warmup, "_train", spy)
    batches = rebatch(classification_batch((5, 9, 3, 7) * 10), 4)
    model = lora(bert(), init_lora_weights=True, use_dora=use_dora).to(dtype)
    before = everything(model)
    for scored_model in (copy.deepcopy(model).float(), model):
        calculate_fisher_information(scored_model, batches, progress=False)
    assert_untouched(model, before)
    wide, narrow = moves
    for name, move in wide.items():
        # Beside values near 1 a step is rounded to whole bits; over all entries the direction must be there.
        assert torch.cosine_similarity(move.flatten(), narrow[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("during", ["warm-up", "scoring"])
def test_whatever_happens_is_undone(error: type[BaseException], during: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = at_zero()
    before = everything(model)
    place = "fish_tuning.scores.warmup.PlainGradients.in_place" if during == "warm-up" else (
        "fish_tuning.scores.moments.Scorer.add"
    )  # fmt: skip

    def fail(*_: object, **__: object) -> None:
        raise error("stop")

    monkeypatch.setattr(place, fail)
    with pytest.raises(error, match="stop"):
        scored(model)
    assert_untouched(model, before)


def test_hooks_and_gradients_of_the_users_see_nothing() -> None:
    model = at_zero()
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: seen.append(name))
            parameter.grad = torch.ones_like(parameter)
    scored(model)
    assert seen == []
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_a_loader_that_can_be_read_once() -> None:
    def once() -> Iterator[Batch]:
        yield from BATCHES

    one = calculate_fisher_information(at_zero(), once(), progress=False)
    assert_scores_close(one, scored(at_zero()), tolerance=1e-6)
    with pytest.raises(FisherError, match="gave no example"):
        calculate_fisher_information(at_zero(), [], progress=False)


def test_a_loader_that_fills_the_same_tensors_again() -> None:
    def refilled() -> Iterator[Batch]:
        batch = {key: value.clone() for key, value in BATCHES[0].items()}
        for each in BATCHES:
            for key, value in each.items():
                batch[key].copy_(value)
            yield batch

    found = calculate_fisher_information(at_zero(), refilled(), progress=False)
    assert_scores_close(found, scored(at_zero()), tolerance=1e-6)


def test_a_long_loader_is_not_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up takes what its steps need; the rest is read as it is scored."""
    monkeypatch.setattr("fish_tuning.scores.moments.WARMUP_EXAMPLES", 2)
    read, at_warmup = 0, []

    def loader() -> Iterator[Batch]:
        nonlocal read
        for _ in range(10):
            read += 1
            yield BATCHES[0]

    train = warmup._train
    monkeypatch.setattr(warmup, "_train", lambda *args: (at_warmup.append(read), train(*args)))
    calculate_fisher_information(at_zero(), loader(), warmup_steps=4, progress=False)
    assert at_warmup == [2]  # of four examples each
    assert read == 10


def b_alone() -> Any:
    model = at_zero()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def no_adapter() -> Any:
    return bert()


def ia3() -> Any:
    config = IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[])
    return get_peft_model(bert(), config)


def vera() -> Any:
    return get_peft_model(bert(), VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (at_zero, 20),
        (lambda: at_zero().to(torch.bfloat16), 20),
        (lambda: lora(bert(), init_lora_weights="gaussian"), 20),
        (lambda: lora(bert(), init_lora_weights=False), 0),
        (lambda: lora(bert(), init_lora_weights="pissa", r=2), 0),
        (b_alone, 0),
        (no_adapter, 0),
        (ia3, 0),
        (vera, 20),
    ],
    ids=["default", "bf16", "gaussian", "not zero", "pissa", "B alone", "no adapter", "ia3", "vera"],
)
def test_steps_are_taken_where_a_start_needs_them(
    make: Callable[[], nn.Module], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    assert steps_needed(model) == steps
    with caplog.at_level(logging.INFO, "fish_tuning"):
        scored(model)
    assert ("warm-up steps" in caplog.text) == bool(steps)


def test_an_adapter_that_is_trained_is_scored_as_it_is() -> None:
    model = at_zero()
    model(**BATCHES[0]).loss.backward()
    torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01).step()
    assert steps_needed(model) == 0


def test_bias_of_a_base_model_that_is_zero_is_no_start() -> None:
    model = lora(bert(), init_lora_weights=False)
    assert not model.base_model.model.classifier.modules_to_save["default"].bias.any()
    assert steps_needed(model) == 0


@pytest.mark.parametrize("fisher_type", ["sampled", "expected"])
def test_other_labels_are_for_scoring_alone(fisher_type: str) -> None:
    scores = scored(at_zero(), fisher_type=fisher_type)
    assert all(bool(score.any()) for name, score in scores.items() if "lora_A" in name)


def test_activation_checkpointing_and_named_scores() -> None:
    plain = calculate_scores(at_zero(), BATCHES, "gain", progress=False)
    model = at_zero().train()
    model.activation_checkpointing_enable()
    assert_scores_close(calculate_scores(model, BATCHES, "gain", progress=False), plain, tolerance=1e-3)


def test_sensitivity_takes_weights_and_gradients_at_one_point() -> None:
    model = at_zero()
    scores = calculate_scores(model, BATCHES, "sensitivity", progress=False)
    moments = measure_moments(model, BATCHES, progress=False)
    for name, found in scores.items():
        torch.testing.assert_close(found, (moments.weights[name] * moments.mean_gradients[name]).abs())
        assert bool(found.any())
    without = measure_moments(model, BATCHES, warmup_steps=0, progress=False)
    assert without.weights == {}


def test_regression() -> None:
    model = lora(bert(num_labels=1), init_lora_weights=True)
    scores = calculate_fisher_information(model, [regression_batch()], progress=False)
    assert all(bool(score.any()) for name, score in scores.items() if "lora" in name)


@pytest.mark.parametrize("steps", [-1, 1.5, "20"])
def test_steps_must_be_a_whole_number(steps: object) -> None:
    with pytest.raises(FisherError, match="warmup_steps"):
        scored(at_zero(), warmup_steps=steps)
