"""A logger that is none: it notes what transformers' own reporting callbacks would be told, in their place."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """`report_to="recorder"`, once a test has registered it. Its run opens when training begins, as theirs do."""

    made: list[Recorder]

    def __init__(self) -> None:
        self.name: str | None = None
        self.events: list[tuple[str, int, dict[str, Any]]] = []  # what happened, the step, what was logged
        self.made.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.name = args.run_name
        self.events.append(("begin", state.global_step, {}))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.events.append(("log", state.global_step, dict(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(("end", state.global_step, {}))

    @property
    def first(self) -> dict[str, Any]:
        """What was logged first, straight after the run was opened."""
        (begun, start, _), (told, step, logs) = self.events[:2]
        assert (begun, told, step) == ("begin", "log", start)
        return {name: value for name, value in logs.items() if name != "epoch"}

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [logs for event, _, logs in self.events if event == "log"]
