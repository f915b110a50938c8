from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import assert_same_tensors, tensors

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.models.building import build_model
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.starts import Starts

MakeExperiment = Callable[..., ExperimentConfig]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_of_an_earlier_arm_is_the_start_built_anew(
    experiment: MakeExperiment, method: str, init: str, dtype: str
) -> None:
    config = experiment(f"peft.method={method}", f"lora.init_lora_weights={init}", f"model.dtype={dtype}")
    plan = plan_experiment(config)
    starts, arm = Starts(config, plan), f"{method}-fish"
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
    starts, computed = Starts(config, plan_experiment(config)), []
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
