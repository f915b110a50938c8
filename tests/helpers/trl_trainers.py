"""Tiny trl trainers that make their PEFT model themselves, as the recipes do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from folders import WORDS, write_llama
from peft import LoraConfig

PRAISE = [" ".join([WORDS[number % 4], *WORDS[8 : 10 + number % 3]]) for number in range(16)]
BLAME = [" ".join(WORDS[4 + number % 4 : 9 + number % 2]) for number in range(16)]
PREFERENCES = {"prompt": ["film was"] * 16, "chosen": PRAISE, "rejected": BLAME}


def count_praise(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(sum(word in WORDS[:8] for word in completion.split())) for completion in completions]


def nothing_matters(completions: Sequence[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def make(kind: str, folder: Path, data: Any = None, rewards: Any = count_praise, **settings: Any) -> Any:
    """SFTTrainer, DPOTrainer, RewardTrainer or GRPOTrainer on a random Llama, with `peft_config`."""
    import trl

    model = folder / "model"
    if not model.is_dir():
        write_llama(model)
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    }
    extra: dict[str, Any] = {}
    if kind == "GRPO":
        defaults |= {"num_generations": 4, "max_completion_length": 6}
        data, extra = data or {"prompt": PRAISE}, {"reward_funcs": rewards}
    else:
        data = data or ({"text": PRAISE} if kind == "SFT" else PREFERENCES)
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    torch.manual_seed(0)  # a new head is drawn from it
    return getattr(trl, f"{kind}Trainer")(
        model=str(model),
        args=getattr(trl, f"{kind}Config")(**(defaults | settings)),
        train_dataset=Dataset.from_dict(data),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type=task),
        **extra,
    )


def move(model: torch.nn.Module) -> None:
    """Away from B = 0, where the model is its own reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
