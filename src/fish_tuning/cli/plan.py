"""`fish-tuning plan`."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

from fish_tuning.cli.application import (
    ConfigArgument,
    ExtensionOption,
    app,
    console,
    errors_told,
    quiet_libraries,
    renamings_untold,
)
from fish_tuning.cli.output import stdout_kept, write_document


class HowPlanned(NamedTuple):
    """What an experiment is planned for; the options of `fish-tuning plan`."""

    devices: str = "1,2,4,8"
    strategy: str = "ddp"
    on: str | None = None
    tokens: int | None = None
    as_json: bool = False
    extensions: tuple[str, ...] = ()


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the file, as those of run.")
    ] = None,
    devices: Annotated[str, typer.Option(metavar="N,N", help="How many devices share a training.")] = "1,2,4,8",
    strategy: Annotated[str, typer.Option(help="How they share it: ddp, fsdp, zero2 or zero3.")] = "ddp",
    on: Annotated[
        str | None, typer.Option(help="cpu or cuda, whose kernels to plan for; by default what would train here.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Length of the longest text; by default that of the training set's.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="All of it in bytes, as one JSON document on standard output.")
    ] = False,
    extension: ExtensionOption = None,
) -> None:
    """Show what each arm needs: memory, traffic and files.

    Nothing is trained. The data is read; of the model nothing but its configuration is, and no weights are made.

    Exit code: 0, or 2 when the configuration cannot work.
    """
    how = HowPlanned(devices, strategy, on, tokens, as_json, tuple(extension or ()))
    quiet_libraries()
    with errors_told("Make room for the data set that is read."), renamings_untold(), stdout_kept(as_json) as out:
        _plan(config, overrides or [], how, out)


def _plan(config_name: str, overrides: list[str], how: HowPlanned, out: Any) -> None:
    from fish_tuning.experiments.config.extensions import load_extensions
    from fish_tuning.experiments.config.loading import load_experiments

    load_extensions(how.extensions)
    experiments = load_experiments(config_name, overrides)  # before torch is imported: a wrong key is told at once

    from fish_tuning.experiments.costs.experiment_costs import check_options, experiment_costs, parse_devices, plannable
    from fish_tuning.experiments.costs.tables import show_costs
    from fish_tuning.experiments.run.plan import plan_experiment

    devices, found = parse_devices(how.devices), []
    check_options(devices, how.strategy, how.on, how.tokens)  # before data and model are read
    for config in experiments:
        config = plannable(config, how.on)
        planned = plan_experiment(config)
        found.append(
            experiment_costs(config, planned, devices=devices, strategy=how.strategy, kind=how.on, tokens=how.tokens)
        )
    if how.as_json:
        write_document([costs.to_dict() for costs in found], out)
        return
    for costs in found:
        show_costs(console(), costs)
