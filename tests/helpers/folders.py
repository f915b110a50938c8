"""Local folders in place of hub names: tiny models, a tokenizer and data sets that can be learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, the four usual special ones among them."""
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_llama(folder: Path, chat: bool = False) -> Path:
    """A tiny random Llama whose tokenizer knows whole words and single digits."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", *WORDS, *"0123456789", "plus", "is"]
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_sums(folder: Path, number: int = 24) -> Path:
    """Questions whose answers end with a number, as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(0)
    for split in ("train", "test"):
        pairs = [(chooser.randint(0, 4), chooser.randint(0, 4)) for _ in range(number)]
        rows = {
            "question": [f"{a} plus {b}" for a, b in pairs],
            "answer": [f"it is {a + b}" for a, b in pairs],
        }
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def write_entities(folder: Path, number: int = 24, names: list[str] | None = None) -> Path:
    """Sentences in words with a tag each, where the words tell the tag; as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or ["O", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    for split, seed in (("train", 0), ("validation", 1)):
        texts, _ = sentences(number, seed)
        words = [text.split() for text in texts]
        tags = [[1 if word in WORDS[:4] else 2 if word in WORDS[4:8] else 0 for word in row] for row in words]
        Dataset.from_dict({"tokens": words, "ner_tags": tags}, features=features).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder
