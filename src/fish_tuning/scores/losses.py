"""Per-example losses: one number an example, formed from that example alone.

A mean loss over a batch is not a mean of per-example losses (in a causal LM the tokens of the whole batch share one
denominator), so the Fisher information needs its own. The task is read off the model as transformers does for its
training loss; every loss here is a negative log-likelihood, so labels can also be drawn from the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning.errors import FisherError
from fish_tuning.scores.reading import placed

FisherType = Literal["empirical", "sampled", "expected"]
TokenReduction = Literal["mean", "sum"]
IGNORED = -100  # the label value that transformers leaves out of every loss

CLASSIFICATION = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification",
                  "ForVideoClassification")  # fmt: skip
TOKENWISE = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")
KNOWN = (*CLASSIFICATION, *TOKENWISE, "ForMultipleChoice", "ForCTC")
SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # by transformers' own loss, not by that of every such class
# Tasks that transformers knows by the model's class alone.
BY_CLASS = {"LMHeadModel": "ForCausalLM", "ForMultipleChoice": "ForMultipleChoice"}
ANSWER = ("start_positions", "end_positions")
_DRAWN: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are, the same numbers
LABELS = ("labels", "label", *ANSWER)


@dataclass(frozen=True)
class Likelihood:
    """p(y | x) as the model's head defines it, with labels already aligned to the logits.

    `labels` tells what they are: a class an example, a class (or -100) a token, or a value for every logit.
    `nll(logits, labels, known)` gives one value an example, (n,); `known` only tells which positions count.
    `sample(logits, known, generators)` draws labels with `generators[i]` for example i. `expected(logits)` gives
    vectors whose squared gradients add up to the exact expectation over labels. `known` may lie on the CPU, where a
    look at it waits for no GPU.
    """

    nll: Callable[[Tensor, Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]
    expected: Callable[[Tensor], list[Tensor]] | None
    labels: Literal["classes", "tokens", "values"]


def example_losses(
    logits: Tensor,
    labels: Tensor,
    likelihood: Likelihood,
    fisher_type: FisherType,
    generators: list[torch.Generator],
    known: Tensor | None = None,
) -> list[Tensor]:
    """The (n,) loss vectors whose squared per-example gradients, summed over vectors, are the Fisher information.

    One vector for the empirical Fisher (given labels) and the sampled one (labels drawn from the model); one a class
    for the exact expectation, weighted so that no further factor is needed: sum_c p_c (grad nll_c)^2.

    Args:
        known: the same labels on the CPU, for what is looked at there. Default: `labels`.
    """
    known = labels if known is None else known
    if likelihood.labels != "tokens":
        logits = logits.float()
    if fisher_type == "expected":
        if likelihood.expected is None:
            raise FisherError(
                "fisher_type='expected' sums over all labels, which only sequence classification and regression allow;"
                " use fisher_type='sampled' for token-wise and multi-label tasks."
            )
        return likelihood.expected(logits)
    if fisher_type == "sampled":
        with torch.no_grad():
            labels = likelihood.sample(logits, known, generators)
    return [likelihood.nll(logits, labels, known)]


def resolve_likelihood(model: nn.Module, logits: Tensor, labels: Tensor, token_reduction: TokenReduction) -> Likelihood:
    """The likelihood of the model's task, from its transformers loss type, configuration and labels.

    Raises FisherError when the task is none of sequence classification (single label, multi-label, regression),
    multiple choice, causal language modelling, token classification, masked language modelling, sequence to sequence
    and question answering, whose two "tokens" are the answer's start and end.
    """
    loss_type = loss_type_of(model)
    if loss_type in CLASSIFICATION:
        return _classification_likelihood(model, logits, labels)
    if loss_type == "ForMultipleChoice":
        return Likelihood(_class_nll, _sample_classes, _expected_classes, "classes")
    if loss_type in TOKENWISE:
        return _token_likelihood(token_reduction)
    raise FisherError(
        f"No per-example loss is known for {type(model).__name__} (transformers loss type: {loss_type!r}); known are "
        f"{', '.join(KNOWN)}. Pass loss_fn=f, where f(outputs, batch) returns one loss an "
        "example."
    )


def loss_type_of(model: Any) -> str | None:
    """The name of the loss that transformers trains the model with; some models carry none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    by_class = [kind for ending, kind in BY_CLASS.items() if type(base).__name__.endswith(ending)]
    return getattr(model, "loss_type", None) or next(iter(by_class), None)


def align_labels(
    model: nn.Module, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, shifted: bool | None = None
) -> Tensor:
    """Labels in the shape and order of the logits: shifted for causal models, padding set to -100.

    `shifted` says whether a label is laid beside the logits before it; default: where the task's own loss does so.

    Logits that are longer than the labels (virtual prompt tokens in front) get ignored labels there. What a causal
    model says at a padding position counts as little: in a left-padded row it is no prediction of the first token.
    """
    loss_type = loss_type_of(model)
    if loss_type not in TOKENWISE:
        return labels
    if loss_type == "ForQuestionAnswering":  # an answer beyond the text's end, where it was cut off, does not count
        return labels.masked_fill(labels >= logits.shape[2], IGNORED)
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    virtual = logits.shape[1] - labels.shape[1]
    padding = at_padding(labels, None if encoder_decoder else attention_mask)
    labels = F.pad(labels.masked_fill(padding, IGNORED), (virtual, 0), value=IGNORED)
    if (loss_type in SHIFTED and not encoder_decoder) if shifted is None else shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).masked_fill(F.pad(padding, (virtual, 0)), IGNORED)
    return labels


def at_padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which labels are those of padding; of a mask that runs along other tokens than the labels, none."""
    if attention_mask is None or attention_mask.shape != labels.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    return attention_mask == 0


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The batch's labels, under either of the two names in use, or an answer's (start, end); FisherError if none."""
    if all(isinstance(batch.get(key), Tensor) for key in ANSWER):
        return torch.stack([batch[key].flatten() for key in ANSWER], dim=1)
    for key in ("labels", "label"):
        if isinstance(batch.get(key), Tensor):
            return batch[key]  # type: ignore[no-any-return]
    raise FisherError(
        f"The calibration batch has no 'labels' tensor (found: {', '.join(map(str, batch)) or 'nothing'}). The Fisher "
        "information needs a label an example, also where it draws them itself, to know which tokens count. For a task "
        "whose target is something else, pass loss_fn=f, where f(outputs, batch) returns one loss an example."
    )


def _classification_likelihood(model: nn.Module, logits: Tensor, labels: Tensor) -> Likelihood:
    config = getattr(model, "config", None)
    problem_type = getattr(config, "problem_type", None)
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        elif labels.dtype.is_floating_point:
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"
    return {
        "regression": Likelihood(_regression_nll, _sample_regression, _expected_regression, "values"),
        "multi_label_classification": Likelihood(_multi_label_nll, _sample_multi_label, None, "values"),
        "single_label_classification": Likelihood(_class_nll, _sample_classes, _expected_classes, "classes"),
    }[problem_type]


def _class_nll(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.view(-1), reduction="none")


def _sample_classes(logits: Tensor, known: Tensor, generators: list[torch.Generator]) -> Tensor:
    uniform = torch.cat([torch.rand(1, 1, generator=generator, **_DRAWN) for generator in generators])
    return _draw(logits, placed(uniform, logits.device))


def _expected_classes(logits: Tensor) -> list[Tensor]:
    # The square root of p_c goes into the loss, so that squaring the gradient weighs it with p_c.
    log_p = F.log_softmax(logits, dim=-1)
    weights = (log_p.detach() / 2).exp()
    return list((-log_p * weights).unbind(dim=-1))


def _regression_nll(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    # Squared error, averaged over outputs as transformers does: up to a constant the negative log-likelihood of a
    # Gaussian whose variance is half the number of outputs.
    return (logits - labels.float().view_as(logits)).square().flatten(1).mean(dim=1)


def _sample_regression(logits: Tensor, known: Tensor, generators: list[torch.Generator]) -> Tensor:
    deviation = math.sqrt(logits[0].numel() / 2)
    noise = torch.stack([torch.randn(logits.shape[1:], generator=generator, **_DRAWN) for generator in generators])
    return logits + deviation * placed(noise, logits.device)


def _expected_regression(logits: Tensor) -> list[Tensor]:
    # E[(grad (f - y)^2 / d)^2] over y ~ N(f, d/2), summed over the d independent outputs: (2 / d) (grad f)^2 each.
    outputs = logits.flatten(1)
    return list((outputs * math.sqrt(2 / outputs.shape[1])).unbind(dim=1))


def _multi_label_nll(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(dim=-1)


def _sample_multi_label(logits: Tensor, known: Tensor, generators: list[torch.Generator]) -> Tensor:
    uniform = torch.stack([torch.rand(logits.shape[1:], generator=generator, **_DRAWN) for generator in generators])
    return (placed(uniform, logits.device) < logits.sigmoid()).float()


def _token_likelihood(reduction: TokenReduction) -> Likelihood:
    def nll(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        counted = known != IGNORED
        # Positions that do not count, as a chat model's prompts, need no fp32 copy and no softmax. Taking the others
        # out is a copy too, which pays where they are few.
        if int(counted.sum()) < counted.numel() / 2:
            places = placed(counted.nonzero(), logits.device).unbind(1)
            losses = F.cross_entropy(logits[places].float(), labels[places], reduction="none")
            totals = losses.new_zeros(labels.shape).index_put(places, losses).sum(dim=1)
        else:
            flat, classes = logits.flatten(0, 1).float(), labels.flatten()
            losses = F.cross_entropy(flat, classes, reduction="none", ignore_index=IGNORED)
            totals = losses.view_as(labels).sum(dim=1)
        return totals if reduction == "sum" else totals / (labels != IGNORED).sum(dim=1).clamp(min=1)

    def sample(logits: Tensor, known: Tensor, generators: list[torch.Generator]) -> Tensor:
        counted = known != IGNORED
        numbers = counted.sum(dim=1).tolist()
        drawn = placed(known.clone(), logits.device)
        columns = placed(counted.nonzero()[:, 1], logits.device).split(numbers)
        uniform = [torch.rand(number, 1, generator=g, **_DRAWN) for number, g in zip(numbers, generators, strict=True)]
        chances = placed(torch.cat(uniform), logits.device).split(numbers)
        for row, (of_row, chance) in enumerate(zip(columns, chances, strict=True)):
            drawn[row, of_row] = _draw(logits[row, of_row].float(), chance)
        return drawn

    return Likelihood(nll, sample, None, "tokens")


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One class for each row of `logits` (m, C), by as many numbers in [0, 1): what is drawn depends on no batch."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp_(
        max=logits.shape[-1] - 1
    )
