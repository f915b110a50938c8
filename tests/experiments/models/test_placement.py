from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import bert
from transformers import TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.data.tasks.completion_trainer import sft_config
from fish_tuning.experiments.models.placement import (
    check_device_map,
    check_loaded_place,
    check_modules,
    loading_place,
)
from fish_tuning.experiments.run.arguments import as_one_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def model(device_map: Any, **more: Any) -> ModelConfig:
    return ModelConfig(name="a", device_map=device_map, **more)


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("device_map", "device", "message"),
    [
        ({"": 2}, GPU, r"names cuda:2, and 2 GPUs can be seen here"),
        ({"": 1}, GPU, r"whole model on cuda:1, but training is on cuda:0\. Choose the GPU with CUDA_VISIBLE_DEVICES"),
        ("cpu", GPU, r"whole model on cpu, but training is on cuda:0.*use_cpu=true"),
        ({"a": 0, "b": "cpu"}, GPU, r"cpu, cuda:0 would keep parts of the model away"),
        ({"a": 0, "b": "disk"}, GPU, r"cuda:0, disk would keep parts of the model away"),
        ("auto", CPU, r"'auto' puts parts on the GPU, but training\.args_override\.use_cpu trains on the CPU"),
    ],
)
def test_a_map_that_cannot_be_trained_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, device_map: Any, device: torch.device, message: str
) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(ConfigurationError, match=message):
        check_device_map(model(device_map), device)


@pytest.mark.parametrize("device_map", [None, "auto", "balanced", {"": 0}, "cuda", "cuda:0", {"a": 0, "b": 1}])
def test_a_map_of_gpus_is_taken(monkeypatch: pytest.MonkeyPatch, device_map: Any) -> None:
    gpus(monkeypatch, 2)
    check_device_map(model(device_map), GPU)


def test_several_processes_share_no_map() -> None:
    with pytest.raises(ConfigurationError, match="but 4 processes train together"):
        check_device_map(model("auto"), CPU, processes=4)
    check_device_map(model(None), CPU, processes=4)


def test_modules_of_the_map_are_those_of_the_model() -> None:
    base = bert()
    for fine in ({"": "cpu"}, {"bert": "cpu", "classifier": "cpu"}, {"bert.encoder.layer.1": "cpu", "": "cpu"}, "auto"):
        check_modules(model(fine), base)
    with pytest.raises(ConfigurationError, match=r"no module 'clasifier'\. Did you mean 'classifier'\?"):
        check_modules(model({"bert": "cpu", "clasifier": "cpu"}), base)
    with pytest.raises(ConfigurationError, match=r"no device for 2 of the 4\d tensors .*'classifier\.weight'"):
        check_modules(model({"bert": "cpu"}), base)


@pytest.mark.parametrize(
    ("places", "fits"),
    [
        (None, True),
        ({"": "cpu"}, True),
        ({"a": 0, "b": 1}, True),
        ({"a": 0, "b": "cpu"}, False),
        ({"a": 0, "b": "disk"}, False),
        ({"": "disk"}, False),
    ],
)
def test_parts_that_do_not_fit_are_told(places: dict[str, Any] | None, fits: bool) -> None:
    base = SimpleNamespace(hf_device_map=places)
    if fits:
        check_loaded_place(base)
    else:
        with pytest.raises(ConfigurationError, match=r"1 of \d parts of the model do not fit.*model\.max_memory"):
            check_loaded_place(base)


def test_where_a_model_is_loaded_to() -> None:
    assert loading_place(model(None), GPU, quantized=False) == {}
    assert loading_place(model(None), GPU, quantized=True) == {"device_map": {"": GPU}}
    asked = loading_place(model("auto", max_memory={"0": "20GiB", "cpu": "1GiB"}), GPU, quantized=True)
    assert asked == {"device_map": "auto", "max_memory": {0: "20GiB", "cpu": "1GiB"}}


def test_no_copies_of_a_model_in_parts_share_a_batch(tmp_path: Any) -> None:
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    arguments._n_gpu = 2  # as two GPUs in one process have it
    assert arguments.train_batch_size == 8
    assert sft_config(arguments).train_batch_size == 8
    assert as_one_model(arguments).train_batch_size == 4
    assert sft_config(arguments).train_batch_size == 4
