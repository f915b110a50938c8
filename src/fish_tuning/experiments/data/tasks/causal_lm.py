"""Instructions and answers, conversations, or plain texts for a causal language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from datasets import Dataset, Features, List
from transformers import Trainer

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.metrics import GENERATED_METRICS, LIKELIHOOD_METRICS
from fish_tuning.experiments.data.splits import Splits, find
from fish_tuning.experiments.data.tasks.base import Task, asks_for_completions, check_filled, first_present, is_text
from fish_tuning.experiments.data.tasks.chats import PROMPT, REFERENCE, ChatTemplateError, Rows
from fish_tuning.experiments.data.tasks.classification import check_texts
from fish_tuning.experiments.data.tasks.labels import LABEL_COLUMNS
from fish_tuning.scores.losses import IGNORED

# Decoders although their configurations say is_decoder=False.
DECODERS = ("gpt_neox", "gpt_neox_japanese", "reformer")
CONVERSATION_COLUMN = "messages"
# Usual names of a prompt's columns, of which those after the first may be missing or empty, and of its completion.
PROMPTS_AND_COMPLETIONS = (
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("question",), "answer"),
    (("instruction", "input", "context"), "output"),
    (("instruction", "input", "context"), "response"),
)


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Trained by trl's SFTTrainer on the completions alone; plain texts are trained on as a whole.

    `columns` are the prompt's; none for a conversation (`completion` is then its column, whose last message is the
    completion) and for plain texts.
    """

    kind: ClassVar[str] = "causal_lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    brings_head: ClassVar[bool] = False
    average_tokens_across_devices: ClassVar[bool] = True

    completion: str
    chat_template: bool | None
    max_new_tokens: int

    @classmethod
    def fits(cls, config: DatasetConfig, features: Features) -> bool:
        """Prompt or completion are asked for, or have their usual names beside no label; conversations likewise."""
        if asks_for_completions(config):
            return True
        labelled = config.label_column or first_present(LABEL_COLUMNS, features)
        conversation = _is_conversation(features.get(CONVERSATION_COLUMN))
        return not labelled and (conversation or next(_usual_pairs(features), None) is not None)

    @classmethod
    def read(cls, config: DatasetConfig, splits: Splits) -> Task:
        train, validation = splits.all[splits.train], splits.all[splits.validation]
        if config.label_column:
            raise ConfigurationError(
                f"dataset.label_column={config.label_column!r}: a causal language model learns texts, not labels. Set "
                "dataset.completion_column, or dataset.task to text_classification."
            )
        prompt, completion = _columns(config, train.features)
        first = dict.fromkeys(prompt[:1], "dataset.prompt_column") | {completion: "dataset.completion_column"}
        for name, split in ((splits.train, train), (splits.validation, validation)):
            check_filled(name, split, first)
        needed = [*prompt, completion]
        if not prompt and is_text(train.features[completion]):
            train, validation = (_without_blanks(split, completion) for split in (train, validation))
        return cls._made(
            config,
            splits,
            train.select_columns(needed),
            validation.select_columns([column for column in needed if column in validation.column_names]),
            columns=prompt,
            completion=completion,
            chat_template=config.chat_template,
            max_new_tokens=config.max_new_tokens,
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        return LIKELIHOOD_METRICS if self._is_plain else (*LIKELIHOOD_METRICS, *GENERATED_METRICS)

    @property
    def encodes(self) -> bool:
        return True

    @property
    def num_labels(self) -> int | None:
        return None

    @property
    def used_columns(self) -> tuple[str, ...]:
        return (*self.columns, self.completion)

    @property
    def tokens_written(self) -> int:
        return self.max_new_tokens if self.metric in GENERATED_METRICS else 0

    def longest_prompt(self, encoded: Dataset) -> int:
        return max(map(len, encoded[PROMPT])) if self.tokens_written else 0

    def check(self, processing_class: Any, model_config: Any, max_length: int) -> list[str]:
        if find_spec("trl") is None:
            raise ConfigurationError(
                "dataset.task=causal_lm trains with trl, which is not installed: pip install 'fish-tuning[trl]'."
            )
        if getattr(model_config, "is_decoder", True) is False and model_config.model_type not in DECODERS:
            raise ConfigurationError(
                f"model.name: a {model_config.model_type!r} is an encoder that sees the tokens it is "
                "to write. Use a model that is made for writing, or set model.config_overrides.is_decoder=true."
            )
        train, validation = (self.encode(part, processing_class, max_length) for part in (self.train, self.validation))
        self.usable(self.validation_split, validation)
        left_out = len(train) - len(self.usable(self.train_split, train))
        if not left_out:
            return []
        return [
            f"{left_out} of {len(train)} training rows are left out: their prompt alone is as long as "
            f"training.max_seq_length={max_length}."
        ]

    def encode(self, split: Dataset, processing_class: Any, max_length: int) -> Dataset:
        rows = Rows(self.columns, self.completion, self._uses_template(processing_class))
        for_answers = self.tokens_written > 0

        def tokens(row: Mapping[str, Any]) -> dict[str, Any]:
            try:
                prompt, completion = rows.tokens(row, processing_class)
            except ChatTemplateError as error:
                raise ConfigurationError(
                    f"dataset.{'chat_template' if rows.prompt else 'messages'}: {error}"
                ) from error
            ids, labels = [*prompt, *completion], [IGNORED] * len(prompt) + completion
            kept = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
            return kept | ({PROMPT: prompt, REFERENCE: rows.reference(row)} if for_answers else {})

        return split.map(tokens, remove_columns=split.column_names)

    def usable(self, split: str, encoded: Dataset) -> Dataset:
        """Without the rows whose prompt alone fills the length; a validation set is not made easier that way."""
        used = encoded.filter(lambda labels: any(label != IGNORED for label in labels), input_columns="labels")
        lost = len(encoded) - len(used)
        if lost and (split == self.validation_split or not len(used)):
            raise ConfigurationError(
                f"training.max_seq_length leaves {lost} of the {len(encoded)} rows of the split {split!r} no token of "
                "their completion. Raise it to more than the longest prompt, or take these rows out."
            )
        return used

    def collator(self, processing_class: Any) -> Any:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=processing_class.pad_token_id)

    def make_trainer(self, *, processing_class: Any, **arguments: Any) -> Trainer:
        from fish_tuning.experiments.data.tasks.completion_trainer import CompletionTrainer, sft_config

        args = sft_config(arguments.pop("args"))
        return CompletionTrainer(
            processing_class=processing_class,
            data_collator=self.collator(processing_class),
            args=args,
            max_new_tokens=self.tokens_written,
            **arguments,
        )

    @property
    def _is_plain(self) -> bool:
        return not self.columns and is_text(self.train.features[self.completion])

    def _uses_template(self, tokenizer: Any) -> bool:
        if self._is_plain:
            return False
        has_one = bool(getattr(tokenizer, "chat_template", None))
        if has_one and self.chat_template is None:
            return True
        asked = self.chat_template if self.columns else True  # messages are nothing without a template
        if asked and not has_one:
            what = "dataset.chat_template=true" if self.columns else f"The column {self.completion!r} of messages"
            raise ConfigurationError(
                f"{what} needs a tokenizer with a chat template, which the model's has not. Use a chat model, or "
                "dataset.prompt_column and dataset.completion_column with dataset.chat_template=false."
            )
        return bool(asked)


def _columns(config: DatasetConfig, features: Features) -> tuple[tuple[str, ...], str]:
    """The prompt's columns and that of the completion."""
    asked = config.prompt_column
    prompt = () if asked is None else (asked,) if isinstance(asked, str) else tuple(asked)
    if config.text_column is not None:
        return (), _plain_column(config, features)
    if not prompt and config.completion_column is None:
        if _is_conversation(features.get(CONVERSATION_COLUMN)):
            return (), CONVERSATION_COLUMN
        if pair := next(_usual_pairs(features), None):
            return pair
        if "text" in features and is_text(features["text"]):
            return (), "text"
    completion = find("dataset.completion_column", config.completion_column, _completions(), list(features), "column")
    if not prompt and _is_conversation(features[completion]):
        return (), completion
    prompt = prompt or _prompt_of(completion, features)
    check_texts("dataset.prompt_column", prompt, features)
    check_texts("dataset.completion_column", (completion,), features)
    return prompt, completion


def _plain_column(config: DatasetConfig, features: Features) -> str:
    column = config.text_column
    if not isinstance(column, str) or config.prompt_column or config.completion_column:
        raise ConfigurationError(
            "dataset.text_column: a causal language model learns the texts of one column, or completions: set "
            "dataset.prompt_column and dataset.completion_column instead."
        )
    check_texts("dataset.text_column", (column,), features)
    return column


def _usual_pairs(features: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for prompt, completion in PROMPTS_AND_COMPLETIONS:
        present = tuple(column for column in prompt if is_text(features.get(column)))
        if prompt[0] in present and is_text(features.get(completion)):
            yield present, completion


def _prompt_of(completion: str, features: Features) -> tuple[str, ...]:
    names = list(dict.fromkeys(prompt[0] for prompt, _ in PROMPTS_AND_COMPLETIONS))
    others = [name for name in features if name != completion]
    return (find("dataset.prompt_column", None, names, others, "column"),)


def _completions() -> Sequence[str]:
    return list(dict.fromkeys(completion for _, completion in PROMPTS_AND_COMPLETIONS))


def _is_conversation(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, List) else None
    return isinstance(inner, Mapping) and {"role", "content"} <= set(inner)


def _without_blanks(split: Dataset, column: str) -> Dataset:
    return split.filter(lambda texts: [bool(text.strip()) for text in texts], input_columns=column, batched=True)
