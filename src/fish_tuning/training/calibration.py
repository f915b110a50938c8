"""What a Trainer trains on, as arguments for scoring: its batches, and what the loss of one example is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from fish_tuning.errors import ConfigurationError, FishTuningWarning
from fish_tuning.scores.loss_vectors import LossFunction
from fish_tuning.scores.scoring_state import random_state_kept

Batch = dict[str, Tensor]

OWN_LOSS = (
    "Score with a loss of your own, calculate_fisher_information(model, batches, loss_fn=...), and give the mask to "
    "add_mask(trainer, mask)."
)

# Trainers of other tools whose compute_loss ends in transformers' own. Where they train on another loss, an argument
# that is looked at says so: `compute_loss_func`, `orpo_alpha`.
MODELS_LOSS = {
    "axolotl.core.trainers.base.AxolotlTrainer",
    "llamafactory.train.sft.trainer.CustomSeq2SeqTrainer",
}


def calibration_of(trainer: Trainer, num_samples: int = 128) -> dict[str, Any]:
    """Arguments for `calculate_fisher_information` or `calculate_scores` that score what a Trainer trains on.

    What one example is, and its loss:

    - transformers' own Trainer, trl's SFTTrainer: a row; the negative log-likelihood of its labels.
    - trl's RewardTrainer: a preferred and a rejected answer; -log sigmoid(r+ - r- - margin), as trained.
    - trl's DPOTrainer: a preferred and a rejected answer; -log sigmoid of beta times the gap of log-ratios.
    - trl's GRPOTrainer: a completion, drawn by the model; -advantage times its tokens' mean log-likelihood.

    GRPO's is the gradient that its first step takes, without clip and KL term: these are 0 where training starts, and
    would hide completions once the warm-up before scoring has moved the model. Its completions are generated here, and
    what they cost is a first generation more. The Trainer is left as it was, its random state and its logs included.

    Args:
        trainer: a Trainer that is made, with its data.
        num_samples: examples to score: rows, pairs or completions.

    Returns:
        `calibration_dataloader` and `num_samples`, for preferences and completions `loss_fn` too, for preferences
        `rows_per_example`. Of preferences and completions the batches are a list that is made now.

    Raises:
        ConfigurationError: a Trainer without training data, another of trl's trainers, a DPO loss other than the
            sigmoid, packed or padding-free rows, which hold several examples, completions whose rewards tell nothing,
            or preferences or completions in several processes.

    Warns:
        FishTuningWarning: a plain Trainer or an SFTTrainer with a loss of its own (`compute_loss`,
            `compute_loss_func`, `label_smoothing_factor`, `loss_type="dft"`), which is not scored; parts of a loss of
            preferences or completions that are not (of routers, of entropy, a weight by length).

    Example:
        >>> trainer = DPOTrainer(model="...", peft_config=LoraConfig(), ...)  # doctest: +SKIP
        >>> scores = calculate_fisher_information(trainer.model, **calibration_of(trainer))  # doctest: +SKIP
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ConfigurationError(f"num_samples={num_samples!r} must be a whole number of at least 1.")
    if trainer.train_dataset is None:
        raise ConfigurationError(f"This {type(trainer).__name__} has no train_dataset, so there is nothing to score.")
    kind = _kind(trainer)
    _check_rows(trainer)
    if kind is None:
        _warn_of_own_loss(trainer)
        return {"calibration_dataloader": trainer.get_train_dataloader(), "num_samples": num_samples}
    if trainer.args.world_size > 1:
        raise ConfigurationError(
            f"{type(trainer).__name__} in {trainer.args.world_size} processes: its examples are made in one process. "
            "Score there, save_mask(mask, file), and give add_mask(trainer, load_mask(file)) in all of them."
        )
    _warn_of_parts_left_out(trainer, kind)
    make, loss_fn, rows = KINDS[kind]
    with random_state_kept(cast(nn.Module, trainer.model)):
        batches = make(trainer, num_samples * rows)
    found = {"calibration_dataloader": batches, "num_samples": num_samples, "loss_fn": loss_fn(trainer)}
    return found | ({"rows_per_example": rows} if rows > 1 else {})


def _kind(trainer: Trainer) -> str | None:
    """Which of trl's trainers this is; None where the model's own task says what the loss is."""
    names = [each.__name__ for each in type(trainer).__mro__ if each.__module__.split(".")[0] == "trl"]
    own = [name for name in names if name.endswith("Trainer") and not name.startswith("_")]
    found = next((name for name in own if name in KINDS), None)
    if own and found is None and "SFTTrainer" not in own:
        raise ConfigurationError(
            f"What one example's loss is in trl's {own[0]} is not known; known are SFTTrainer, {', '.join(KINDS)}. "
            f"{OWN_LOSS}"
        )
    return found


def _warn_of_own_loss(trainer: Any) -> None:
    """Where a Trainer trains on another loss than the model's own."""
    definer = next(
        each
        for each in type(trainer).__mro__
        if "compute_loss" in vars(each) and f"{each.__module__}.{each.__name__}" not in MODELS_LOSS
    )
    loss_type = getattr(trainer.args, "loss_type", "nll")
    reasons = {
        f"{definer.__name__}.compute_loss": definer.__module__.split(".")[0]
        not in ("transformers", "trl", "fish_tuning"),
        "orpo_alpha": bool(getattr(trainer.args, "orpo_alpha", None)),  # axolotl's
        "compute_loss_func": getattr(trainer, "compute_loss_func", None) is not None,
        f"label_smoothing_factor={trainer.args.label_smoothing_factor}": trainer.args.label_smoothing_factor,
        # trl's SFTTrainer; what is not known to be the likelihood's other name is another loss.
        f"loss_type={loss_type!r}": loss_type not in ("nll", "chunked_nll"),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        warnings.warn(
            f"{' and '.join(found)}: the Trainer trains on a loss of its own, and entries are scored by the model's. "
            f"{OWN_LOSS}", FishTuningWarning, stacklevel=3,
        )  # fmt: skip


def _warn_of_parts_left_out(trainer: Any, kind: str) -> None:
    """Of trl's losses of preferences and completions. Of rows, scoring itself tells of the routers' part."""
    args = trainer.args
    reasons = {"router_aux_loss_coef": getattr(trainer, "aux_loss_enabled", False)}
    if kind == "GRPOTrainer":
        loss_type, part = args.loss_type, getattr(args, "top_entropy_quantile", 1.0)
        reasons |= {
            # The others' first gradient is that of the mean over a completion's tokens; these weigh it by its length.
            f"loss_type={loss_type!r}": loss_type not in ("grpo", "bnpo", "dapo", "cispo", "sapo", "vespo"),
            f"top_entropy_quantile={part}": part < 1,
            "an entropy bonus": getattr(trainer, "_entropy_bonus_enabled", False),
        }
    if found := [reason for reason, holds in reasons.items() if holds]:
        warnings.warn(
            f"{' and '.join(found)}: a part of {kind}'s loss that no entry is scored by. {OWN_LOSS}",
            FishTuningWarning, stacklevel=3,
        )  # fmt: skip


def _check_rows(trainer: Any) -> None:
    packed = [
        name
        for name in ("packing", "sample_packing", "padding_free", "neat_packing")
        if getattr(trainer.args, name, False)
        or True in (getattr(trainer, name, False), getattr(trainer.data_collator, name, False))
    ]
    if packed:
        raise ConfigurationError(
            f"{packed[0]}=True puts several examples into one row, whose gradients would be squared as one. Score with "
            f"a {type(trainer).__name__} that is made without it, and give the mask to add_mask(trainer, mask)."
        )


def _first(batches: Iterator[Batch], rows: int) -> list[Batch]:
    """The first batches, until they hold so many rows."""
    taken: list[Batch] = []
    while rows > 0 and (batch := next(batches, None)) is not None:
        taken.append(batch)
        rows -= len(batch["input_ids"])
    return taken


# Preferences: trl's batches hold all preferred answers, then all rejected ones


def _pairs(batch: Mapping[str, Any]) -> Batch:
    """The batch with each rejected answer behind its preferred one; what there is once a pair is given to both."""
    number = len(batch["input_ids"]) // 2
    return {
        key: torch.stack(value.chunk(2), dim=1).flatten(0, 1)
        if len(value) == 2 * number
        else value.repeat_interleave(2, dim=0)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim()
    }


def _reward_pairs(trainer: Any, rows: int) -> list[Batch]:
    return _first(map(_pairs, trainer.get_train_dataloader()), rows)


def _reward_loss(trainer: Any) -> LossFunction:
    center = trainer.args.center_rewards_coefficient or 0.0

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        preferred, rejected = outputs.logits[:, 0].float().view(-1, 2).unbind(dim=1)
        margin = batch["margin"][::2] if "margin" in batch else 0.0
        losses: Tensor = center * (preferred + rejected).square() - F.logsigmoid(preferred - rejected - margin)
        return losses

    return loss


def _dpo_pairs(trainer: Any, rows: int) -> list[Batch]:
    losses = trainer.args.loss_type
    asked = {
        "loss_type": [kind for kind in ([losses] if isinstance(losses, str) else losses) if kind != "sigmoid"],
        "f_divergence_type": trainer.args.f_divergence_type != "reverse_kl" and trainer.args.f_divergence_type,
        "ld_alpha": trainer.args.ld_alpha is not None and trainer.args.ld_alpha,
        "use_weighting": trainer.args.use_weighting,
    }
    for name, value in asked.items():
        if value is not False and value != []:
            raise ConfigurationError(f"{name}={value!r}: of DPO's losses the sigmoid alone is known. {OWN_LOSS}")
    with _mode(trainer.model, training=False):
        return _first((_with_reference(trainer, batch) for batch in trainer.get_train_dataloader()), rows)


def _with_reference(trainer: Any, batch: Mapping[str, Any]) -> Batch:
    if unknown := set(batch) - PREFERENCES:
        raise ConfigurationError(f"The preferences hold {', '.join(sorted(unknown))} beside text. {OWN_LOSS}")
    if "ref_chosen_logps" in batch:
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    rows = {key: batch[key] for key in ("input_ids", "attention_mask", "completion_mask")}
    return _pairs({**rows, "ref_logps": torch.cat(reference)})


def _dpo_loss(trainer: Any) -> LossFunction:
    beta = trainer.args.beta

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ratios = (completion_logps(outputs.logits, batch) - batch["ref_logps"]).view(-1, 2)
        return -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))

    return loss


# Completions that the model draws, with what their rewards say of them


def _completions(trainer: Any, rows: int) -> list[Batch]:
    repeats = trainer.num_iterations * trainer.args.steps_per_generation  # of the same prompts, for further steps
    # In training mode, since trl groups completions by prompt as that mode has it.
    with _logs_kept(trainer), _mode(trainer.model, training=True):
        loader = islice(trainer.get_train_dataloader(), 0, None, repeats)
        batches = _first((_drawn(trainer, prompts) for prompts in loader), rows)
    if not any(bool(batch["advantages"].any()) for batch in batches):
        raise ConfigurationError(
            f"{rows} completions, and in no group of them do the rewards differ: nothing tells the entries apart. Draw "
            "more (num_samples), raise the temperature or num_generations, or look at the reward functions."
        )
    return batches


def _drawn(trainer: Any, prompts: Any) -> Batch:
    drawn = trainer._generate_and_score_completions(prompts)
    if "pixel_values" in drawn:
        raise ConfigurationError(f"The prompts hold images. {OWN_LOSS}")
    counted = drawn["completion_mask"] * drawn.get("tool_mask", 1)
    return {
        "input_ids": torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], dim=1),
        "attention_mask": torch.cat([drawn["prompt_mask"], drawn["completion_mask"]], dim=1),
        "completion_mask": torch.cat([torch.zeros_like(drawn["prompt_mask"]), counted], dim=1),
        "advantages": drawn["advantages"],
    }


def _completion_loss(trainer: Any) -> LossFunction:
    temperature = trainer.args.temperature

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logps = completion_logps(outputs.logits, batch, temperature)
        return -batch["advantages"] * logps / batch["completion_mask"][:, 1:].sum(dim=1).clamp(min=1)

    return loss


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, was in modes.items():
            module.training = was


@contextmanager
def _logs_kept(trainer: Any) -> Iterator[None]:
    """What trl would log of completions that no step is taken with is forgotten."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in ("_metrics", "_logs")}
    seen = trainer.state.num_input_tokens_seen
    try:
        yield
    finally:
        vars(trainer).update(kept)
        trainer.state.num_input_tokens_seen = seen


def completion_logps(logits: Tensor, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The log-likelihood of each row's completion, (n,); virtual tokens in front of the text are passed over."""
    labels, counted = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
    said = logits[:, -batch["input_ids"].shape[1] :][:, :-1][counted].float() / temperature
    losses = F.cross_entropy(said, labels[counted], reduction="none")
    return -losses.new_zeros(len(labels)).index_add(0, counted.nonzero()[:, 0], losses)


PREFERENCES = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
# How trl's trainers are scored: where the rows come from, their loss, and how many of them are one example.
KINDS: dict[str, tuple[Callable[[Any, int], list[Batch]], Callable[[Any], LossFunction], int]] = {
    "RewardTrainer": (_reward_pairs, _reward_loss, 2),
    "DPOTrainer": (_dpo_pairs, _dpo_loss, 2),
    "GRPOTrainer": (_completions, _completion_loss, 1),
}
