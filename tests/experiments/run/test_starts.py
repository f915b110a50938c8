from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import EvaConfig
from peft.tuners.lora import LoraLayer
from tiny import (
    assert_same_tensors,
    bert,
    causal_batch,
    classification_batch,
    image_batch,
    llama,
    lora,
    rebatch,
    tensors,
    vit,
)

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.models.building import build_model, state_digest
from fish_tuning.experiments.records.run_keys import run_keys
from fish_tuning.experiments.run.eva import start_along_inputs
from fish_tuning.experiments.run.plan import Plan, plan_experiment
from fish_tuning.experiments.run.starts import Starts
from fish_tuning.starts.along_gradient import start_along_gradient

MakeExperiment = Callable[..., ExperimentConfig]


def make_starts(config: ExperimentConfig, plan: Plan) -> Starts:
    return Starts(config, plan, encode(plan.task, plan.processing_class, config.training.max_seq_length))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_of_an_earlier_arm_is_the_start_built_anew(
    experiment: MakeExperiment, method: str, init: str, dtype: str
) -> None:
    config = experiment(f"peft.method={method}", f"lora.init_lora_weights={init}", f"model.dtype={dtype}")
    plan = plan_experiment(config)
    starts, arm = make_starts(config, plan), f"{method}-fish"
    with torch.no_grad():  # what an arm does to its model must not reach the next one's
        for parameter in starts(arm, 1).parameters():
            parameter.add_(1)
    again = starts(arm, 1)
    new = build_model(config, plan.model_config, plan.task, config.method_of(arm), config.variant_of(arm), seed=1)
    assert_same_tensors(tensors(again), tensors(new))
    for one, other in zip(again.parameters(), new.parameters(), strict=True):
        assert (one.dtype, one.stride(), one.requires_grad) == (other.dtype, other.stride(), other.requires_grad)
    assert again.peft_config["default"].to_dict() == new.peft_config["default"].to_dict()


def test_svds_are_computed_once_a_seed(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("lora.init_lora_weights=pissa")
    starts, computed = make_starts(config, plan_experiment(config)), []
    init = LoraLayer.pissa_init

    def counted(self: LoraLayer, *arguments: object) -> None:
        computed.append(self)
        init(self, *arguments)

    monkeypatch.setattr(LoraLayer, "pissa_init", counted)
    for arm in ("lora-fish", "lora-fish-rand", "lora-fish-rev"):
        starts(arm, 1)
    assert len(computed) == 6
    starts("lora", 1)  # of another rank
    assert len(computed) == 12
    starts("lora-fish", 2)
    assert len(computed) == 18


def test_gradients_are_taken_once_a_seed(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("lora.init_lora_weights=gradient", "peft.method=dora")
    plan = plan_experiment(config)
    starts, computed = make_starts(config, plan), []

    def counted(model: Any, loader: Any, *arguments: Any, **options: Any) -> None:
        computed.append(sum(len(batch["labels"]) for batch in loader))
        start_along_gradient(model, loader, *arguments, **options)

    monkeypatch.setattr("fish_tuning.experiments.run.starts.start_along_gradient", counted)
    first = starts("dora-fish", 1)
    assert_same_tensors(tensors(starts("dora-fish-rand", 1)), tensors(first))
    assert computed == [8]  # fish_tuning.num_samples
    starts("dora", 1)  # of another rank
    other = starts("dora-fish", 2)
    assert computed == [8, 8, 8]
    assert first.peft_config["default"].init_lora_weights is True
    names = [name for name in tensors(first) if "lora_A" in name]
    rows = tensors(first)[names[0]]
    torch.testing.assert_close(3 * rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(rows, tensors(other)[names[0]])
    assert not any(tensor.any() for name, tensor in tensors(first).items() if "lora_B" in name)
    assert_same_tensors(tensors(make_starts(config, plan)("dora-fish", 1)), tensors(first))


def test_a_method_of_its_own_start(experiment: MakeExperiment) -> None:
    """`peft.args` goes over the section `lora`, in the start and in the runs' keys."""
    plain = experiment("peft.method=lora")
    config = experiment("peft.method=lora", "peft.args.init_lora_weights=gradient")
    starts = make_starts(config, plan_experiment(config))
    model = starts("lora-fish", 1)
    rows = next(tensor for name, tensor in tensors(model).items() if "lora_A" in name)
    torch.testing.assert_close(3 * rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
    keys = {run_keys(each, plan_experiment(each).arms[1], {}, {}).run for each in (plain, config)}
    assert len(keys) == 2


@pytest.mark.parametrize("init", ["true", "gradient", "pissa"])
def test_a_frozen_factor(experiment: MakeExperiment, init: str) -> None:
    plain = experiment(f"lora.init_lora_weights={init}")
    config = experiment(f"lora.init_lora_weights={init}", "lora.freeze_A=true")
    plan = plan_experiment(config)
    starts = make_starts(config, plan)
    for arm in plan.arms[:-1]:  # the last trains the head alone
        model = starts(arm.arm, 1)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any(".lora_B." in name for name in trained)
        assert not any(".lora_A." in name for name in trained)
        assert_same_tensors(tensors(starts(arm.arm, 1)), tensors(model))
        assert_same_tensors(tensors(make_starts(plain, plan_experiment(plain))(arm.arm, 1)), tensors(model))
        if arm.selection:
            assert sum(model.get_parameter(name).numel() for name in trained) == arm.pool + arm.dense
    assert config.warmup_steps(config.peft[0]) == 0
    assert plan.notes == plan_experiment(plain).notes
    model = starts("lora-fish", 1)
    digest = state_digest(model)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if ".lora_A." in name)[0, 0] += 1
    assert state_digest(model) != digest
    assert config.start(config.peft[0]) == f"init_lora_weights {init}, A frozen"
    assert run_keys(config, plan.arms[1], {}, {}).run != run_keys(plain, plan.arms[1], {}, {}).run


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_eva_keeps_ranks_and_counts(experiment: MakeExperiment, method: str) -> None:
    config = experiment("lora.init_lora_weights=eva", f"peft.method={method}")
    plan = plan_experiment(config)
    starts = make_starts(config, plan)
    for arm in plan.arms[:2]:
        model = starts(arm.arm, 1)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == 6
        rank = config.lora.baseline_rank if arm.selection is None else config.lora.fish_rank
        for layer in layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=1e-4, atol=1e-4)
            assert not b.any()
        assert_same_tensors(tensors(starts(arm.arm, 1)), tensors(model))
        assert_same_tensors(tensors(make_starts(config, plan)(arm.arm, 1)), tensors(model))
        settings = [each.peft_config["default"].to_dict() for each in (starts(arm.arm, 1), model)]
        assert settings[0] == settings[1]
    assert config.warmup_steps(config.peft[0]) == 20
    moving = experiment("lora.init_lora_weights=eva", "peft.args.eva_config={rho: 2.0}")
    with pytest.raises(ConfigurationError, match="rho=2 lets EVA move ranks"):
        plan_experiment(moving)


def test_eva_refuses_what_it_would_go_round_on_for_ever() -> None:
    model = lora(bert(), rank=8, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with pytest.raises(ConfigurationError, match="at least r=8 tokens"):
        start_along_inputs(model, rebatch(classification_batch(lengths=(3, 4)), 2))
    images = lora(vit(), rank=16, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with pytest.raises(
        ConfigurationError, match="at least r=16 tokens, but the largest of calibration examples has 15"
    ):
        start_along_inputs(images, rebatch(image_batch(), 3))  # 4 patches and the class token of each


def test_eva_counts_tokens_with_labels_and_images() -> None:
    for model, batch in (
        (lora(llama(), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)), causal_batch()),
        (lora(vit(), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)), image_batch()),
    ):
        before = tensors(model)
        start_along_inputs(model, [batch])
        moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if "lora_A" in name}


@pytest.mark.parametrize("init", ["gradient", "eva"])
def test_trials_look_at_their_own_data(experiment: MakeExperiment, init: str) -> None:
    config = experiment(f"lora.init_lora_weights={init}")
    plan = plan_experiment(config)
    data = encode(plan.task, plan.processing_class, config.training.max_seq_length)
    starts = Starts(config, plan, data)
    part = data._replace(train=data.train.select(range(10, 20)))
    of_all, of_part = (tensors(each("lora", 1)) for each in (starts, starts.with_data(part)))
    different = {name for name in of_all if not torch.equal(of_all[name], of_part[name])}
    assert different == {name for name in of_all if "lora_A" in name}
    pissa = Starts(experiment("lora.init_lora_weights=pissa"), plan, data)
    assert pissa.with_data(part) is pissa
