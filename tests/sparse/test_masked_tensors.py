"""A masked model trains its selected entries, and nothing else about it is different."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE, placed
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tiny import (
    Batch,
    Rows,
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    causal_batch,
    classification_batch,
    llama,
    lora,
    only_trainable,
    random_mask,
    tensors,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from fish_tuning import (
    FishMaskCallback,
    MaskError,
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
    get_mask,
    is_masked,
    remove_mask,
)
from fish_tuning.files.delta_file import load_delta
from fish_tuning.sparse import groups, masked_tensors
from fish_tuning.sparse.delta import add_delta, remove_delta, save_delta

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "bert-lora": (lambda: lora(bert(), lora_dropout=0.0), classification_batch),
    "llama-lora": (lambda: lora(llama(), lora_dropout=0.0), causal_batch),
    "bert-full": (bert, classification_batch),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=False, fused=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    accumulate: int = 1,
    clip: float = 0,
) -> None:
    for _ in range(steps):
        for _ in range(accumulate):
            (model(**batch).loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()


def train_dense(model: nn.Module, batch: Batch, mask: dict[str, Tensor], steps: int = 4, clip: float = 0) -> None:
    """Masked AdamW on dense tensors: gradients masked, decay on the selected entries alone."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
    for _ in range(steps):
        model(**batch).loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask[name])
        if clip:
            nn.utils.clip_grad_norm_(parameters.values(), clip)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter -= 0.02 * 0.1 * parameter * mask[name]
        optimizer.step()
        optimizer.zero_grad()


# Training


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"clip": 0.05}], ids=["plain", "accumulate", "clip"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", MODELS)
def test_plain_loop_moves_selected_entries_alone(case: str, optimizer: str, settings: dict[str, float]) -> None:
    make_model, make_batch = MODELS[case]
    model, batch = make_model(), make_batch()
    if case == "bert-full":
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    mask = random_mask(model, dense=["classifier"])
    # Gradients of key biases are rounding, and the other rows of the embeddings are never read: decay moves them all.
    before = tensors(model)
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS[optimizer](trainable(model)), **settings)  # type: ignore[arg-type]
    assert_only_selected_moved(before, tensors(model), mask)


@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-foreach", "adamw-fused"])
def test_result_is_that_of_dense_masked_adamw(optimizer: str, clip: float) -> None:
    batch, model, dense = classification_batch(), lora(bert(), lora_dropout=0.0), lora(bert(), lora_dropout=0.0)
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS[optimizer](trainable(model)), clip=clip)
    train_dense(dense, batch, mask, clip=clip)
    for name, tensor in tensors(dense).items():
        torch.testing.assert_close(tensors(model)[name], tensor, rtol=0, atol=1e-6)


def test_everything_that_grows_with_training_is_k_numbers() -> None:
    model, batch = lora(bert()), classification_batch()
    mask = random_mask(model, 0.1)
    k = sum(int(selected.sum()) for selected in mask.values())
    apply_mask(model, mask)
    assert count_trainable_parameters(model) == model.get_nb_trainable_parameters()[0] == k
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    model(**batch).loss.backward()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == k
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
    assert sum(value.numel() for value in state) == 2 * k


def test_print_trainable_parameters_tells_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    model = lora(bert())
    mask = random_mask(model, 0.1)
    apply_mask(model, mask)
    model.print_trainable_parameters()
    assert f"trainable params: {sum(int(m.sum()) for m in mask.values()):,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("case", MODELS)
def test_outputs_and_gradients_are_those_of_the_unmasked_model(case: str) -> None:
    make_model, make_batch = MODELS[case]
    model, batch = make_model(), make_batch()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    masked = make_model()
    mask = {name: selected for name, selected in random_mask(masked).items() if not selected.all()}
    apply_mask(masked, mask)
    again = masked(**batch).loss
    again.backward()
    assert torch.equal(loss, again)
    for name, selected in mask.items():
        values = dict(masked.named_parameters())[name]
        torch.testing.assert_close(values.grad.flatten(), gradients[name][selected])


def test_activation_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model, batch = lora(llama(), lora_dropout=0.0).train(), causal_batch()
        apply_mask(model, random_mask(model))
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
        results.append(tensors(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-6)


def test_compiled_model_trains_alike() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        before, mask = tensors(model), random_mask(model)
        apply_mask(model, mask)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = OPTIMIZERS["adamw-fused"](trainable(model))
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            run(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_only_selected_moved(before, tensors(model), mask)
        results.append(tensors(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-5)


def test_bf16_model() -> None:
    model, batch = lora(bert()).to(torch.bfloat16), classification_batch()
    mask, before = random_mask(model, dense=["classifier"]), tensors(model)
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    assert all(p.dtype == torch.bfloat16 for p in trainable(model))
    assert_only_selected_moved(before, tensors(model), mask)


def test_dtype_may_change_after_masking() -> None:
    model, batch = lora(bert()), classification_batch()
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    model.to(torch.bfloat16)
    before = tensors(model)
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    assert_only_selected_moved(before, tensors(model), mask)
    remove_mask(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Tensors wholly selected, not at all, or not named


def test_tensors_with_all_or_no_entries() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    kept, before = model[1].weight, tensors(model)
    mask = {
        "0.weight": torch.zeros(3, 3, dtype=torch.bool),
        "0.bias": torch.tensor([True, False, True]),
        "1.weight": torch.ones(3, 3, dtype=torch.bool),
    }
    apply_mask(model, mask)
    assert dict(model.named_parameters()).keys() == {"0.bias", "1.weight", "1.bias"}
    assert model[1].weight is kept
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert_only_selected_moved(before, tensors(model), mask | {"1.bias": torch.ones(3, dtype=torch.bool)})
    assert {name: int(m.sum()) for name, m in get_mask(model).items()} == {
        "0.weight": 0, "0.bias": 2, "1.weight": 9, "1.bias": 3
    }  # fmt: skip


@pytest.mark.parametrize("dense", [["classifier"], []], ids=["dense-head", "masked-head"])
def test_get_mask_gives_back_the_mask(dense: list[str]) -> None:
    model = lora(bert())
    mask = random_mask(model, dense=dense)
    assert not is_masked(model)
    apply_mask(model, mask)
    assert is_masked(model)
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(mask.items())))
    model.requires_grad_(False)  # for evaluation
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(mask.items())))


# State dict, files, PEFT


@pytest.mark.parametrize("case", MODELS)
def test_state_dict_is_that_of_the_unmasked_model(case: str) -> None:
    model = MODELS[case][0]()
    before = tensors(model)
    apply_mask(model, random_mask(model))
    after = model.state_dict()
    assert list(after) == list(before) or after.keys() == before.keys()
    assert_same_tensors(after, before)


def test_state_dict_has_the_trained_values_without_a_forward_pass() -> None:
    model = nn.Linear(3, 2)
    apply_mask(model, {"weight": torch.eye(2, 3, dtype=torch.bool)})
    with torch.no_grad():
        trainable(model)[0].fill_(7.0)
    assert model.state_dict()["weight"].diagonal().tolist() == [7.0, 7.0]


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_the_dense_tensors(assign: bool) -> None:
    source, target = lora(bert(), seed=1), lora(bert(), seed=2)
    apply_mask(target, random_mask(target))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert_same_tensors(target.state_dict(), source.state_dict())
    batch = classification_batch()
    assert torch.equal(target(**batch).logits, source(**batch).logits)
    mask, before = get_mask(target), tensors(target)
    train(target, batch, OPTIMIZERS["adamw-fused"](trainable(target)))
    assert_only_selected_moved(before, tensors(target), mask)


def test_loading_leaves_the_given_state_dict_alone() -> None:
    model = nn.Linear(3, 2)
    state = tensors(model)
    apply_mask(model, {"weight": torch.eye(2, 3, dtype=torch.bool)})
    model.load_state_dict(state)
    assert state.keys() == {"weight", "bias"}
    missing, unexpected = model.load_state_dict({"bias": state["bias"]}, strict=False)
    assert missing
    assert not unexpected


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "olora"])
def test_saved_adapter_is_an_ordinary_one(init: bool | str, tmp_path: Path) -> None:
    model, batch = lora(bert(), init_lora_weights=init), classification_batch()
    model.save_pretrained(tmp_path / "unmasked")
    apply_mask(model, random_mask(model, dense=["classifier"]))
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    model.eval().save_pretrained(tmp_path / "masked")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "masked").eval()
    assert not is_masked(loaded)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("masked", "unmasked")]
    assert sizes[0] == sizes[1]


def test_adapter_loads_into_the_masked_model(tmp_path: Path) -> None:
    model, batch = lora(bert()), classification_batch()
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    model.save_pretrained(tmp_path)
    other = lora(bert(), seed=5)
    apply_mask(other, mask)
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert_same_tensors(other.state_dict(), model.state_dict())
    assert count_trainable_parameters(other) == sum(int(m.sum()) for m in mask.values())


def test_full_model_saves_as_transformers_does(tmp_path: Path) -> None:
    model, batch = bert(), classification_batch()
    apply_mask(model, random_mask(model))
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    model.eval().save_pretrained(tmp_path)
    loaded = placed(BertForSequenceClassification.from_pretrained(tmp_path))
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_merge_and_unload() -> None:
    model, batch = lora(bert()), classification_batch()
    apply_mask(model, random_mask(model))
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    logits = model.eval()(**batch).logits
    merged = model.merge_and_unload()
    assert not is_masked(merged) or all("lora" not in name for name in get_mask(merged))
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=1e-5)


def test_frozen_entries_stay_frozen_whatever_is_switched_on() -> None:
    model, batch = lora(bert()), classification_batch()
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    before, base = tensors(model), {n: p.requires_grad for n, p in model.named_parameters()}
    model.set_adapter("default")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == base
    model.requires_grad_(True)
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    after = tensors(model)
    assert_only_selected_moved({n: before[n] for n in mask}, {n: after[n] for n in mask}, mask)


def test_two_adapters() -> None:
    model, batch = lora(bert()), classification_batch()
    apply_mask(model, random_mask(model, dense=["classifier"]))
    mask = get_mask(model)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.set_adapter("other")
    first = tensors(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all("other" in name for name in names)
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    second = tensors(model)
    assert all(torch.equal(first[name], second[name]) for name in first if "other" not in name)
    model.set_adapter("default")
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    assert_only_selected_moved(second, tensors(model), mask)
    model.delete_adapter("other")
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(mask.items())))


def test_embedding_adapter_in_a_parameter_dict() -> None:
    model, batch = lora(bert(), target_modules=["query", "word_embeddings"]), classification_batch()
    mask, before = random_mask(model, dense=["classifier"]), tensors(model)
    assert any("lora_embedding_A" in name for name in mask)
    apply_mask(model, mask)
    assert_same_tensors(model.state_dict(), before)
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    assert_only_selected_moved(before, tensors(model), mask)


# The base model's own weights


POOLS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "biases": lambda name: name.endswith("bias"),
    "pattern": lambda name: re.search(r"embeddings\.|LayerNorm|attention.*weight", name) is not None,
}


@pytest.mark.parametrize("how", ["loop", "trainer"])
@pytest.mark.parametrize("pool", POOLS)
def test_base_weights_from_scores_to_delta(pool: str, how: str, tmp_path: Path) -> None:
    model, base, rows = bert(), bert(), classification_batch((5, 9, 3, 7, 6, 8, 4, 5))
    only_trainable(model, [n for n, _ in model.named_parameters() if POOLS[pool](n) or n.startswith("classifier")])
    scores = calculate_fisher_information(model, [rows], progress=False)
    mask = create_mask_from_fisher(scores, 0.05, ["classifier"])
    before, kept = tensors(model), sum(int(selected.sum()) for selected in mask.values())
    assert sum(bool(selected.any()) for selected in mask.values()) > 4
    if how == "loop":
        apply_mask(model, mask)
        train(model.train(), rows, OPTIMIZERS["adamw-fused"](trainable(model)), clip=1.0)
    else:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.02, weight_decay=0.1,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Rows(rows), callbacks=[FishMaskCallback(mask)]).train()
    assert count_trainable_parameters(model) == kept
    assert_only_selected_moved(before, tensors(model), mask)
    save_delta(model.eval(), tmp_path / "delta.safetensors")
    add_delta(base, tmp_path / "delta.safetensors")
    assert load_delta(tmp_path / "delta.safetensors").num_parameters == kept
    assert torch.equal(base(**rows).logits, model.to(DEVICE)(**rows).logits)
    assert_same_tensors(base.state_dict(), model.state_dict())
    remove_delta(base)
    assert_same_tensors(base.state_dict(), before)


class DenseTensors(TorchDispatchMode):
    """Counts the tensors of at least `size` entries that operations have made and that are alive at the same time."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.size, self.peak, self.made = size, 0, {}  # type: ignore[var-annotated]
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.known |= {tensor.frozen.untyped_storage()._cdata for tensor in masked_tensors.masked_tensors(model)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and tensor.numel() >= self.size and storage._cdata not in self.known:
                self.made[storage._cdata] = StorageWeakRef(storage)
        self.made = {key: reference for key, reference in self.made.items() if not reference.expired()}
        self.peak = max(self.peak, len(self.made))
        return result


def test_one_dense_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large tensors; the small ones of a layer wait for each other."""
    monkeypatch.setattr(groups, "_SMALL", 1000)
    peaks = {}
    for masked in (False, True):
        model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
        if masked:
            apply_mask(model, random_mask(model, 0.1))
        with DenseTensors(model, 40 * 40) as dense:
            for _ in range(2):  # two batches are accumulated
                model(torch.ones(2, 3, 40)).square().sum().backward()
        peaks[masked] = dense.peak
    assert peaks == {False: 5, True: 1}  # four kept, and one on its way to be added to them


def test_small_tensors_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one kind; up to so many entries, more on a GPU; large ones and those without a key stay alone."""
    small, large = groups._SMALL, groups._SMALL + 1
    sizes, keys = [small, large, small, small, small, small, 10, 10], ["a", "a", "b", "a", "a", "a", None, "a"]
    monkeypatch.setattr(groups, "_TOGETHER", 4 * small)
    assert groups.small_groups(sizes, keys) == [[0, 3, 4, 5], [1], [2], [6], [7]]
    assert groups.small_groups(sizes, keys, gpu=True) == [[0, 3, 4, 5, 7], [1], [2], [6]]


def test_gradient_that_is_not_contiguous_is_not_copied() -> None:
    model = placed(nn.Linear(40, 30, bias=False))
    mask = random_mask(model, 0.1)
    apply_mask(model, mask)
    gradient = torch.randn(40, 30).to(DEVICE).T
    weight = model.weight
    with DenseTensors(model, 40 * 30) as dense:
        weight.backward(gradient)
    assert dense.peak == 0
    assert torch.equal(trainable(model)[0].grad.flatten(), gradient[mask["weight"]])


# Taking the mask off, copies


@pytest.mark.parametrize("head", ["dense", "masked"])
def test_remove_mask_gives_back_the_same_parameters(head: str) -> None:
    model, batch = lora(bert()), classification_batch()
    parameters = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    mask = random_mask(model, 0.3, dense=["classifier"] if head == "dense" else [])
    mask[next(iter(mask))][:] = False
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
    trained = tensors(model)
    remove_mask(model)
    assert not is_masked(model)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    assert all(after[name].requires_grad and after[name].grad is None for name in mask)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any(module._state_dict_hooks or module._load_state_dict_pre_hooks for module in model.modules()
                   if not isinstance(module, PeftModel) and type(module) is nn.Linear)  # fmt: skip
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert_same_tensors(model.state_dict(), trained)
    assert not getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    assert all((trained[name] != tensor).any() for name, tensor in tensors(model).items() if name in mask)


def test_masks_one_after_the_other() -> None:
    model, batch = lora(bert()), classification_batch()
    for seed in range(3):
        mask = random_mask(model, seed=seed, dense=["classifier"])
        before = tensors(model)
        apply_mask(model, mask)
        train(model, batch, OPTIMIZERS["adamw-fused"](trainable(model)))
        assert_only_selected_moved(before, tensors(model), mask)
        remove_mask(model)


def test_remove_mask_of_an_unmasked_model_does_nothing() -> None:
    model = lora(bert())
    before, parameters = tensors(model), dict(model.named_parameters())
    remove_mask(model)
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_old_gradients_go() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    apply_mask(model, {"weight": torch.eye(2, 3, dtype=torch.bool)})
    remove_mask(model)
    assert model.weight.grad is None


def test_deepcopy_is_a_masked_model_of_its_own() -> None:
    model, batch = lora(bert()), classification_batch()
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    twin, before = copy.deepcopy(model), tensors(model)
    assert_same_tensors(twin.state_dict(), before)
    train(twin, batch, OPTIMIZERS["adamw-fused"](trainable(twin)))
    assert_same_tensors(model.state_dict(), before)
    assert_only_selected_moved(before, tensors(twin), mask)
    trained = tensors(twin)
    remove_mask(twin)
    assert_same_tensors(twin.state_dict(), trained)
    assert is_masked(model)
    assert not is_masked(twin)
    assert_same_tensors(model.state_dict(), before)


def test_tensor_that_is_not_contiguous() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.randn(3, 2).T)
    before, mask = tensors(model), {"weight": torch.eye(2, 3, dtype=torch.bool)}
    apply_mask(model, mask)
    assert_same_tensors(model.state_dict(), before)
    assert dict(model.named_parameters())["weight"].flatten().tolist() == before["weight"].diagonal().tolist()
    remove_mask(model)
    assert_same_tensors(model.state_dict(), before)


class AppliedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def _apply(self, fn: Any) -> Any:  # type: ignore[override]  # as modules had it before torch 2
        return super()._apply(fn)


def test_a_module_with_an_apply_of_its_own_moves() -> None:
    model = nn.Sequential(AppliedByHand())
    apply_mask(model, random_mask(model, 0.5))
    before = tensors(model)["0.weight"].double()
    assert torch.equal(model.double()[0].weight, before)  # type: ignore[arg-type]


def test_sparse_gradients_of_an_embedding() -> None:
    dense, masked = nn.Embedding(5, 3), nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    masked[0].load_state_dict(dense.state_dict())
    mask = random_mask(masked, 0.5)
    apply_mask(masked, mask)
    rows = torch.tensor([1, 2, 2])
    dense(rows).square().sum().backward()
    masked[0](rows).square().sum().backward()  # alone, without the others of its group
    (gradient,) = (parameter.grad for name, parameter in masked.named_parameters() if name == "0.weight")
    assert torch.equal(gradient.flatten(), dense.weight.grad[mask["0.weight"]])  # type: ignore[union-attr, index]
    masked(rows).sum().backward()


# Errors


def test_a_hook_that_would_be_left_behind_is_refused() -> None:
    model = nn.Linear(3, 3)
    handle = model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    mask = random_mask(model, 0.5)
    with pytest.raises(
        MaskError, match=r"'weight' has a hook \(register_post_accumulate_grad_hook\).*after apply_mask"
    ):
        apply_mask(model, mask)
    assert not is_masked(model)
    handle.remove()
    apply_mask(model, mask)


def test_tied_tensors_cannot_be_split() -> None:
    model = llama(tie_word_embeddings=True)
    mask = random_mask(model)
    shared = (
        r"'model.embed_tokens.weight' is shared by several layers .*: 'model.embed_tokens.weight', 'lm_head.weight'"
    )
    ways_out = r".*requires_grad_\(False\) before scoring.*names_to_exclude=\['model.embed_tokens.weight'\]"
    with pytest.raises(MaskError, match=shared + ways_out):
        apply_mask(model, mask)
    apply_mask(model, random_mask(model, dense=["embed_tokens"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_of_one_memory_cannot_be_split() -> None:
    """As PEFT's ensure_weight_tying makes them: two parameters, one a transposed view of the other."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    mask = random_mask(model, 0.5)
    with pytest.raises(
        MaskError, match=r"'0.weight' is shared by several layers \(tied weights: '0.weight', '1.weight'"
    ):
        apply_mask(model, mask)
    apply_mask(model, {"0.weight": torch.ones(3, 4, dtype=torch.bool), "1.weight": torch.ones(4, 3, dtype=torch.bool)})
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


def test_parameters_side_by_side_in_one_memory_are_not_shared() -> None:
    model, memory = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)), torch.randn(24)
    model[0].weight, model[1].weight = (nn.Parameter(memory[:12].view(3, 4)), nn.Parameter(memory[12:].view(4, 3)))
    apply_mask(model, random_mask(model, 0.5))
    assert is_masked(model)


@pytest.mark.parametrize("how", ["=", "register_parameter"])
def test_a_whole_parameter_in_the_place_of_values_is_refused(how: str) -> None:
    model = nn.Linear(4, 3)
    apply_mask(model, random_mask(model, 0.5))
    before, parameters = tensors(model), list(model.parameters())
    put = model.__setattr__ if how == "=" else model.register_parameter
    with pytest.raises(MaskError, match=r"'weight' of Linear has a mask, and a new parameter .* train as a\s*whole"):
        put("weight", nn.Parameter(torch.ones(3, 4)))
    assert_same_tensors(tensors(model), before)
    assert all(now is was for now, was in zip(model.parameters(), parameters, strict=True))


def test_a_masked_embedding_gets_no_other_size() -> None:
    model = llama()
    mask = random_mask(model)
    apply_mask(model, mask)
    before = tensors(model)
    with pytest.raises(
        MaskError, match=r"would get another size \(resize_token_embeddings.*remove_mask\(model\) first"
    ):
        model.resize_token_embeddings(64)
    assert_same_tensors(tensors(model), before)
    model(**causal_batch())
    remove_mask(model)
    model.resize_token_embeddings(64)
    assert model(**causal_batch()).logits.shape[-1] == 64


def test_tied_tensors_outside_the_pool() -> None:
    model, batch = llama(tie_word_embeddings=True), causal_batch()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    mask, before = random_mask(model), tensors(model)
    apply_mask(model, mask)
    train(model, batch, OPTIMIZERS["adamw"](trainable(model)))
    assert_only_selected_moved(before, tensors(model), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: {f"{next(iter(mask))}s": next(iter(mask.values()))}, "does not have. Did you mean '"),
        (lambda mask: {next(reversed(mask)): torch.ones(1, dtype=torch.bool)}, r"the tensor needs torch.bool of shape"),
        (lambda mask: {next(reversed(mask)): next(reversed(mask.values())).float()}, "is torch.float32 of shape"),
        (lambda mask: {"base_model.model.bert.pooler.dense.bias": torch.zeros(16, dtype=torch.bool)}, "not trainable"),
    ],
    ids=["name", "shape", "dtype", "frozen"],
)
def test_masks_that_do_not_fit_leave_the_model_alone(change: Callable[..., dict[str, Tensor]], message: str) -> None:
    model = lora(bert())
    before, parameters = tensors(model), dict(model.named_parameters())
    mask = random_mask(model)
    with pytest.raises(MaskError, match=message):
        apply_mask(model, mask | change(mask))
    assert not is_masked(model)
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_adalora_is_refused() -> None:
    config = AdaLoraConfig(target_modules=["query"], total_step=10, tinit=1, tfinal=1, deltaT=1)
    model = get_peft_model(bert(), config)
    with pytest.raises(MaskError, match=r"AdaLoRA.*cannot be masked"):
        apply_mask(model, random_mask(model))


def test_second_mask_is_an_error() -> None:
    model = lora(bert())
    mask = random_mask(model)
    apply_mask(model, mask)
    with pytest.raises(MaskError, match="remove_mask"):
        apply_mask(model, mask)
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(mask.items())))
