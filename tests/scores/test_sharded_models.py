"""Two processes score a model that an engine has sharded over them: as one process scores it whole; it is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader  # type: ignore[import-untyped]
from device import DEVICE
from engines import NEEDS_DEEPSPEED, adamw, deepspeed_config, deepspeed_on_the_cpu
from processes import once_in_two_processes, refusal
from tiny import assert_scores_close, bert, causal_batch, classification_batch, llama, lora, rebatch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fish_tuning import (
    FisherError,
    calculate_fisher_information,
    calculate_scores,
    create_mask_from_fisher,
    measure_moments,
)

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6, 9, 5))
TEXTS = causal_batch((5, 9, 3, 7, 9, 4, 6, 8))
ROWS = [{key: value[row] for key, value in BATCH.items()} for row in range(10)]
QUIET: dict[str, Any] = {"progress": False}
ROUNDING = 1e-4 if DEVICE.type == "cpu" else 1e-3  # a GPU convolves in TF32


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def adapted() -> Any:
    return lora(base(), init_lora_weights=True, lora_dropout=0.0)


def recomputed() -> Any:
    """With a convolution, which has no rule, behind the word embeddings of a Llama."""
    model = lora(llama())
    torch.manual_seed(0)
    embed = model.base_model.model.model.embed_tokens
    model.base_model.model.model.embed_tokens = nn.Sequential(embed, Convolved().to(DEVICE))
    return model


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def looped() -> Any:
    """A parameter of the whole model itself, which nothing smaller than the loop can score."""
    model = base().requires_grad_(False)
    torch.manual_seed(0)
    model.register_parameter("shift", nn.Parameter(torch.randn(3).to(DEVICE)))
    plain = model.forward

    def forward(labels: Tensor | None = None, **inputs: Any) -> Any:
        outputs = plain(**inputs)
        outputs.logits = outputs.logits * model.shift
        outputs.loss = None if labels is None else nn.functional.cross_entropy(outputs.logits, labels)
        return outputs

    model.forward = forward
    model.classifier.requires_grad_(True)
    return model


class Fsdp2:
    alone = "no process can score it by itself"
    holds = "holds a gradient that FSDP has not reduced"

    @staticmethod
    def sharded(model: Any, in_bf16: bool = False) -> Any:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if in_bf16 else MixedPrecisionPolicy()
        for module in list(model.modules()):
            if isinstance(module, BertLayer | LlamaDecoderLayer):
                fully_shard(module, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)

    @staticmethod
    def part(parameter: Any) -> Tensor:
        return parameter.to_local()  # type: ignore[no-any-return]

    @staticmethod
    def gradients(model: Any, batch: Any) -> dict[str, Tensor]:
        """Of a training's next step, whole."""
        model(**batch).loss.backward()
        return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}

    @staticmethod
    def accumulating() -> Any:
        model = Fsdp2.sharded(lora(base()))
        model.set_requires_gradient_sync(False)
        model(**BATCH).loss.backward()
        return model


class Fsdp1:
    alone = "accepted"  # each process has the whole model
    holds = "hold gradients that it has not reduced (no_sync)"

    @staticmethod
    def sharded(model: Any, in_bf16: bool = False) -> Any:
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({BertLayer, LlamaDecoderLayer}),
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if in_bf16 else None,
        )

    @staticmethod
    def part(parameter: Any) -> Tensor:
        return parameter  # type: ignore[no-any-return]

    @staticmethod
    def gradients(model: Any, batch: Any) -> dict[str, Tensor]:
        model(**batch).loss.backward()
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    @staticmethod
    def accumulating() -> Any:
        model = Fsdp1.sharded(lora(base()))
        with model.no_sync():
            model(**BATCH).loss.backward()
        return model


class Zero3:
    alone = "no process can score it by itself"
    holds = "holds gradients of a step that is not yet done"

    @staticmethod
    def sharded(model: Any, in_bf16: bool = False) -> Any:
        config = deepspeed_config(3, stage3_param_persistence_threshold=20)  # some biases above it, some below
        config["bf16"] = {"enabled": in_bf16}
        engine, *_ = deepspeed_on_the_cpu().initialize(model=model, optimizer=adamw(model), config=config)
        return engine

    @staticmethod
    def part(parameter: Any) -> Tensor:
        part = parameter.ds_tensor  # filled up by whatever lay in memory
        return part[: parameter.ds_numel - dist.get_rank() * part.numel()]  # type: ignore[no-any-return]

    @staticmethod
    def gradients(model: Any, batch: Any) -> dict[str, Tensor]:
        model.backward(model(**batch).loss)
        whole = deepspeed_on_the_cpu().utils.safe_get_full_grad
        return {n: whole(p) for n, p in model.module.named_parameters() if p.requires_grad}

    @staticmethod
    def accumulating() -> Any:
        engine = Zero3.sharded(lora(base()))
        engine.backward(engine(**BATCH).loss)
        return engine


ENGINES: dict[str, Any] = {"FSDP2": Fsdp2, "FSDP1": Fsdp1, "ZeRO-3": Zero3}


def sampler() -> Any:
    return DistributedSampler(ROWS, shuffle=False)  # type: ignore[arg-type, var-annotated]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(ROWS, batch_size=2, **options)  # type: ignore[arg-type]


def trained_base() -> Any:
    model = base()
    model.bert.embeddings.requires_grad_(False)
    return model


def checkpointed(model: Any) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


LONG = causal_batch((520, 514, 518))
# What is scored: the model, its batches, how. Each is compared with one process that has the whole model.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "lora": (lambda: lora(base()), lambda: rebatch(BATCH, 2), {"warmup_steps": 0}),
    "warmed up": (adapted, lambda: rebatch(BATCH, 2), {"warmup_steps": 3}),
    "llama": (lambda: lora(llama()), lambda: rebatch(TEXTS, 2), {}),
    "dora": (lambda: lora(llama(), use_dora=True), lambda: rebatch(TEXTS, 2), {}),
    "base weights": (trained_base, lambda: rebatch(BATCH, 2), {}),
    "num_samples": (lambda: lora(base()), lambda: rebatch(BATCH, 2), {"num_samples": 7}),
    "drawn labels": (lambda: lora(base()), lambda: rebatch(BATCH, 2), {"fisher_type": "sampled"}),
    "expected labels": (lambda: lora(base()), lambda: rebatch(BATCH, 2), {"fisher_type": "expected"}),
    "loop": (lambda: lora(base()), lambda: rebatch(BATCH, 2), {"method": "loop"}),
    "single examples": (lambda: lora(base()), lambda: rebatch(BATCH, 1), {}),
    "long texts": (lambda: lora(llama(max_position_embeddings=600)), lambda: rebatch(LONG, 2), {}),
    "ragged": (lambda: lora(base()), lambda: rebatch(BATCH, 3), {}),
    "one batch": (lambda: lora(base()), lambda: [BATCH], {}),
    "recomputed": (recomputed, lambda: rebatch(TEXTS, 2), {}),
    "looped": (looped, lambda: rebatch(BATCH, 2), {}),
    "checkpointed": (lambda: checkpointed(lora(base())), lambda: rebatch(BATCH, 2), {"warmup_steps": 2}),
}
PARTS: dict[str, Callable[[int], Any]] = {
    "distributed sampler": lambda rank: loader(sampler=sampler()),
    "accelerate": lambda rank: prepare_data_loader(loader(), num_processes=2, process_index=rank),
}


def traces(engine: Any, model: nn.Module) -> dict[str, Any]:
    return {
        "states": [getattr(p, "ds_status", None) for p in model.parameters()],
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "values": [float(engine.part(p).double().sum()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def worker(rank: int, folder: Path, name_of_engine: str) -> dict[str, Any]:
    engine = ENGINES[name_of_engine]
    found: dict[str, Any] = {}
    for name, (make, batches, options) in CASES.items():
        model = engine.sharded(make())
        before = traces(engine, model)
        found[name] = calculate_fisher_information(model, batches(), **QUIET, **options)
        assert traces(engine, model) == before, name

    def adapter(**options: Any) -> Any:
        return engine.sharded(lora(base()), **options)

    for name, part in PARTS.items():
        found[name] = calculate_fisher_information(adapter(), part(rank), warmup_steps=0, **QUIET)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = calculate_fisher_information(adapter(), rebatch(BATCH, 2), **QUIET)
    found["in bf16"] = calculate_fisher_information(adapter(in_bf16=True), rebatch(BATCH, 2), **QUIET)
    model = engine.sharded(adapted())
    gain = calculate_scores(model, rebatch(BATCH, 2), "gain", warmup_steps=2, **QUIET)
    found["gain"], found["mask"] = gain, create_mask_from_fisher(gain, keep_ratio=0.1)
    found["magnitude"] = calculate_scores(model, [], "magnitude", **QUIET)
    found["moments"] = measure_moments(model, rebatch(BATCH, 2), warmup_steps=2, **QUIET).mean_gradients
    model.train()
    found["trained on"] = engine.gradients(model, rebatch(BATCH, 5)[rank])
    found["rows"] = rows_seen(adapter(), rebatch(BATCH, 2) * 4)
    found["told"] = refusals(engine, rank)
    return found


def rows_seen(model: Any, batches: Any) -> int:
    """How many rows went through the model while it was scored."""
    seen: list[int] = []
    head = next(module for name, module in model.named_modules() if name.endswith("base_model.model.classifier"))
    head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    calculate_fisher_information(model, batches, warmup_steps=0, **QUIET)
    return sum(seen)


def refusals(engine: Any, rank: int) -> dict[str, str]:
    def scored(batches: Any, **options: Any) -> str:
        model = engine.sharded(lora(base()))
        return refusal(lambda: calculate_fisher_information(model, batches, **QUIET, **options))

    broken = [dict(batch) for batch in rebatch(BATCH, 2)]
    broken[3]["labels"] = broken[3]["labels"] + 100  # process 1's, once rules are proven

    def failing() -> Iterator[Any]:
        yield from rebatch(BATCH, 2)[:3]
        if rank == 1:
            raise FisherError("no more data")
        yield from rebatch(BATCH, 2)[3:]

    accumulating = engine.accumulating()
    return {
        "broken": scored(broken),
        "different": scored(rebatch(BATCH, 2 + rank)),
        "loader": scored(failing()),
        "alone": scored(rebatch(BATCH, 2), split_between_processes=False),
        "accumulating": refusal(lambda: calculate_fisher_information(accumulating, [BATCH], **QUIET)),
    }


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "ZeRO-3":
        pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    return str(request.param)


@pytest.fixture(scope="module")
def results(engine: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, f"sharded-{engine}", engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process_with_the_whole_model(name: str, results: list[dict[str, Any]]) -> None:
    make, batches, options = CASES[name]
    alone = calculate_fisher_information(make(), batches(), **QUIET, **options)
    for result in results:
        assert_scores_close(result[name], alone, tolerance=ROUNDING)
        assert list(result[name]) == list(alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_loader_that_gives_each_its_part(name: str, results: list[dict[str, Any]]) -> None:
    alone = calculate_fisher_information(lora(base()), rebatch(BATCH, 2), warmup_steps=0, **QUIET)
    for result in results:
        assert_scores_close(result[name], alone, tolerance=1e-4)


@pytest.mark.slow
def test_low_precision_comes_close(results: list[dict[str, Any]]) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        alone = calculate_fisher_information(lora(base()), rebatch(BATCH, 2), **QUIET)
    for result in results:
        assert_scores_close(result["autocast"], alone, tolerance=0.05)
        assert_scores_close(result["in bf16"], alone, tolerance=0.3)


@pytest.mark.slow
def test_all_processes_have_the_same_to_the_bit(results: list[dict[str, Any]]) -> None:
    for name in (*CASES, *PARTS, "gain", "mask", "magnitude", "moments"):
        assert results[0][name]
        assert all(torch.equal(tensor, results[1][name][key]) for key, tensor in results[0][name].items()), name


@pytest.mark.slow
def test_named_scores_and_masks(results: list[dict[str, Any]]) -> None:
    alone = calculate_scores(adapted(), rebatch(BATCH, 2), "gain", warmup_steps=2, **QUIET)
    assert_scores_close(results[0]["gain"], alone, tolerance=1e-3)
    for name, weight in adapted().named_parameters():
        if weight.requires_grad:
            assert torch.equal(results[0]["magnitude"][name], weight.abs().cpu())


@pytest.mark.slow
def test_processes_share_the_work(results: list[dict[str, Any]]) -> None:
    """But for the first round, which both need to look at, and its proof."""
    batches = rebatch(BATCH, 2) * 4
    for result in results:
        assert result["rows"] <= rows_seen(lora(base()), batches[:4]) + 2 * len(batches[4:]) // 2
    assert rows_seen(lora(base()), batches) >= 2 * len(batches)


@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_been_scored(results: list[dict[str, Any]]) -> None:
    model = adapted().train()
    for half in rebatch(BATCH, 5):
        (model(**half).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(results[0]["trained on"][name], parameter.grad.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_no_process_waits_for_one_that_failed(engine: str, results: list[dict[str, Any]]) -> None:
    told = [result["told"] for result in results]
    assert "Process 1 of 2 failed while scoring: FisherError" in told[0]["broken"]
    assert "label" in told[1]["broken"]
    assert "no more data" in told[0]["loader"]
    assert "no more data" in told[1]["loader"]
    for each in told:
        assert "different batches" in each["different"]
        assert ENGINES[engine].alone in each["alone"]
        assert ENGINES[engine].holds in each["accumulating"]
