"""Tiny random models and batches, the same at every call: what the tests of the core are run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from device import DEVICE, placed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 40
PAD = 0
Batch = dict[str, Tensor]


def bert(num_labels: int = 3, seed: int = 0, layers: int = 2, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "num_labels": num_labels,
        "pad_token_id": PAD,
        "initializer_range": 0.3,  # far from the flat start of a real model: gradients of every tensor count
    }
    return placed(BertForSequenceClassification(BertConfig(**(settings | config))).eval())


def llama_config(**config: Any) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(settings | config))


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return placed(LlamaForCausalLM(llama_config(**config)).eval())


def llama_classifier(seed: int = 0, **config: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return placed(LlamaForSequenceClassification(llama_config(num_labels=3, **config)).eval())


def vit(seed: int = 0, **config: Any) -> ViTForImageClassification:
    torch.manual_seed(seed)
    settings = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
        "initializer_range": 0.3,
    }
    return placed(ViTForImageClassification(ViTConfig(**(settings | config))).eval())


def lora(model: nn.Module, rank: int = 4, seed: int = 0, **config: Any) -> PeftModel:
    """LoRA on the attention's projections. Both factors are random unless `init_lora_weights` is given."""
    torch.manual_seed(seed)
    kind = type(model).__name__
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1, "init_lora_weights": False}
    if kind.startswith("Llama"):
        settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "down_proj"]
        settings["task_type"] = "CAUSAL_LM" if kind.endswith("CausalLM") else "SEQ_CLS"
    elif kind.startswith("ViT"):
        settings["target_modules"] = ["q_proj", "v_proj"]
        settings["modules_to_save"] = ["classifier"]
    else:
        settings["target_modules"] = ["query", "value"]
        settings["task_type"] = "SEQ_CLS"
    return get_peft_model(model, LoraConfig(**(settings | config))).eval()  # type: ignore[return-value]


def text_batch(lengths: Sequence[int] = (5, 9, 3, 7), side: str = "right", seed: int = 0) -> Batch:
    """Padded rows of random ids with the given lengths; `side` is where the padding is."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def classification_batch(lengths: Sequence[int] = (5, 9, 3, 7), side: str = "right", classes: int = 3) -> Batch:
    return text_batch(lengths, side) | {"labels": torch.arange(len(lengths), device=DEVICE) % classes}


def regression_batch(lengths: Sequence[int] = (5, 9, 3, 7), outputs: int = 1) -> Batch:
    labels = torch.randn(len(lengths), outputs, generator=torch.Generator().manual_seed(1))
    return text_batch(lengths) | {"labels": labels.squeeze(-1).to(DEVICE)}


def causal_batch(
    lengths: Sequence[int] = (5, 9, 3, 7), side: str = "right", ignore_padding: bool = True, prompt: int = 0
) -> Batch:
    """Labels are the ids; padding is -100 only with `ignore_padding`, and so are the first `prompt` tokens of a row."""
    batch = text_batch(lengths, side)
    labels = batch["input_ids"].clone()
    if ignore_padding:
        labels[batch["attention_mask"] == 0] = -100
    for row, mask in zip(labels, batch["attention_mask"], strict=True):
        row[mask.nonzero()[:prompt, 0]] = -100
    return batch | {"labels": labels}


def image_batch(number: int = 4) -> Batch:
    pixels = torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(DEVICE), "labels": torch.arange(number, device=DEVICE) % 3}


def rebatch(batch: Batch, size: int) -> list[Batch]:
    """The batch as a loader that gives `size` rows at a time, the last one ragged."""
    number = len(batch["labels"])
    return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, number, size)]


def examples(batch: Batch) -> Iterator[Batch]:
    """Every row alone with its padding cut away, as if it had never been in a batch."""
    for row in rebatch(batch, 1):
        mask = row.get("attention_mask")
        if mask is None:
            yield row
            continue
        keep = mask[0].bool()
        width = mask.shape[1]
        yield {
            key: value[:, keep] if value.dim() > 1 and value.shape[1] == width and key != "pixel_values" else value
            for key, value in row.items()
        }


def reference_fisher(model: nn.Module, batch: Batch, token_reduction: str = "mean") -> dict[str, Tensor]:
    """The definition, with transformers' own training loss on each unpadded row alone, where the model is."""
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    model.eval()
    number = 0
    for row in examples(batch):
        loss = model(**row).loss
        if token_reduction == "sum":
            loss = loss * (row["labels"][:, 1:] != -100).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.float() ** 2
        number += 1
    return {name: total / number for name, total in totals.items()}


def relative_differences(scores: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor over its largest entry.

    Tensors whose gradient is zero but for rounding (the bias of the keys in attention) are left out: squares below
    1e-11 of the largest of the whole model are less than the square of fp32's rounding.
    """
    assert scores.keys() == reference.keys()
    scores, reference = ({name: t.detach().cpu() for name, t in each.items()} for each in (scores, reference))
    floor = 1e-11 * max(float(tensor.abs().max()) for tensor in reference.values())
    assert floor > 0
    return {
        name: float((scores[name] - tensor).detach().abs().max() / tensor.abs().max())
        if tensor.abs().max() > floor
        else float(scores[name].abs().max() > 10 * floor)
        for name, tensor in reference.items()
    }


def assert_scores_close(scores: Mapping[str, Tensor], reference: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    different = {n: d for n, d in relative_differences(scores, reference).items() if not d <= tolerance}
    assert not different, different


def only_trainable(model: nn.Module, names: Iterable[str]) -> None:
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def random_mask(model: nn.Module, share: float = 0.4, seed: int = 0, dense: Sequence[str] = ()) -> dict[str, Tensor]:
    """A random share of every trainable tensor; those whose name contains one of `dense` are kept whole."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.rand(parameter.shape, generator=generator).to(DEVICE if parameter.is_meta else parameter.device)
            < share
        )
        | any(part in name for part in dense)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name].cpu(), other[name].cpu())]
    assert not different, different


def assert_only_selected_moved(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor]
) -> None:
    """Every entry that the mask leaves out, and every tensor that it does not name, has the bits it had."""
    assert before.keys() == after.keys()
    before, after, mask = map(on_cpu, (before, after, mask))
    for name, tensor in before.items():
        moved = tensor != after[name]
        selected = mask.get(name, torch.zeros_like(moved))
        assert not (moved & ~selected).any(), name
    assert all((before[name] != after[name])[selected].any() for name, selected in mask.items() if selected.any())


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rows of a batch as a data set, on the CPU as data sets are."""

    def __init__(self, batch: Batch) -> None:
        self.batch = {key: value.cpu() for key, value in batch.items()}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> Batch:
        return {key: value[index] for key, value in self.batch.items()}
