"""What other code does with the tensors of an adapter, it may do with masked ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.utils.hotswap import hotswap_adapter
from processes import in_two_processes
from tiny import (
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    classification_batch,
    llama,
    lora,
    on_cpu,
    random_mask,
    tensors,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import MaskError, apply_mask, count_trainable_parameters, is_masked
from fish_tuning.sparse.masked_tensors import masked_tensors

BATCH = classification_batch()


def masked(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    mask = random_mask(model, 0.5)
    apply_mask(model, mask)
    return model.eval(), mask


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: Any, batch: Any = BATCH, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layer(model: nn.Module) -> tuple[str, Any]:
    return next((name, module) for name, module in model.named_modules() if name.endswith("lora_B.default"))


def test_names_are_those_of_the_unmasked_model() -> None:
    assert list(trainable(masked(lora(bert()))[0])) == list(trainable(lora(bert())))


def test_a_read_gives_one_tensor_until_the_values_change() -> None:
    _, module = layer(masked(lora(bert()))[0])
    first = module.weight
    assert module.weight is first
    assert module.weight.data_ptr() == first.data_ptr()


def test_lora_plus_sees_which_factor_a_value_belongs_to() -> None:
    model, _ = masked(lora(bert()))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {1e-3}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16e-3}


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01),
        lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01),
        lambda model: torch.optim.Muon([p for n, p in trainable(model).items() if "lora" in n], lr=0.01),
    ],
    ids=["lora-fa", "riemannian", "muon"],
)
def test_optimizers_of_whole_matrices_are_refused_by_name(make: Any) -> None:
    model = lora(bert())
    optimizer = make(model)
    model(**BATCH).loss.backward()
    optimizer.step()  # without a mask they work
    model, _ = masked(lora(bert()))
    optimizer = make(model)
    model(**BATCH).loss.backward()
    with pytest.raises(MaskError, match=r"whole matrices.*remove_mask"):
        optimizer.step()


@pytest.mark.parametrize("name", ["MuonClip", "Another"])
def test_classes_that_derive_from_one_of_whole_matrices_are_refused(name: str) -> None:
    model, _ = masked(lora(bert()))
    optimizer = type(name, (torch.optim.Muon,), {})([p for n, p in trainable(model).items() if "lora" in n], lr=0.01)
    model(**BATCH).loss.backward()
    with pytest.raises(MaskError, match=f"{name} computes its steps from whole matrices"):
        optimizer.step()


@pytest.mark.parametrize("muon", [False, True])
def test_masked_tensors_may_be_in_another_optimizers_part_of_muon(muon: bool) -> None:
    class MuonWithAuxAdam(torch.optim.SGD): ...

    model, _ = masked(lora(bert()))
    optimizer = MuonWithAuxAdam([{"params": trainable(model).values(), "use_muon": muon}], lr=0.01)
    model(**BATCH).loss.backward()
    if muon:
        with pytest.raises(MaskError, match="whole matrices"):
            optimizer.step()
    else:
        optimizer.step()


def test_merged_norms_are_ordinary_ones() -> None:
    model, _ = masked(get_peft_model(bert(), LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])))
    train(model)
    logits = model(**BATCH).logits
    merged = model.merge_and_unload()
    assert not is_masked(merged)
    torch.testing.assert_close(merged(**BATCH).logits, logits)


def test_values_that_are_changed_past_autograd_are_seen() -> None:
    """As an exponential moving average of the weights is put into a model."""
    model, _ = masked(lora(bert()))
    before = model(**BATCH).logits.detach()
    for parameter in trainable(model).values():
        parameter.data.copy_(parameter.data + 0.1)
    after = model(**BATCH).logits.detach()
    again = lora(bert()).eval()
    again.load_state_dict(model.state_dict())
    assert not torch.equal(before, after)
    assert torch.equal(again(**BATCH).logits, after)


@pytest.mark.parametrize("how", ["copy_", "data.fill_", "data ="])
def test_who_writes_into_a_masked_tensor_writes_its_values(how: str) -> None:
    model, mask = masked(lora(bert()))
    name, module = layer(model)
    sevens = torch.full(module.weight.shape, 7.0, device=DEVICE)
    if how == "copy_":
        with torch.no_grad():
            module.weight.copy_(sevens)
    elif how == "data.fill_":
        module.weight.data.fill_(7.0)
    else:
        module.weight.data = sevens.clone()
    assert torch.equal(module.weight, sevens)
    assert set(trainable(model)[f"{name}.weight"].flatten().tolist()) == {7.0}
    before = tensors(model)
    train(model)
    assert_only_selected_moved(before, tensors(model), mask)


@pytest.mark.parametrize("after_an_error", [False, True])
def test_a_pickled_model_trains_on(after_an_error: bool) -> None:
    model, mask = masked(lora(bert()))
    if after_an_error:  # in an optimizer's step, which takes values as ordinary parameters
        optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
        model(**BATCH).loss.backward()
        optimizer.param_groups[0]["lr"] = "fast"
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        model.zero_grad()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copy = torch.load(file, weights_only=False)
    assert torch.equal(copy(**BATCH).logits, model(**BATCH).logits)
    before = tensors(copy)
    train(copy)
    assert_only_selected_moved(before, tensors(copy), mask)
    assert torch.equal(model.state_dict()["base_model.model.classifier.modules_to_save.default.weight"],
                       before["base_model.model.classifier.modules_to_save.default.weight"])  # fmt: skip


def test_another_adapter_is_swapped_in_whole(tmp_path: Path) -> None:
    other = lora(llama(), seed=5)
    other.save_pretrained(tmp_path)
    model, _ = masked(lora(llama()))
    hotswap_adapter(model, str(tmp_path), "default")
    stray = nn.Parameter(torch.ones(1))
    stray.grad = torch.ones(1)
    torch.optim.SGD([stray], lr=1.0).step()  # a step of another optimizer changes nothing
    expected = {name: tensor for name, tensor in other.state_dict().items() if "lora_" in name}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_transformers_own_hotswap_writes_into_masked_tensors(tmp_path: Path) -> None:
    models: list[Any] = [llama(), llama()]
    for seed, each in enumerate(models):
        torch.manual_seed(seed)
        each.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model, other = models
    other.save_pretrained(tmp_path)
    mask = random_mask(model, 0.5)
    mask[next(iter(mask))][:] = False
    apply_mask(model, mask)
    values = dict(model.named_parameters())
    for name in (next(iter(mask)), "lm_head.weight"):  # it asks so before it loads onto a GPU
        assert model.get_parameter_or_buffer(name) is model.get_submodule(name.rpartition(".")[0]).weight
    model.load_adapter(str(tmp_path), hotswap=True, adapter_name="default")
    assert all(each is values[name] for name, each in model.named_parameters())
    assert_same_tensors(
        {n: t for n, t in tensors(model).items() if "lora_" in n},
        {n: t for n, t in tensors(other).items() if "lora_" in n},
    )


def test_an_adapter_in_parameter_dicts_can_be_deleted() -> None:
    config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    model = get_peft_model(bert(), config)
    model.add_adapter("b", config)
    apply_mask(model, random_mask(model, 0.5))
    model.set_adapter("b")
    assert not [name for name in trainable(model) if name.endswith(".default")]
    model.delete_adapter("default")
    assert not is_masked(model)
    assert not [name for name in model.state_dict() if name.endswith(".default")]
    model(**BATCH)


def test_positions_outlive_memory_that_is_given_up() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    mask = random_mask(model, 0.5)
    apply_mask(model, mask)
    state = tensors(model)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert_only_selected_moved(state, tensors(model), mask)


def test_an_unloaded_model_is_an_ordinary_one() -> None:
    model, _ = masked(lora(bert()))
    count = sum(parameter.numel() for parameter in bert().parameters())
    unloaded = model.merge_and_unload()
    assert not is_masked(unloaded)
    assert sum(parameter.numel() for parameter in unloaded.parameters()) == count


def test_what_is_frozen_asks_for_no_gradient() -> None:
    model, _ = masked(lora(bert()))
    model.requires_grad_(False)
    assert not model(**BATCH).loss.requires_grad
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2 and parameter.shape[1] == 1)
    model(**BATCH).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_the_whole_tensor_hands_requires_grad_on() -> None:
    """PEFT's methods whose tensors lie in ParameterDicts thaw and freeze what they read."""
    model, _ = masked(lora(bert()))
    name, module = layer(model)
    module.weight.requires_grad_(False)
    assert f"{name}.weight" not in trainable(model)
    assert not module.weight.requires_grad
    module.weight.requires_grad = True
    assert f"{name}.weight" in trainable(model)


def test_an_attribute_that_is_set_to_itself_changes_nothing() -> None:
    model, _ = masked(lora(bert()))
    name, module = layer(model)
    before = dict(model.named_parameters())[f"{name}.weight"]
    module.weight = module.weight
    assert dict(model.named_parameters())[f"{name}.weight"] is before
    train(model)
    with pytest.raises(TypeError, match="cannot assign"):
        module.weight = torch.ones_like(module.weight)


def test_a_tensor_that_takes_the_parameters_place_can_be_deleted() -> None:
    """As FSDP puts views there for a forward pass."""
    module = nn.Linear(3, 2, bias=False)
    apply_mask(module, random_mask(module, 0.5))
    values, whole = module._parameters["weight"], module.weight.detach().clone()
    assert values is not None
    del module.weight
    module.weight = values.detach() + 1  # type: ignore[assignment]
    assert int((module.weight != whole).sum()) == len(values)
    del module.weight
    with pytest.raises(AttributeError):
        del module.weight
    module.weight = values  # type: ignore[assignment]
    assert module.weight is values, "from now on they are FSDP's to move"
    assert torch.equal(module.state_dict()["weight"], whole)


def test_no_tensor_of_a_state_dict_shares_memory_with_another() -> None:
    """Code that saves tensors takes those that share memory for one."""
    model, _ = masked(lora(bert()))
    storages = [tensor.untyped_storage().data_ptr() for name, tensor in model.state_dict().items() if "lora_" in name]
    assert len(set(storages)) == len(storages)


def test_inference_mode_leaves_training_as_it_is() -> None:
    model, _ = masked(lora(bert()))
    with torch.inference_mode():
        for parameter in trainable(model).values():
            parameter.data.add_(0.1)
        model(**BATCH)
    train(model)


def sharded(rank: int, folder: Path, version: int) -> dict[str, Tensor]:
    model, _ = masked(lora(bert()))
    if version == 2:
        for block in model.base_model.model.bert.encoder.layer:
            fully_shard(block)
        fully_shard(model)
        train(model)
    else:
        values = count_trainable_parameters(model)
        model = FullyShardedDataParallel(
            model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({BertLayer}), device_id=torch.device("cpu")
        )
        train(model)
        held = torch.tensor(count_trainable_parameters(model))
        dist.all_reduce(held)
        assert held == values, "each process holds its part"
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}


@pytest.mark.parametrize("version", [1, 2])
def test_fully_sharded_training_is_that_of_one_process(version: int, tmp_path: Path) -> None:
    states = in_two_processes(sharded, tmp_path, version)
    alone, mask = masked(lora(bert()))
    before = tensors(alone)
    train(alone)
    for state in states:
        torch.testing.assert_close(state, on_cpu(alone.state_dict()))
        assert_only_selected_moved(before, state, mask)
    assert count_trainable_parameters(alone) == sum(int(selected.sum()) for selected in mask.values())


@pytest.mark.parametrize("place", ["parameters", "attribute"])
def test_what_writes_into_a_tensor_whose_values_an_engine_has_is_refused(place: str) -> None:
    """FSDP puts other tensors in the place of the values, and would keep none of what is written."""
    layer = nn.Linear(3, 2)
    apply_mask(layer, {"weight": torch.tensor([[True, False, False], [False, True, False]])})
    values = layer._parameters["weight"].detach().clone()  # type: ignore[union-attr]
    if place == "parameters":
        layer._parameters["weight"] = values  # type: ignore[assignment]
        next(masked_tensors(layer)).masked.by_engine = True  # as once FSDP2 has put a part of them there
    else:
        del layer._parameters["weight"]
        vars(layer)["weight"] = values
    for _ in range(2):
        read = layer.weight  # again and again
    with torch.no_grad():
        read.mul_(2)
    with pytest.raises(MaskError, match=r"shape \(2, 3\) was written into while FSDP.*remove_mask"):
        layer(torch.ones(1, 3))
