"""fish-tuning: fine-tune with few, well-chosen parameters.

Score the trainable parameters of a model by Fisher information, keep the k that matter, freeze the rest.
Names are imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fish_tuning.errors import (
        ConfigurationError,
        FisherError,
        FishTuningError,
        FishTuningWarning,
        MaskError,
        RecordError,
        ZeroScoresError,
    )
    from fish_tuning.files.delta_file import Delta, load_delta
    from fish_tuning.files.mask_file import load_mask, save_mask
    from fish_tuning.files.sparse_adapter_file import SparseAdapter, load_sparse_adapter
    from fish_tuning.masks.create import create_mask_from_fisher
    from fish_tuning.masks.selections import register_selection
    from fish_tuning.peft_methods import PeftMethod, register_peft_method
    from fish_tuning.scores.calculate import calculate_scores
    from fish_tuning.scores.fisher import calculate_fisher_information
    from fish_tuning.scores.layer_rules import register_rule
    from fish_tuning.scores.moments import Moments, measure_moments
    from fish_tuning.scores.named import Evidence, register_score
    from fish_tuning.sharing.card import CardFacts
    from fish_tuning.sharing.exporting import ExportedAdapter, export_adapter
    from fish_tuning.sharing.folder import complete_adapter
    from fish_tuning.sharing.hub import pull_adapter, push_adapter
    from fish_tuning.sharing.loading import load_adapter
    from fish_tuning.sharing.merging import merge_adapter
    from fish_tuning.sparse.adapter_names import rename_adapter
    from fish_tuning.sparse.applying import apply_mask, remove_mask, synchronize_mask
    from fish_tuning.sparse.compact import save_compact_adapter
    from fish_tuning.sparse.delta import add_delta, merge_delta, remove_delta, save_delta
    from fish_tuning.sparse.masked_tensors import count_trainable_parameters, get_mask, is_masked
    from fish_tuning.sparse.replacing import replace_mask
    from fish_tuning.sparse.shira import create_shira_config
    from fish_tuning.sparse.sparse_adapters import save_sparse_adapter, write_adapter_folder
    from fish_tuning.sparse.switching import (
        add_sparse_adapter,
        list_sparse_adapters,
        remove_sparse_adapter,
        set_sparse_adapter,
    )
    from fish_tuning.starts.along_gradient import start_along_gradient
    from fish_tuning.starts.from_seed import start_from_seed
    from fish_tuning.training.calibration import calibration_of
    from fish_tuning.training.checkpoints import last_checkpoint
    from fish_tuning.training.head_rate import set_head_learning_rate
    from fish_tuning.training.one_call import add_mask, fish_tune
    from fish_tuning.training.reporting import report_figures
    from fish_tuning.training.trainer import FishMaskCallback, FishTuningTrainer

__version__ = "0.1.0"

_PUBLIC = {
    # score
    "calculate_fisher_information": "scores.fisher",
    "calculate_scores": "scores.calculate",
    "measure_moments": "scores.moments",
    "Moments": "scores.moments",
    "register_rule": "scores.layer_rules",
    "Evidence": "scores.named",
    "register_score": "scores.named",
    # start
    "start_along_gradient": "starts.along_gradient",
    "start_from_seed": "starts.from_seed",
    # select
    "create_mask_from_fisher": "masks.create",
    "register_selection": "masks.selections",
    "save_mask": "files.mask_file",
    "load_mask": "files.mask_file",
    "rename_adapter": "sparse.adapter_names",
    # train
    "FishTuningTrainer": "training.trainer",
    "FishMaskCallback": "training.trainer",
    "calibration_of": "training.calibration",
    "add_mask": "training.one_call",
    "fish_tune": "training.one_call",
    "last_checkpoint": "training.checkpoints",
    "report_figures": "training.reporting",
    "set_head_learning_rate": "training.head_rate",
    "apply_mask": "sparse.applying",
    "remove_mask": "sparse.applying",
    "synchronize_mask": "sparse.applying",
    "replace_mask": "sparse.replacing",
    "get_mask": "sparse.masked_tensors",
    "is_masked": "sparse.masked_tensors",
    "count_trainable_parameters": "sparse.masked_tensors",
    # carry what was trained
    "Delta": "files.delta_file",
    "save_delta": "sparse.delta",
    "load_delta": "files.delta_file",
    "add_delta": "sparse.delta",
    "remove_delta": "sparse.delta",
    "merge_delta": "sparse.delta",
    "SparseAdapter": "files.sparse_adapter_file",
    "save_sparse_adapter": "sparse.sparse_adapters",
    "load_sparse_adapter": "files.sparse_adapter_file",
    "add_sparse_adapter": "sparse.switching",
    "set_sparse_adapter": "sparse.switching",
    "list_sparse_adapters": "sparse.switching",
    "remove_sparse_adapter": "sparse.switching",
    "write_adapter_folder": "sparse.sparse_adapters",
    "create_shira_config": "sparse.shira",
    "save_compact_adapter": "sparse.compact",
    # share it
    "CardFacts": "sharing.card",
    "complete_adapter": "sharing.folder",
    "ExportedAdapter": "sharing.exporting",
    "export_adapter": "sharing.exporting",
    "load_adapter": "sharing.loading",
    "merge_adapter": "sharing.merging",
    "pull_adapter": "sharing.hub",
    "push_adapter": "sharing.hub",
    # methods of your own
    "PeftMethod": "peft_methods",
    "register_peft_method": "peft_methods",
    # what can go wrong
    "FishTuningError": "errors",
    "ConfigurationError": "errors",
    "FisherError": "errors",
    "MaskError": "errors",
    "RecordError": "errors",
    "ZeroScoresError": "errors",
    "FishTuningWarning": "errors",
}

__all__ = [
    "CardFacts",
    "ConfigurationError",
    "Delta",
    "Evidence",
    "ExportedAdapter",
    "FishMaskCallback",
    "FishTuningError",
    "FishTuningTrainer",
    "FishTuningWarning",
    "FisherError",
    "MaskError",
    "Moments",
    "PeftMethod",
    "RecordError",
    "SparseAdapter",
    "ZeroScoresError",
    "add_delta",
    "add_mask",
    "add_sparse_adapter",
    "apply_mask",
    "calculate_fisher_information",
    "calculate_scores",
    "calibration_of",
    "complete_adapter",
    "count_trainable_parameters",
    "create_mask_from_fisher",
    "create_shira_config",
    "export_adapter",
    "fish_tune",
    "get_mask",
    "is_masked",
    "last_checkpoint",
    "list_sparse_adapters",
    "load_adapter",
    "load_delta",
    "load_mask",
    "load_sparse_adapter",
    "measure_moments",
    "merge_adapter",
    "merge_delta",
    "pull_adapter",
    "push_adapter",
    "register_peft_method",
    "register_rule",
    "register_score",
    "register_selection",
    "remove_delta",
    "remove_mask",
    "remove_sparse_adapter",
    "rename_adapter",
    "replace_mask",
    "report_figures",
    "save_compact_adapter",
    "save_delta",
    "save_mask",
    "save_sparse_adapter",
    "set_head_learning_rate",
    "set_sparse_adapter",
    "start_along_gradient",
    "start_from_seed",
    "synchronize_mask",
    "write_adapter_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
