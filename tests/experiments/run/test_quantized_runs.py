"""Whole experiments on base weights of 4 and 8 bits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_bert, write_llama, write_sums, write_tokenizer
from peft import PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny import assert_same_tensors, classification_batch, tensors
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertModel,
    TrainerCallback,
    TrainingArguments,
)

from fish_tuning import cli
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.models import quantized
from fish_tuning.experiments.models.building import build_base_model, build_model
from fish_tuning.experiments.records.record_files import adapter_folder
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.plan import Plan, plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.experiments.run.starts import Starts
from fish_tuning.scores.quantized import keep_unpacked

pytest.importorskip("bitsandbytes", reason="base weights in 4 and 8 bits need bitsandbytes")

MakeExperiment = Callable[..., ExperimentConfig]
FOUR = "model.quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
EIGHT = "model.quantization_config={load_in_8bit: true}"
ARMS = "fish_tuning.methods_to_run=[lora, lora-fish]"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """bitsandbytes tells of every cast in 8 bits."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(config: ExperimentConfig) -> tuple[list[RunRecord], list[bool]]:
    known: list[bool] = []
    records = run_experiment(config, plan_experiment(config), lambda _, found: known.append(found))
    assert [record.error for record in records] == [None] * len(records)
    return records, known


def key(config: ExperimentConfig) -> str:
    context = make_context(config, plan_experiment(config), TrainerCallback())
    return context.keys(context.plan.arms[0], 1, None).run


def weight_types(model: torch.nn.Module) -> dict[str, str]:
    """Of the base's linear layers."""
    return {
        name: type(module.weight).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_is_whole_is_not_repeated_and_loads_in_stock_peft(
    experiment: MakeExperiment, bert_folder: Path, tmp_path: Path, bits: int
) -> None:
    config = experiment(FOUR if bits == 4 else EIGHT, "fish_tuning.methods_to_run=[lora, lora-fish, head]")
    records, known = run(config)
    again, found = run(config)
    assert (known, found, again) == ([False] * 3, [True] * 3, records)
    assert len({key(config), key(experiment()), key(experiment(EIGHT if bits == 4 else FOUR))}) == 3

    plan = plan_experiment(config)
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    )
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2, quantization_config=settings)
    folder = tmp_path / "results" / "adapters" / "lora-fish-seed1"
    model: Any = PeftModel.from_pretrained(prepare_model_for_kbit_training(base, False), folder)  # type: ignore[no-untyped-call]
    saved = load_file(folder / "adapter_model.safetensors")
    assert_same_tensors(get_peft_model_state_dict(model), saved)
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    keep_unpacked(model)
    data = encode(plan.task, plan.processing_class, config.training.max_seq_length)
    batch = plan.task.collator(plan.processing_class)(list(data.validation))
    with torch.no_grad():
        loss = float(model.eval()(**batch).loss)
    assert loss == pytest.approx(records[1].metrics["loss"], rel=1e-5 if bits == 4 else 1e-3)


@pytest.mark.slow
def test_a_chosen_start_comes_again(experiment: MakeExperiment) -> None:
    """EVA passes the model in evaluation mode; OLoRA quantises base weights anew."""
    for bits, init in ((FOUR, "eva"), (FOUR, "gradient"), (FOUR, "olora"), (EIGHT, "olora"), (EIGHT, "eva")):
        config = experiment(bits, f"lora.init_lora_weights={init}")
        plan = plan_experiment(config)
        starts = Starts(config, plan, encode(plan.task, plan.processing_class, config.training.max_seq_length))
        one, two = (starts(arm, 1) for arm in ("lora-fish", "lora-fish-rand"))
        assert_same_tensors(tensors(one), tensors(two))
        assert gradients(one).keys() == gradients(two).keys()
        assert_same_tensors(gradients(one), gradients(two))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of a training pass without dropout."""
    model.zero_grad()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = classification_batch(classes=2)
    model(**{**ids, "input_ids": ids["input_ids"] % 19}).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [FOUR, EIGHT])
def test_gradients_outlive_an_evaluation(experiment: MakeExperiment, bits: str) -> None:
    config = experiment(bits, "lora.init_lora_weights=false")
    plan = plan_experiment(config)
    model = build_model(config, plan.model_config, plan.task, config.peft[0], Variant(), seed=1)
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert before
    assert_same_tensors(gradients(model), before)


@pytest.mark.slow
def test_evaluations_and_checkpointing_change_no_run(experiment: MakeExperiment, tmp_path: Path) -> None:
    digests = [
        run(experiment(FOUR, ARMS, f"training.output_dir={tmp_path / str(number)}", *settings))[0][0].adapter_digest
        for number, settings in enumerate(
            [
                [],
                ["training.args_override.activation_checkpointing=true"],
                [
                    "training.args_override.activation_checkpointing=true",
                    "training.args_override.activation_checkpointing_kwargs={use_reentrant: true}",
                ],
                ["model.device_map=auto"],
                ["model.device_map={bert: cpu, classifier: cpu}"],
            ]
        )
    ]
    assert len(set(digests)) == 1
    stopped, _ = run(experiment(FOUR, ARMS, "training.early_stopping_patience=1", f"training.output_dir={tmp_path}/s"))
    assert all(record.value is not None for record in stopped)


def test_the_rest_of_the_model_is_prepared_for_training(experiment: MakeExperiment) -> None:
    config = experiment(FOUR, "model.dtype=bfloat16")
    plan = plan_experiment(config)
    base = build_base_model(config, plan.model_config, plan.task, seed=1)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert {p.dtype for p in base.parameters()} == {torch.float32, torch.uint8}
    kinds = weight_types(base)
    assert kinds["classifier"] == "Parameter"
    assert {kind for name, kind in kinds.items() if name != "classifier"} == {"Params4bit"}


def test_no_part_of_a_new_head_is_quantised(experiment: MakeExperiment, tmp_path: Path) -> None:
    folder = tmp_path / "distilbert"
    write_tokenizer(folder)
    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig(vocab_size=19, dim=16, hidden_dim=24, n_layers=1, n_heads=2)).save_pretrained(
        folder
    )
    config = experiment(f"model.name={folder}", FOUR, "fish_tuning.methods_to_run=[lora, head]")
    plan = plan_experiment(config)
    kinds = weight_types(build_base_model(config, plan.model_config, plan.task, seed=1))
    heads = {name for name, kind in kinds.items() if kind == "Parameter"}
    assert heads == {"pre_classifier", "classifier"}
    run(config)


@pytest.mark.slow
def test_the_output_layer_of_a_language_model_is_not_quantised_either(
    experiment: MakeExperiment, tmp_path: Path
) -> None:
    model, data = write_llama(tmp_path / "llama"), write_sums(tmp_path / "sums")
    skips = FOUR.replace("}", ", llm_int8_skip_modules: [v_proj]}")
    config = experiment(f"model.name={model}", f"dataset.load_args=[{data}]", skips, "training.max_seq_length=32")
    plan = plan_experiment(config)
    kinds = weight_types(build_base_model(config, plan.model_config, plan.task, seed=1))
    assert {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Parameter"} == {"v_proj", "lm_head"}
    run(config)


@pytest.mark.slow
def test_a_model_that_is_stored_in_few_bits_is_taken_as_it_is(
    experiment: MakeExperiment, tmp_path: Path, bert_folder: Path
) -> None:
    folder = write_bert(tmp_path / "stored")
    plain = experiment(FOUR, ARMS)
    plan = plan_experiment(plain)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForSequenceClassification.from_pretrained(bert_folder, quantization_config=settings).save_pretrained(
        folder
    )
    config = experiment(f"model.name={folder}", ARMS)
    facts = plan_experiment(config).facts
    assert facts["quantization"] == "4 bits (nf4), computed in float32, stored by bitsandbytes"
    assert plan.facts["quantization"] == "4 bits (nf4), computed in float32, by bitsandbytes"
    assert "bitsandbytes" in facts["versions"]
    records, _ = run(config)
    assert run(config) == (records, [True, True])
    with pytest.raises(ConfigurationError, match=r"asks for 8 bits, but .* are quantised already: 4 bits \(nf4\)"):
        plan_experiment(experiment(f"model.name={folder}", EIGHT))


@pytest.mark.slow
def test_a_language_model_is_measured_by_its_answers(experiment: MakeExperiment, tmp_path: Path) -> None:
    model, data = write_llama(tmp_path / "llama"), write_sums(tmp_path / "sums")
    config = experiment(
        f"model.name={model}", f"dataset.load_args=[{data}]", FOUR, ARMS, "dataset.metric=exact_match_number",
        "dataset.max_new_tokens=4", "fish_tuning.reselect_every=1", "training.max_seq_length=32",
    )  # fmt: skip
    records, _ = run(config)
    assert all("exact_match_number" in record.metrics for record in records)
    for record in records:  # which trl by itself would train in 16 bits
        folder = adapter_folder(tmp_path / "results", record.arm, record.seed)
        saved = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert not any(torch.equal(t, t.bfloat16().float()) for name, t in saved.items() if "lora_A" in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([FOUR, "lora.init_lora_weights=pissa"], r"'pissa': PEFT cannot start lora so on quantised weights \(4 bits"),
        ([EIGHT, "lora.init_lora_weights=pissa_niter_4"], r"cannot start lora so on quantised weights \(8 bits"),
        ([FOUR, "peft.fish_args.init_lora_weights=orthogonal"], r"'orthogonal': PEFT cannot start lora-fish so"),
        ([FOUR, "peft.method=base"], r"peft\.method='base': base would train the model's own weights"),
        ([FOUR, "peft.method=loha"], r"peft\.method='loha': .* cannot train on weights of 4 bits"),
        ([EIGHT, "peft.method=dora"], r"peft\.method='dora': .* cannot train on weights of 8 bits"),
        ([EIGHT, "peft.args.use_dora=true"], r"peft\.method='dora': .* cannot train on weights of 8 bits"),
        (["model.device_map={beert: cpu, '': cpu}"], r"no module 'beert'\. Did you mean 'bert'\?"),
        (["model.device_map=0"], r"names cuda:0, and 0 GPUs can be seen"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    experiment: MakeExperiment, settings: list[str], message: str
) -> None:
    if "device_map=0" in settings[0] and torch.accelerator.is_available():
        pytest.skip("there is a GPU 0")
    methods = "base" if "base" in settings[-1] else "loha" if "loha" in settings[-1] else (
        "dora" if "method=dora" in settings[-1] else "lora"
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=message):
        plan_experiment(experiment(f"fish_tuning.methods_to_run=[{methods}, {methods}-fish]", *settings))


def test_several_processes_share_no_device_map(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    plan_experiment(experiment(ARMS))
    with pytest.raises(ConfigurationError, match=r"model\.device_map='auto' spreads one model .* but 2 processes"):
        plan_experiment(experiment(ARMS, "model.device_map=auto"))


@pytest.mark.parametrize(("settings", "stays"), [([], False), ([FOUR], True), (["model.device_map=auto"], True)])
def test_what_lies_where_it_was_loaded_is_not_copied_to_every_gpu(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, settings: list[str], stays: bool
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda each: vars(each).get("_n_gpu") or 2))
    config = experiment(*settings)
    context = make_context(config, plan_experiment(config), TrainerCallback())
    arguments = context.arguments(context.plan.arms[0], 1)
    assert arguments.train_batch_size == 16 * (1 if stays else 2)


def test_counting_needs_no_bitsandbytes_and_running_names_the_extra(
    experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [arm.trainable_parameters for arm in plan_experiment(experiment()).arms]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        quantized.importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    config = experiment(FOUR)
    plan: Plan = plan_experiment(config)
    assert [arm.trainable_parameters for arm in plan.arms] == counts
    assert any("pip install 'fish-tuning[quantized]'" in note for note in plan.notes)
    with pytest.raises(ConfigurationError, match=r"need the package bitsandbytes, .*'fish-tuning\[quantized\]'"):
        run_experiment(config, plan)
    file = str(tmp_path / "small.yaml")
    assert cli.run_command(file, [FOUR], cli.How(dry_run=True)) == 0
    assert "quantization: 4 bits (nf4), computed in float32, by bitsandbytes" in capsys.readouterr().out
    assert cli.run_command(file, [FOUR]) == 2
    assert "fish-tuning[quantized]" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
