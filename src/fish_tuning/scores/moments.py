"""One pass over the calibration examples: mean gradients and mean squares of every trainable tensor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.errors import FisherError, FishTuningWarning
from fish_tuning.model_walks import walked_once
from fish_tuning.scores.batches import Batch, batch_size, calibration_batches
from fish_tuning.scores.finite import check_finite
from fish_tuning.scores.first_examples import first_batches, first_rounds, places
from fish_tuning.scores.left_out import LeftOut
from fish_tuning.scores.lockstep import Lockstep, Share, rounds
from fish_tuning.scores.loss_vectors import UNREAD, LossFunction, LossVectors
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.one_start import different_frozen, one_start
from fish_tuning.scores.prepared import prepared
from fish_tuning.scores.processes import Processes
from fish_tuning.scores.prompts import a_prompt_each
from fish_tuning.scores.renormed import tables_kept
from fish_tuning.scores.scorer import Scorer
from fish_tuning.scores.scoring_state import random_state_kept, scoring_state
from fish_tuning.scores.sharded_models import gathered_layer_by_layer, whole_trained_tensors
from fish_tuning.scores.totals import Scores, Totals
from fish_tuning.scores.validation import (
    check_arguments,
    check_rows_per_example,
    check_split,
    check_warmup,
    device_errors_explained,
)
from fish_tuning.scores.warmup import WARMUP_EXAMPLES, warmed_up, warmup_steps_needed

logger = logging.getLogger("fish_tuning.scores.fisher")


@dataclass(frozen=True)
class Moments:
    """What a calibration pass tells of every entry's gradient; tensors by name, in the shapes of their parameters.

    Args:
        mean_gradients: g_i = (1/N) sum_n d loss_n / d theta_i; empty where they were not asked for.
        mean_squares: F_i = (1/N) sum_n (d loss_n / d theta_i)^2, the diagonal Fisher information.
        num_samples: N.
        weights: the values at which they were measured, where these are not the model's own: after warm-up, and of
            tensors that the first of several processes has otherwise; else empty.
    """

    mean_gradients: dict[str, Tensor]
    mean_squares: dict[str, Tensor]
    num_samples: int
    weights: dict[str, Tensor] = field(default_factory=dict)


def measure_moments(
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    device: torch.device | str | None = None,
    *,
    gradients: bool = True,
    num_samples: int | None = None,
    fisher_type: FisherType = "empirical",
    token_reduction: TokenReduction = "mean",
    method: Literal["auto", "loop"] = "auto",
    loss_fn: LossFunction | None = None,
    rows_per_example: int = 1,
    seed: int = 0,
    scores_dtype: torch.dtype = torch.float32,
    scores_device: torch.device | str | None = None,
    warmup_steps: int | None = None,
    split_between_processes: bool | Literal["already"] = True,
    progress: bool = True,
    stacklevel: int = 1,
) -> Moments:
    """Mean gradients and mean squared gradients of every trainable tensor, exact per example, in one pass.

    From g and F follows all that first-order scores need: F - g^2 is the variance of an entry's gradient over examples.
    The gradients are those of each example's own loss, in evaluation mode, averaged over examples.

    Args:
        gradients: whether the mean gradients are wanted; without them this is `calculate_fisher_information`, whose
            other arguments it shares.
        stacklevel: of warnings, counted from the caller.

    Raises:
        FisherError: as `calculate_fisher_information`; also for mean gradients of drawn or expected labels, which are
            nothing but noise around zero.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning import measure_moments
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> batch = {"input_ids": torch.randint(5, 99, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> moments = measure_moments(BertForSequenceClassification(config), [batch], progress=False)
        >>> moments.mean_gradients["classifier.weight"].shape
        torch.Size([2, 16])
    """
    check_arguments(model, fisher_type, token_reduction, method, loss_fn, num_samples, seed, scores_dtype)
    check_warmup(warmup_steps)
    check_split(split_between_processes)
    check_rows_per_example(rows_per_example, loss_fn)
    if gradients and fisher_type != "empirical":
        raise FisherError(
            f"fisher_type={fisher_type!r}: the mean gradient under the model's own labels is zero but for chance. Use "
            "fisher_type='empirical', or gradients=False."
        )
    with whole_trained_tensors(model) as model:
        model, trainable, target = prepared(model, device)
        totals = Totals.zeros(trainable, scores_dtype, scores_device, gradients)
        with walked_once(model):
            scored = LossVectors(model, fisher_type, token_reduction, loss_fn, seed, rows_per_example)
            scorer = Scorer(model, trainable, scored, method, totals)
        steps = warmup_steps_needed(model, trainable) if warmup_steps is None else warmup_steps
        processes = Processes(calibration_dataloader, split_between_processes, target)
        wanted = processes.examples(num_samples, rows_per_example)
        left_out, given = LeftOut(model), scored.of_given_labels()
        work = _Work(scorer, given, steps, seed, processes, left_out, target, wanted, progress, stacklevel + 1)
        together = _must_go_together(model, processes)
        weights: Scores = {}
        seen, error = 0, None
        try:
            noted = left_out.noted(processes.noted(num_samples, rows_per_example))
            batches = calibration_batches(noted, target, wanted, rows_per_example)
            seen, weights = _in_lockstep(work, batches) if together else _by_itself(work, batches)
        except Exception as raised:
            error = raised
        processes.agree(error)
        seen = processes.add_up(scorer.totals, seen, by_all=together)
        if not seen:
            raise FisherError("The calibration dataloader gave no example.")
        if num_samples is not None and seen < num_samples:
            logger.warning("Fisher information: %d examples asked for, the loader gave %d.", num_samples, seen)
        check_finite(model, scorer.totals.squares)
        return Moments(*scorer.totals.means(seen), seen, weights)


@dataclass(frozen=True)
class _Work:
    scorer: Scorer
    trained_on: LossVectors  # in warm-up
    steps: int
    seed: int
    processes: Processes
    left_out: LeftOut
    target: torch.device
    wanted: int | None
    progress: bool
    stacklevel: int
    notes: list[str] = field(default_factory=list)

    def bar(self) -> Any:
        """Of the examples that are scored; warm-up has one of its own before."""
        return tqdm(total=self.wanted, desc="Fisher information", unit="ex", disable=not self.progress, leave=False)

    def warn(self) -> None:
        told = (*self.left_out.new(), *self.scorer.new_failures(), *self.scorer.losses.own.new_notes())
        for message in (*self.notes, *told):
            warnings.warn(message, FishTuningWarning, stacklevel=self.stacklevel + 2)
        self.notes.clear()


def _must_go_together(model: nn.Module, processes: Processes) -> bool:
    """Whether the model lies on several processes, so that none can pass it alone; FisherError where this one is to."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    sharded = several and gathered_layer_by_layer(model)
    if sharded and processes.number == 1:
        raise FisherError(
            "split_between_processes=False: the model is sharded, so no process can score it by itself. Leave it out, "
            "and call this in all processes."
        )
    return sharded


def _by_itself(work: _Work, batches: Iterator[Batch]) -> tuple[int, Scores]:
    """This process's share, in its own time; gives how many examples its loader gave, and weights as `_ready`."""
    scorer, processes, target = work.scorer, work.processes, work.target
    losses, seen, needed = scorer.losses, 0, WARMUP_EXAMPLES * work.steps
    # Kept, since a loader may give others, or none, when it is asked again.
    with random_state_kept(losses.model):  # a loader that shuffles draws from it
        if processes.has_own_part:  # and all warm up on the same: those that one process would have
            every = list(chain.from_iterable(first_rounds(rounds(processes, batches), needed)))
            first = [share.batch for share in every if share.owner == processes.rank]
        else:
            first = first_batches(batches, needed)
            every = [Share(batch, 0, 0) for batch in first]
    with _ready(work, every) as weights, work.bar() as bar:
        for number, batch in enumerate(chain(first, batches)):
            if processes.takes(number):
                with device_errors_explained(losses.model, target):
                    scorer.add(losses.trimmed(batch), first_example=processes.first_example(seen))
            losses.check_finite(unread=UNREAD)
            work.warn()
            seen += batch_size(batch)
            bar.update(batch_size(batch))
        losses.check_finite()
    return seen, weights


def _in_lockstep(work: _Work, batches: Iterator[Batch]) -> tuple[int, Scores]:
    """The same with the other processes, pass by pass; gives how many examples there were in all."""
    losses, left, seen = work.scorer.losses, rounds(work.processes, batches), 0
    with random_state_kept(losses.model):
        first = first_rounds(left, WARMUP_EXAMPLES * work.steps)
    lockstep = Lockstep(work.scorer, losses, work.processes)
    with _ready(work, list(chain.from_iterable(first))) as weights, work.bar() as bar:
        for shares in chain(first, left):
            lockstep.add(shares)
            work.warn()
            number = sum(batch_size(share.batch) for share in shares)
            seen += number
            bar.update(number)
        losses.check_finite()
    return seen, weights


@contextmanager
def _ready(work: _Work, first: list[Share]) -> Iterator[Scores]:
    """The model as it is scored: quiet, warmed up, watched. Gives its weights where they are not this process's own."""
    model, trainable = work.trained_on.model, work.scorer.trainable
    with ExitStack() as stack:
        with walked_once(model):
            for state in (tables_kept(model), scoring_state(model), a_prompt_each(model)):
                stack.enter_context(state)
        if work.steps:
            with device_errors_explained(model, work.target):
                stack.enter_context(_warmed_up(work, first))
        others = stack.enter_context(one_start(work.processes, trainable))
        weights = {name: trainable[name].detach().clone() for name in (trainable if work.steps else others)}
        if (name := different_frozen(work.processes, model)) is not None:
            work.notes.append(
                f"Fisher information: {name!r}, which is frozen, is not the same in all processes, so that each scores "
                "its examples on another model. Load the same weights in all of them, or draw them from one seed."
            )
        stack.enter_context(work.scorer.probes)
        yield weights


def _warmed_up(work: _Work, first: list[Share]) -> AbstractContextManager[None]:
    in_order = places(first, work.processes.order)
    batches = [share.batch for share in first]
    return warmed_up(
        work.trained_on.model, work.scorer.trainable, work.trained_on, batches, work.steps,
        places=in_order, seed=work.seed, progress=work.progress,
    )  # fmt: skip
