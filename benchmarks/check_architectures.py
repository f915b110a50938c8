"""Scores and masks of every architecture of transformers that its own default configuration, made small, can build.

    python benchmarks/check_architectures.py [--tasks causal_lm ...] [--models bert llama ...] [--dtype bfloat16]
        [--adapters dora ia3 prefix ...]

For each: LoRA on all linear layers, then all of the model's weights, or the adapters that are asked for. Scores in
batches are compared with those of the loop (`method="loop"`), entry by entry in 32 bits and tensor by tensor in 16; a
masked step of SGD with the dense gradient, and the loss that is scored of an example with the model's own, in 32 bits.
Scores that differ in 32 bits are compared again in 64. Where they differ in 16, both ways are held against the loop in
32 bits: batches may be twice as far from it as the loop in 16 is. A line a model, and a table of what is not the same;
exit code 1 where anything is not.
"""

from __future__ import annotations

import argparse
import copy
import logging
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from architectures import ADAPTERS, TASKS, WHOLE, Unbuilt, adapted, built, classes_of
from common import DTYPES, print_table
from torch import Tensor, nn

from fish_tuning import FishTuningError, FishTuningWarning, apply_mask, calculate_fisher_information, remove_mask
from fish_tuning.scores import batches
from fish_tuning.scores.loss_vectors import LossVectors
from fish_tuning.scores.scoring_state import scoring_state

SECONDS = 100
# In 32 and 64 bits of a tensor's largest score, in 16 of its norm.
LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.15}
NEGLIGIBLE = {torch.float64: 1e-8, torch.float32: 1e-8, torch.bfloat16: 1e-4}  # of the largest tensor's norm


@dataclass
class Found:
    """Of one model: what was looked at, and whatever is not as it should be."""

    tensors: int = 0
    looped: int = 0
    rounded: float = 0.0  # how far from those in 32 bits scores are at most that differ in 16
    wrong: list[str] = field(default_factory=list)


def compare_scores(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, found: Found) -> None:
    by_loop = calculate_fisher_information(model, [batch], method="loop", warmup_steps=0, progress=False)
    with loop_counted(found), warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        scores = calculate_fisher_information(model, [batch], warmup_steps=0, progress=False)
    found.tensors += len(scores)
    off = {name: distance(scores[name], by_loop[name], dtype) for name in not_rounding(by_loop, dtype)}
    differ = [name for name, each in off.items() if not each <= LIMITS[dtype]]
    wide = scores_in_32_bits(model, batch) if differ and dtype == torch.bfloat16 else {}
    for name in differ:
        told = f"score of {name} off by {off[name]:.1e}"
        if wide:
            if name not in not_rounding(wide, dtype):
                continue
            rule, loop = (distance(each[name], wide[name], dtype) for each in (scores, by_loop))
            found.rounded = max(found.rounded, rule)
            if rule <= 2 * loop + LIMITS[dtype]:
                continue
            told += f", from 32 bits by {rule:.1e}, where the loop is by {loop:.1e}"
        found.wrong.append(told)


def not_rounding(scores: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """The tensors whose scores are more than rounding beside those of the largest."""
    norms = {name: float(each.norm()) for name, each in scores.items()}
    return [name for name, norm in norms.items() if norm > NEGLIGIBLE[dtype] * max(norms.values())]


def distance(scores: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Of a tensor's scores from those that are expected, to the size of these."""
    difference = scores - expected
    if dtype == torch.bfloat16:
        return float(difference.norm() / expected.norm())
    return float(difference.abs().amax() / expected.amax())


def scores_in_32_bits(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the loop, of the same weights and the same batch."""
    batch = {key: each.float() if each.is_floating_point() else each for key, each in batch.items()}
    wide = copy.deepcopy(model).float()
    return calculate_fisher_information(wide, [batch], method="loop", warmup_steps=0, progress=False)


@contextmanager
def loop_counted(found: Found) -> Iterator[None]:
    class Counted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "by the loop" in record.getMessage():
                found.looped += record.args[0] if isinstance(record.args, tuple) else 0  # type: ignore[operator]

    logger, handler = logging.getLogger("fish_tuning.scores.fisher"), Counted()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def compare_losses(model: nn.Module, batch: dict[str, Tensor], found: Found) -> None:
    """Of each example, the loss that is scored and the model's own, which batches and the loop know nothing of."""
    losses = LossVectors(model, "empirical", "mean", None, seed=0)
    with torch.no_grad(), scoring_state(model):
        for number in range(batches.batch_size(batch)):
            example = losses.trimmed(batches.rows(batch, number, number + 1))
            (scored,) = losses(example, number)
            own = getattr(model(**example), "loss", None)
            if own is not None and not torch.allclose(scored[0], own.float(), rtol=1e-4, atol=1e-5):
                found.wrong.append(f"loss of example {number}: {float(scored[0]):.5g}, its own {float(own):.5g}")


def compare_masked_step(model: nn.Module, batch: dict[str, Tensor], found: Found) -> None:
    """A step of SGD with a rate of 1 takes the gradient off selected entries, and leaves the others as they were."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for parameter in model.parameters():
        if places[id(parameter)] > 1:
            parameter.requires_grad_(False)  # tied tensors cannot be masked
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    before = {name: (p.detach().clone(), g) for (name, p), g in zip(trained.items(), gradients, strict=True)}
    generator = torch.Generator().manual_seed(1)
    mask = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in trained.items()}
    apply_mask(model, mask)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    masked_loss = model(**batch).loss
    masked_loss.backward()
    optimizer.step()
    remove_mask(model)
    if not torch.allclose(loss, masked_loss, rtol=1e-5):
        found.wrong.append("loss under a mask")
    for name, (weight, gradient) in before.items():
        now, selected = model.get_parameter(name).detach(), mask[name]
        step = torch.zeros_like(weight) if gradient is None else gradient
        if not torch.equal(now[~selected], weight[~selected]):
            found.wrong.append(f"frozen entries of {name}")
        largest = float(step.abs().amax()) if step.numel() else 0.0
        if not torch.allclose(now, torch.where(selected, weight - step, weight), rtol=1e-5, atol=1e-4 * largest + 1e-7):
            found.wrong.append(f"step of {name}")


def check(kind: str, name: str, task: str, dtype: torch.dtype, adapters: Sequence[str]) -> Found:
    model, batch = built(kind, name, task, dtype)
    found = Found()
    models = []
    for adapter in adapters:
        try:
            each = model if adapter == WHOLE else adapted(model, adapter, task).to(dtype)
            each(**batch)
        except (Exception, SystemExit) as error:  # PEFT adapts not every layer
            reason = f"{adapter}: {type(error).__name__}: {error}"
        else:
            models.append(each)
    if not models:
        raise Unbuilt(reason)
    for each in models:
        compare_scores(each, batch, dtype, found)
        if dtype == torch.float32:
            compare_losses(each, batch, found)
        if dtype == torch.float32 and getattr(each(**batch), "loss", None) is not None:
            compare_masked_step(each, batch, found)
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ended(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--models", nargs="+", help="kinds of models as transformers calls them; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--adapters", choices=[*ADAPTERS, WHOLE], nargs="+", default=["lora", WHOLE], metavar="ADAPTER",
        help=f"{', '.join(ADAPTERS)}, or {WHOLE} for all of the model's weights",
    )  # fmt: skip
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    seen: Counter[str] = Counter()
    rows = []
    for task, kind, name in classes_of(asked.tasks, asked.models):
        try:
            with at_most(SECONDS):
                found = check(kind, name, task, DTYPES[asked.dtype], asked.adapters)
            told = f"{found.tensors} tensors, {found.looped} by the loop"
            if found.rounded:
                told += f"; up to {found.rounded:.1e} off those in 32 bits, where they differ from the loop's"
            outcome = "not the same" if found.wrong else "the same"
            # Some lose so many digits that two exact ways differ in 32 bits; a wrong score is wrong in 64, too.
            if asked.dtype == "float32" and found.wrong and all(each.startswith("score") for each in found.wrong):
                with at_most(SECONDS):
                    if not check(kind, name, task, torch.float64, asked.adapters).wrong:
                        outcome, told = "the same in 64 bits", f"{told}; in 32 {found.wrong[0]}"
            rows += [[task, name, wrong] for wrong in found.wrong[:3] if outcome == "not the same"]
        except FishTuningError as refusal:
            outcome, told = "refused", str(refusal)
        except (Unbuilt, TimeoutError) as reason:
            outcome, told = "not built", str(reason).splitlines()[0][:90]
        except Exception as error:  # of any kind: it is what is looked for
            outcome, told = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append([task, name, told[:150]])
        seen[outcome] += 1
        print(f"{task} {name}: {outcome} ({told})", flush=True)
    print(f"\n{asked.dtype}: " + ", ".join(f"{number} {outcome}" for outcome, number in seen.most_common()))
    if rows:
        print_table(["task", "model", "what is not the same"], rows)
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
