"""What is DeepSpeed ZeRO-3's own when a model is scored that it has split: it trains on as if nothing had been."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engines import NEEDS_DEEPSPEED, adamw, deepspeed_config, deepspeed_on_the_cpu
from peft import PeftModel
from processes import in_two_processes
from tiny import (
    assert_same_tensors,
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    llama,
    lora,
    rebatch,
    tensors,
)
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import FisherError, apply_mask, calculate_fisher_information, create_mask_from_fisher
from fish_tuning.scores.zero3 import Gatherer

pytestmark = pytest.mark.slow

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6, 9, 5))
TEXTS = causal_batch((5, 9, 3, 7, 9, 4, 6, 8))
QUIET: dict[str, Any] = {"progress": False}
LAYERS = 4  # one of which is well below the whole


def base() -> Any:
    # Two processes halve all its tensors: what fills up an odd one is whatever lay in memory.
    return bert(num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layers=LAYERS)


def adapted() -> Any:
    """At PEFT's own start, which is scored after warm-up."""
    return lora(base(), init_lora_weights=True, lora_dropout=0.0)


def engine_of(model: Any, trains: bool = True, **zero: Any) -> Any:
    settings = {"stage3_param_persistence_threshold": 20, **zero}  # some biases above it, some below
    optimizer = adamw(model) if trains else None
    config = deepspeed_config(3, **settings)
    engine, *_ = deepspeed_on_the_cpu().initialize(model=model, optimizer=optimizer, config=config)
    return engine


def scored(model: Any, batches: Any = None, **options: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, batches or rebatch(BATCH, 2), **QUIET, **options)


def state_of(engine: Any) -> dict[str, Any]:
    """All that ZeRO-3 keeps of a model and its training."""
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    place = "_PartitionedParameterCoordinator__"
    names = {id(each): name for name, each in engine.module.named_parameters()}
    names |= {id(module): name for name, module in engine.module.named_modules()}
    return {
        "parts": {name: each.ds_tensor.clone() for name, each in engine.module.named_parameters()},
        "states": {
            name: (each.ds_status.name, each.requires_grad, each.ds_persist, len(each.ds_active_sub_modules))
            for name, each in engine.module.named_parameters()
        },
        "gradients": [name for name, each in engine.module.named_parameters() if each.grad is not None],
        "masters": [each.detach().clone() for each in engine.optimizer.fp32_partitioned_groups_flat],
        "optimizer": [
            {key: torch.as_tensor(value).clone() for key, value in each.items()}
            for each in engine.optimizer.optimizer.state.values()
        ],
        "trace": (
            getattr(coordinator, f"{place}trace_mode").name,
            [names[id(module)] for module in getattr(coordinator, f"{place}submodule_order")],
            [names[id(each.param)] for each in getattr(coordinator, f"{place}param_order")],
            getattr(coordinator, f"{place}step_id"),
        ),
        "hooks": {
            name: (
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                module.training,
                getattr(module, "applied_pre_backward_ref_cnt", None),
                getattr(module, "ds_grads_remaining", None),
                [names[id(each)] for each in module._external_params.values()],
                module._parameters._in_forward,
            )
            for name, module in engine.module.named_modules()
        },
        "own": sorted(vars(engine.optimizer.parameter_offload)),
    }


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("states", "gradients", "trace", "hooks", "own"):
        assert one[key] == other[key], key
    assert all(torch.equal(part, other["parts"][name]) for name, part in one["parts"].items())
    assert all(torch.equal(*pair) for pair in zip(one["masters"], other["masters"], strict=True))
    for mine, theirs in zip(one["optimizer"], other["optimizer"], strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BertLayer)]


def trained(rank: int, score: Callable[[Any, str], object]) -> tuple[list[float], dict[str, Any]]:
    """The losses and the end of a training that is interrupted to score: new, midway, after a forward pass alone."""
    model = adapted()
    set_leaf = deepspeed_on_the_cpu().utils.set_z3_leaf_module
    set_leaf(layers_of(model)[2], True)  # whose gradients ZeRO reduces in its own way
    engine = engine_of(model)
    losses = []

    def step() -> None:
        engine.train()
        loss = engine(**rebatch(BATCH, 5)[rank]).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()

    score(engine, "new")
    step()
    score(engine, "once trained")
    step()
    step()
    score(engine, "with a trace")
    step()
    with torch.no_grad():
        engine.eval()
        engine(**rebatch(BATCH, 5)[rank])  # leaves what it has fetched ahead
    score(engine, "after an evaluation")
    step()
    step()
    return losses, state_of(engine)


def training_goes_on(rank: int) -> dict[str, Any]:
    scores = {}

    def interrupted(engine: Any, when: str) -> None:
        before = state_of(engine)
        scores[when] = scored(engine)
        if when == "after an evaluation":  # what was under way has arrived, as at the next forward pass
            assert all(torch.equal(part, before["parts"][name]) for name, part in state_of(engine)["parts"].items())
        else:
            assert_same_state(state_of(engine), before)
        with pytest.raises(FisherError, match="label"):
            scored(engine, [{**BATCH, "labels": BATCH["labels"] + 100}], warmup_steps=2)
        with broken(engine.module), pytest.raises(ArithmeticError):
            scored(engine)

    losses, end = trained(rank, interrupted)
    plain, plain_end = trained(rank, lambda engine, when: None)
    assert losses == plain
    assert_same_state(end, plain_end)
    assert not torch.equal(next(iter(scores["new"].values())), next(iter(scores["with a trace"].values())))
    return scores


@contextlib.contextmanager
def broken(model: nn.Module) -> Iterator[None]:
    """Within the second layer's forward pass, in both processes."""

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = layers_of(model)[1].register_forward_pre_hook(fail)
    yield
    handle.remove()


def peak_of_frozen(model: Any, batches: Any) -> tuple[int, int]:
    """How many frozen entries a process ever holds while it scores, and how many there are."""
    frozen = [each for each in model.parameters() if not each.requires_grad]
    held: list[int] = []
    fetch = Gatherer.fetch_sub_module

    def counted(self: Gatherer, module: Any, forward: bool) -> None:
        fetch(self, module, forward)
        held.append(sum(each.numel() for each in frozen))

    with mock.patch.object(Gatherer, "fetch_sub_module", counted):
        scored(model, batches)
    assert sum(each.numel() for each in frozen) == 0
    return max(held), sum(each.ds_numel for each in frozen)


def checkpointed(model: Any) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def peaks() -> dict[str, tuple[int, int]]:
    models: dict[str, Any] = {"plain": lora(base()), "checkpointed": checkpointed(lora(base())), "llama": tied_llama()}
    found = {
        name: peak_of_frozen(engine_of(model, stage3_param_persistence_threshold=0).module, BATCHES.get(name))
        for name, model in models.items()
    }
    return {**found, "no engine": peak_of_frozen(split(lora(base())), None)}


def tied_llama() -> Any:
    """Its frozen head is its frozen embeddings."""
    return lora(llama(tie_word_embeddings=True, num_hidden_layers=LAYERS))


class Reaching(nn.Module):
    """A model that reads a tensor of a part of it past that part's own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() @ self.first.weight)  # type: ignore[no-any-return]


def reaching_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, 4, generator=generator), "y": torch.tensor([0, 2, 1])} for _ in range(4)]


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")


def leaf(model: Any) -> Any:
    """Each layer is gathered as a whole."""
    deepspeed_on_the_cpu().utils.set_z3_leaf_modules(model, [BertLayer])
    return model


def built_split(model_of: Callable[[], Any], folder: Path) -> Any:
    """A base model that was never whole in a process: loaded under a Trainer's configuration; an adapter on it."""
    kept = HfDeepSpeedConfig(deepspeed_config(3))  # in force for as long as it lives
    model = model_of()
    loaded = type(model).from_pretrained(folder / type(model).__name__)
    assert all(each.numel() == 0 for each in loaded.parameters())
    adapter = lora(loaded, lora_dropout=0.0)
    del kept
    return adapter


def split(model: Any) -> Any:
    """With its adapter."""
    with deepspeed_on_the_cpu().zero.Init(module=model, config_dict_or_path=deepspeed_config(3)):
        return model


def left_by_an_engine() -> Any:
    engine = engine_of(lora(base()))
    loss = engine(**BATCH).loss
    engine.backward(0 * loss)
    engine.destroy()
    return engine.module


def traces(model: nn.Module) -> list[Any]:
    """All that is in a model's modules, and in which state its tensors are."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (
            sorted(vars(module)),
            type(module._parameters),
            [len(vars(module)[name]) for name in hooks],
            [(name, id(each), each.shape) for name, each in module._parameters.items() if each is not None],
        )
        for module in model.modules()
    ]


def scored_untouched(model: Any) -> dict[str, Tensor]:
    """Also where that is cut short, and for the engine that takes the model next."""
    before, has_had_an_engine = traces(model), "pre_bwd_fn" in vars(model)
    scores = scored(model)
    assert has_had_an_engine or traces(model) == before
    before = traces(model)
    with broken(model), pytest.raises(ArithmeticError):
        scored(model)
    assert traces(model) == before
    assert_scores_close(scored(engine_of(model)), scores, tolerance=1e-4)
    return scores


BATCHES: dict[str, Any] = {"llama": rebatch(TEXTS, 2)}
REACHING: dict[str, Any] = {"loss_fn": cross_entropy}


def variants(folder: Path) -> dict[str, Any]:
    """Models as ZeRO-3 may have them, each scored."""
    offload = {"offload_param": {"device": "cpu"}}
    within = engine_of(lora(base()))
    return {
        "tied": scored(engine_of(tied_llama()), rebatch(TEXTS, 2)),
        "reaching": scored(engine_of(Reaching(), stage3_param_persistence_threshold=0), reaching_batches(), **REACHING),
        "leaf": scored(engine_of(leaf(lora(base())))),
        "offloaded": scored(engine_of(lora(base()), **offload)),
        "part": scored(within.module.base_model.model),
        "built split": scored(engine_of(built_split(base, folder), trains=False)),
        "everywhere": scored(engine_of(lora(base()), stage3_param_persistence_threshold=10**6)),
        "no engine": scored_untouched(built_split(base, folder)),
        "all split, no engine": scored_untouched(split(lora(base()))),
        "no more engine": scored_untouched(left_by_an_engine()),
        "reaching, no engine": scored(split(Reaching()), reaching_batches(), **REACHING),
    }


ALONE: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tied": lambda: scored(tied_llama(), rebatch(TEXTS, 2)),
    "reaching": lambda: scored(Reaching(), reaching_batches(), **REACHING),
    "part": lambda: scored(lora(base()).base_model.model),
    "built split": lambda: scored(lora(base(), lora_dropout=0.0)),
    "no engine": lambda: scored(lora(base(), lora_dropout=0.0)),
    "reaching, no engine": lambda: scored(Reaching(), reaching_batches(), **REACHING),
    **dict.fromkeys(
        ("leaf", "offloaded", "everywhere", "all split, no engine", "no more engine"), lambda: scored(lora(base()))
    ),
}


def masked_then(rank: int, folder: Path) -> dict[str, Tensor]:
    """Scores, a mask of them, and training under it, which starts anew and is saved; gives the mask."""
    mask = create_mask_from_fisher(scored(engine_of(adapted())), keep_ratio=0.1)
    model = adapted()
    apply_mask(model, mask)
    engine = engine_of(model)
    for _ in range(2):
        engine.backward(engine(**rebatch(BATCH, 5)[rank]).loss)
        engine.step()
    state = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        model.save_pretrained(folder / "masked", state_dict=state)
    return mask


def refusals(rank: int, folder: Path) -> dict[str, str]:
    def told(model: Any, **options: Any) -> str:
        with pytest.raises(FisherError) as raised:
            scored(model, **options)
        return str(raised.value)

    accumulating = engine_of(adapted())
    accumulating.backward(accumulating(**BATCH).loss)
    again = engine_of(adapted())
    for _ in range(2):
        again.backward(again(**BATCH).loss)
    quantized = engine_of(adapted())
    quantized.optimizer.parameter_offload.zero_quantized_weights = True
    gone = engine_of(adapted())
    gone.optimizer.parameter_offload._remove_module_hooks()
    return {
        "accumulating": told(accumulating),
        "twice": told(again.module),
        "quantized": told(quantized),
        "gone": told(gone),
        "alone": told(engine_of(adapted()), split_between_processes=False),
    }


def worker(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "refusals": refusals(rank, folder),
        "variants": variants(folder),
        "peaks": peaks(),
        "masked": masked_then(rank, folder),
        "trained": training_goes_on(rank),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    folder = tmp_path_factory.mktemp("zero3")
    base().save_pretrained(folder / type(base()).__name__)
    return [{"folder": folder, **result} for result in in_two_processes(worker, folder)]


def test_training_goes_on_to_the_bit_as_if_nothing_had_been_scored(results: list[dict[str, Any]]) -> None:
    """Its parts, master weights, optimizer, states, trace and hooks: each process compared them."""
    for result in results:
        assert set(result["trained"]) == {"new", "once trained", "with a trace", "after an evaluation"}
    assert_scores_close(results[0]["trained"]["new"], scored(adapted()), tolerance=1e-4)


@pytest.mark.parametrize("name", ALONE)
def test_models_as_zero_3_may_have_them(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_scores_close(result["variants"][name], ALONE[name](), tolerance=1e-4)
    assert all(
        torch.equal(each, results[1]["variants"][name][key]) for key, each in results[0]["variants"][name].items()
    )


def test_no_process_ever_holds_the_whole_base(results: list[dict[str, Any]]) -> None:
    for result in results:
        for name, (peak, whole) in result["peaks"].items():
            assert 0 < peak < whole / 2, name


def test_a_mask_of_such_scores_is_trained_as_in_one_process(results: list[dict[str, Any]]) -> None:
    model = adapted()
    mask = create_mask_from_fisher(scored(model), keep_ratio=0.1)
    apply_mask(model, mask)
    optimizer = adamw(model)
    for _ in range(2):
        for half in rebatch(BATCH, 5):
            (model(**half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_tensors(results[0]["masked"], mask)
    assert not all(selected.any() for selected in mask.values())  # and what ZeRO-3 leaves out is saved
    stock = PeftModel.from_pretrained(base(), results[0]["folder"] / "masked")
    torch.testing.assert_close(tensors(stock), tensors(model), rtol=0, atol=1e-6)


def test_what_cannot_be_scored_is_named(results: list[dict[str, Any]]) -> None:
    for result in results:
        told = result["refusals"]
        assert "the engine has no hooks that gather it" in told["gone"]
        assert "deepspeed.initialize" in told["gone"]
        for name in ("accumulating", "twice"):
            assert "Score before or after the accumulation of a step" in told[name]
        assert "zero_quantized_weights" in told["quantized"]
        assert "no process can score it by itself" in told["alone"]
