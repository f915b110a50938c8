"""Mixtures of experts in the hands of FSDP2 and DeepSpeed, in two processes over gloo: scored and trained as in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from engines import ENGINES, NEEDS_DEEPSPEED, adamw, deepspeed_config, deepspeed_on_the_cpu
from peft import PeftModel
from processes import in_two_processes
from tiny import (
    assert_only_selected_moved,
    assert_scores_close,
    causal_batch,
    llama_config,
    lora,
    on_cpu,
    random_mask,
    rebatch,
    tensors,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fish_tuning import apply_mask, calculate_fisher_information, synchronize_mask

pytestmark = pytest.mark.slow

BATCH = causal_batch((9, 9, 9, 9, 9, 9, 9, 9))  # as many tokens count in each half, whose losses are means
STEPS = 3


def of_llamas_size(config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    own = ("model_type", "architectures", "transformers_version")
    return config(**{name: each for name, each in (llama_config().to_dict() | settings).items() if name not in own})


def mixtral() -> Any:
    """Experts in one tensor."""
    return hf.MixtralForCausalLM(of_llamas_size(hf.MixtralConfig, intermediate_size=32, num_local_experts=4)).eval()


def qwen() -> Any:
    """With an expert that all tokens go to."""
    own = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 24}
    return hf.Qwen2MoeForCausalLM(of_llamas_size(hf.Qwen2MoeConfig, num_experts=4, num_experts_per_tok=2, **own)).eval()


BASES: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "its experts train": mixtral, "qwen": qwen}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def adapted(name: str) -> Any:
    more: dict[str, Any] = EXPERTS if name == "its experts train" else {}
    return lora(BASES[name](), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0, **more)


class Routed(nn.Module):
    """Experts that are modules: each example goes through one, and a batch passes some by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router, self.last = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        weight, chosen = self.router(hidden).softmax(-1).max(-1)
        out = hidden
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]) * weight[rows, None])
        return self.last(out)  # type: ignore[no-any-return]


def scored(model: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, rebatch(BATCH, 2), progress=False)


def routed_scores(model: Any) -> dict[str, Tensor]:
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    batches = [{"x": x[start : start + 2], "y": y[start : start + 2]} for start in range(0, 12, 2)]
    return calculate_fisher_information(model, batches, loss_fn=cross_entropy, progress=False)


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")


def split(engine: str) -> Any:
    """Whose experts are gathered together, since processes would wait for one that only some of them come to."""
    if engine == "FSDP2":
        return fully_shard(Routed())
    deepspeed, model = deepspeed_on_the_cpu(), Routed()
    deepspeed.utils.set_z3_leaf_modules(model, [Routed])
    config = deepspeed_config(3, stage3_param_persistence_threshold=0)
    return deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]


def masked(name: str) -> Any:
    model = adapted(name)
    apply_mask(model, random_mask(model, 0.3))
    return model


def worker(rank: int, folder: Path, engines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"routed": routed_scores(split(engines[-1]))}
    for name in BASES:
        for engine in engines:
            if engine != "ZeRO-2":  # scored as in one process
                found[f"{engine}, {name}"] = scored(ENGINES[engine](adapted(name)).model)
            model = masked(name)
            synchronize_mask(model)
            trained = ENGINES[engine](model)
            for _ in range(STEPS):
                trained.step(rebatch(BATCH, 4)[rank])
            state = trained.whole_state_dict()
            if rank == 0:
                model.save_pretrained(str(folder / engine / name), state_dict=state)
    return found


@pytest.fixture(scope="module", params=["FSDP", "DeepSpeed"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    engines = ["FSDP2"] if request.param == "FSDP" else ["ZeRO-2", "ZeRO-3"]
    folder = tmp_path_factory.mktemp("experts")
    return folder, in_two_processes(worker, folder, engines)


@pytest.mark.parametrize("name", BASES)
def test_scores_are_those_of_one_process(name: str, results: tuple[Path, list[Any]]) -> None:
    alone = scored(adapted(name))
    for rank in results[1]:
        for told in [each for key, each in rank.items() if key.endswith(f", {name}")]:
            assert_scores_close(told, alone, tolerance=1e-4)


def test_experts_that_a_batch_passes_by(results: tuple[Path, list[Any]]) -> None:
    for rank in results[1]:
        assert_scores_close(rank["routed"], routed_scores(Routed()), tolerance=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_what_is_trained_is_that_of_one_process(name: str, results: tuple[Path, list[Any]]) -> None:
    model = masked(name)
    optimizer = adamw(model)
    for _ in range(STEPS):
        for half in rebatch(on_cpu(BATCH), 4):
            (model(**half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    folders = list(results[0].glob(f"*/{name}"))
    assert folders
    for folder in folders:
        stock = tensors(PeftModel.from_pretrained(BASES[name](), folder))
        torch.testing.assert_close(stock, tensors(model), rtol=0, atol=1e-5)
        assert_only_selected_moved(tensors(adapted(name)), stock, random_mask(adapted(name), 0.3))
