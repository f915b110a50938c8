"""load_adapter, and load_mask of a folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fake_hub import Hub
from folders import write_bert
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shelf import CASES, adapted, base_model, supported
from tiny import assert_same_tensors, random_mask, text_batch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fish_tuning import (
    ConfigurationError,
    FishTuningWarning,
    MaskError,
    apply_mask,
    complete_adapter,
    count_trainable_parameters,
    get_mask,
    is_masked,
    load_adapter,
    load_mask,
    merge_adapter,
)
from fish_tuning.adapters import SerialAdapterConfig
from fish_tuning.sharing.predicting import predict

INPUTS = {name: tensor % 19 for name, tensor in text_batch().items()}


def changed(folder: Path, name: str = "adapter_config.json", **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in INPUTS.items()}
        out: torch.Tensor = model.eval()(**inputs).logits
    return out


def test_it_computes_the_same(classifier: Any, adapter: Path) -> None:
    model = load_adapter(adapter)
    assert torch.equal(logits(model), logits(classifier))
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert not is_masked(model)
    assert count_trainable_parameters(model) == 0


def test_it_trains_on_with_its_mask(classifier: Any, adapter: Path) -> None:
    model = load_adapter(adapter, is_trainable=True)
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(get_mask(classifier).items())))
    assert count_trainable_parameters(model) == count_trainable_parameters(classifier)


def test_the_mask_fits_the_model_of_stock_peft(classifier: Any, adapter: Path, base_folder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    apply_mask(model, load_mask(adapter))
    assert count_trainable_parameters(model) == count_trainable_parameters(classifier)


def test_under_another_name_too(classifier: Any, adapter: Path) -> None:
    model = load_adapter(adapter, is_trainable=True, adapter_name="mine")
    assert count_trainable_parameters(model) == count_trainable_parameters(classifier)


@pytest.mark.parametrize("bias", ["none", "all"])  # PEFT saves biases without the adapter's name
@pytest.mark.parametrize("called", ["default", "reviews", "mine"])
def test_an_adapter_that_was_saved_under_a_name_trains_on(
    called: str, bias: Literal["none", "all"], base_folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False, bias=bias)
    model: Any = get_peft_model(base, config, adapter_name="reviews")
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path / "reviews", is_trainable=True, adapter_name=called)
    assert torch.equal(logits(loaded), logits(model))
    assert count_trainable_parameters(loaded) == count_trainable_parameters(model)
    assert sorted(map(_without(called), get_mask(loaded))) == sorted(map(_without("reviews"), get_mask(model)))


def _without(adapter: str) -> Callable[[str], str]:
    return lambda name: name.replace(f".{adapter}.", ".")


def test_what_was_frozen_stays_frozen(classifier: Any, adapter: Path) -> None:
    mask = load_mask(adapter)
    frozen = [name for name in mask if ".lora_A." in name]
    from fish_tuning import save_mask

    save_mask({name: tensor for name, tensor in mask.items() if name not in frozen}, adapter / "fish_mask.safetensors")
    model = load_adapter(adapter, is_trainable=True)
    assert not [name for name in frozen if model.get_parameter(name).requires_grad]


def test_a_method_that_peft_lacks(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    model = get_peft_model(base, SerialAdapterConfig(task_type="SEQ_CLS", bottleneck_size=4))
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.save_pretrained(tmp_path / "serial")
    assert torch.equal(logits(load_adapter(tmp_path / "serial")), logits(model))
    assert "import fish_tuning.adapters" in (tmp_path / "serial" / "README.md").read_text()


def test_a_base_model_elsewhere(classifier: Any, adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"is a folder that is not here. .* base_model="):
        load_adapter(adapter)
    assert torch.equal(logits(load_adapter(adapter, base_model=base_folder)), logits(classifier))


def test_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = write_bert(tmp_path / "wide", hidden_size=32)
    with pytest.raises(ConfigurationError, match="not those that the adapter was made on"):
        load_adapter(adapter, base_model=other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not readable JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is no adapter's configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "does not fit|cannot be"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no weights: there is no adapter_model"),
        (
            lambda folder: (folder / "model_config/config.json").write_text("{"),
            "label names, cannot be read: .* valid JSON",
        ),
        (
            lambda folder: (folder / "model_config/config.json").write_text("[]"),
            "label names, cannot be read: .*model_type",
        ),
        (lambda folder: changed(folder, "model_config/config.json", hidden_size="x"), "cannot be read: .*hidden_size"),
        (
            lambda folder: changed(folder, base_model_name_or_path=5),
            "base_model_name_or_path=5 must be a name or a path",
        ),
        (lambda folder: changed(folder, auto_mapping=[1]), r"auto_mapping=\[1\] must be an object"),
        (lambda folder: changed(folder, peft_type="LORAX"), r"no method peft_type='LORAX'.* Did you mean 'LORA'\?"),
        (lambda folder: changed(folder, r="four"), "does not fit BertForSequenceClassification: .*'str'"),
        (lambda folder: changed(folder, modules_to_save="classifier"), "does not fit BertForSequenceClassification"),
        (lambda folder: changed(folder, target_modules=["query", "key", "value"]), "its weights lack .*key.lora_A"),
        (shutil.rmtree, "There is no folder"),
    ],
)
def test_damage_is_told(damage: Any, message: str, adapter: Path) -> None:
    damage(adapter)
    with pytest.raises(ConfigurationError, match=message):
        load_adapter(adapter)


def test_weights_for_layers_that_the_base_model_lacks_are_told(adapter: Path) -> None:
    changed(adapter, "model_config/config.json", num_hidden_layers=1)
    with pytest.warns(FishTuningWarning, match=r"weights for layers that Bert.* lacks, .*layer\.1\.attention"):
        load_adapter(adapter)


def test_a_folder_two_levels_above_names_one(adapter: Path) -> None:
    adapter.rename(adapter.parent / "x")
    (adapter.parent / "runs" / "adapters").mkdir(parents=True)
    (adapter.parent / "x").rename(adapter.parent / "runs" / "adapters" / "x")
    with pytest.raises(ConfigurationError, match=r"Folders below have one, e\.g\. '.*/runs/adapters/x'"):
        load_adapter(adapter.parent / "runs")


def test_a_mistyped_folder_gets_its_neighbour(
    adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no folder '.*/adaptr'\. Did you mean 'adapter'\?"):
        load_adapter(tmp_path / "adaptr")
    monkeypatch.chdir(tmp_path)  # a name alone may be the hub's, too
    with pytest.raises(ConfigurationError, match=r"'adaptr' is no folder here, .* Did you mean 'adapter'\?"):
        load_adapter("adaptr")


def test_a_damaged_mask_is_told_where_it_matters(adapter: Path) -> None:
    file = adapter / "fish_mask.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    load_adapter(adapter)
    with pytest.raises(MaskError, match="damaged"):
        load_adapter(adapter, is_trainable=True)


def test_load_mask_takes_a_folder(adapter: Path, tmp_path: Path) -> None:
    assert_same_tensors(load_mask(adapter), load_mask(adapter / "fish_mask.safetensors"))
    with pytest.raises(MaskError, match=r"has no fish_mask.safetensors. Folders below have one; give one of .*adapter"):
        load_mask(adapter.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MaskError, match="was trained without a mask"):
        load_mask(tmp_path / "empty")


def test_the_weights_are_peft_s_own(classifier: Any, adapter: Path) -> None:
    assert all("classifier" in name or "lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))


# Tensors that come from nowhere


@pytest.fixture
def without_pooler(base_folder: Path, tmp_path: Path) -> Path:
    base = tmp_path / "no-pooler"
    shutil.copytree(base_folder, base)
    state = load_file(base / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "pooler" not in name},
        base / "model.safetensors",
        {"format": "pt"},
    )
    return base


def lora_on(base: Path, folder: Path, **config: Any) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], **config))
    adapted.save_pretrained(folder)
    complete_adapter(adapted, folder)
    return folder


def test_random_tensors_are_told_and_make_no_prediction(without_pooler: Path, tmp_path: Path) -> None:
    folder = lora_on(without_pooler, tmp_path / "pooled", task_type="SEQ_CLS")
    message = r"nor the adapter has bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight: they are new random numbers"
    with pytest.warns(FishTuningWarning, match=message):
        load_adapter(folder)
    with pytest.raises(ConfigurationError, match=message):
        predict(folder, [{"text": "good film"}])
    with pytest.raises(ConfigurationError, match=r"train again with these modules in modules_to_save"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_head_that_nobody_has_is_told(base_folder: Path, tmp_path: Path) -> None:
    folder = lora_on(base_folder, tmp_path / "headless")
    with pytest.warns(FishTuningWarning, match=r"has classifier\.bias, classifier\.weight"):
        load_adapter(folder)


@pytest.mark.filterwarnings("error::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
        {"modules_to_save": ["classifier", "pooler"]},
    ],
)
def test_what_the_adapter_brings_is_not(config: dict[str, Any], without_pooler: Path, tmp_path: Path) -> None:
    folder = lora_on(without_pooler, tmp_path / "whole", **config)
    assert torch.equal(logits(load_adapter(folder)), logits(load_adapter(folder)))
    assert predict(folder, [{"text": "good film"}])


@pytest.mark.filterwarnings("error::fish_tuning.FishTuningWarning")
def test_tied_weights_and_prompts_bring_all_they_need(base_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder, tie_word_embeddings=True)
    base.config.tie_word_embeddings = True
    base.save_pretrained(tmp_path / "tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter")
    complete_adapter(model, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter")
    head = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    prefix = get_peft_model(head, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    prefix.save_pretrained(tmp_path / "prefix")
    complete_adapter(prefix, tmp_path / "prefix")
    load_adapter(tmp_path / "prefix")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if supported(case)])
def test_every_method_brings_all_that_its_model_has(name: str, tmp_path: Path) -> None:
    base_model(CASES[name]).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    (tmp_path / "made").mkdir()
    model = adapted(CASES[name], tmp_path / "made")
    model.save_pretrained(tmp_path / "adapter")
    complete_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        load_adapter(tmp_path / "adapter", base_model=tmp_path / "base")


def test_layers_that_peft_repeats_are_not_taken_for_the_base_models_own(llama_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    layers = base.config.num_hidden_layers
    config = LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, layer_replication=[(0, layers), (0, layers)]
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)  # that layers are random
        loaded = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.num_hidden_layers == 2 * layers
