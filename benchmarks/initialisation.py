"""Which starting point should the FISH arms have? LoRA-FISH from several, on real data, over seeds and learning rates.

    python benchmarks/initialisation.py --tasks sst2 mrpc --output results/initialisation
    python benchmarks/initialisation.py --report-only --output results/initialisation

Goes through the experiment runner; started again it goes on where it stopped. The report is a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fish_tuning.experiments.loading import load_experiment
from fish_tuning.experiments.statistics import mean_interval

# Name in the table -> overrides.
STARTS = {
    "B = 0 (PEFT's default)": ["lora.init_lora_weights=true"],
    "B = 0, scored after 20 dense steps": ["lora.init_lora_weights=true", "fish_tuning.warmup_steps=20"],
    "PiSSA": ["lora.init_lora_weights=pissa"],
    "OLoRA": ["lora.init_lora_weights=olora"],
    "orthogonal": ["lora.init_lora_weights=orthogonal"],
}
LEARNING_RATES = ("1.5e-3", "4.0e-3", "1.2e-2")
SETTINGS = [
    "dataset.max_train_samples=1000",
    "training.args_override.num_train_epochs=2",
    "training.args_override.per_device_train_batch_size=16",
    "fish_tuning.methods_to_run=[lora-fish]",
    "seeds=[0, 1, 2]",
]


def folder_of(output: Path, task: str, start: str, learning_rate: str) -> Path:
    name = "".join(character if character.isalnum() else "-" for character in start.lower())
    return output / task / f"{name}-lr{learning_rate}"


def run(output: Path, task: str) -> None:
    from fish_tuning.experiments.plan import plan_experiment
    from fish_tuning.experiments.runner import run_experiment

    for start, overrides in STARTS.items():
        for learning_rate in LEARNING_RATES:
            folder = folder_of(output, task, start, learning_rate)
            settings = [
                *SETTINGS,
                *overrides,
                f"training.args_override.learning_rate={learning_rate}",
                f"training.output_dir={folder}",
            ]
            config = load_experiment(f"minilm-{task}", settings)
            records = run_experiment(config, plan_experiment(config))
            print(task, start, learning_rate, [record.value for record in records], flush=True)


def report(output: Path, tasks: list[str]) -> None:
    print("| task | start | " + " | ".join(f"lr {rate}" for rate in LEARNING_RATES) + " |")
    print("|---|---|" + "---|" * len(LEARNING_RATES))
    for task in tasks:
        for start in STARTS:
            cells = []
            for learning_rate in LEARNING_RATES:
                files = sorted((folder_of(output, task, start, learning_rate) / "runs").glob("*.json"))
                values = [json.loads(file.read_text())["value"] for file in files]
                interval = mean_interval([value for value in values if value is not None])
                spread = f" [{interval.low:.3f}, {interval.high:.3f}]" if interval.low is not None else ""
                cells.append(f"{interval.mean:.3f}{spread}" if values else "not run")
            print(f"| {task} | {start} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    parser.add_argument("--output", type=Path, default=Path("results/initialisation"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if not args.report_only:
        for task in args.tasks:
            run(args.output, task)
    report(args.output, args.tasks)


if __name__ == "__main__":
    main()
