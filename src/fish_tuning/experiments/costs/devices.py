"""One device's share of memory and traffic, by how a training is spread over several: plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class FrozenParts:
    """Bytes of the frozen parts of masked tensors that FSDP shards: all, in the layer with most, and in no layer."""

    total: int = 0
    largest_layer: int = 0
    rest: int = 0


@dataclass(frozen=True)
class Sizes:
    """Bytes of a training on one device, before it is spread.

    Args:
        parameters: of the model, frozen ones and trained values; what FSDP and ZeRO-3 shard.
        replicated: what ZeRO leaves whole on every device: buffers, the tensors of masked entries, and their positions.
        frozen_parts: of `replicated`: what FSDP shards.
        buffers: the part of `replicated` that DDP sends before a forward pass.
        largest_layer, rest: of `parameters`: those of the largest repeated layer, and of all that is in none.
        trained: of the values that train.
        gradients: of their gradients.
        optimizer: of the optimizer's state.
        copies: fp32 copies of trained values in 16 bits, which DeepSpeed keeps.
        step: what the optimizer's step needs beside all of these.
        workspace: what products of matrices have been given, and keep.
        accumulates: over how many batches gradients are accumulated.
    """

    parameters: int
    replicated: int
    buffers: int
    largest_layer: int
    rest: int
    trained: int
    gradients: int
    optimizer: int
    copies: int
    step: int
    workspace: int = 0
    accumulates: int = 1
    frozen_parts: FrozenParts = FrozenParts()

    def under(self, strategy: str) -> Sizes:
        """What is sharded by it, and what is not."""
        if strategy != "fsdp":
            return self
        parts = self.frozen_parts
        return replace(
            self,
            parameters=self.parameters + parts.total,
            replicated=self.replicated - parts.total,
            largest_layer=self.largest_layer + parts.largest_layer,
            rest=self.rest + parts.rest,
            frozen_parts=FrozenParts(),
        )


@dataclass(frozen=True)
class DeviceCosts:
    """Bytes of one of several devices. `traffic` is what it sends in one step of the optimizer, in a ring.

    `activations` and `peak` are None where the model could not be traced.
    """

    devices: int
    weights: int
    gathered: int
    gradients: int
    buckets: int
    optimizer: int
    activations: int | None
    peak: int | None
    traffic: int


def device_costs(
    sizes: Sizes, strategy: str, devices: int, activations: int | None, peak: Callable[[float], int] | None
) -> DeviceCosts:
    """The costs of each of so many devices.

    Args:
        activations: the most bytes beside gradients in a forward and backward pass.
        peak: `peak(share)` is the most bytes of that pass when a device keeps that share of each gradient.
    """
    if devices == 1:
        strategy = "ddp"  # with one device there is nothing to spread
    sizes = sizes.under(strategy)
    shards_parameters, shards_gradients = strategy in ("fsdp", "zero3"), strategy != "ddp"
    part = 1 / devices
    weights = sizes.replicated + (math.ceil(sizes.parameters * part) if shards_parameters else sizes.parameters)
    gathered = min(sizes.parameters, sizes.rest + 2 * sizes.largest_layer) if shards_parameters else 0
    whole = strategy == "fsdp" and sizes.accumulates > 1  # FSDP keeps them whole until the last batch
    share = part if shards_gradients and not whole else 1.0
    gradients = math.ceil(sizes.gradients * share)
    buckets = sizes.gradients if strategy == "ddp" and devices > 1 else 0
    held = part if shards_gradients else 1.0
    optimizer = math.ceil(sizes.optimizer * held)
    if strategy.startswith("zero"):
        optimizer += math.ceil(sizes.copies * held)
    kept = weights + optimizer + buckets + sizes.workspace
    passing = None if peak is None else peak(share) + gathered
    stepping = gradients + math.ceil(sizes.step * held)
    return DeviceCosts(
        devices=devices,
        weights=weights,
        gathered=gathered,
        gradients=gradients,
        buckets=buckets,
        optimizer=optimizer,
        activations=activations,
        peak=None if passing is None else kept + max(passing, stepping),
        traffic=traffic(sizes, strategy, devices),
    )


def traffic(sizes: Sizes, strategy: str, devices: int) -> int:
    """Bytes that a device sends in one step of the optimizer.

    In a ring of N, gathering or reducing-and-scattering B bytes sends (N - 1) / N of B, and an all-reduce twice that.
    """
    if devices == 1:
        return 0
    sizes = sizes.under(strategy)
    times = sizes.accumulates
    ring = (devices - 1) / devices
    if strategy == "ddp":
        return round(2 * ring * sizes.gradients) + times * sizes.buffers
    if strategy == "zero2":
        return round(ring * (times * sizes.gradients + sizes.trained))
    reduced = times if strategy == "zero3" else 1
    return round(ring * (2 * times * sizes.parameters + reduced * sizes.gradients))
