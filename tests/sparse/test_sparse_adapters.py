"""Sparse adapters hold what save_pretrained wrote, to the byte, in few bytes."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import adapted as own_adapted
from peft import LoraConfig, PeftModel, get_peft_model
from shelf import CASES, HEAD, adapted, base_model, batch_for, supported
from tiny import assert_same_tensors, bert, classification_batch, lora, on_cpu, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import (
    FishTuningWarning,
    MaskError,
    SparseAdapter,
    add_sparse_adapter,
    apply_mask,
    get_mask,
    load_mask,
    load_sparse_adapter,
    remove_mask,
    replace_mask,
    save_mask,
    save_sparse_adapter,
    start_from_seed,
    write_adapter_folder,
)

BATCH = classification_batch()
FILES = ["adapter_config.json", "adapter_model.safetensors", "fish_mask.safetensors"]
WITHOUT_WARNING = pytest.mark.filterwarnings("error::fish_tuning.FishTuningWarning")
# PEFT saves something else of these than what trains.
NOT_STORED = {
    "Cartridge": "trainable_embedding",
    "P-tuning": "mlp_head",
    "P-tuning, LSTM": "lstm_head",
    "Prefix tuning, projection": "has it in the shape",
    "X-LoRA": "has no mask",
}


def train(model: nn.Module) -> None:
    """Every trained entry moves, none of the others."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(seed: int | None = 7, share: float = 0.3, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A trained, masked LoRA that starts from a seed, with a head that trains as a whole."""
    model = lora(bert(), **({"init_lora_weights": True} | config))
    if seed is not None:
        start_from_seed(model, seed)
    model.to(dtype)
    apply_mask(model, random_mask(model, share, dense=[HEAD]))
    train(model)
    return model


def saved(model: Any, folder: Path, adapter_name: str = "default") -> SparseAdapter:
    save_sparse_adapter(model, folder / "task.safetensors", adapter_name)
    return load_sparse_adapter(folder / "task.safetensors")


def logits(model: nn.Module, batch: Any = BATCH) -> Tensor:
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    with torch.no_grad():  # attention rounds otherwise where it has gradients
        outputs: Tensor = model.eval()(**batch).logits
    return outputs


def assert_same_files(one: Path, other: Path) -> None:
    assert filecmp.cmpfiles(one, other, FILES, shallow=False) == (FILES, [], [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_STORED])
def test_any_method_there_and_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not supported(case):
        pytest.skip("not in the installed PEFT")
    model, batch = adapted(case, tmp_path), batch_for(case)
    apply_mask(model, random_mask(model, dense=[HEAD]))
    train(model)
    adapter_name = "second" if case.first else "default"
    adapter = saved(model, tmp_path, adapter_name)
    model.save_pretrained(tmp_path / "ordinary")
    ordinary = tmp_path / "ordinary" / ("" if adapter_name == "default" else adapter_name)
    write_adapter_folder(adapter, tmp_path / "back")
    assert_same_files(ordinary, tmp_path / "back")
    loaded = add_sparse_adapter(base_model(case), adapter, "task")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_STORED)
def test_methods_of_which_peft_saves_something_else_are_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not supported(case):
        pytest.skip("not in the installed PEFT")
    model = adapted(case, tmp_path)
    apply_mask(model, random_mask(model, dense=[HEAD]))
    with pytest.raises(MaskError, match=NOT_STORED[name]):
        save_sparse_adapter(model, tmp_path / "task.safetensors")
    assert not (tmp_path / "task.safetensors").exists()


@WITHOUT_WARNING
@pytest.mark.parametrize("method", ["serial", "unipelt"])
def test_own_methods(method: str, tmp_path: Path) -> None:
    model = own_adapted(method)
    start_from_seed(model, 4)
    apply_mask(model, random_mask(model, dense=[HEAD]))
    train(model)
    adapter = saved(model, tmp_path)
    assert adapter.seed == 4
    assert all(tensor.start for tensor in adapter.tensors if tensor.index is not None)
    assert torch.equal(logits(add_sparse_adapter(bert(), adapter)), logits(model))


@WITHOUT_WARNING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_frozen_entries_cost_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(seed=65_535, dtype=dtype)
    adapter, mask, state = saved(model, tmp_path), get_mask(model), on_cpu(tensors(model))
    assert adapter.seed == 65_535
    assert adapter.num_parameters == sum(int(selected.sum()) for selected in mask.values())
    for tensor in adapter.tensors:
        assert tensor.name is not None
        assert tensor.dtype == dtype
        assert torch.equal(tensor.values.flatten(), state[tensor.name][mask[tensor.name].cpu()])
    assert_same_tensors(adapter.mask(), mask)
    write_adapter_folder(adapter, tmp_path / "back")
    model.save_pretrained(tmp_path / "ordinary")
    assert_same_files(tmp_path / "ordinary", tmp_path / "back")


@pytest.mark.parametrize(("share", "limit"), [(0.1, 0.15), (0.01, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_in_the_ordinary_case(share: float, limit: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """MiniLM's shape, LoRA r=16 on query, key and value."""
    base = nn.Module()
    for layer in range(6):
        for name in ("query", "key", "value"):
            module = base
            for part in ("encoder", "layer", str(layer), "attention", "self"):
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(name, nn.Linear(384, 384))
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=["query", "key", "value"]))
    start_from_seed(model, 1)
    model.to(dtype)
    apply_mask(model, random_mask(model, share))
    train(model)
    saved(model, tmp_path)
    model.save_pretrained(tmp_path / "ordinary")
    sizes = [(tmp_path / file).stat().st_size for file in ("task.safetensors", "ordinary/adapter_model.safetensors")]
    assert sizes[0] <= limit * sizes[1]


def test_pefts_own_start_is_stored_and_said_so(tmp_path: Path) -> None:
    model = trained(seed=None)
    with pytest.warns(FishTuningWarning, match="4 masked tensors, e.g. .*lora_A.* call start_from_seed") as caught:
        adapter = saved(model, tmp_path)
    assert caught[0].filename == __file__
    assert adapter.seed is None
    assert {"lora_A" in tensor.key for tensor in adapter.tensors if tensor.index is not None and not tensor.start} == {
        True
    }
    assert torch.equal(logits(add_sparse_adapter(bert(), adapter)), logits(model))


def test_entries_of_an_earlier_mask_are_stored(tmp_path: Path) -> None:
    model = trained()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    replace_mask(model, lambda bare: random_mask(bare, 0.3, seed=5, dense=[HEAD]), optimizer)
    train(model)
    with pytest.warns(FishTuningWarning, match="Entries that an earlier mask trained"):
        adapter = saved(model, tmp_path)
    assert torch.equal(logits(add_sparse_adapter(bert(), adapter)), logits(model))


def test_one_entry_off_its_start_is_not_lost(tmp_path: Path) -> None:
    """The seed is found by a few entries; all must agree before they are left out."""
    for part, place in (("lora_A", 1), ("lora_B", 1)):
        model = trained()
        name = next(name for name in get_mask(model) if part in name)
        frozen = (~get_mask(model)[name]).flatten().nonzero()[place, 0]
        state = tensors(model)
        state[name].view(-1)[frozen] += 1e-6
        model.load_state_dict(state)
        with pytest.warns(FishTuningWarning, match="1 masked tensors"):
            adapter = saved(model, tmp_path)
        assert torch.equal(logits(add_sparse_adapter(bert(), adapter)), logits(model))


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    model = trained()
    state = tensors(model)
    name = next(name for name, selected in get_mask(model).items() if "lora_B" in name and not selected.all())
    state[name][~get_mask(model)[name]] *= -1
    model.load_state_dict(state)
    adapter = saved(model, tmp_path)
    back = next(tensor for tensor in adapter.tensors if tensor.name == name).dense(adapter.seed)
    assert torch.equal(torch.signbit(back), torch.signbit(state[name].cpu()))


def test_what_did_not_train_and_no_mask_names(tmp_path: Path) -> None:
    model = lora(bert(), init_lora_weights=True)
    start_from_seed(model, 7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    apply_mask(model, random_mask(model, dense=[HEAD]))
    train(model)
    adapter = saved(model, tmp_path)
    factors = [tensor for tensor in adapter.tensors if "lora_A" in tensor.key]
    assert {(tensor.name, len(tensor.values)) for tensor in factors} == {(None, 0)}
    again = add_sparse_adapter(bert(), adapter, is_trainable=True)
    assert {name for name, each in again.named_parameters() if each.requires_grad} == set(get_mask(model))
    assert torch.equal(logits(again), logits(model))


# Folders


def test_a_folder_and_the_model_give_the_same(tmp_path: Path) -> None:
    model = trained()
    adapter = saved(model, tmp_path)
    model.save_pretrained(tmp_path / "ordinary")
    save_sparse_adapter(tmp_path / "ordinary", tmp_path / "of_folder.safetensors")
    of_folder = load_sparse_adapter(tmp_path / "of_folder.safetensors")
    assert (of_folder.digest, of_folder.seed, of_folder.base) == (adapter.digest, 7, None)
    write_adapter_folder(tmp_path / "of_folder.safetensors", tmp_path / "back")
    assert_same_files(tmp_path / "ordinary", tmp_path / "back")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "back")), logits(model))
    assert torch.equal(logits(add_sparse_adapter(bert(), of_folder)), logits(model))


def test_a_folder_of_an_adapter_of_another_name(tmp_path: Path) -> None:
    model = lora(bert())
    model.add_adapter("query", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"]))  # a module's name, too
    model.set_adapter("query")
    start_from_seed(model, 7, "query")
    apply_mask(model, random_mask(model, dense=[HEAD]))
    train(model)
    model.save_pretrained(tmp_path / "ordinary")
    save_sparse_adapter(tmp_path / "ordinary" / "query", tmp_path / "of_folder.safetensors")
    of_folder = load_sparse_adapter(tmp_path / "of_folder.safetensors")
    assert (of_folder.adapter_name, of_folder.seed) == ("query", 7)
    write_adapter_folder(of_folder, tmp_path / "back")
    assert_same_files(tmp_path / "ordinary" / "query", tmp_path / "back")
    assert saved(model, tmp_path, "query").digest == of_folder.digest
    assert torch.equal(logits(add_sparse_adapter(bert(), of_folder, "x")), logits(model))


def named(name: str, **config: Any) -> Any:
    """A trained, masked LoRA that PEFT knows by this name."""
    settings = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "init_lora_weights": False} | config
    model = get_peft_model(bert(), LoraConfig(**settings), adapter_name=name)
    dense = ["classifier"] if settings["task_type"] == "SEQ_CLS" else []
    apply_mask(model, random_mask(model, dense=dense))
    train(model)
    return model


@pytest.mark.parametrize(("name", "lost"), [("weight", "classifier.weight"), ("bias", "classifier.bias")])
def test_the_folder_of_an_adapter_called_as_a_part_of_its_head_is_refused(name: str, lost: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), adapter_name=name)
    model.save_pretrained(tmp_path)
    save_mask(random_mask(model), tmp_path / name / "fish_mask.safetensors")  # as earlier versions did
    told = rf"An adapter cannot be called '{name}' here: .*{lost}', is called so too.* Give the adapter another name"
    with pytest.raises(MaskError, match=told):
        save_sparse_adapter(tmp_path / name, tmp_path / "task.safetensors")
    assert not (tmp_path / "task.safetensors").exists()


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("name", ["weight", "bias", "base_layer", "lora_A", "query", "modules_to_save"])
def test_names_that_collide_with_nothing_of_a_head(name: str, tmp_path: Path) -> None:
    model = named(name, task_type="FEATURE_EXTRACTION")
    adapter = saved(model, tmp_path, name)
    expected = logits(model)
    for added in ("task", name):
        loaded = add_sparse_adapter(bert(), adapter, added, is_trainable=True)
        assert torch.equal(logits(loaded), expected)
        assert len(get_mask(loaded)) == len(get_mask(model))
        again = saved(loaded, tmp_path, added)
        assert torch.equal(logits(add_sparse_adapter(bert(), again)), expected)


@pytest.mark.parametrize("missing", FILES)
def test_folders_that_lack_a_file(missing: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "ordinary")
    (tmp_path / "ordinary" / missing).unlink()
    with pytest.raises(MaskError, match=f"ordinary' has no {missing}"):
        save_sparse_adapter(tmp_path / "ordinary", tmp_path / "task.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not readable JSON"),
        (b'{"peft_type": "LORA"', "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "names no peft_type"),
        (b"{}", "names no peft_type"),
    ],
)
def test_a_folder_whose_configuration_is_damaged(content: bytes, message: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "ordinary")
    (tmp_path / "ordinary" / "adapter_config.json").write_bytes(content)
    with pytest.raises(MaskError, match=f"adapter_config.json' .*{message}"):
        save_sparse_adapter(tmp_path / "ordinary", tmp_path / "task.safetensors")
    assert not (tmp_path / "task.safetensors").exists()


def test_a_folder_whose_mask_is_anothers(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "ordinary")
    path = tmp_path / "ordinary" / "fish_mask.safetensors"
    mask = load_mask(path)
    name = next(iter(mask))
    save_mask(mask | {name: torch.ones(3, 3, dtype=torch.bool)}, path)
    with pytest.raises(MaskError, match=r"of the shape \(3, 3\), and the adapter's file has it in the shape"):
        save_sparse_adapter(tmp_path / "ordinary", tmp_path / "task.safetensors")
    save_mask(mask | {"bert.pooler.dense.weight": torch.ones(3, 3, dtype=torch.bool)}, path)
    with pytest.raises(MaskError, match=r"does not have it. .*base weights: save_delta stores those"):
        save_sparse_adapter(tmp_path / "ordinary", tmp_path / "task.safetensors")
    (tmp_path / "ordinary" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(MaskError, match=r"adapter_model.safetensors' is not a readable safetensors file"):
        save_sparse_adapter(tmp_path / "ordinary", tmp_path / "task.safetensors")


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    adapter = saved(trained(), tmp_path)
    (tmp_path / "back").mkdir()
    for name in ("adapter_config.json", "README.md"):
        (tmp_path / "back" / name).touch()
    write_adapter_folder(adapter, tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [*FILES, "model_config"]


# Wrong use


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = trained()
    with pytest.raises(MaskError, match="The model has no adapter 'other'"):
        save_sparse_adapter(model, path, "other")
    with pytest.raises(MaskError, match=r"A DataParallel has no adapter to save. .* \(of DDP: model.module\)"):
        save_sparse_adapter(nn.DataParallel(model), path)
    with pytest.raises(MaskError, match="save_delta stores what was trained"):
        save_sparse_adapter(bert(), path)
    remove_mask(model)
    with pytest.raises(MaskError, match="'default' has no mask"):
        save_sparse_adapter(model, path)
    model = trained()
    model.merge_adapter()
    with pytest.raises(MaskError, match="is merged into the base weights"):
        save_sparse_adapter(model, path)
    assert not path.exists()


def test_masks_of_base_weights_are_for_deltas(tmp_path: Path) -> None:
    model = lora(bert())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("pooler.dense.weight"))
    apply_mask(model, random_mask(model, dense=[HEAD]))
    with pytest.raises(MaskError, match=r"pooler.dense.weight.*does not have it.* save_delta"):
        save_sparse_adapter(model, tmp_path / "task.safetensors")


def test_saving_leaves_the_model_and_the_files_as_they_were(tmp_path: Path) -> None:
    model = trained()
    before, trainable = tensors(model), {n for n, p in model.named_parameters() if p.requires_grad}
    state = torch.random.get_rng_state()
    first = saved(model, tmp_path)
    bytes_of_it = (tmp_path / "task.safetensors").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_tensors(tensors(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert first.digest == saved(model, tmp_path).digest
    assert (tmp_path / "task.safetensors").read_bytes() == bytes_of_it
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]


def test_the_configuration_is_pefts(tmp_path: Path) -> None:
    model = trained(lora_alpha=3)
    model.save_pretrained(tmp_path / "ordinary")
    adapter = saved(model, tmp_path)
    assert adapter.config == (tmp_path / "ordinary" / "adapter_config.json").read_text()
    assert adapter.peft_config == json.loads(adapter.config)
    assert adapter.peft_config["lora_alpha"] == 3
