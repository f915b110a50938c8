"""What all arms of an experiment share, as short keys, from its training arguments and its plain configuration.

Nothing here needs torch: reports read it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# Training arguments that say where things go, what is told, or how fast the same batches come.
_WITHOUT_EFFECT = re.compile(
    r"output_dir|run_name|report_to|project|disable_tqdm|trackio_.*|log(ging)?_.*|push_to_hub|hub_.*|debug|"
    r"dataloader_(num_workers|pin_memory|prefetch_factor|multiprocessing_context)|"
    r"save_(only_model|on_each_node|total_limit)|skip_memory_metrics|include_num_input_tokens_seen|ddp_timeout|"
    r"do_(train|eval|predict)|use_cpu|torch_empty_cache_steps"
)
# Workers that stay draw one seed for all epochs, and others may mix batches up; said where they are not the default, so
# that the keys of other runs stay what they were.
_AS_USUAL = {"dataloader_persistent_workers": False, "dataloader_in_order": True}
_SAVING = ("save_strategy", "save_steps")  # they count where the best checkpoint is loaded at the end
SEEDS = ("seed", "data_seed")  # arguments that tell runs of one setting apart
_SIZES = ("baseline_rank", "fish_rank")  # of `lora`: they are the arms' own


def effective_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that can change what comes out."""
    left_out = () if arguments.get("load_best_model_at_end") else _SAVING
    return {
        name: value
        for name, value in arguments.items()
        if not _WITHOUT_EFFECT.fullmatch(name) and name not in left_out and _AS_USUAL.get(name, ...) is not value
    }


def common_of_stored(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What stands for `common` where records do not say it, from the configuration and the facts of their folder."""
    parts = {name: config.get(name) for name in ("model", "dataset")}
    training = _section(config, "training")
    arguments = effective_arguments(_section(training, "args_override"))
    rest = {name: value for name, value in training.items() if name not in ("output_dir", "args_override")}
    seedless = {name: value for name, value in arguments.items() if name not in SEEDS}
    methods = config.get("peft")
    owns = [method_own(each) for each in methods if isinstance(each, Mapping)] if isinstance(methods, list) else []
    known: dict[str, Any] = {"methods": owns}
    known |= {name: facts.get(name) for name in ("versions", "device", "data_fingerprint", "weights_fingerprint")}
    return digest({**parts, **known, "training": rest, "arguments": seedless, **of_all_arms(config)})


def method_own(section: Mapping[str, Any]) -> str:
    """The key of what the arms of a method have of their own beside their adapters, from its section of `peft`."""
    return digest({name: section.get(name) or None for name in ("training_args", "learning_rates")})


def of_all_arms(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of every arm, whatever is its size and how its entries are chosen."""
    training = _section(config, "training")
    lora = {name: value for name, value in _section(config, "lora").items() if name not in _SIZES}
    return {"lora": lora, **{name: training.get(name) for name in ("early_stopping_patience", "head_learning_rate")}}


def _section(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
