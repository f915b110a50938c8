"""A first experiment file for a model and data at hand, with what was found in them beside every choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import HEAD_ALONE
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import experiments_of, merge, parse_override
from fish_tuning.experiments.config.meanings import MEANINGS
from fish_tuning.experiments.config.methods import INITIALISATIONS
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.config.task_kinds import BUILT_IN
from fish_tuning.experiments.config.yaml_files import parse
from fish_tuning.experiments.data.splits import FILE_FORMATS, TRAIN_SPLITS, VALIDATION_SPLITS, load_all
from fish_tuning.experiments.data.tasks import (
    CausalLM,
    ImageClassification,
    Task,
    TextClassification,
    TokenClassification,
    load_task,
)
from fish_tuning.experiments.data.tasks.base import first_present, is_text
from fish_tuning.experiments.data.tasks.labels import LABEL_COLUMNS
from fish_tuning.experiments.data.tasks.token_classification import TAG_COLUMNS
from fish_tuning.experiments.models.building import load_config, load_processing_class, model_to_look_at, read_config
from fish_tuning.experiments.models.poolers import POOLER, untrained_poolers
from fish_tuning.experiments.models.targets import head_names, linear_names, target_modules
from fish_tuning.experiments.run.draft_text import draft_text, listed
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.plan_samples import HELD_OUT

SOURCE = "fish-tuning init"
TOKENS_IN_STEPS_OF = 16
SAMPLE = 1000  # rows whose tokens are counted
LONGEST = 8192  # tokens that are looked at
FEW_EXAMPLES = 2000  # of which ten epochs cost little
LABEL_TYPES = ("string", "large_string", "bool", "int64")
MOST_CLASSES = 50  # of a column that is offered as labels
SMALL_SHARE = 0.1  # of the dense arm's adapter: with less left at half the size, arms are given the whole size


@dataclass(frozen=True)
class Draft:
    """An experiment file that was planned as it stands: its text, what it is called, and the plan's notes."""

    name: str
    text: str
    notes: tuple[str, ...]


def draft_experiment(model: str, data: Sequence[str], overrides: Sequence[str] = (), head: Sequence[str] = ()) -> Draft:
    """Look at a model and a data set, and write down what an experiment with them would be.

    Args:
        model: a hub name or a folder.
        data: a hub name and maybe a configuration, a folder, or one file, beside which its validation set may lie.
        overrides: `key=value`, which go before what is found.
        head: comments to begin with.

    Raises:
        ConfigurationError: nothing that runs can be made of the two; names the key that would help.
    """
    asked: dict[str, Any] = {}
    for override in overrides:
        asked = merge(asked, parse_override(override))
    found = _Found(asked)
    _data_source(found, data)
    found.set("model.name", model, "")
    dataset, splits = _splits(found)
    try:
        task = load_task(dataset)
    except ConfigurationError as error:
        example = _example_of_a_label(splits) if "dataset.label_column" in str(error) else ""
        raise ConfigurationError(
            f"{error} Give init what it cannot find as KEY=VALUE after the data{example}."
        ) from error
    _describe_task(found, dataset, splits, task)
    config = found.config()
    _describe_model(found, config, task)
    _describe_training(found, config, task)
    _describe_budget(found, task)
    _describe_rest(found, task)
    text = draft_text([*head, *_head(model, data)], found.choices(), found.remarks)
    (written,) = experiments_of(parse(text, SOURCE), SOURCE)
    return Draft(dataset.task_name, text, plan_experiment(written).notes)


class _Found:
    """Choices by dotted keys, each with a remark; those that were asked for stay as they are."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.asked = asked
        self.made: dict[str, Any] = {}
        self.remarks: dict[str, str] = {}

    def set(self, key: str, value: Any, remark: str) -> None:
        self.made = merge(self.made, _nested(key, value))
        self.remarks[key] = remark

    def choices(self) -> dict[str, Any]:
        """Everything that the file says."""
        order = ("model", "dataset", "protocol", "peft", "lora", "fish_tuning", "training", "seeds")
        merged = merge(self.made, self.asked)
        return {key: merged[key] for key in (*order, *merged) if key in merged}

    def is_asked(self, key: str) -> bool:
        at: Any = self.asked
        for part in key.split("."):
            if not isinstance(at, Mapping) or part not in at:
                return False
            at = at[part]
        return True

    def config(self) -> ExperimentConfig:
        experiments = experiments_of({"name": "draft", **self.choices()}, SOURCE)
        if len(experiments) > 1:
            raise ConfigurationError(f"{SOURCE} looks at one data set, and {len(experiments)} were given.")
        return experiments[0]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _head(model: str, data: Sequence[str]) -> list[str]:
    return [
        f"{model} on {' '.join(data)}: a first experiment, written by fish-tuning init.",
        "Check it with `fish-tuning run FILE --dry-run`, train with `fish-tuning run FILE`. All keys are described",
        "in docs/configuration.md of the project and in fish-tuning schema, with their defaults.",
    ]


def _data_source(found: _Found, data: Sequence[str]) -> None:
    if not data:
        raise ConfigurationError(f"{SOURCE} needs data after the model: a hub name, a folder or a file.")
    suffix = Path(data[0]).suffix.lower()
    if len(data) > 1 or suffix not in FILE_FORMATS:
        found.set(
            "dataset.load_args", list(data), "As for datasets.load_dataset: a hub name and configuration, or a folder."
        )
        return
    train = Path(data[0])
    beside = [train.with_name(train.name.replace("train", name)) for name in VALIDATION_SPLITS]
    other = next((path for path in beside if path != train and path.expanduser().is_file()), None)
    files = {"train": str(train)} | ({"validation": str(other)} if other else {})
    remark = f"Files of one format ({', '.join(FILE_FORMATS)}) by split" + (
        "; the second lies beside the first." if other else "; add validation: FILE where there is one."
    )
    found.set("dataset.data_files", files, remark)


def _splits(found: _Found) -> tuple[DatasetConfig, DatasetDict]:
    """The data with a validation split: one of its own, or a part of the training split."""
    dataset = found.config().dataset
    splits = load_all(dataset)
    sizes = ", ".join(f"{name} ({len(rows):,} rows)" for name, rows in splits.items())
    train = dataset.train_split or first_present(TRAIN_SPLITS, splits)
    own = first_present([name for name in VALIDATION_SPLITS if name != train], splits)
    if train in splits:
        found.set("dataset.train_split", train, f"Found: {sizes}.")
        if own is None:
            share = 0.1 if len(splits[train]) >= FEW_EXAMPLES else 0.2
            remark = (
                "No split to measure on was found: a share of the training split is held out, alike for every seed."
            )
            found.set("dataset.validation_split", share, remark)
        else:
            remark = "What arms are measured on: another split, or a share such as 0.1 of the training split."
            found.set("dataset.validation_split", own, remark)
    return found.config().dataset, splits


def _example_of_a_label(splits: DatasetDict) -> str:
    """The column that could be the labels, of the fewest values, as it would be written."""
    rows = _sample(next(iter(splits.values())))
    names = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) in LABEL_TYPES]
    numbers = {name: len(set(rows[name])) for name in names}
    fitting = [name for name in names if 2 <= numbers[name] <= min(MOST_CLASSES, len(rows) // 2)]
    if not fitting:
        return ""
    name = min(fitting, key=numbers.__getitem__)
    return f", such as dataset.label_column={name}, which has {numbers[name]} different values"


def _describe_task(found: _Found, dataset: DatasetConfig, splits: DatasetDict, task: Task) -> None:
    features = splits[dataset.train_split or task.train_split].features
    kinds = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    others = listed([kind for kind in BUILT_IN if kind != task.kind])
    found.set("dataset.task", task.kind, f"By the columns, which are {kinds}. Also allowed: {others}.")
    fitting = [name for name in task.metrics if name != task.metric]
    remark = f"What arms are compared by; larger is better. Also fitting: {listed(fitting)}."
    if isinstance(task, CausalLM):
        _describe_completions(found, task, features)
        remark += " With exact_match and exact_match_number the model writes its answers, which takes its time."
    elif isinstance(task, TextClassification | ImageClassification | TokenClassification):
        _describe_labels(found, dataset, task, features)
    found.set("dataset.metric", task.metric, remark)


def _kind(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    if inner is not None and not isinstance(inner, Mapping):
        return f"list of {_kind(inner)}"
    return str(getattr(feature, "dtype", None) or type(feature).__name__).removeprefix("large_")


def _describe_labels(found: _Found, dataset: DatasetConfig, task: Task, features: Any) -> None:
    inputs = list(task.columns)
    usual = TAG_COLUMNS if isinstance(task, TokenClassification) else LABEL_COLUMNS
    column = dataset.label_column or first_present(usual, features)
    if isinstance(task, ImageClassification):
        key, what = "dataset.image_column", "The images."
    else:
        texts = [name for name, feature in features.items() if is_text(feature) and name != column]
        key, what = "dataset.text_column", f"One text, or a list of two for pairs. Columns of texts: {listed(texts)}."
        if isinstance(task, TokenClassification):
            what = "The words; a word's first token stands for it."
    if inputs:
        found.set(key, inputs[0] if len(inputs) == 1 else inputs, what)
    found.set("dataset.label_column", column, _labels_text(task))


def _labels_text(task: Task) -> str:
    if not task.labels:
        return "Numbers, so this is regression; classes are whole numbers or texts."
    if isinstance(task, TokenClassification):
        return f"{len(task.labels)} classes of words: {listed(task.labels)}."
    counts = Counter(task.train["labels"])
    shares = [f"{name} {counts[number] / len(task.train):.1%}" for number, name in enumerate(task.labels)]
    return f"{len(task.labels)} classes with their shares of the training examples: {listed(shares)}."


def _describe_completions(found: _Found, task: CausalLM, features: Any) -> None:
    plain = not task.columns and is_text(features[task.completion])
    if plain:
        found.set("dataset.text_column", task.completion, "Plain texts, which are learned as a whole.")
        return
    if task.columns:
        prompt = task.columns[0] if len(task.columns) == 1 else list(task.columns)
        found.set("dataset.prompt_column", prompt, "What is given; the columns of a list are put together.")
    what = "What is learned." if task.columns else "Conversations, of which the last message is learned."
    found.set("dataset.completion_column", task.completion, what)


def _describe_model(found: _Found, config: ExperimentConfig, task: Task) -> None:
    model_config = load_config(config.model, task, None, read_config(config.model))
    base = model_to_look_at(config, model_config, task)
    size = sum(parameter.numel() for parameter in base.parameters())
    found.set(
        "model.name", config.model.name, f"Found: {model_config.model_type}, {size:,} parameters with the task's head."
    )
    dtype = "Of the weights: float32, bfloat16 or float16. Adapters train in float32 all the same."
    found.set("model.dtype", config.model.dtype, dtype)
    heads, poolers = head_names(base), untrained_poolers(config.model, base)
    methods = "Or dora, serial_adapter, prefix_tuning, ia3, unipelt, another one of PEFT's, or a list of sections."
    found.set("peft.method", "lora", methods)
    if poolers and heads:
        why = "; ".join(f"{name} was never trained: {reason}" for name, reason in poolers.items())
        found.set("peft.args", {"modules_to_save": [*heads, *poolers]}, f"Trained as a whole with the new head. {why}.")
    if found.is_asked("peft") and not isinstance(found.asked["peft"], Mapping):
        found.made.pop("peft")
    layers = listed(linear_names(base))
    targets = target_modules(config.lora.target_modules, base)
    found.set(
        "lora.target_modules", targets, f"Linear layers of this model: {layers}. A regular expression will do too."
    )
    head = f"The new head, {listed(heads)}, trains" if heads else "What new head a task brings (here none) would train"
    found.set("lora.names_to_exclude", ["modules_to_save"], f"{head} as a whole in every arm, outside the pool.")


def _describe_training(found: _Found, config: ExperimentConfig, task: Task) -> None:
    written = isinstance(task, CausalLM)
    if task.processor == "tokenizer" and task.encodes:
        _describe_lengths(found, config, task)
    few = len(task.train) <= FEW_EXAMPLES
    key = "training.args_override"
    found.set(f"{key}.num_train_epochs", 10 if few and not written else 3, f"Of {len(task.train):,} examples.")
    found.set(f"{key}.per_device_train_batch_size", 8 if written else 32, "Lower it where memory is short.")
    rate = "An arm's best rate is not another's: training.learning_rates lists several for each arm to choose from."
    found.set(f"{key}.learning_rate", 2e-4 if written else 1e-3, rate)
    found.remarks[key] = "transformers' TrainingArguments, by their own names."


def _describe_lengths(found: _Found, config: ExperimentConfig, task: Task) -> None:
    """How many tokens an example is cut to: nearly all texts stay whole, of completions all."""
    processing_class = load_processing_class(config.model, task)
    positions = getattr(load_config(config.model, task, None), "max_position_embeddings", None)
    most = min(LONGEST, positions) if isinstance(positions, int) and positions > 0 else LONGEST
    whole = isinstance(task, CausalLM)  # a validation row without its completion would be refused
    parts = (task.train, task.validation) if whole else (_sample(task.train), _sample(task.validation))
    encoded = [task.encode(part, processing_class, most) for part in parts]
    lengths = sorted(len(ids) for part in encoded for ids in part["input_ids"])
    share = 1.0 if whole else 0.99
    needed = lengths[math.ceil(share * len(lengths)) - 1]
    chosen = min(most, TOKENS_IN_STEPS_OF * math.ceil((needed + whole) / TOKENS_IN_STEPS_OF))
    remark = f"Tokens; longer texts are cut. Here {share:.0%} have at most {needed}, the longest {lengths[-1]}."
    found.set("training.max_seq_length", chosen, remark)
    if task.tokens_written:
        prompt = task.longest_prompt(encoded[1])
        room = max(1, most - prompt)
        remark = f"The longest answer that is written when it is measured; the longest prompt has {prompt} tokens."
        found.set("dataset.max_new_tokens", min(task.tokens_written, room), remark)


def _sample(part: Dataset) -> Dataset:
    return part.shuffle(seed=0).select(range(SAMPLE)) if len(part) > SAMPLE else part


def _describe_budget(found: _Found, task: Task) -> None:
    """Half of the dense arm's size, unless the head alone is about as large; then all of it."""
    found.set("lora.baseline_rank", 8, "Of the dense arm; alpha is twice the rank.")
    found.set("lora.fish_rank", 16, "Of the pool that the masked arms choose from.")
    starts = listed([name for name in INITIALISATIONS if name != "gaussian"])
    found.set("lora.init_lora_weights", True, f"PEFT's default, B = 0. Also: {starts}.")
    samples = min(128, len(task.train) - math.ceil(HELD_OUT * len(task.train)))  # so that learning_rates may be added
    found.set("fish_tuning.num_samples", max(1, samples), "Training examples that the scores are measured on.")
    others = "fixed_layers (keep_ratio), fixed_budget (top_layers) and fixed_count (kept_parameters)"
    remark = f"How budgets are set. Also allowed, with their keys of fish_tuning: {others}."
    found.set("protocol", "ratio_of_baseline", remark)
    ratio, why = (0.5, "") if not task.brings_head else _ratio(found)
    remark = f"Trainable parameters of a masked arm over those of its dense arm, head included{why}."
    found.set("fish_tuning.prune_to_ratio_of_baseline", ratio, remark)


def _ratio(found: _Found) -> tuple[float, str]:
    key = "fish_tuning.prune_to_ratio_of_baseline"
    found.set(key, 1.0, "")
    arms = plan_experiment(found.config()).arms
    dense = next((arm for arm in arms if arm.selection is None and arm.pool), None)
    if dense is None or round(0.5 * dense.trainable_parameters) - dense.dense >= SMALL_SHARE * dense.kept:
        return 0.5, ""
    head = f"the head alone has {dense.dense:,} of {dense.trainable_parameters:,}"
    return 1.0, f"; {head}, which leaves next to nothing at half"


def _describe_rest(found: _Found, task: Task) -> None:
    arms = "Dense, chosen by Fisher information, at random, in reverse"
    poolers = [name for name in found.config().peft[0].args.get("modules_to_save") or () if POOLER in name]
    frozen = f", with {' and '.join(poolers)} as it was made" if poolers else ""
    head = f", the head alone{frozen}" if task.brings_head else ""
    remark = f"{arms}{head}. By another score: its name, as in lora-gain."
    if not found.is_asked("protocol"):
        named = [arm for arm in found.config().fish_tuning.methods_to_run if arm != HEAD_ALONE or task.brings_head]
        found.set("fish_tuning.methods_to_run", named, remark)
    found.set("seeds", [42, 43, 44], f"{MEANINGS['seeds'].capitalize()}, and eight tell small differences.")
