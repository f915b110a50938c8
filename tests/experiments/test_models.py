from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import write_llama_config
from tiny import llama_classifier, vit

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config import ExperimentConfig
from fish_tuning.experiments.data import load_task
from fish_tuning.experiments.models import (
    build_meta_model,
    build_model,
    load_config,
    load_tokenizer,
    state_digest,
    target_modules,
)

MakeExperiment = Callable[..., ExperimentConfig]


def built(config: ExperimentConfig, rank: int = 4, seed: int = 1) -> torch.nn.Module:
    task = load_task(config.dataset)
    return build_model(config, load_config(config.model, task, 0), task, rank, seed=seed)  # type: ignore[no-any-return]


def test_the_same_seed_gives_the_same_model_and_another_seed_another_head(experiment: MakeExperiment) -> None:
    one, two, other = (state_digest(built(experiment(), seed=seed)) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("init", ["pissa", "true", "orthogonal"])
def test_arms_of_different_rank_start_from_the_same_head(experiment: MakeExperiment, init: str) -> None:
    config = experiment(f"lora.init_lora_weights={init}")
    heads = [built(config, rank=rank).get_parameter("base_model.model.classifier.modules_to_save.default.weight")
             for rank in (2, 4)]  # fmt: skip
    assert torch.equal(*heads)


def test_the_counting_model_counts_as_the_real_one(experiment: MakeExperiment) -> None:
    config = experiment()
    task = load_task(config.dataset)
    meta = build_meta_model(config, load_config(config.model, task, 0), task, 4)
    sizes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (meta, built(config))]
    assert sizes[0] == sizes[1]
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_labels_and_dtype_reach_the_model(experiment: MakeExperiment) -> None:
    config = experiment("model.dtype=bfloat16", "model.config_overrides.hidden_dropout_prob=0.3")
    model = built(config)
    assert model.config.num_labels == 2
    assert model.config.hidden_dropout_prob == 0.3
    assert model.get_parameter("base_model.model.bert.embeddings.word_embeddings.weight").dtype == torch.bfloat16


def test_targets_are_found_by_family(experiment: MakeExperiment) -> None:
    assert target_modules(experiment(), vit()) == ["q_proj", "k_proj", "v_proj"]
    assert target_modules(experiment(), llama_classifier()) == ["q_proj", "k_proj", "v_proj"]
    assert target_modules(experiment("lora.target_modules=[o_proj]"), llama_classifier()) == ["o_proj"]


def test_a_target_the_model_lacks_is_told_with_what_there_is(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match=r"no module 'querry'; .*Did you mean 'query'\?"):
        built(experiment("lora.target_modules=[querry]"))


def test_an_unknown_override_is_told_with_the_nearest(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match=r"no 'hiden_size'\. Did you mean 'hidden_size'"):
        built(experiment("model.config_overrides.hiden_size=3"))


def test_a_missing_model_is_told(experiment: MakeExperiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        load_tokenizer(experiment(f"model.name={tmp_path / 'nowhere'}").model)
    with pytest.raises(ConfigurationError, match="'no-such-model' cannot be loaded"):
        load_tokenizer(experiment("model.name=no-such-model").model)


def test_a_decoder_gets_a_padding_token(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment(f"model.name={write_llama_config(tmp_path / 'llama')}")
    task = load_task(config.dataset)
    assert load_config(config.model, task, pad_token_id=3).pad_token_id == 3
