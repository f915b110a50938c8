from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import write_bert, write_llama_config
from safetensors.torch import load_file, save_file
from tiny import llama_classifier

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import load_task
from fish_tuning.experiments.models.building import (
    build_meta_model,
    build_model,
    check_weights,
    load_config,
    load_tokenizer,
    state_digest,
)

MakeExperiment = Callable[..., ExperimentConfig]


def built(config: ExperimentConfig, dense: bool = False, seed: int = 1) -> torch.nn.Module:
    task = load_task(config.dataset)
    loaded = load_config(config.model, task, 0)
    return build_model(config, loaded, task, config.peft[0], Variant(small=dense), seed=seed)  # type: ignore[no-any-return]


def counted(config: ExperimentConfig) -> torch.nn.Module:
    task = load_task(config.dataset)
    loaded = load_config(config.model, task, 0)
    return build_meta_model(config, loaded, task, config.peft[0], Variant())  # type: ignore[no-any-return]


def test_the_same_seed_gives_the_same_model_and_another_seed_another_head(experiment: MakeExperiment) -> None:
    one, two, other = (state_digest(built(experiment(), seed=seed)) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("init", ["pissa", "true", "orthogonal"])
def test_arms_of_different_rank_start_from_the_same_head(experiment: MakeExperiment, init: str) -> None:
    config = experiment(f"lora.init_lora_weights={init}")
    heads = [built(config, dense=dense).get_parameter("base_model.model.classifier.modules_to_save.default.weight")
             for dense in (True, False)]  # fmt: skip
    assert torch.equal(*heads)


def test_the_counting_model_counts_as_the_real_one(experiment: MakeExperiment) -> None:
    config = experiment()
    meta = counted(config)
    sizes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (meta, built(config))]
    assert sizes[0] == sizes[1]
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_labels_and_dtype_reach_the_model(experiment: MakeExperiment) -> None:
    config = experiment("model.dtype=bfloat16", "model.config_overrides.hidden_dropout_prob=0.3")
    model = built(config)
    assert model.config.num_labels == 2
    assert model.config.hidden_dropout_prob == 0.3
    assert model.get_parameter("base_model.model.bert.embeddings.word_embeddings.weight").dtype == torch.bfloat16


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hidden_size=32", r"model\.config_overrides=.*another shape than the model \(bert\."),
        ("num_hidden_layers=3", r"16 of its .* tensors are not among them \(bert\.encoder\.layer\.2"),
    ],
)
def test_an_encoder_that_would_be_random_is_refused(experiment: MakeExperiment, override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built(experiment(f"model.config_overrides.{override}"))


def test_weights_of_another_architecture_are_refused(experiment: MakeExperiment, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", weights=False)
    llama_classifier().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match="are not among them"):
        built(experiment(f"model.name={folder}"))


def test_a_missing_pooler_and_a_head_of_another_size_are_fine(experiment: MakeExperiment, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    save_file(tensors | {"classifier.weight": torch.zeros(5, 16), "classifier.bias": torch.zeros(5)}, file,
              metadata={"format": "pt"})  # fmt: skip
    assert built(experiment(f"model.name={folder}")).config.num_labels == 2


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_bfloat16_model_trains(experiment: MakeExperiment, bert_folder: Path, tmp_path: Path, family: str) -> None:
    folder = bert_folder
    if family == "llama":
        folder = tmp_path / "llama"
        llama_classifier().save_pretrained(folder)
    model = built(experiment(f"model.name={folder}", "model.dtype=bfloat16"))
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([1])).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {p.dtype for name, p in trained.items() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in trained.items() if "modules_to_save" in name} == {torch.bfloat16}
    torch.optim.AdamW(trained.values()).step()
    assert all(parameter.isfinite().all() for parameter in trained.values())


def test_a_folder_without_weights_is_told(experiment: MakeExperiment, tmp_path: Path) -> None:
    check_weights(experiment().model)
    folder = write_bert(tmp_path / "bare", weights=False)
    with pytest.raises(ConfigurationError, match=r"holds no weights; one of model\.safetensors, .* is needed"):
        check_weights(experiment(f"model.name={folder}").model)


def test_a_configuration_that_makes_no_model_is_told(experiment: MakeExperiment) -> None:
    config = experiment("model.config_overrides.num_attention_heads=3")
    task = load_task(config.dataset)
    with pytest.raises(ConfigurationError, match="no model can be made from the configuration"):
        counted(config)
    with pytest.raises(ConfigurationError, match=r"config_overrides\.hidden_size='big' .*expected int, got str"):
        load_config(experiment("model.config_overrides.hidden_size=big").model, task, 0)


def test_without_network_the_way_out_is_told(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError("We couldn't connect")

    monkeypatch.setattr("fish_tuning.experiments.models.building.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ConfigurationError, match=r"couldn't connect.*HF_HUB_OFFLINE=1"):
        load_tokenizer(experiment("model.name=bert-base-cased").model)
    assert "Retrying" not in caplog.text
