"""First experiment files: what is found is written down, and the file runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import WORDS, sentences, write_bert, write_llama, write_pairs, write_sums
from jsonschema import Draft7Validator
from task_helpers import write_split
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from fish_tuning.cli import app
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.config.schema import experiment_schema
from fish_tuning.experiments.config.yaml_files import parse
from fish_tuning.experiments.run.draft import draft_experiment
from fish_tuning.experiments.run.draft_text import draft_text, yaml_text
from fish_tuning.experiments.run.plan import plan_experiment


def csv_file(path: Path, rows: int = 40) -> Path:
    texts, labels = sentences(rows)
    named = [f"{text},{'good' if label else 'bad'}" for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["review,label", *named]) + "\n")
    return path


def planned(text: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """What a drafted file says, and its plan; the schema must let it pass too."""
    file = folder / "drafted.yaml"
    file.write_text(text)
    said = parse(text, "the draft")
    assert [error.message for error in Draft7Validator(experiment_schema()).iter_errors(said)] == []
    return said, plan_experiment(load_experiment(file))


def test_one_file_of_texts(bert_folder: Path, tmp_path: Path) -> None:
    file = csv_file(tmp_path / "films.csv")
    draft = draft_experiment(str(bert_folder), [str(file)])
    assert draft.name == "films"
    said, plan = planned(draft.text, tmp_path)
    assert said["dataset"] == {
        "data_files": {"train": str(file)},
        "train_split": "train",
        "validation_split": 0.2,
        "task": "text_classification",
        "text_column": "review",
        "label_column": "label",
        "metric": "accuracy",
    }
    assert said["lora"]["target_modules"] == ["query", "key", "value"]
    assert said["fish_tuning"]["num_samples"] == 25  # of 32 rows, without a fifth on which rates may be chosen
    assert said["training"]["max_seq_length"] == 16
    assert [arm.arm for arm in plan.arms] == said["fish_tuning"]["methods_to_run"]
    for remark in (
        "# Found: train (40 rows).",
        "2 classes with their shares of the training examples: bad ",
        "f1_macro",
    ):
        assert remark in draft.text


def test_a_validation_file_beside_the_training_file_is_taken(bert_folder: Path, tmp_path: Path) -> None:
    csv_file(tmp_path / "films-dev.csv", 20)
    draft = draft_experiment(str(bert_folder), [str(csv_file(tmp_path / "films-train.csv"))])
    said, plan = planned(draft.text, tmp_path)
    assert list(said["dataset"]["data_files"]) == ["train", "validation"]
    assert (len(plan.task.train), len(plan.task.validation)) == (40, 20)


def test_pairs_with_numbers_and_what_was_asked_for(bert_folder: Path, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    asked = ["dataset.text_column=sentence2", "training.learning_rates=[1e-3, 1e-4]", "lora.target_modules=[dense]"]
    draft = draft_experiment(str(bert_folder), [str(folder)], asked)
    said, _ = planned(draft.text, tmp_path)
    assert said["dataset"]["text_column"] == "sentence2"
    assert said["training"]["learning_rates"] == [1e-3, 1e-4]
    assert said["lora"]["target_modules"] == ["dense"]
    assert said["dataset"]["metric"] == "pearson_spearman"
    assert "Numbers, so this is regression" in draft.text


@pytest.mark.parametrize(
    ("asked", "arms"),
    [
        (["peft=[{method: lora}, {method: dora}]"], ["lora", "lora-fish", "dora", "dora-fish-rev", "head"]),
        (["peft.method=ia3"], ["ia3", "ia3-fish-rand", "head"]),
        (
            ["protocol=fixed_layers", "fish_tuning.keep_ratio=[0.5, 0.1]"],
            ["lora", "lora-fish@0.5", "lora-fish-rev@0.1"],
        ),
        (["fish_tuning.methods_to_run=[lora, lora-fish]"], ["lora", "lora-fish"]),
    ],
)
def test_other_methods_and_protocols_can_be_asked_for(
    bert_folder: Path, tmp_path: Path, asked: list[str], arms: list[str]
) -> None:
    draft = draft_experiment(str(bert_folder), [str(csv_file(tmp_path / "films.csv"))], asked)
    _, plan = planned(draft.text, tmp_path)
    assert set(arms) <= {arm.arm for arm in plan.arms}


def test_words_with_tags(bert_folder: Path, tmp_path: Path) -> None:
    columns = {"tokens": [["good", "film"], ["it", "was", "dull"]] * 6, "ner_tags": [["O", "B-F"], ["O", "O", "O"]] * 6}
    for split in ("train", "validation"):
        write_split(tmp_path / "tags", split, columns)
    said, _ = planned(draft_experiment(str(bert_folder), [str(tmp_path / "tags")]).text, tmp_path)
    assert (said["dataset"]["text_column"], said["dataset"]["label_column"]) == ("tokens", "ner_tags")
    assert (said["dataset"]["task"], said["dataset"]["metric"]) == ("token_classification", "entity_f1")


def test_questions_and_answers_that_are_written(tmp_path: Path) -> None:
    model, folder = write_llama(tmp_path / "llama"), write_sums(tmp_path / "gsm8k")  # whose metric needs answers
    draft = draft_experiment(str(model), [str(folder)])
    said, plan = planned(draft.text, tmp_path)
    assert (said["dataset"]["prompt_column"], said["dataset"]["completion_column"]) == ("question", "answer")
    assert said["dataset"]["max_new_tokens"] < 64  # the model's positions less the longest prompt
    assert (plan.task.metric, "head" in said["fish_tuning"]["methods_to_run"]) == ("exact_match_number", False)
    assert "args" not in said["peft"]


def test_plain_texts_and_conversations(tmp_path: Path) -> None:
    model = str(write_llama(tmp_path / "llama", chat=True))
    for split in ("train", "validation"):
        write_split(tmp_path / "plain", split, {"text": ["good film", "dull story"] * 4})
        turns = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]
        write_split(tmp_path / "chats", split, {"messages": [turns] * 6})
    plain = draft_experiment(model, [str(tmp_path / "plain")], ["dataset.task=causal_lm"])
    assert planned(plain.text, tmp_path)[0]["dataset"]["text_column"] == "text"
    chats = draft_experiment(model, [str(tmp_path / "chats")])
    assert planned(chats.text, tmp_path)[0]["dataset"]["completion_column"] == "messages"


def bert_with_pooler(folder: Path, *, trained: bool | None) -> str:
    """A checkpoint whose pooler was trained, is as it was made, or (None) is not there."""
    write_bert(folder)
    model = BertForSequenceClassification(BertConfig.from_pretrained(folder))
    if trained:
        torch.nn.init.normal_(model.bert.pooler.dense.bias)
    state = {
        name: value for name, value in model.bert.state_dict().items() if trained is not None or "pool" not in name
    }
    model.bert.save_pretrained(folder, state_dict=state)
    return str(folder)


@pytest.mark.parametrize(
    ("trained", "reason"),
    [(True, None), (False, "its bias is zero everywhere"), (None, "its weights are not in the checkpoint")],
)
def test_a_pooler_that_was_never_trained_belongs_to_the_head(
    tmp_path: Path, trained: bool | None, reason: str | None
) -> None:
    model = bert_with_pooler(tmp_path / "bert", trained=trained)
    draft = draft_experiment(model, [str(csv_file(tmp_path / "films.csv"))])
    said, plan = planned(draft.text, tmp_path)
    args = said["peft"].get("args", {})
    assert args == ({"modules_to_save": ["classifier", "pooler"]} if reason else {})
    assert (reason or "Linear layers") in draft.text
    words = " ".join(draft.text.replace("#", " ").split())
    assert ("in reverse, the head alone, with pooler as it was made." in words) == bool(reason)
    assert plan.arm("lora").dense == 2 * 16 + 2 + (16 * 16 + 16 if reason else 0)


def test_where_the_head_is_large_arms_get_the_whole_size(bert_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "films.csv"
    rows = [f"{WORDS[n % len(WORDS)]},class{n % 100}" for n in range(400)]
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    files = [f"dataset.data_files={{train: {file}, validation: {file}}}"]  # every class in both
    draft = draft_experiment(str(bert_folder), [str(file)], files)
    said, _ = planned(draft.text, tmp_path)
    assert said["fish_tuning"]["prune_to_ratio_of_baseline"] == 1.0
    words = " ".join(draft.text.replace("#", " ").split())
    assert "the head alone has 1,972 of 3,508, which leaves next to nothing at half" in words


def test_what_cannot_be_drafted_names_the_key(bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text("a,b,c,label\n" + "x,y,z,1\nx,y,z,0\n" * 8)
    with pytest.raises(ConfigurationError, match=r"Set dataset\.text_column\. Give init .* as KEY=VALUE"):
        draft_experiment(str(bert_folder), [str(tmp_path / "wide.csv")])
    with pytest.raises(ConfigurationError, match=r"there is no file .*wid\.csv.*Did you mean .*wide\.csv"):
        draft_experiment(str(bert_folder), [str(tmp_path / "wid.csv")])
    with pytest.raises(ConfigurationError, match="needs data after the model"):
        draft_experiment(str(bert_folder), [])
    (tmp_path / "topics.csv").write_text(
        "id,headline,topic\n" + "".join(f"{n},text {n % 9},{'ab'[n % 2]}\n" for n in range(20))
    )
    with pytest.raises(
        ConfigurationError, match=r"such as dataset\.label_column=topic, which has 2 different values\."
    ):
        draft_experiment(str(bert_folder), [str(tmp_path / "topics.csv")])
    with pytest.raises(ConfigurationError, match=r"write a list of sections: peft: \[{method: lora}, {method: ia3}\]"):
        draft_experiment(str(bert_folder), [str(tmp_path / "wide.csv")], ["peft.method=[lora,ia3]"])
    images = ["builtin:digits"]
    with pytest.raises(ConfigurationError, match=r"no AutoModelForImageClassification of .* \(bert\), which image_"):
        draft_experiment(str(bert_folder), images)
    with pytest.raises(ConfigurationError, match=r"there is no folder .*nowhere"):
        draft_experiment(str(tmp_path / "nowhere"), [str(csv_file(tmp_path / "films.csv"))])


def test_names_of_columns_and_classes_stay_in_their_lines(bert_folder: Path, tmp_path: Path) -> None:
    columns = {"no: text # [1] \U0001f600": ["good film", "dull film"] * 8, "label": ["a\nmodel: evil", "yes"] * 8}
    for split in ("train", "validation"):
        write_split(tmp_path / "odd", split, columns)
    said, plan = planned(draft_experiment(str(bert_folder), [str(tmp_path / "odd")]).text, tmp_path)
    assert said["model"]["name"] == str(bert_folder)
    assert (said["dataset"]["text_column"], plan.task.labels) == (
        "no: text # [1] \U0001f600",
        ("a\nmodel: evil", "yes"),
    )


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "0o7",
        "1e-4",
        "",
        "a b",
        "~",
        "x: y",
        "é\n",
        "a \U0001f600 face",
        "\x7f\u2028\ufeff",
        "true",
        True,
        None,
        3,
        1e-5,
        0.1,
        ["a", ["b"]],
        {"": 0, "1": "x"},
    ],
)
def test_values_are_read_back(value: Any) -> None:
    assert parse(f"key: {yaml_text(value)}", "the test") == {"key": value}


def test_remarks_stand_above_their_keys() -> None:
    text = draft_text(["one\nline"], {"seeds": [1], "lora": {"a": 1}}, {"lora.a": "why " * 60})
    assert text.startswith("# one line\n\nseeds: [1]\n\nlora:\n  # why why")
    assert max(map(len, text.splitlines())) <= 110
    assert parse(text, "the test") == {"seeds": [1], "lora": {"a": 1}}


def test_the_command(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    csv_file(Path("films.csv"))
    arguments = ["init", str(bert_folder), "films.csv"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (done.exit_code, done.stdout.splitlines()[-2]) == (0, "written: films.yaml")
    first = Path("films.yaml").read_text()
    assert "$schema" not in first
    again = CliRunner().invoke(app, [*arguments, "seeds=[1]"], catch_exceptions=False)
    assert (again.exit_code, Path("films.yaml").read_text()) == (2, first)
    assert "films.yaml is there already, and is not overwritten. Name another with --output" in again.stderr
    Path("fish-tuning.schema.json").write_text("{}")
    forced = CliRunner().invoke(app, [*arguments, "seeds=[1]", "--force"], catch_exceptions=False)
    assert forced.exit_code == 0
    lines = Path("films.yaml").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("# yaml-language-server: $schema=fish-tuning.schema.json", "seeds: [1]")
    shown = CliRunner().invoke(app, [*arguments, "--output", "-"], catch_exceptions=False)
    assert parse(shown.stdout, "standard output") == parse(first, "the file")
    csv_file(Path("a=b.csv"))
    assert CliRunner().invoke(app, ["init", str(bert_folder), "a=b.csv", "-o", "-"]).stdout.startswith("# ")
    wrong = CliRunner().invoke(app, ["init", str(bert_folder), "flims.csv"], catch_exceptions=False)
    assert wrong.exit_code == 2
    assert "Did you mean 'films.csv'?" in wrong.stderr
