"""A training step on tensors without memory, and the same one really done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fish_tuning.experiments.costs.fake_models import make_fake, mask_fake
from fish_tuning.experiments.costs.live_bytes import LiveBytes
from fish_tuning.files.sizes import Described
from fish_tuning.sparse.masked_tensors import masked_tensors


def arguments(bf16: bool = False, checkpoints: bool = False) -> Any:
    return SimpleNamespace(
        bf16=bf16, fp16=False, activation_checkpointing=checkpoints, activation_checkpointing_kwargs=None
    )


def faked(model: Any, mask: Any = None, **how: Any) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    kept = {} if mask is None else {name: int(own.sum()) for name, own in mask.items() if not own.all()}
    with mode:
        beside = mask_fake(model, kept)
    return model, mode, beside


def shapes(batch: dict[str, torch.Tensor]) -> dict[str, Described]:
    return {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}


def real_pass(model: Any, batch: dict[str, torch.Tensor], args: Any) -> LiveBytes:
    """A step as the Trainer does it."""
    held = [*model.parameters(), *model.buffers()]
    for tensor in masked_tensors(model):
        held += [tensor.masked.read(), tensor.masked.frozen]
        held += tensor.masked.group.joined or [tensor.masked.index]
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    live = LiveBytes(held)
    live.of_gradients(p for p in model.parameters() if p.requires_grad)
    with live:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**inputs).loss
        del inputs
        loss.backward()
    return live
