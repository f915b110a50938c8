from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from folders import write_bert, write_llama, write_sums
from peft import AutoPeftModelForCausalLM
from task_helpers import task_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")

MakeExperiment = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chat_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "chat-llama", chat=True)


def write(folder: Path, **columns: list[Any]) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return folder


def words(tokenizer: Any, row: dict[str, Any]) -> tuple[str, str]:
    """What is read and what of it is learned."""
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert learned == [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learned)


@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        (("question", "answer"), ("question",), "answer"),
        (("prompt", "completion"), ("prompt",), "completion"),
        (("instruction", "input", "output"), ("instruction", "input"), "output"),
        (("instruction", "response"), ("instruction",), "response"),
    ],
)
def test_instructions_and_answers_are_found(
    tmp_path: Path, columns: tuple[str, ...], prompt: tuple[str, ...], completion: str
) -> None:
    task = task_of(write(tmp_path / "d", **{column: ["good", "bad"] for column in columns}))
    assert task.kind == "causal_lm"
    assert (task.columns, task.completion) == (prompt, completion)  # type: ignore[attr-defined]
    assert task.metric == "log_likelihood"


def test_a_label_makes_it_classification(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", question=["good", "bad"], answer=["it", "was"], label=[0, 1])
    assert task_of(folder).kind == "text_classification"
    assert task_of(folder, task="causal_lm").kind == "causal_lm"


def test_the_completion_alone_is_learned(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    task = task_of(write(tmp_path / "d", instruction=["good"], input=["film"], output=["it was fine"]))
    row = encode(task, tokenizer, 32).train[0]
    assert words(tokenizer, row) == ("good film it was fine </s>", "it was fine </s>")
    without = task_of(write(tmp_path / "e", instruction=["good"], input=[""], output=["it was fine"]))
    assert words(tokenizer, encode(without, tokenizer, 32).train[0])[0] == "good it was fine </s>"


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path, chat_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_llama)
    folder = write(tmp_path / "d", prompt=["good film"], completion=["it was fine"])
    row = encode(task_of(folder), tokenizer, 32).train[0]
    assert words(tokenizer, row) == ("<|user|> good film </s> <|assistant|> it was fine </s>", "it was fine </s>")
    plain = encode(task_of(folder, chat_template=False), tokenizer, 32).train[0]
    assert words(tokenizer, plain) == ("good film it was fine </s>", "it was fine </s>")


def test_the_last_message_of_a_conversation_is_learned(tmp_path: Path, chat_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_llama)
    talk = [("user", "good film"), ("assistant", "it was"), ("user", "bad plot"), ("assistant", "very dull")]
    task = task_of(write(tmp_path / "d", messages=[[{"role": role, "content": text} for role, text in talk]]))
    read, learned = words(tokenizer, encode(task, tokenizer, 64).train[0])
    assert read.startswith("<|user|> good film </s> <|assistant|> it was </s> <|user|> bad plot")
    assert learned == "very dull </s>"


def test_plain_texts_are_learned_as_a_whole_and_blanks_left_out(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    task = task_of(write(tmp_path / "d", text=["good film", " ", "bad"]), task="causal_lm")
    train = encode(task, tokenizer, 32).train
    assert [words(tokenizer, row) for row in train] == [("good film </s>",) * 2, ("bad </s>",) * 2]
    assert "exact_match" not in task.metrics


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["good", "bad"]}, {}, r"label_column: none of the usual names .* set dataset\.task to causal_lm"),
        ({"text": ["a"]}, {"metric": "exact_match", "task": "causal_lm"}, "metric='exact_match' does not fit d, which"),
        ({"question": ["a"], "answer": ["b"]}, {"metric": "accuracy"}, "what fits is log_likelihood, token_accuracy"),
        (
            {"question": ["a"], "answer": ["b"]},
            {"prompt_column": "quest"},
            "no column 'quest'.*Did you mean 'question'",
        ),
        ({"question": ["a"], "answer": [1]}, {"completion_column": "answer"}, "'answer' is Value.*of texts is needed"),
        ({"question": ["a", "b"], "answer": ["c", None]}, {}, r"'answer' is empty \(null\) in 1 of the 2 rows"),
        (
            {"question": ["a"], "answer": ["b"], "label": [1]},
            {"task": "causal_lm", "label_column": "label"},
            "learns texts, not labels",
        ),
        ({"other": ["a"]}, {"task": "causal_lm"}, r"dataset\.completion_column: none of the usual names"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, columns: dict[str, list[Any]], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        task_of(write(tmp_path / "d", **columns), **settings)


def test_messages_need_a_template_and_an_answer(tmp_path: Path, llama: Path, chat_llama: Path) -> None:
    question = {"role": "user", "content": "good"}
    folder = write(tmp_path / "d", messages=[[question]])
    with pytest.raises(ConfigurationError, match=r"'messages' of messages needs a tokenizer with a chat template"):
        task_of(folder).check(AutoTokenizer.from_pretrained(llama), None, 32)
    with pytest.raises(ConfigurationError, match=r"the last message .* must be the assistant's"):
        task_of(folder).check(AutoTokenizer.from_pretrained(chat_llama), None, 32)
    pairs = task_of(write(tmp_path / "e", prompt=["a"], completion=["b"]), chat_template=True)
    with pytest.raises(ConfigurationError, match=r"dataset\.chat_template=true needs"):
        pairs.check(AutoTokenizer.from_pretrained(llama), None, 32)


def test_long_prompts_are_left_out_of_training_alone(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = {"prompt": ["good " * 9, "bad"], "completion": ["it", "was"]}
    for split, part in (("train", rows), ("validation", {name: column[1:] for name, column in rows.items()})):
        (tmp_path / "d").mkdir(exist_ok=True)
        Dataset.from_dict(part).to_parquet(tmp_path / "d" / f"{split}.parquet")
    encoded = encode(task_of(tmp_path / "d"), tokenizer, 8)
    assert (len(encoded.train), len(encoded.validation)) == (1, 1)
    (note,) = task_of(tmp_path / "d").check(tokenizer, AutoConfig.from_pretrained(llama), 8)
    assert note.startswith("1 of 2 training rows are left out")
    task = task_of(write(tmp_path / "e", **rows))
    with pytest.raises(ConfigurationError, match="leaves 1 of the 2 rows of the split 'validation' no token"):
        encode(task, tokenizer, 8)


def experiment_on(experiment: MakeExperiment, model: Path, data: Path, *overrides: str) -> ExperimentConfig:
    return experiment(f"model.name={model}", f"dataset.load_args=[{data}]", *overrides)


@pytest.mark.slow
def test_answers_are_learned_written_and_measured(experiment: MakeExperiment, tmp_path: Path, llama: Path) -> None:
    config = experiment_on(
        experiment, llama, write_sums(tmp_path / "sums"),
        "dataset.metric=exact_match_number", "dataset.max_new_tokens=4", "fish_tuning.methods_to_run=[lora-fish]",
        "training.args_override.num_train_epochs=40", "training.args_override.learning_rate=0.01",
        "training.args_override.per_device_train_batch_size=8", "lora.fish_rank=8", "lora.baseline_rank=8",
        "lora.target_modules=[q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    )  # fmt: skip
    plan = plan_experiment(config)
    assert (plan.arms[0].dense, plan.facts["task_kind"]) == (0, "causal_lm")  # no head is new
    (record,) = run_experiment(config, plan)
    assert record.status == "ok", record.error
    assert record.metrics.keys() >= {"loss", "log_likelihood", "token_accuracy", "exact_match", "perplexity"}
    assert record.metrics["log_likelihood"] == -record.metrics["loss"]
    assert record.value is not None
    assert record.value > 0.2  # by chance: a ninth
    # The share that is right is that of a stock model with the saved adapter, one prompt at a time.
    folder = Path(config.training.output_dir) / "adapters" / "lora-fish-seed1"
    stock = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    right = 0
    for row in plan.task.validation:
        ids = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        written = stock.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        right += tokenizer.decode(written, skip_special_tokens=True).split()[-1:] == row["answer"].split()[-1:]
    assert record.value == pytest.approx(right / len(plan.task.validation))


def test_the_likelihood_is_that_of_all_tokens_whatever_the_batches(
    experiment: MakeExperiment, tmp_path: Path, llama: Path
) -> None:
    data = write(tmp_path / "d", prompt=["good", "bad film", "it"], completion=["was", "fine fine it was", "dull plot"])
    values = []
    for size in (1, 3):
        config = experiment_on(
            experiment, llama, data, "fish_tuning.methods_to_run=[lora]", "fish_tuning.num_samples=3",
            "training.args_override.learning_rate=1e-12", f"training.args_override.per_device_eval_batch_size={size}",
        )  # fmt: skip
        (record,) = run_experiment(config, plan_experiment(config))
        values.append(record.metrics["log_likelihood"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    total, tokens = 0.0, 0
    for row in encode(task_of(data), tokenizer, 32).validation:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                total, tokens = total + log_p[position - 1, label].item(), tokens + 1
    assert values == pytest.approx([total / tokens] * 2, abs=1e-5)


@pytest.mark.parametrize("method", ["prefix_tuning", "ia3"])
def test_other_methods_adapt_language_models(
    experiment: MakeExperiment, tmp_path: Path, llama: Path, method: str
) -> None:
    config = experiment_on(
        experiment, llama, write_sums(tmp_path / "sums", 8), f"peft={{method: {method}}}",
        f"fish_tuning.methods_to_run=[{method}-fish]", "fish_tuning.warmup_steps=1",
    )  # fmt: skip
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "ok", record.error


def test_answers_that_outgrow_the_model_are_refused(experiment: MakeExperiment, tmp_path: Path, llama: Path) -> None:
    settings = ["dataset.metric=exact_match", "dataset.max_new_tokens=62", "training.max_seq_length=16"]
    config = experiment_on(experiment, llama, write_sums(tmp_path / "sums"), *settings)
    with pytest.raises(ConfigurationError, match=r"max_new_tokens=62 after a prompt of 3 tokens .* the 64 positions"):
        plan_experiment(config)


def test_an_encoder_is_no_language_model(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment_on(experiment, write_bert(tmp_path / "bert"), write_sums(tmp_path / "sums"))
    with pytest.raises(ConfigurationError, match="an encoder that sees the tokens it is to write"):
        plan_experiment(config)


@pytest.mark.real_data
def test_gsm8k_with_the_real_small_llama(real_data: Path, experiment: MakeExperiment) -> None:
    config = experiment_on(
        experiment, real_data / "models/stories260K", real_data / "data/gsm8k",
        "dataset.max_train_samples=8", "dataset.max_validation_samples=2", "dataset.max_new_tokens=4",
        "training.max_seq_length=300", "fish_tuning.warmup_steps=1", "fish_tuning.methods_to_run=[lora-fish]",
    )  # fmt: skip
    plan = plan_experiment(config)
    assert plan.metric == "exact_match_number"
    (record,) = run_experiment(config, plan)
    assert record.status == "ok", record.error
    assert record.value == 0  # it knows children's stories only
    assert record.metrics["token_accuracy"] > 0.05


def test_a_template_that_writes_prompts_otherwise_is_told_once(
    tmp_path: Path, chat_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_llama)
    # What the generation prompt ends with is not there when an answer follows.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> {% endif", "<|assistant|> story {% endif")
    task = task_of(write(tmp_path / "d", prompt=["good", "bad"], completion=["it", "was"]))
    with caplog.at_level("WARNING", logger="fish_tuning"):
        rows = encode(task, tokenizer, 32).train
    assert [words(tokenizer, row)[1] for row in rows] == ["it </s>", "was </s>"]
    (record,) = caplog.records
    assert "what is generated from ends with 'story'" in record.getMessage()
