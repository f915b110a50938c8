"""The costs of an experiment's arms as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fish_tuning.experiments.costs.devices import DeviceCosts
from fish_tuning.experiments.costs.experiment_costs import ArmCosts, ExperimentCosts
from fish_tuning.experiments.report.tables import human_bytes, plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEGEND = (
    "Exact: parameters, weights, gradients, optimizer, files, and what is sent in a ring. Estimated (~): activations, "
    "peak, calibration and what is gathered. They are counted tensor by tensor, without what an allocator rounds up "
    "and holds in reserve, a GPU's own context, and what most kernels and communication use inside themselves."
)
_MOST_COLUMNS = 5  # of devices, side by side


def show_costs(console: Console, costs: ExperimentCosts) -> None:
    """Print them: files and calibration of each arm, then memory and traffic of a device."""
    console.print(plain_table(*arm_rows(costs), title=f"{costs.experiment}: what each arm needs"))
    for arms in alike(costs.arms):
        title = f"{', '.join(arms)}: a device ({costs.kind}, {costs.strategy})"
        for table in device_tables(next(arm for arm in costs.arms if arm.arm == arms[0]), title):
            console.print()
            console.print(table)
    console.print()
    for note in (LEGEND, *costs.notes):
        console.print(f"note: {note}")


def arm_rows(costs: ExperimentCosts) -> tuple[list[str], list[list[str]]]:
    """What does not depend on the number of devices."""
    headers = ["arm", "trained parameters", "adapter file", "mask file", "checkpoint", "calibration ~"]
    rows = [
        [
            arm.arm,
            f"{arm.trainable_parameters:,}",
            human_bytes(arm.files.adapter),
            human_bytes(arm.files.mask),
            human_bytes(arm.files.checkpoint),
            human_bytes(arm.calibration_peak),
        ]
        for arm in costs.arms
    ]
    return headers, rows


def alike(arms: tuple[ArmCosts, ...]) -> list[list[str]]:
    """Names of arms that need the same."""
    groups: dict[tuple[DeviceCosts, ...], list[str]] = {}
    for arm in arms:
        groups.setdefault(arm.devices, []).append(arm.arm)
    return list(groups.values())


def device_tables(arm: ArmCosts, title: str) -> Iterator[Table]:
    """A column for each number of devices; several tables where they are many."""
    lines: list[tuple[str, Callable[[DeviceCosts], int | None]]] = [
        ("weights", lambda device: device.weights),
        ("gradients", lambda device: device.gradients),
        ("optimizer", lambda device: device.optimizer),
        ("activations ~", lambda device: device.activations),
        ("buckets to send", lambda device: device.buckets),
        ("gathered ~", lambda device: device.gathered),
        ("peak of all ~", lambda device: device.peak),
        ("sent in a step", lambda device: device.traffic),
    ]
    for start in range(0, len(arm.devices), _MOST_COLUMNS):
        devices = arm.devices[start : start + _MOST_COLUMNS]
        rows = [
            [name, *(human_bytes(line(device)) for device in devices)]
            for name, line in lines
            if any(line(device) != 0 for device in devices)  # no such thing here
        ]
        headers = [f"of {device.devices}" for device in devices]
        yield plain_table(["", *headers], rows, title=title)
