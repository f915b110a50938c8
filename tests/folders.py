"""Local folders in place of hub names: tiny models, a tokenizer and data sets that can be learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, LlamaConfig

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "dull", "film", "story", "plot", "it", "was", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)


def write_bert(folder: Path, weights: bool = True, **config: int) -> Path:
    """A BERT folder with tokenizer; without weights it serves for counting only."""
    write_tokenizer(folder)
    settings = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
    } | config
    if weights:
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(**settings)).bert.save_pretrained(folder)
    else:
        BertConfig(**settings).save_pretrained(folder)
    return folder


def write_llama_config(folder: Path, **config: int) -> Path:
    """A Llama configuration and a tokenizer, no weights."""
    write_tokenizer(folder)
    LlamaConfig(**config).save_pretrained(folder)
    return folder


def sentences(number: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts whose class is plain to see: half the words are of one kind."""
    chooser = random.Random(seed)
    labels = [index % 2 for index in range(number)]
    texts = [
        " ".join(
            chooser.choice(WORDS[4 * (1 - label) : 4 * (1 - label) + 4] + WORDS[8:])
            for _ in range(chooser.randint(3, 9))
        )
        for label in labels
    ]
    return texts, labels


def write_sentences(folder: Path, train: int = 48, validation: int = 24) -> Path:
    """Single sentences with classes, as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, number, seed in (("train", train, 0), ("validation", validation, 1)):
        texts, labels = sentences(number, seed)
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


def write_pairs(folder: Path, number: int = 24) -> Path:
    """Pairs of sentences with a score, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, seed in (("train", 0), ("validation", 1)):
        texts, labels = sentences(number, seed)
        rows = [
            {"idx": i, "sentence1": text, "sentence2": texts[-i - 1], "label": label + 0.25}
            for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
