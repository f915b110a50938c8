"""Run as a process of its own: kills trainings at file events in their folder, resumes each, compares, counts.

    python killed_trainings.py FOLDER KIND SAVE_TOTAL_LIMIT FIRST STEP

KIND is "adapter" or "whole". Every STEPth event from FIRST on is a moment to be killed at, until one training comes to
its end. The last line of the output is the number of trainings that were killed and, resumed, ended as one that never
stopped.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from itertools import count
from pathlib import Path

import torch
from kills import killed_at
from tiny import Rows, bert, classification_batch, lora, random_mask, tensors
from torch import Tensor
from transformers import TrainingArguments

from fish_tuning import FishTuningTrainer

DATA = Rows(classification_batch((5, 9, 3, 7, 6, 8, 4, 5)))


def train(folder: Path, kind: str, limit: int, resume: bool = False) -> dict[str, Tensor]:
    model = bert() if kind == "whole" else lora(bert(), lora_dropout=0.3)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit or None,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    mask = random_mask(model, 0.3, dense=["classifier"])
    trainer = FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return tensors(model)


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    limit, first, step = map(int, sys.argv[3:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    expected = train(folder / "whole", kind, limit)
    for number, event in enumerate(count(first, step)):
        output = folder / str(event)
        output.mkdir()
        if not killed_at(event, output, partial(train, output, kind, limit)):
            sys.stdout.write(f"{number}\n")
            return
        found = train(output, kind, limit, resume=any(output.glob("checkpoint-*")))
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        if different:
            raise SystemExit(f"killed at event {event}: {different[0]} is different")


if __name__ == "__main__":
    main()
