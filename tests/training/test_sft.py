"""Masks in trl's SFTTrainer: random tiny Llama, and the real small one where it is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from folders import word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, assert_only_selected_moved, llama, lora, random_mask, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from fish_tuning import (
    FishMaskCallback,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
)

trl = pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
datasets = pytest.importorskip("datasets")

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "fish",
    "who",
    "liked",
    "to",
    "swim",
    "in",
    "the",
    "big",
    "blue",
    "sea",
    "all",
    "day",
    "long",
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    assert len(words) <= VOCABULARY
    return word_tokenizer(words)


def texts() -> Any:
    return datasets.Dataset.from_dict({"text": [" ".join(WORDS[start : start + 4 + start]) for start in range(8)]})


def settings(folder: Path, **others: Any) -> Any:
    return trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        weight_decay=0.1,
        max_length=32,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        bf16=False,
        **others,
    )


def score_train_and_reload(model: PeftModel, base: PreTrainedModel, words: Any, folder: Path) -> None:
    """The three steps with SFTTrainer's own collation as calibration data, and what must hold after them."""
    plain = trl.SFTTrainer(
        model=model, args=settings(folder), train_dataset=texts(), processing_class=words
    ).get_train_dataloader()
    scores = calculate_fisher_information(model, plain, progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.1)
    k = sum(int(selected.sum()) for selected in mask.values())
    before = tensors(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=settings(folder),
        train_dataset=texts(),
        processing_class=words,
        callbacks=[FishMaskCallback(mask)],
    )
    trainer.train()
    assert_only_selected_moved(before, tensors(model), {name: m for name, m in mask.items() if m.any()})
    assert count_trainable_parameters(model) == k
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values() if value.dim()]
    assert sum(value.numel() for value in state) == 2 * k
    trainer.save_model(str(folder / "adapter"))
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids = words("once upon a time", return_tensors="pt")["input_ids"].to(DEVICE)
    model.to(DEVICE)
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    written = [m.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist() for m in (loaded, model)]
    assert written[0] == written[1]


def test_sft(tmp_path: Path) -> None:
    score_train_and_reload(lora(llama()), llama(), tokenizer(), tmp_path)


def test_sft_with_accumulation_and_checkpointing(tmp_path: Path) -> None:
    model = lora(llama())
    mask, before = random_mask(model), tensors(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=settings(tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[FishMaskCallback(mask)],
    )
    trainer.train()
    assert_only_selected_moved(before, tensors(model), mask)


@pytest.mark.real_data
def test_sft_on_the_real_small_llama(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "models/stories260K"
    model, base = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    words = AutoTokenizer.from_pretrained(folder)
    score_train_and_reload(get_peft_model(model, config), base, words, tmp_path)
