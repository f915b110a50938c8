"""Tasks beside classification and text: per-example losses are those that transformers trains on, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from device import DEVICE
from tiny import assert_scores_close, bert, causal_batch, llama, lora
from torch import Tensor, nn

from fish_tuning import FisherError, calculate_fisher_information

TEXT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0,
}  # fmt: skip


def ids(*shape: int) -> Tensor:
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(0))


def rebatch(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


def question_answering() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)), {
        "input_ids": ids(4, 9), "attention_mask": mask,
        "start_positions": torch.tensor([1, 0, 6, 3]), "end_positions": torch.tensor([2, 0, 8, 3]),
    }  # fmt: skip


def multiple_choice() -> tuple[nn.Module, dict[str, Tensor]]:
    model = hf.BertForMultipleChoice(hf.BertConfig(**TEXT))
    return model, {"input_ids": ids(4, 3, 7), "labels": torch.tensor([0, 2, 1, 1])}


def speech() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.Wav2Vec2Config(
        **TEXT, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", mask_time_prob=0.0, ctc_loss_reduction="mean",
    )  # fmt: skip
    labels = ids(4, 5)
    labels[2, 3:] = -100
    sounds = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[3, 300:] = 0
    return hf.Wav2Vec2ForCTC(config), {"input_values": sounds, "attention_mask": mask, "labels": labels}


def by_transformers(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squares of the gradients of the loss that the model itself gives for each row."""
    model.eval()
    count = len(next(iter(batch.values())))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for row in range(count):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for name in names:
            gradient = model.get_parameter(name).grad
            sums[name] += 0 if gradient is None else gradient.square() / count
    model.zero_grad()
    return {name: total.detach() for name, total in sums.items()}


@pytest.mark.parametrize("task", [question_answering, multiple_choice, speech])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_scores_are_of_the_loss_that_transformers_trains_on(task: Any, size: int) -> None:
    torch.manual_seed(0)
    model, batch = task()
    reference = by_transformers(model, batch)
    scores = calculate_fisher_information(model, rebatch(batch, size), progress=False)
    largest = max(float(each.norm()) for each in reference.values())
    told = [name for name, each in reference.items() if float(each.norm()) > 1e-8 * largest]
    assert len(told) > len(reference) / 2
    assert_scores_close({n: scores[n] for n in told}, {n: reference[n] for n in told}, tolerance=1e-4)


@pytest.mark.parametrize("task", [question_answering, multiple_choice])
def test_labels_can_be_drawn(task: Any) -> None:
    torch.manual_seed(0)
    model, batch = task()
    options: dict[str, Any] = {"fisher_type": "sampled", "progress": False}
    whole = calculate_fisher_information(model, [batch], **options)
    by_loop = calculate_fisher_information(model, rebatch(batch, 2), method="loop", **options)
    told = [name for name, scores in by_loop.items() if float(scores.norm()) > 1e-8]
    assert_scores_close({n: whole[n] for n in told}, {n: by_loop[n] for n in told}, tolerance=1e-4)


def test_an_answer_that_was_cut_off_does_not_count() -> None:
    model, batch = question_answering()
    batch["start_positions"] = torch.tensor([1, 0, 9, 3])
    batch["end_positions"] = torch.tensor([2, 0, 20, 3])
    with pytest.raises(FisherError, match=r"example 2 has no label that counts.*raise the maximal length"):
        calculate_fisher_information(model, [batch], progress=False)


def test_speech_draws_no_labels() -> None:
    model, batch = speech()
    with pytest.raises(FisherError, match="CTC has no labels of frames to draw"):
        calculate_fisher_information(model, [batch], fisher_type="sampled", progress=False)


# Groups of rows


def preference(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Bradley and Terry's: the first row of each pair is preferred."""
    rewards = outputs.logits[:, 0].view(-1, 2)
    return -nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_pairs_of_rows_are_one_example(method: Any, size: int) -> None:
    model, batch = lora(bert()).eval(), {"input_ids": ids(8, 7).to(DEVICE) // 3}
    batch["labels"] = torch.zeros(8, dtype=torch.long, device=DEVICE)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][3, 4:] = 0
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reference = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for pair in rebatch(batch, 2):
        model.zero_grad()
        preference(model(**pair), pair).sum().backward()
        for name in names:
            reference[name] += model.get_parameter(name).grad.square() / 4
    model.zero_grad()
    options: dict[str, Any] = {"loss_fn": preference, "rows_per_example": 2, "warmup_steps": 0, "progress": False}
    scores = calculate_fisher_information(model, rebatch(batch, size), method=method, **options)
    told = {name: scores.detach() for name, scores in reference.items() if scores.any()}
    assert_scores_close({name: scores[name] for name in told}, told)
    half = calculate_fisher_information(model, rebatch(batch, size), num_samples=2, method=method, **options)
    assert_scores_close(half, calculate_fisher_information(model, rebatch(batch, 4)[:1], **options))


def test_groups_that_do_not_come_out_even_are_refused() -> None:
    batch = {"input_ids": ids(5, 7) // 3, "labels": torch.zeros(5, dtype=torch.long)}
    with pytest.raises(FisherError, match=r"rows_per_example=2: 'input_ids' has 5 rows"):
        calculate_fisher_information(bert(), [batch], loss_fn=preference, rows_per_example=2, progress=False)
    with pytest.raises(FisherError, match="needs loss_fn"):
        calculate_fisher_information(bert(), [batch], rows_per_example=5, progress=False)
    with pytest.raises(FisherError, match="whole number of at least 1"):
        calculate_fisher_information(bert(), [batch], rows_per_example=0, loss_fn=preference, progress=False)


# What only the loss reads


class Strict(nn.Module):
    """Takes what it names, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Open(Strict):
    """Takes anything, and needs a part of it."""

    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(inputs["x"]) * inputs["weight"][:, None]


def weighted(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return batch["weight"] * outputs.square().sum(dim=1)


@pytest.mark.parametrize(("kind", "power"), [(Strict, 2), (Open, 6)])
def test_the_model_gets_what_it_takes_and_the_loss_all(kind: type[Strict], power: int) -> None:
    model, same = kind(), Strict()
    same.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"loss_fn": weighted, "progress": False}
    batch = {"x": torch.rand(5, 3), "weight": torch.full((5,), 2.0)}
    alone = calculate_fisher_information(same, [{**batch, "weight": torch.ones(5)}], **options)
    scores = calculate_fisher_information(model, [batch], **options)
    assert_scores_close(scores, {name: 2**power * score for name, score in alone.items()})


def test_a_transformers_model_is_not_given_what_only_the_loss_reads() -> None:
    model, batch = lora(llama()), causal_batch()
    seen: list[set[str]] = []
    model.get_base_model().register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["advantages"] * outputs.logits.square().mean(dim=(1, 2))

    batch |= {"advantages": torch.ones(4), "cu_seq_lens_q": torch.zeros(4)}
    calculate_fisher_information(model, [batch], loss_fn=loss, warmup_steps=0, progress=False)
    assert seen
    assert all("advantages" not in keys and {"input_ids", "cu_seq_lens_q"} <= keys for keys in seen)
