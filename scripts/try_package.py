"""Build wheel and sdist, install them into empty environments with pip, and try what a user tries first.

`make package`, or `python scripts/try_package.py [--torch torch==2.13.0]`. Needs pip to reach an index, or wheels on
the disk. Prints what was tried; exit code 1 at the first thing that is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The three functions on a tiny random model, away from this repository.
SCRIPT = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from fish_tuning import FishTuningTrainer, calculate_fisher_information, create_mask_from_fisher

def base():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config)

rows = [{"input_ids": torch.randint(5, 99, (12,)), "labels": n % 2} for n in range(32)]
model = get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
scores = calculate_fisher_information(model, torch.utils.data.DataLoader(rows, batch_size=8), progress=False)
mask = create_mask_from_fisher(scores, keep_ratio=0.25, names_to_exclude=["classifier"])
args = TrainingArguments("output", max_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True)
FishTuningTrainer(model, args, mask=mask, train_dataset=rows).train()
after = model.state_dict()
moved = {name: int((after[name] != before[name])[~mask[name]].sum()) for name in mask}
assert not any(moved.values()), moved
assert any(bool((after[name] != before[name]).any()) for name in mask)
model.save_pretrained("adapter")
PeftModel.from_pretrained(base(), "adapter")
"""


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check(what: str, holds: bool) -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        sys.exit(1)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made of it, so that what the sdist lacks is found out."""
    venv.create(folder / "builder", with_pip=True)
    pip = [folder / "builder" / "bin" / "python", "-m", "pip"]
    run(*pip, "install", "--quiet", "build", cwd=folder)
    run(pip[0], "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    shipped = {
        f"fish_tuning/configs/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.yaml")
    }
    check(f"the wheel ({wheel.stat().st_size / 1e3:.0f} kB) has {len(shipped)} configurations", shipped <= set(inside))
    check("it has py.typed, the page's template and its style", {"fish_tuning/py.typed"} < set(inside)
          and {"page.html", "page.css"} <= {name.rpartition("/")[2] for name in inside})  # fmt: skip
    top = {name.split("/")[0] for name in inside}
    check(f"and nothing else: {', '.join(sorted(top))}", all(name.startswith("fish_tuning") for name in top))
    with tarfile.open(sdist) as packed:
        names = packed.getnames()
    check(
        f"the sdist ({sdist.stat().st_size / 1e3:.0f} kB) has the tests, and no results of the documentation",
        any("/tests/" in name for name in names) and not any("/docs/results" in name for name in names),
    )


def try_library(python: Path, folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run(python, "script.py", cwd=folder, environment=environment)
    check("the three functions on a tiny model; stock PEFT loads the adapter", True)


def try_command(python: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = python.with_name("fish-tuning")
    check(
        "fish-tuning --version",
        run(command, "--version", cwd=folder, environment=environment).startswith("fish-tuning "),
    )
    listed = run(command, "configs", cwd=folder, environment=environment)
    check("fish-tuning configs", all(file.stem in listed for file in (ROOT / "configs" / "experiments").glob("*.yaml")))
    planned = run(command, "run", "digits", "--dry-run", cwd=folder, environment=environment)
    check("fish-tuning run digits --dry-run, with its built-in data", "lora-fish" in planned)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--torch", default="torch", help="what pip installs first, such as torch==2.13.0")
    options.add_argument("--keep", type=Path, help="copy wheel and sdist to this folder")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        check_contents(sdist, wheel)
        venv.create(folder / "user", with_pip=True)
        python = folder / "user" / "bin" / "python"
        constraints = ["--constraint", ROOT / "constraints.txt"]
        run(python, "-m", "pip", "install", "--quiet", chosen.torch, *constraints, cwd=folder)
        run(python, "-m", "pip", "install", "--quiet", wheel, *constraints, cwd=folder)
        try_library(python, folder)
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[experiments]", *constraints, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        try_command(python, folder)
        if chosen.keep:
            chosen.keep.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                shutil.copy(file, chosen.keep)


if __name__ == "__main__":
    main()
