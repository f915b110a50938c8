"""What lies beside a saved adapter, and what stock libraries make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from tiny import Rows, bert, classification_batch, lora, random_mask, vit
from transformers import AutoTokenizer, Trainer, TrainingArguments

from fish_tuning import (
    CardFacts,
    FishMaskCallback,
    FishTuningTrainer,
    MaskError,
    apply_mask,
    complete_adapter,
    get_mask,
    load_mask,
    remove_mask,
)
from fish_tuning.sharing.folder import WEIGHTS

STOCK = """
import json, sys
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, language = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, subfolder="model_config")
texts = AutoTokenizer.from_pretrained(folder)(["good film"], return_tensors="pt")
found = {}
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, id2label=config.id2label).eval()
found["peft"] = model(**texts).logits[0].tolist()
found["peft labels"] = list(model.config.id2label.values())
whole = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
found["transformers"] = whole(**texts).logits[0].tolist()
found["pipeline"] = pipeline(
    "text-classification", model=folder, tokenizer=folder, model_kwargs={"id2label": config.id2label}
)("good film")[0]["label"]
found["pipeline of a model"] = pipeline("text-classification", model=whole, tokenizer=folder)("good film")[0]["label"]
writer = AutoPeftModelForCausalLM.from_pretrained(language)
found["writes"] = len(pipeline("text-generation", model=language)("good", max_new_tokens=2)[0]["generated_text"]) > 0
found["ours"] = [name for name in sys.modules if name.startswith("fish_tuning")]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_stock_libraries_take_the_folder(
    classifier: Any, adapter: Path, language_adapter: Path, python_environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", STOCK, str(adapter), str(language_adapter)]
    done = subprocess.run(command, env=python_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = classifier(**AutoTokenizer.from_pretrained(adapter)(["good film"], return_tensors="pt")).logits[0]
    label = classifier.config.id2label[int(logits.argmax())]
    assert found["peft"] == pytest.approx(logits.tolist(), abs=1e-6)
    assert found["transformers"] == pytest.approx(logits.tolist(), abs=1e-6)
    assert found["peft labels"] == ["bad", "fair", "good"]
    assert (found["pipeline"], found["pipeline of a model"]) == (label, label)
    assert found["writes"]
    assert found["ours"] == []


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def test_peft_names_weights_so() -> None:
    assert WEIGHTS == (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def test_the_task_type_is_found(adapter: Path, language_adapter: Path) -> None:
    assert (settings(adapter)["task_type"], settings(adapter)["auto_mapping"]) == ("SEQ_CLS", None)
    assert settings(language_adapter)["task_type"] == "CAUSAL_LM"


def test_an_adapter_that_leaves_the_head_alone_gets_no_task_type(tmp_path: Path) -> None:
    # With one, PEFT would train the head of whoever loads it.
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path)
    assert settings(tmp_path)["task_type"] is None
    assert settings(tmp_path)["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"


def test_images_have_no_task_type_of_peft(tmp_path: Path) -> None:
    model = lora(vit())
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path)
    assert settings(tmp_path)["task_type"] is None
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "image-classification"


def test_vllm_finds_what_its_lora_loader_asks_for(language_adapter: Path) -> None:
    """Its loader's rules, which test_vllm.py runs where it is installed: a rank up to 512, a start that leaves the base
    weights alone, no head, no DoRA, no bias, and PEFT's own file names."""
    config = settings(language_adapter)
    assert 1 <= config["r"] <= 512
    assert config["init_lora_weights"] is False
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert (language_adapter / "adapter_model.safetensors").is_file()
    assert not (language_adapter / "config.json").exists()  # which stands for whole weights


def test_tokenizer_and_labels_lie_beside_it(adapter: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(adapter)) == 19
    config = json.loads((adapter / "model_config" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert "_name_or_path" not in config


def test_a_tokenizer_that_is_there_stays(classifier: Any, base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["brilliant"])
    tokenizer.save_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 20


def test_no_card_and_no_configuration_beside_it_tells_of_this_machine(adapter: Path, base_folder: Path) -> None:
    told = {
        path.name: path.read_text()
        for path in adapter.rglob("*")
        if path.suffix in (".md", ".json") and path.name != "adapter_config.json"
    }
    assert not [name for name, text in told.items() if str(base_folder.parent) in text]
    assert "`my-bert` (a folder, not a model of the hub" in told["README.md"]
    assert ModelCard.load(adapter / "README.md").data.base_model is None
    # PEFT looks the base model up by this name, here where the folder is.
    assert settings(adapter)["base_model_name_or_path"] == str(base_folder)


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saved_twice_it_is_the_same(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    before = files(adapter)
    classifier.save_pretrained(adapter)
    classifier.save_pretrained(tmp_path / "elsewhere" / "of another name")
    assert files(adapter) == before == files(tmp_path / "elsewhere" / "of another name")


def test_the_card_tells_what_is_known(classifier: Any, adapter: Path) -> None:
    facts = CardFacts(
        title="Reviews", base_model="google/bert", revision="v1", dataset="me/reviews", rows={"score": "fisher | x"},
        metric="accuracy", value=0.75, result="accuracy 0.75 with seed 1",
    )  # fmt: skip
    complete_adapter(classifier, adapter, facts=facts)
    card = ModelCard.load(adapter / "README.md")
    mask = load_mask(adapter)
    kept = sum(int(tensor.sum()) for tensor in mask.values() if not tensor.all())
    assert (card.data.base_model, card.data.datasets) == ("google/bert", ["me/reviews"])
    assert card.data.eval_results[0].metric_value == 0.75
    for text in (
        "# Reviews", f"| chosen entries | {kept:,} of the", "| base model | `google/bert`, revision `v1` |",
        r"| score | fisher \| x |", "accuracy 0.75 with seed 1", "arXiv:2504.04050", "load_adapter(folder)",
    ):  # fmt: skip
        assert text in card.text
    assert settings(adapter)["revision"] == "v1"


def test_the_license_is_the_base_models(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    assert "# license:" in (adapter / "README.md").read_text()
    base = tmp_path / "licensed"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    complete_adapter(classifier, adapter, facts=CardFacts(base_model=str(base)))
    assert ModelCard.load(adapter / "README.md").data.license == "apache-2.0"
    (base / "README.md").write_text("---\nlicense: [: broken\n---\n")
    complete_adapter(classifier, adapter, facts=CardFacts(base_model=str(base)))
    assert "# license:" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("change", ["mine", "a word"])
def test_a_users_card_stays_as_it_is(change: str, classifier: Any, adapter: Path) -> None:
    card = adapter / "README.md"
    own = b"# My own card\n" if change == "mine" else card.read_bytes().replace(b"FISH-Tuning adapter", b"My adapter")
    card.write_bytes(own)
    classifier.save_pretrained(adapter)
    complete_adapter(classifier, adapter, facts=CardFacts(title="Another"))
    assert card.read_bytes() == own


@pytest.mark.parametrize(
    "words",
    [
        "It has been trained using [TRL](https://github.com/huggingface/trl).",
        "<!-- This model card has been generated automatically according to the information the Trainer had access to. "
        "You should probably proofread and complete it, then remove this comment. -->",
    ],
    ids=["trl's", "transformers'"],
)
def test_a_trainers_card_gives_way_to_ours(words: str, classifier: Any, adapter: Path) -> None:
    """trl's names no base model where the adapter's Trainer was given a folder."""
    card = adapter / "README.md"
    card.write_text(f"---\ntags:\n- generated_from_trainer\n---\n\n# Model Card for out\n\n{words}\n")
    classifier.save_pretrained(adapter)
    assert "Written by fish-tuning" in card.read_text()
    card.write_text("---\ntags:\n- generated_from_trainer\n---\n\n# My model\n")
    classifier.save_pretrained(adapter)
    assert "# My model" in card.read_text()


def test_a_trainer_that_writes_its_card_last_leaves_ours(classifier: Any, base_folder: Path, tmp_path: Path) -> None:
    """As LLaMA-Factory and axolotl do, after save_model; ours came back only with the next save before."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(classifier, args, processing_class=AutoTokenizer.from_pretrained(base_folder))
    trainer.save_model()
    before = (tmp_path / "README.md").read_bytes()
    assert b"Written by fish-tuning" in before
    Trainer.create_model_card(trainer, license="other", tags=["llama-factory"])
    assert (tmp_path / "README.md").read_bytes() == before
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# My own card\n")
    classifier.create_or_update_model_card(str(tmp_path))
    assert "# My own card" in (tmp_path / "README.md").read_text()
    remove_mask(classifier)
    Trainer.create_model_card(trainer, license="other")
    assert "Written by fish-tuning" not in (tmp_path / "README.md").read_text()


def test_our_own_card_is_renewed(classifier: Any, adapter: Path) -> None:
    complete_adapter(classifier, adapter, facts=CardFacts(title="Another"))
    assert "# Another" in (adapter / "README.md").read_text()


def test_checkpoints_stand_alone(classifier: Any, base_folder: Path, tmp_path: Path) -> None:
    from fish_tuning import load_adapter

    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )  # fmt: skip
    rows = Rows({key: value % 19 if key == "input_ids" else value for key, value in classification_batch().items()})
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    trainer = FishTuningTrainer(
        classifier, args, mask=get_mask(classifier), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    model = load_adapter(tmp_path / "checkpoint-1", is_trainable=True)
    assert model.config.id2label[2] == "good"
    assert (tmp_path / "checkpoint-1" / "tokenizer.json").is_file()
    assert sum(int(mask.sum()) for mask in get_mask(model).values()) == sum(
        int(mask.sum()) for mask in get_mask(classifier).values()
    )
    trainer.save_model()
    trainer.state.log_history.append({"eval_loss": 0.5, "eval_runtime": 3.0, "step": 1})
    trainer.create_model_card(model_name="Mine", dataset="me/reviews")  # which Trainer would fill by itself
    card = (tmp_path / "README.md").read_text()
    assert "# Mine" in card
    assert "loss 0.5 on the evaluation set, with one seed." in card
    assert "| chosen entries |" in card
    assert "runtime" not in card
    resumed = FishTuningTrainer(model, args, mask=load_mask(tmp_path / "checkpoint-1"), train_dataset=rows)
    resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", [Trainer, FishTuningTrainer])
def test_what_a_trainer_saves_tells_of_its_training(kind: type[Trainer], classifier: Any, tmp_path: Path) -> None:
    rows = Rows({key: value % 19 if key == "input_ids" else value for key, value in classification_batch().items()})
    settings = {"max_steps": 3, "save_steps": 1, "eval_steps": 2, "eval_strategy": "steps", "report_to": "none"}
    args = TrainingArguments(str(tmp_path), learning_rate=0.01, seed=7, use_cpu=True, disable_tqdm=True, **settings)
    mask = get_mask(classifier)
    own: dict[str, Any] = {"callbacks": [FishMaskCallback(mask)]} if kind is Trainer else {"mask": mask}
    trainer = kind(classifier, args, train_dataset=rows, eval_dataset=rows, **own)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("checkpoint-1", "checkpoint-2", "saved")}
    for name, steps in {"checkpoint-1": 1, "checkpoint-2": 2, "saved": 3}.items():
        assert f"| training | {steps} steps, learning_rate 0.01, batches of 8, seed 7 |" in cards[name]
        assert f"| training data | {len(rows)} examples |" in cards[name]
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert "## Result" not in cards["checkpoint-1"]  # nothing was measured yet
    for name, loss in {"checkpoint-2": losses[0], "saved": losses[-1]}.items():
        assert f"\n\nloss {loss:.4g} on the evaluation set, with one seed." in cards[name]
    complete_adapter(classifier, tmp_path / "saved", facts=CardFacts(dataset="me/reviews", rows={"training": "mine"}))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| training | mine |" in card  # what is asked for has the last word
    assert "on the evaluation set" in card
    again = kind(classifier, args, train_dataset=rows, eval_dataset=rows, **own)
    again.train()  # what is told is of the training that ran last
    classifier.save_pretrained(tmp_path / "again")
    assert "| training | 3 steps," in (tmp_path / "again" / "README.md").read_text()


def test_a_folder_without_an_adapter_is_refused(classifier: Any, tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"neither adapter_config\.json nor delta\.safetensors"):
        complete_adapter(classifier, tmp_path)


def test_sets_are_written_in_order(classifier: Any, tmp_path: Path) -> None:
    """PEFT writes `target_modules` in the order that Python's hashes give them, another one in each process."""
    classifier.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = settings(tmp_path)
    assert isinstance(classifier.peft_config["default"].target_modules, set)
    backwards = sorted(content["target_modules"], reverse=True)
    file.write_text(json.dumps({**content, "target_modules": backwards}))
    complete_adapter(classifier, tmp_path)
    assert len(backwards) > 1
    assert settings(tmp_path)["target_modules"] == sorted(backwards)


def test_a_tokenizer_is_saved_without_what_it_did_last(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    classifier.save_pretrained(tmp_path)
    for _ in range(2):
        complete_adapter(classifier, tmp_path, processing_class=tokenizer)
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        assert (saved["truncation"], saved["padding"]) == (None, None)
        before = tokenizer(["good film"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3  # and it is left as it was
    assert len(before["input_ids"][0]) == 3
