"""Predictions on files and texts, and the merged model."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import lora, random_mask, vit
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from typer.testing import CliRunner, Result

from fish_tuning import (
    ConfigurationError,
    FishTuningWarning,
    apply_mask,
    complete_adapter,
    load_adapter,
    merge_adapter,
    save_sparse_adapter,
)
from fish_tuning.adapters import SerialAdapterConfig
from fish_tuning.cli import app
from fish_tuning.sharing.predicting import predict
from fish_tuning.sharing.rows import read_rows, text_columns

TEXTS = ["good film", "bad story was awful", "plot"]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def expected(model: Any, folder: Path) -> list[list[float]]:
    encoded = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        shares: list[list[float]] = model(**encoded).logits.softmax(-1).tolist()
    return shares


def test_a_file_of_texts_gets_labels_and_probabilities(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    file.write_text("id,text,label\n" + "".join(f"{n},{text},good\n" for n, text in enumerate(TEXTS)))
    done = invoke("predict", adapter, file, "--output", out, "--batch-size", 2)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.open()))
    for row, shares in zip(rows, expected(classifier, adapter), strict=True):
        found = [float(row[f"probability_{name}"]) for name in ("bad", "fair", "good")]
        assert found == pytest.approx(shares, abs=1e-5)
        assert row["prediction"] == ["bad", "fair", "good"][shares.index(max(shares))]
        assert float(row["probability"]) == max(found)
    assert [row["id"] for row in rows] == ["0", "1", "2"]


@pytest.mark.filterwarnings("error::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("answers", [("good", "bad", "fair "), ("3", "-1", "2.5")])
def test_answers_in_a_column_of_any_name_are_no_second_text(answers: tuple[str, ...], adapter: Path) -> None:
    rows = [{"mood": answer, "text": text} for answer, text in zip(answers, TEXTS, strict=True)]
    alone = predict(adapter, [{"text": text} for text in TEXTS])
    assert [row["probability"] for row in predict(adapter, rows)] == [row["probability"] for row in alone]
    assert predict(adapter, [{"text": "good"}])[0]["prediction"]  # the only column is the text, whatever it says


def test_two_columns_that_nobody_named_are_told(adapter: Path) -> None:
    rows = [{"title": "plot", "text": "good film"}]
    with pytest.warns(FishTuningWarning, match=r"'title' and 'text' are read as pairs .* --text-column title"):
        pair = predict(adapter, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        assert predict(adapter, rows, columns=["title", "text"]) == pair
        assert predict(adapter, rows, columns=["text"]) != pair


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt", "tsv"])
def test_every_kind_of_file(suffix: str, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / f"in.{suffix}"
    rows = [{"text": text} for text in TEXTS]
    file.write_text({
        "json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows)),
        "txt": "\n\n".join(TEXTS), "tsv": "text\n" + "\n".join(TEXTS),
    }[suffix])  # fmt: skip
    assert read_rows(str(file)) == rows


def test_a_text_alone_is_told_on_the_terminal(adapter: Path) -> None:
    done = invoke("predict", adapter, "a very good film")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["prediction"] in ("bad", "fair", "good")


def test_pairs_and_numbers(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    model.save_pretrained(tmp_path / "number")
    complete_adapter(model, tmp_path / "number")
    (row,) = predict(tmp_path / "number", [{"one": "good", "two": "bad film"}])
    encoded = AutoTokenizer.from_pretrained(base_folder)("good", "bad film", return_tensors="pt")
    assert row["prediction"] == pytest.approx(model(**encoded).logits.item(), abs=1e-6)


def test_tagged_words(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForTokenClassification.from_pretrained(base_folder, id2label={0: "O", 1: "PER"})
    model = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["classifier"])).eval()
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.save_pretrained(tmp_path / "tags")
    assert json.loads((tmp_path / "tags" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    rows = predict(tmp_path / "tags", [{"text": "good film it was"}, {"text": "plot"}])
    encoded = AutoTokenizer.from_pretrained(base_folder)("good film it was", return_tensors="pt")
    tags = model(**encoded).logits[0, 1:-1].argmax(-1).tolist()
    assert rows[0]["prediction"] == [["O", "PER"][tag] for tag in tags]
    assert [len(row["probability"]) for row in rows] == [4, 1]


def test_a_language_model_writes(language_adapter: Path, llama_folder: Path) -> None:
    rows = predict(language_adapter, [{"text": "good film"}, {"text": "bad"}], max_new_tokens=3)
    alone = predict(language_adapter, [{"text": "bad"}], max_new_tokens=3)
    assert rows[1] == alone[0]  # whatever padding the batch gave it
    assert len(rows[0]["prediction"].split()) <= 3


def test_a_chat_template_is_used_where_there_is_one(language_adapter: Path) -> None:
    from folders import CHAT_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(language_adapter)
    plain = predict(language_adapter, [{"text": "good film"}], max_new_tokens=3)
    with pytest.raises(ConfigurationError, match="no chat template"):
        predict(language_adapter, [{"text": "good film"}], chat_template=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(language_adapter)
    written = "<|user|> good film </s> <|assistant|>"
    assert predict(language_adapter, [{"text": "good film"}], max_new_tokens=3) == [
        {"text": "good film"} | {"prediction": row["prediction"]}
        for row in predict(language_adapter, [{"text": written}], max_new_tokens=3, chat_template=False)
    ]
    assert predict(language_adapter, [{"text": "good film"}], max_new_tokens=3, chat_template=False) == plain


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("a,b,c\nx,y,z\n", "in.csv", "found 3 (a, b, c)"),
        ("number\n", "in.csv", "has no rows"),
        ("a\nx,y\n", "in.csv", "line 2 has more cells than there are names"),
        ("text,text\nx,y\n", "in.csv", "two columns are called 'text'"),
        ("[1, 2]", "in.json", "each row must be an object"),
        ('"good"\n{', "in.jsonl", "is not readable as jsonl: line 2 is no JSON"),
        ("text,prediction\nx,y\n", "in.csv", "have a column 'prediction' already"),
        ("x", "in.pdf", "is none of .csv"),
    ],
)
def test_what_cannot_be_read_is_exit_code_2(
    content: str, name: str, message: str, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    options = [] if "prediction" not in content else ["--text-column", "text"]
    done = invoke("predict", adapter, tmp_path / name, *options)
    assert (done.exit_code, "Traceback" in done.output) == (2, False)
    assert message in done.stderr


def test_a_missing_file_is_no_text(adapter: Path, tmp_path: Path) -> None:
    done = invoke("predict", adapter, "reviews.csv")
    assert "There is no file 'reviews.csv'" in done.stderr
    done = invoke("predict", adapter, "good", "--output", tmp_path / "out.xlsx")
    assert "must end with .csv" in done.stderr
    assert text_columns([{"label": "a", "text": "b"}]) == ("text",)


def test_a_file_in_another_encoding_is_told_with_the_way_out(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes("text\ncaf\u00e9\n".encode("latin-1"))
    done = invoke("predict", adapter, tmp_path / "in.csv")
    assert (done.exit_code, "is not in UTF-8 (byte 0xe9 at 8). Save it in UTF-8" in done.stderr) == (2, True)


def test_an_empty_text_is_no_folder(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert "The text to predict on is empty." in invoke("predict", adapter, "").stderr


def test_a_folder_is_no_file_to_write(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    done = invoke("predict", adapter, "good", "--output", tmp_path / "out.csv", "--force")
    assert (done.exit_code, "out.csv' is a folder. Name a file." in done.stderr) == (2, True)


def test_outputs_that_are_not_finite_are_no_predictions(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    head = next(name for name in weights if "classifier" in name)
    save_file({**weights, head: weights[head] * math.nan}, adapter / "adapter_model.safetensors")
    done = invoke("predict", adapter, "good film")
    assert (done.exit_code, "outputs are not finite" in done.stderr, done.stdout) == (2, True, "")


def test_a_folder_that_cannot_be_written_is_told(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    for command in (["merge", adapter, "--output", out], ["export", adapter, out, "--rank", "1"]):
        done = invoke(*command)
        assert (done.exit_code, "Traceback" in done.output) == (2, False)
        assert done.stderr.endswith(f"error: '{tmp_path / 'file'}': File exists\n")


def test_a_file_that_is_there_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\ngood film\n")
    for options in ([], ["--force"]):
        done = invoke("predict", adapter, tmp_path / "in.csv", "--output", tmp_path / "in.csv", *options)
        assert (done.exit_code, "in.csv' is what is predicted on" in done.stderr) == (2, True)
        assert (tmp_path / "in.csv").read_text() == "text\ngood film\n"
    out = tmp_path / "out.csv"
    out.write_text("of yesterday\n")
    done = invoke("predict", adapter, tmp_path / "in.csv", "--output", out)
    assert (done.exit_code, "replace it with --force" in done.stderr) == (2, True)
    assert out.read_text() == "of yesterday\n"
    assert invoke("predict", adapter, tmp_path / "in.csv", "--output", out, "--force").exit_code == 0
    assert out.read_text().startswith("text,prediction,")


def test_a_file_that_may_not_be_read_is_told(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "in.csv").write_text("text\ngood film\n")
    monkeypatch.setattr(Path, "read_text", refused)  # whoever runs the tests may be allowed to read everything
    with pytest.raises(ConfigurationError, match=r"in.csv' is not readable as csv: .*Permission denied"):
        read_rows(str(tmp_path / "in.csv"))


@pytest.fixture
def image_adapter(tmp_path: Path) -> Path:
    base = vit(num_channels=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    base.save_pretrained(tmp_path / "image-base")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "image-base")
    model = lora(ViTForImageClassification.from_pretrained(tmp_path / "image-base"))
    model.save_pretrained(tmp_path / "image-adapter")
    complete_adapter(model, tmp_path / "image-adapter")
    return tmp_path / "image-adapter"


def write_images(folder: Path) -> list[Path]:
    (folder / "deeper").mkdir(parents=True)
    files = [folder / "a.png", folder / "b.PNG", folder / "deeper" / "c.jpg"]
    for number, (file, mode) in enumerate(zip(files, ("L", "RGBA", "RGB"), strict=True)):
        Image.effect_noise((20 + number, 12), 90).convert(mode).save(file)
    (folder / "notes.txt").write_text("no image")
    return files


def test_images_of_a_folder_and_alone(image_adapter: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    done = invoke("predict", image_adapter, tmp_path / "images", "--output", tmp_path / "out.jsonl", "--batch-size", 2)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == list(map(str, files))
    processor = AutoImageProcessor.from_pretrained(image_adapter)
    with torch.no_grad():
        pixels = processor(images=[Image.open(file).convert("RGB") for file in files], return_tensors="pt")
        shares = load_adapter(image_adapter)(**pixels).logits.softmax(-1).tolist()
    for row, expected in zip(rows, shares, strict=True):
        assert [row[f"probability_{name}"] for name in ("cat", "dog", "owl")] == pytest.approx(expected, abs=1e-5)
    alone = invoke("predict", image_adapter, files[1])
    assert json.loads(alone.stdout.splitlines()[-1])["prediction"] == rows[1]["prediction"]
    (one,) = predict(image_adapter, [{"image": Image.open(files[0])}])
    assert one["probability"] == pytest.approx(rows[0]["probability"], abs=1e-5)


def test_images_that_cannot_be_read(image_adapter: Path, adapter: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    files[0].write_bytes(files[0].read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((image_adapter, tmp_path / "images"), "a.png' is no image that can be read"),
        ((image_adapter, tmp_path / "empty"), "has no images (.bmp"),
        ((image_adapter, "gone.png"), "There is no file 'gone.png'"),
        ((image_adapter, "good film"), "ViTForImageClassification reads images, not text. Give image files"),
        ((adapter, files[1]), "BertForSequenceClassification reads texts, not image."),
    ):
        done = invoke("predict", *arguments)
        assert (done.exit_code, "Traceback" in done.output) == (2, False), done.output
        assert message in done.stderr
    for file in tmp_path.rglob("preprocessor_config.json"):
        file.unlink()
    done = invoke("predict", image_adapter, files[1])
    assert (done.exit_code, "There is no image processor in" in done.stderr) == (2, True), done.output


def test_models_for_something_else_are_refused_by_name(base_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModel.from_pretrained(base_folder), LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path / "features")
    complete_adapter(model, tmp_path / "features")
    with pytest.raises(ConfigurationError, match="BertModel is for something else"):
        predict(tmp_path / "features", [{"text": "good"}])


def test_texts_are_cut_to_what_the_tokenizer_beside_the_adapter_says(adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.model_max_length = 5
    tokenizer.save_pretrained(adapter)
    long, cut = ({**predict(adapter, [{"text": text}])[0], "text": ""} for text in ("good film " * 9, "good film good"))
    assert long == cut


# Merged


def test_the_merged_model_is_one_of_transformers(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    done = invoke("merge", adapter, "--output", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    found = pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None)(["good film"])[0]
    shares = {row["label"]: row["score"] for row in found}
    assert [shares[name] for name in ("bad", "fair", "good")] == pytest.approx(
        torch.softmax(
            classifier(**AutoTokenizer.from_pretrained(adapter)("good film", return_tensors="pt")).logits[0], -1
        ).tolist(),
        abs=1e-5,
    )
    assert "merged" in (tmp_path / "merged" / "README.md").read_text()
    again = invoke("merge", adapter, "--output", tmp_path / "merged")
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize("method", ["prefix", "serial"])
def test_what_cannot_be_merged_is_refused_by_name(
    method: str, base_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    if method == "prefix":
        base = AutoModelForCausalLM.from_pretrained(llama_folder)
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(base_folder)
        model = get_peft_model(base, SerialAdapterConfig(task_type="SEQ_CLS", bottleneck_size=2))
    model.save_pretrained(tmp_path / "adapter")
    done = invoke("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert done.exit_code == 2, done.output
    assert "cannot be merged" in done.stderr
    assert {"prefix": "PREFIX_TUNING", "serial": "SERIAL_ADAPTER"}[method] in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def anothers_adapter(tmp_path: Path) -> Path:
    """What stock PEFT writes of three classes on a base model of ten: no labels and no image processor."""
    vit(num_channels=3, num_labels=10).save_pretrained(tmp_path / "ten")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "ten")
    base = ViTForImageClassification.from_pretrained(tmp_path / "ten", num_labels=3, ignore_mismatched_sizes=True)
    model = lora(base)
    model.save_pretrained(tmp_path / "anothers")
    return tmp_path / "anothers"


def test_the_number_of_labels_of_anothers_adapter_is_read_off_its_head(anothers_adapter: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    done = invoke("predict", anothers_adapter, files[0])
    assert done.exit_code == 0, done.output
    assert {"probability_LABEL_0", "probability_LABEL_1", "probability_LABEL_2"} < json.loads(done.stdout).keys()
    assert "note: The adapter's head has 3 labels, its base model" in done.stderr
    assert "they are called LABEL_0 to LABEL_2" in done.stderr
    merged = invoke("merge", anothers_adapter, "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert ViTForImageClassification.from_pretrained(tmp_path / "merged").num_labels == 3


def test_given_names_are_kept_beside_anothers_adapter(anothers_adapter: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        model = load_adapter(anothers_adapter, id2label={0: "cat", 1: "dog", 2: "owl"})
    complete_adapter(model, anothers_adapter)
    done = invoke("predict", anothers_adapter, write_images(tmp_path / "images")[0])
    assert done.exit_code == 0, done.output
    assert {"probability_cat", "probability_dog", "probability_owl"} < json.loads(done.stdout).keys()


def test_an_adapter_for_texts_of_another_number_of_labels(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=5)
    lora(base).save_pretrained(tmp_path / "five")
    with pytest.warns(FishTuningWarning, match=r"head has 5 labels, its base model .* 2, .*LABEL_0 to LABEL_4"):
        assert load_adapter(tmp_path / "five").config.num_labels == 5


def test_a_sparse_adapters_file_is_as_good_as_its_folder(anothers_adapter: Path, tmp_path: Path) -> None:
    with pytest.warns(FishTuningWarning):
        model = load_adapter(anothers_adapter, is_trainable=True)
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.save_pretrained(tmp_path / "whole")
    with pytest.warns(FishTuningWarning):
        save_sparse_adapter(model, tmp_path / "task.safetensors")
    image = write_images(tmp_path / "images")[0]
    of_file, of_folder = (invoke("predict", tmp_path / name, image) for name in ("task.safetensors", "whole"))
    assert (of_file.exit_code, of_file.stdout) == (0, of_folder.stdout)
    merged = invoke("merge", tmp_path / "task.safetensors", "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    with pytest.raises(ConfigurationError, match=r"is a file, and no folder of an adapter.*write_adapter_folder"):
        load_adapter(tmp_path / "task.safetensors")


@pytest.mark.parametrize("made_of", ["the folder", "a model of it"])
def test_a_sparse_adapters_file_knows_labels_and_length(adapter: Path, tmp_path: Path, made_of: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.model_max_length = 3
    tokenizer.save_pretrained(adapter)
    file, text = tmp_path / "task.safetensors", [{"text": "good film bad film good film"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        save_sparse_adapter(adapter if made_of == "the folder" else load_adapter(adapter, is_trainable=True), file)
    (expected,) = predict(adapter, text)
    assert {"probability_bad", "probability_fair", "probability_good"} < expected.keys()
    assert predict(file, text) == [expected] != predict(file, text, max_length=8)
    merge_adapter(file, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").model_max_length == 3


def test_a_sparse_adapters_file_knows_the_overrides(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3, num_hidden_layers=1)
    model = lora(base)
    apply_mask(model, random_mask(model, dense=["classifier"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        save_sparse_adapter(model, tmp_path / "task.safetensors")
    assert predict(tmp_path / "task.safetensors", [{"text": "good"}])


def test_images_are_named_from_where_their_file_lies(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (tmp_path / "in.csv").write_text(f"image\nimages/{images[0].name}\n{images[1]}\nno-such.png\n")
    assert [row["image"] for row in read_rows(str(tmp_path / "in.csv"))] == [
        str(images[0]), str(images[1]), "no-such.png",
    ]  # fmt: skip
