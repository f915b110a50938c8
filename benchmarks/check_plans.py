"""What `fish-tuning plan` says of every architecture of transformers, beside what a step and a scoring take.

    python benchmarks/check_plans.py [--tasks causal_lm ...] [--models bert llama ...]

Of each that its default configuration, made small, builds (`check_architectures.py`): LoRA on all linear layers, dense
and masked, and the scores of what trains; memory as torch's CPU allocator tells it, allocation by allocation
(`measured_plans.py`). A line a model, and a table of what is off by more than a tenth or cannot be traced; exit code 1
where anything is off.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from architectures import Unbuilt, adapted, built, classes_of, labelled, texts
from check_architectures import at_most
from common import print_table
from measured_plans import LIMIT, peak_above
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from fish_tuning import FisherError, apply_mask, calculate_fisher_information
from fish_tuning.experiments.costs.fake_models import make_fake, mask_fake
from fish_tuning.experiments.costs.scoring_pass import scoring_peak
from fish_tuning.experiments.costs.training_pass import training_pass
from fish_tuning.files.sizes import Described

TASKS = ("causal_lm", "seq_cls", "token_cls", "image_cls")  # of experiments
SECONDS = 100


def batch_of(task: str, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Eight examples; texts of 48 tokens, one of them padded, as a batch of an experiment has."""
    classes = torch.arange(8) % 3
    if task == "image_cls":
        return {"pixel_values": small["pixel_values"].repeat(2, 1, 1, 1), "labels": classes}
    batch = texts((48,) * 7 + (40,))
    ids = batch["input_ids"]
    labels = {"causal_lm": ids, "token_cls": ids % 3}
    return labelled(batch, labels[task]) if task in labels else batch | {"labels": classes}


def step(model: Any, batch: Mapping[str, Tensor]) -> None:
    loss = model(**{name: tensor.clone() for name, tensor in batch.items()})["loss"]
    loss.backward()


def measured_step(model: Any, batch: Mapping[str, Tensor]) -> int:
    model.train()
    step(model, batch)  # what is made once is no cost of a step
    model.zero_grad()
    peak = peak_above(lambda: step(model, batch))
    model.zero_grad()
    return peak


def quarter(size: int) -> int:
    return max(1, size // 4)


def first_quarter(parameter: Tensor) -> Tensor:
    selected = torch.zeros(parameter.numel(), dtype=torch.bool)
    selected[: quarter(parameter.numel())] = True
    return selected.view(parameter.shape)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def measured(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    found = {"dense": measured_step(model, batch)}
    with suppress(FisherError):  # a model of no known loss
        found["scores"] = peak_above(
            # Of two batches, since the first one's proof makes no small products together.
            lambda: calculate_fisher_information(model, [batch] * 2, warmup_steps=0, progress=False)
        )
    apply_mask(model, {name: first_quarter(parameter) for name, parameter in trained(model).items()})
    return found | {"masked": measured_step(model, batch)}


def planned(model: nn.Module, batch: dict[str, Tensor], args: TrainingArguments) -> tuple[dict[str, int], str]:
    """Bytes, and why some are missing."""
    shapes = {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    found: dict[str, int] = {}
    missing = ""
    for kind in ("dense", "masked", "scores"):
        fake, mode = copy.deepcopy(model).train(), FakeTensorMode(allow_non_fake_inputs=True)
        make_fake(fake, mode)
        try:
            if kind == "scores":
                found[kind] = scoring_peak(fake, mode, shapes, args, "fisher", 0, gpu=False).peak
                continue
            kept = {name: quarter(p.numel()) for name, p in trained(fake).items()} if kind == "masked" else {}
            with mode:
                beside = mask_fake(fake, kept)
            found[kind] = training_pass(fake, mode, shapes, args, gpu=False, beside=beside).peak()
        except Exception as error:  # of other people's models, on tensors without values
            missing = f"{kind}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return found, missing


def check(kind: str, name: str, task: str, args: TrainingArguments) -> tuple[dict[str, float], str]:
    """Ratios of what is planned to what is measured, and why some are missing."""
    model, small = built(kind, name, task, torch.float32)
    if task == "seq_cls":
        model.config.problem_type = "single_label_classification"  # as experiments set it
    batch = batch_of(task, small)
    try:
        model = adapted(model)
        if getattr(model(**batch), "loss", None) is None:
            raise Unbuilt("it gives no loss")
        step(copy.deepcopy(model).train(), batch)
    except Unbuilt:
        raise
    except (Exception, SystemExit) as error:  # PEFT adapts not every layer, nor does every model train
        raise Unbuilt(f"{type(error).__name__}: {error}") from None
    said, missing = planned(model, batch, args)
    real = measured(model, batch)
    return {kind: said[kind] / real[kind] for kind in said if kind in real}, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--models", nargs="+", help="kinds of models as transformers calls them; default: all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    args = TrainingArguments(use_cpu=True, report_to="none")
    seen: Counter[str] = Counter()
    rows, off = [], 0
    for task, kind, name in classes_of(asked.tasks, asked.models):
        try:
            with at_most(SECONDS):
                ratios, missing = check(kind, name, task, args)
        except (Unbuilt, TimeoutError) as reason:
            seen["models not built"] += 1
            print(f"{task} {name}: not built ({str(reason).splitlines()[0][:90]})", flush=True)
            continue
        wrong = {what: ratio for what, ratio in ratios.items() if not abs(ratio - 1) <= LIMIT}
        seen.update("off" if what in wrong else "within a tenth" for what in ratios)
        seen["not traced"] += 3 - len(ratios)
        off += len(wrong)
        told = ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items())
        print(f"{task} {name}: {told or 'nothing'}{missing and f' (not traced: {missing})'}", flush=True)
        if wrong or missing:
            rows.append([task, name, ", ".join(f"{what} {ratio:.3f}" for what, ratio in wrong.items()), missing])
    print("\nplanned / measured: " + ", ".join(f"{number} {outcome}" for outcome, number in seen.most_common()))
    if rows:
        print_table(["task", "model", "off", "not traced"], rows)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
