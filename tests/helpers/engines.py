"""Engines that spread a model over processes, by hand: how each takes a model, trains it, and saves where it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertLayer

NEEDS_DEEPSPEED = "DeepSpeed is missing: pip install 'fish-tuning[deepspeed]'"


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)


def entries_of_state(optimizer: Any) -> int:
    """How many numbers this process's optimizer keeps beside its step counts."""
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in kept if value.dim())


def deepspeed_config(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **zero},
        "gradient_clipping": 0.0,  # else 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def deepspeed_on_the_cpu() -> Any:
    """DeepSpeed without what it would compile first, for minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def fsdp_on_the_cpu() -> None:
    """accelerate shards on accelerators alone; on the CPU it would take DDP without a word."""
    make = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or vars(self).get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            self.device = torch.device("cpu")

    AcceleratorState.__init__ = __init__


class Fsdp2:
    resumes = True

    def __init__(self, model: Any) -> None:
        for block in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(block)
        self.inner, self.model = model, fully_shard(model)
        self.optimizer = adamw(model)

    def step(self, batch: dict[str, Tensor]) -> None:
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


class Fsdp1(Fsdp2):
    # Without a mask too, what torch loads into an optimizer of FSDP1 goes on otherwise than what was saved.
    resumes = False

    def __init__(self, model: Any) -> None:
        self.inner = model
        self.model = FullyShardedDataParallel(
            model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({BertLayer}), device_id=torch.device("cpu")
        )
        self.optimizer = adamw(self.model)

    def whole_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def save(self, folder: Path) -> None:
        state = self.model.state_dict(), FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer)
        if dist.get_rank() == 0:
            torch.save(state, folder)
        dist.barrier()

    def load(self, folder: Path) -> None:
        model, state = torch.load(folder)
        self.model.load_state_dict(model)
        own = FullyShardedDataParallel.optim_state_dict_to_load(self.model, self.optimizer, state)
        self.optimizer.load_state_dict(own)


class Zero2:
    stage = 2
    resumes = True

    def __init__(self, model: Any) -> None:
        # Below the size of some tensors' values and above that of others, which ZeRO-3 then keeps everywhere.
        config = deepspeed_config(self.stage, stage3_param_persistence_threshold=12)
        self.inner = model
        self.model, *_ = deepspeed_on_the_cpu().initialize(model=model, optimizer=adamw(model), config=config)
        self.optimizer = self.model.optimizer

    def step(self, batch: dict[str, Tensor]) -> None:
        self.model.backward(self.model(**batch).loss)
        self.model.step()

    def whole_state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self.model.load_checkpoint(str(folder), load_module_strict=False)


class Zero3(Zero2):
    stage = 3

    def whole_state_dict(self) -> dict[str, Any]:
        return self.model._zero3_consolidated_16bit_state_dict() or {}


ENGINES: dict[str, Any] = {"FSDP2": Fsdp2, "FSDP1": Fsdp1, "ZeRO-2": Zero2, "ZeRO-3": Zero3}
