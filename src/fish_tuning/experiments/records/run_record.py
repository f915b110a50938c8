"""What is known of one run, and of an arm before it runs: plain data between planning, running and reporting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fish_tuning.experiments.config.secrets import scrubbed


@dataclass(frozen=True)
class KeptShare:
    """How many entries of one masked tensor kind are trained, e.g. `query.lora_A` of layer 3."""

    layer: int | None
    module: str
    kept: int
    total: int


@dataclass(frozen=True)
class RunRecord:
    """One arm with one seed. Times in seconds, sizes in bytes; `None` where a failed run never got to it."""

    arm: str
    seed: int
    status: str  # "ok" or "failed"
    metric: str
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trainable_parameters: int | None = None
    kept_parameters: int | None = None  # of the adapter: the chosen entries, a dense arm's all
    head_parameters: int | None = None  # what trains as a whole beside them; the two add up to trainable_parameters
    train_seconds: float | None = None
    fisher_seconds: float | None = None  # warm-up and scoring
    peak_memory_bytes: int | None = None
    peak_memory_of: str = "process"  # "gpu" or "process"
    optimizer_state_bytes: int | None = None
    adapter_bytes: int | None = None
    kept: list[KeptShare] = field(default_factory=list)
    error: str | None = None
    config_hash: str = ""  # key of all that the run depends on
    setting: str = ""  # the same without the seed: runs that differ in it are no further seeds of each other
    common: str = ""  # key of what all arms share, seed left out: runs that differ in it are no pairs
    method_own: str = ""  # key of what the arms of one method share beyond that
    adapter_digest: str = ""  # of the adapter's files as they were written
    mask_digest: str = ""
    constant_value: float | None = None  # the metric of always predicting the largest class, or the mean
    initial_state: str = ""  # digest of the trainable tensors before training
    experiment: str = ""
    task: str = ""
    model: str = ""
    keep_ratio: float | None = None  # kept share of the arm's pool; None for a dense arm
    learning_rate: float | None = None
    loss_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mean training loss since the last one)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunRecord:
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["kept"] = [KeptShare(**share) for share in values.get("kept", [])]
        values["loss_curve"] = [(int(step), float(loss)) for step, loss in values.get("loss_curve", [])]
        return cls(**values)


@dataclass(frozen=True)
class ArmPlan:
    """What an arm will train, counted from the model; `pool` and `kept` are entries, a dense arm keeps them all."""

    arm: str
    method: str  # the PEFT method
    selection: str | None  # how the kept entries are chosen ("fish-rand"), or None for a dense arm
    size: str  # of the adapter: "r 16"
    settings: dict[str, Any]  # the whole PEFT configuration
    trainable_parameters: int
    pool: int
    kept: int
    dense: int  # entries outside the pool that always train (the head)


def scrubbed_record(record: RunRecord) -> RunRecord:
    """The record without values that came from the environment. Its arm, which it is found by, is never one."""
    return replace(
        record,
        experiment=scrubbed(record.experiment),
        task=scrubbed(record.task),
        model=scrubbed(record.model),
        error=None if record.error is None else scrubbed(record.error),
    )
