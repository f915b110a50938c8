"""`fish-tuning schema`."""

from __future__ import annotations

from fish_tuning.cli.application import app, tell


@app.command()
def schema() -> None:
    """Print the JSON schema of the experiment file.

    Editors complete and check the file by it.

    fish-tuning schema > fish-tuning.schema.json, and `# yaml-language-server: $schema=fish-tuning.schema.json` as the
    first line of an experiment file beside it.
    """
    import json

    from fish_tuning.experiments.config.schema import experiment_schema

    tell(json.dumps(experiment_schema(), indent=2))
