"""Experiment files: defaults, merging, and that every mistake is named with its way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import (
    config_directory,
    describe,
    load_experiment,
    load_experiments,
    merge,
    parse_override,
    shipped_experiments,
)
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.config.training_keys import training_argument_types
from fish_tuning.experiments.config.yaml_files import parse

SMALLEST = "model: {name: some-model}\ndataset: {load_args: some-data}\n"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALLEST)
    return path


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


def test_everything_left_out_has_a_default(experiment: Path) -> None:
    config = load_experiment(experiment)
    assert config.name == "mine"
    assert config.training.output_dir == "results/mine"
    assert config.dataset.load_args == ["some-data"]
    assert config.fish_tuning.methods_to_run == ["lora", "lora-fish", "lora-fish-rand", "lora-fish-rev", "head"]
    assert config.seeds == [42, 43, 44]
    assert config.training.args_override["learning_rate"] == 1e-3


def test_schema_and_shipped_defaults_agree(experiment: Path) -> None:
    bare = ExperimentConfig(model={"name": "some-model"}, dataset={"load_args": ["some-data"]})
    loaded = load_experiment(experiment)
    for section in ("peft", "lora", "fish_tuning", "seeds"):
        assert getattr(bare, section) == getattr(loaded, section)


def test_overrides_beat_the_file_and_the_file_beats_the_base(experiment: Path) -> None:
    experiment.write_text(SMALLEST + "lora: {fish_rank: 4, baseline_rank: 2}\nname: other\n")
    config = load_experiment(experiment, ["lora.fish_rank=32", "training.args_override.learning_rate=1e-4", "seeds=7"])
    assert (config.lora.baseline_rank, config.lora.fish_rank) == (2, 32)
    assert config.training.args_override["learning_rate"] == 1e-4
    assert config.training.args_override["num_train_epochs"] == 3
    assert config.training.output_dir == "results/other"
    assert config.seeds == [7]


def test_an_empty_section_keeps_the_defaults() -> None:
    assert merge({"lora": {"a": 1}}, {"lora": None}) == {"lora": {"a": 1}}
    assert merge({"lora": {"a": 1}}, {"lora": {"a": None}}) == {"lora": {"a": None}}


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_shipped_experiments_load_and_describe_themselves(name: str) -> None:
    assert load_experiments(name) == load_experiments(shipped_experiments()[name])
    assert describe(shipped_experiments()[name])


def test_the_paper_experiments_are_as_published() -> None:
    expected = {
        "bert-base-sst2": (8, 16, 1.0, "float32"),
        "tinyllama-rotten-tomatoes": (8, 32, 0.25, "bfloat16"),
        "bert-tiny-sst2": (4, 8, 0.5, "float32"),
    }
    for name, wanted in expected.items():
        config = load_experiment(name)
        ratio = config.fish_tuning.prune_to_ratio_of_baseline
        assert (config.lora.baseline_rank, config.lora.fish_rank, ratio, config.model.dtype) == wanted


def test_yaml_reads_numbers_and_words_as_people_write_them() -> None:
    values = parse("[1e-4, 1.5, 3, -2E+3, .5, no, on, true, 1e, '1e-4', 1.]", "here")
    assert values == [1e-4, 1.5, 3, -2000.0, 0.5, "no", "on", True, "1e", "1e-4", 1.0]
    assert isinstance(values[2], int)


def test_environment_variables_are_expanded(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISH_HERE", "/data")
    monkeypatch.setenv("FISH_EMPTY", "")
    monkeypatch.delenv("FISH_MISSING", raising=False)
    config = load_experiment(
        experiment, ["model.name=${FISH_HERE}/m", "dataset.load_args=['${FISH_EMPTY:-there}/d', x]"]
    )
    assert config.model.name == "/data/m"
    assert config.dataset.load_args == ["there/d", "x"]
    text = message(experiment, "model.name=${FISH_MISSING}")
    assert "model.name" in text
    assert "FISH_MISSING" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("baseline_rank=3", "Did you mean 'lora.baseline_rank'?"),
        ("learning_rate=1", "Did you mean 'training.args_override.learning_rate'?"),
        ("lora.baseline_rnk=3", "Did you mean 'lora.baseline_rank'?"),
        ("lora.baseline_rank=0", "lora.baseline_rank=0: must be a whole number from 1 to 65536."),
        ("lora.fish_rank=1000000000", "lora.fish_rank=1000000000: must be a whole number from 1 to 65536."),
        ("peft.args={r: 1000000000}", "r=1000000000 must be a whole number from 1 to 65536"),
        ("lora.baseline_rank=true", "lora.baseline_rank=true: must be a whole number from 1 to 65536."),
        ("lora.fish_rank='16'", "lora.fish_rank='16': must be a whole number"),
        ("lora.dropout=1", "lora.dropout=1: must be a number from 0 to below 1."),
        ("lora.names_to_exclude=['(']", "'(' is no regular expression"),
        ("lora.target_modules=3", "lora.target_modules=3: must be a list of module names"),
        ("lora.target_modules=[]", "must name at least one module"),
        ("lora.init_lora_weights=pisa", "Did you mean 'pissa'?"),
        ("lora.init_lora_weights=pissa_niter_0", "must be one of true, false, gaussian"),
        ("fish_tuning.prune_to_ratio_of_baseline=0", "must be a number above 0, up to 1"),
        ("fish_tuning.prune_to_ratio_of_baseline=1.5", "must be a number above 0, up to 1"),
        ("fish_tuning.methods_to_run=[lora-fsh]", "Did you mean 'lora-fish'?"),
        ("fish_tuning.methods_to_run=[lora, lora]", "holds 'lora' twice"),
        ("fish_tuning.methods_to_run=[dora]", "'dora' is no arm; allowed are lora, lora-fish"),
        ("fish_tuning.quotas={a: 0.5, b: 0.4}", "must be shares from 0 that add up to 1; they add up to 0.9"),
        ("peft.metod=dora", "peft.metod is not known. Did you mean 'peft.method'?"),
        ("peft.method=DoRA", "peft.method='DoRA': must be a method's name in small letters"),
        ("peft=[{method: lora}, {method: lora}]", "holds 'lora' twice"),
        ("peft=[{method: lora, args: 3}]", "peft.args=3: must be names and values of the method's PEFT configuration"),
        ("protocol=fixed", "protocol='fixed': must be ratio_of_baseline, fixed_layers, fixed_budget or fixed_count."),
        ("fish_tuning.keep_ratio=[0.5, 0]", "must be numbers above 0, up to 1"),
        ("fish_tuning.top_layers=[6]", "fish_tuning.top_layers: 6 is more than the pool's layers"),
        ("peft=5", "peft=5: must be a section with the keys method, name, args"),
        ("peft=[]", "peft=[]: must be a section with the key method, or a list of them"),
        ("peft.training_args.evaluation_strategy=no", "write 'eval_strategy'"),
        ("fish_tuning.num_samples=0", "fish_tuning.num_samples=0: must be a whole number from 1"),
        ("fish_tuning.warmup_steps=-1", "fish_tuning.warmup_steps=-1: must be a whole number from 0"),
        ("dataset.load_args=[]", "dataset: needs either load_args or data_files."),
        ("dataset.data_files={train: a.csv}", "dataset: needs either load_args or data_files."),
        ("training.learning_rates=[0.1, 0]", "must be numbers above 0"),
        ("training.early_stopping_patience=0", "early_stopping_patience=0: must be a whole number from 1"),
        ("dataset.text_column=[a, b, c]", "or a list of two"),
        ("dataset.max_train_samples=0", "dataset.max_train_samples=0: must be a whole number from 1"),
        ("model=roberta-base", "model='roberta-base': must be a section with the keys name"),
        ("model.dtype=fp16", "model.dtype='fp16': must be float32, bfloat16 or float16."),
        ("model.torch_dtype=bfloat16", "write 'model.dtype'"),
        ("model.name=", "model.name=null: must be a model's name"),
        ("name=a/b", "name='a/b': must be a name that begins with no dot and holds no slash"),
        ("seeds=[]", "seeds=[]: must be a list of one or more different whole numbers"),
        ("seeds=[1, 1]", "holds 1 twice"),
        ("seeds=[-1]", "must be whole numbers from 0"),
        ("training=5", "training=5: must be a section with the keys max_seq_length"),
        ("training.args_override.evaluation_strategy=epoch", "write 'eval_strategy'"),
        ("training.args_override.warmup_ratio=0.1", "write 'warmup_steps', where a value below 1"),
        ("training.args_override.no_cuda=true", "write 'use_cpu'"),
        ("training.args_override.per_gpu_train_batch_size=4", "write 'per_device_train_batch_size'"),
        ("training.args_override.tokenizer=x", "processing_class"),
        ("training.args_override.learning_rat=1", "Did you mean 'learning_rate'?"),
        ("training.args_override.learning_rate=fast", "learning_rate='fast': must be a number."),
        ("training.args_override.max_steps=1.5", "max_steps=1.5: must be a whole number."),
        ("training.args_override.bf16=1", "bf16=1: must be true or false."),
        ("training.args_override.seed=3", "'seeds' lists the seeds"),
        ("training.args_override.output_dir=x", "training.output_dir sets the folder"),
        ("seeds", "is no override: write key=value"),
        ("a..b=1", "is no override: write key=value"),
        ("seeds=[1", "The override 'seeds=[1', line 1, column"),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(experiment: Path, override: str, expected: str) -> None:
    assert expected in message(experiment, override)


def test_all_mistakes_are_told_at_once(experiment: Path) -> None:
    text = message(experiment, "lora.fish_rank=0", "seeds=[]", "training.args_override.seed=1")
    assert len(text.splitlines()) == 4  # the file and three mistakes
    assert str(experiment) in text


def test_orthogonal_needs_even_ranks(experiment: Path) -> None:
    assert "fish_rank is 3" in message(experiment, "lora.init_lora_weights=orthogonal", "lora.fish_rank=3")
    for name in ("gaussian", "olora", "pissa_niter_16", "orthogonal", "false"):
        load_experiment(experiment, [f"lora.init_lora_weights={name}"])


def test_the_required_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    text = message(path)
    assert "model is missing" in text
    assert "dataset is missing" in text


def test_a_missing_file_lists_the_shipped_ones() -> None:
    text = message("digit")
    assert "Did you mean 'digits'?" in text
    assert "bert-base-sst2" in text
    assert load_experiment("digits.yaml").name == "digits"
    assert "is a folder" in message(str(config_directory()))


def test_yaml_mistakes_name_file_line_and_column(experiment: Path) -> None:
    experiment.write_text("model:\n  name: a\n  name: b\n")
    assert f"{experiment}, line 3, column 3: the key 'name' stands twice." in message(experiment)
    experiment.write_text("model: [1, 2\n")
    assert f"{experiment}, line 2, column 1:" in message(experiment)
    experiment.write_text("- model\n")
    assert "must hold keys and values" in message(experiment)
    experiment.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(experiment)


def test_overrides_nest() -> None:
    assert parse_override("a.b=[1, x]") == {"a": {"b": [1, "x"]}}
    assert parse_override("a=b=c") == {"a": "b=c"}


def test_training_argument_names_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    assert set(training_argument_types()) == {field.name for field in dataclasses.fields(TrainingArguments)}


def test_a_configuration_does_not_change() -> None:
    config = load_experiment("digits")
    with pytest.raises(ValueError, match="frozen"):
        config.lora.fish_rank = 3  # type: ignore[misc]


def test_target_modules_as_text_is_a_regular_expression(experiment: Path) -> None:
    assert load_experiment(experiment, ["lora.target_modules=.*query"]).lora.target_modules == ".*query"
    with pytest.raises(ConfigurationError, match=r"target_modules.*'\[' is no regular expression"):
        load_experiment(experiment, ["lora.target_modules='['"])


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 20),
        (["lora.init_lora_weights=gaussian"], 20),
        (["lora.init_lora_weights=pissa"], 0),
        (["lora.init_lora_weights=pissa", "fish_tuning.warmup_steps=3"], 3),
        (["fish_tuning.warmup_steps=0"], 0),
    ],
)
def test_warm_up_is_what_the_start_needs_unless_it_is_set(overrides: list[str], steps: int) -> None:
    config = load_experiment("my_experiment", overrides)
    assert config.warmup_steps(config.peft[0]) == steps
    assert (f"after {steps} warm-up" in config.start(config.peft[0])) == bool(steps)


def test_several_data_sets_are_several_experiments(experiment: Path) -> None:
    two = "dataset=[{load_args: [glue, cola]}, {data_files: {train: my/reviews/train.csv, validation: dev.csv}}]"
    cola, reviews = load_experiments(experiment, [two, "dataset.max_train_samples=7", "name=mine"])
    assert (cola.name, cola.training.output_dir) == ("mine-cola", "results/mine/cola")
    assert (reviews.name, reviews.dataset.source) == ("mine-reviews", "my/reviews/train.csv, dev.csv")
    assert cola.dataset.max_train_samples == reviews.dataset.max_train_samples == 7
    with pytest.raises(ConfigurationError, match="lists 2 data sets; one was expected"):
        load_experiment(experiment, [two])
    with pytest.raises(ConfigurationError, match="dataset lists 'cola' twice"):
        load_experiments(experiment, ["dataset=[{load_args: [glue, cola]}, {load_args: [mine/cola]}]"])


@pytest.mark.parametrize(
    ("file", "task"),
    [
        ("mydata.csv", "mydata"),
        ("data/reviews.jsonl", "reviews"),
        ("reviews/train.csv", "reviews"),
        ("reviews/Training.parquet", "reviews"),
        ("data/reviews-train.csv", "reviews"),
        ("reviews_train.csv", "reviews"),
        ("reviews.train.csv", "reviews"),
        ("trainees.csv", "trainees"),
        ("train.csv", "data"),
        ("../train.csv", "data"),
        (".csv", "csv"),
    ],
)
def test_the_task_of_files_is_called_after_the_first(file: str, task: str) -> None:
    assert DatasetConfig(data_files={"train": file, "validation": "other.csv"}).task_name == task


def test_methods_bring_their_arms(experiment: Path) -> None:
    config = load_experiment(experiment, ["peft.method=dora"])
    assert config.fish_tuning.methods_to_run == ["dora", "dora-fish", "dora-fish-rand", "dora-fish-rev", "head"]
    two = "peft=[{method: ia3, training_args: {learning_rate: 0.01}}, {method: unipelt, args: {r: 4}}]"
    config = load_experiment(experiment, [two])
    assert config.fish_tuning.methods_to_run[3:5] == ["ia3-fish-rev", "unipelt"]
    assert config.method_of("unipelt-fish-quota").args == {"r": 4}
    assert [config.warmup_steps(section) for section in config.peft] == [0, 20]
    assert config.start(config.peft[0]) == "scored at its start"
    chosen = load_experiment(experiment, [two, "fish_tuning.methods_to_run=[ia3, unipelt-fish-norm]"])
    assert chosen.fish_tuning.methods_to_run == ["ia3", "unipelt-fish-norm"]
