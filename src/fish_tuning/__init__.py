"""fish-tuning: fine-tune with few, well-chosen parameters.

Score the trainable parameters of a model by Fisher information, keep the k that matter, freeze the rest.
Names are imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fish_tuning.delta import Delta, add_delta, load_delta, merge_delta, remove_delta, save_delta
    from fish_tuning.errors import (
        ConfigurationError,
        FisherError,
        FishTuningError,
        FishTuningWarning,
        MaskError,
        ZeroScoresError,
    )
    from fish_tuning.fisher import calculate_fisher_information
    from fish_tuning.per_example import register_rule
    from fish_tuning.reporting import report_figures
    from fish_tuning.selection import create_mask_from_fisher, register_method
    from fish_tuning.shira import create_shira_config
    from fish_tuning.sparse import (
        apply_mask,
        count_trainable_parameters,
        get_mask,
        is_masked,
        remove_mask,
        synchronize_mask,
    )
    from fish_tuning.storage import load_mask, save_mask
    from fish_tuning.trainer import FishMaskCallback, FishTuningTrainer

__version__ = "0.1.0"

_PUBLIC = {
    # score
    "calculate_fisher_information": "fisher",
    "register_rule": "per_example",
    # select
    "create_mask_from_fisher": "selection",
    "register_method": "selection",
    "save_mask": "storage",
    "load_mask": "storage",
    # train
    "FishTuningTrainer": "trainer",
    "FishMaskCallback": "trainer",
    "report_figures": "reporting",
    "apply_mask": "sparse",
    "remove_mask": "sparse",
    "synchronize_mask": "sparse",
    "get_mask": "sparse",
    "is_masked": "sparse",
    "count_trainable_parameters": "sparse",
    # carry what was trained
    "Delta": "delta",
    "save_delta": "delta",
    "load_delta": "delta",
    "add_delta": "delta",
    "remove_delta": "delta",
    "merge_delta": "delta",
    "create_shira_config": "shira",
    # what can go wrong
    "FishTuningError": "errors",
    "ConfigurationError": "errors",
    "FisherError": "errors",
    "MaskError": "errors",
    "ZeroScoresError": "errors",
    "FishTuningWarning": "errors",
}

__all__ = [
    "ConfigurationError",
    "Delta",
    "FishMaskCallback",
    "FishTuningError",
    "FishTuningTrainer",
    "FishTuningWarning",
    "FisherError",
    "MaskError",
    "ZeroScoresError",
    "add_delta",
    "apply_mask",
    "calculate_fisher_information",
    "count_trainable_parameters",
    "create_mask_from_fisher",
    "create_shira_config",
    "get_mask",
    "is_masked",
    "load_delta",
    "load_mask",
    "merge_delta",
    "register_method",
    "register_rule",
    "remove_delta",
    "remove_mask",
    "report_figures",
    "save_delta",
    "save_mask",
    "synchronize_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
