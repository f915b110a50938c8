"""Which starting point should the FISH arms have? LoRA-FISH from several, on real data, over seeds and learning rates.

    python benchmarks/initialisation.py --tasks sst2 mrpc --output results/initialisation
    python benchmarks/initialisation.py --report-only --output results/initialisation

Goes through the experiment runner; started again it goes on where it stopped. The report is a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fish_tuning.experiments.compare.summaries import mean_interval
from fish_tuning.experiments.config.loading import load_experiment

# Name in the table -> overrides.
STARTS = {
    "B = 0 (PEFT's default)": ["lora.init_lora_weights=true", "fish_tuning.warmup_steps=0"],
    "B = 0, scored after 20 dense steps": ["lora.init_lora_weights=true", "fish_tuning.warmup_steps=20"],
    "PiSSA": ["lora.init_lora_weights=pissa"],
    "OLoRA": ["lora.init_lora_weights=olora"],
    "orthogonal": ["lora.init_lora_weights=orthogonal"],
}
LEARNING_RATES = {"sst2": ("1.5e-3", "4.0e-3", "1.2e-2"), "mrpc": ("1.0e-3", "2.0e-3")}
# What differs from the shipped minilm-sst2 and minilm-mrpc.
SETTINGS = {
    "sst2": [
        "dataset.max_train_samples=1000",
        "training.args_override.per_device_train_batch_size=16",
        "training.args_override.train_sampling_strategy=random",
        "seeds=[0, 1, 2]",
    ],
    "mrpc": [],
}


def folder_of(output: Path, task: str, start: str, learning_rate: str) -> Path:
    name = "".join(character if character.isalnum() else "-" for character in start.lower())
    return output / task / f"{name}-lr{learning_rate}"


def run(output: Path, task: str) -> None:
    from fish_tuning.experiments.run.plan import plan_experiment
    from fish_tuning.experiments.run.runner import run_experiment

    for start, overrides in STARTS.items():
        for learning_rate in LEARNING_RATES[task]:
            folder = folder_of(output, task, start, learning_rate)
            settings = [
                *SETTINGS[task],
                *overrides,
                "fish_tuning.methods_to_run=[lora-fish]",
                f"training.args_override.learning_rate={learning_rate}",
                f"training.output_dir={folder}",
            ]
            config = load_experiment(f"minilm-{task}", settings)
            records = run_experiment(config, plan_experiment(config))
            print(task, start, learning_rate, [record.value for record in records], flush=True)


def report(output: Path, tasks: list[str]) -> None:
    for task in tasks:
        print(f"{task}\n\n| start | " + " | ".join(f"lr {rate}" for rate in LEARNING_RATES[task]) + " |")
        print("|---" * (1 + len(LEARNING_RATES[task])) + "|")
        for start in STARTS:
            cells = [cell(folder_of(output, task, start, rate)) for rate in LEARNING_RATES[task]]
            print(f"| {start} | " + " | ".join(cells) + " |")
        print()


def cell(folder: Path) -> str:
    values = [json.loads(file.read_text())["value"] for file in sorted((folder / "runs").glob("*.json"))]
    interval = mean_interval([value for value in values if value is not None])
    if interval.mean is None:
        return "not run"
    return f"{interval.mean:.3f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval.low is not None else "")


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
