"""Many sparse adapters on one base: each computes what its trained model did, to the bit, whatever came before."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from test_sparse_adapters import logits, saved, train, trained
from tiny import assert_same_tensors, bert, classification_batch, lora, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import (
    FishTuningTrainer,
    FishTuningWarning,
    MaskError,
    SparseAdapter,
    add_sparse_adapter,
    apply_mask,
    count_trainable_parameters,
    get_mask,
    is_masked,
    list_sparse_adapters,
    load_sparse_adapter,
    remove_sparse_adapter,
    save_sparse_adapter,
    set_sparse_adapter,
    start_from_seed,
    write_adapter_folder,
)

BATCH = classification_batch()


def one(seed: int, folder: Path, start: int = 7, **config: Any) -> tuple[SparseAdapter, Tensor]:
    """An adapter of its own mask and values, and the outputs of its trained model."""
    model = lora(bert(), **({"init_lora_weights": True} | config))
    start_from_seed(model, start)
    apply_mask(model, random_mask(model, 0.3, seed=seed, dense=["modules_to_save"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter += 0.1 * noise.to(DEVICE)
    return saved(model, folder), logits(model)


def adapters(model: nn.Module) -> int:
    """How many adapters PEFT has in the layers."""
    return len(model.peft_config)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weight", "bias", "classifier"])
def test_a_name_that_peft_would_lose_parts_of_the_head_by(name: str, tmp_path: Path) -> None:
    adapter, expected = one(0, tmp_path)
    base = bert()
    before = tensors(base)
    with pytest.raises(MaskError, match=f"An adapter cannot be called '{name}' here"):
        add_sparse_adapter(base, adapter, name, is_trainable=True)
    assert_same_tensors(tensors(base), before)
    model = add_sparse_adapter(base, adapter, name)  # written into one that PEFT knows by another name
    assert torch.equal(logits(model), expected)
    assert list_sparse_adapters(model) == [name]


def test_switching_at_random(tmp_path: Path) -> None:
    made = {f"task {seed}": one(seed, tmp_path) for seed in range(5)}
    model: Any = bert()
    for name, (adapter, expected) in made.items():
        model = add_sparse_adapter(model, adapter, name)
        assert torch.equal(logits(model), expected)
    assert list_sparse_adapters(model) == list(made)
    assert adapters(model) == 1
    assert count_trainable_parameters(model) == 0
    order = random.Random(0)
    for _ in range(30):
        name = order.choice(list(made))
        set_sparse_adapter(model, name)
        assert torch.equal(logits(model), made[name][1])
    for name in ("task 0", "task 3"):
        set_sparse_adapter(model, "task 1")
        remove_sparse_adapter(model, name)
    assert list_sparse_adapters(model) == ["task 1", "task 2", "task 4"]
    set_sparse_adapter(model, "task 4")
    assert torch.equal(logits(model), made["task 4"][1])
    model = add_sparse_adapter(model, made["task 0"][0], "again")
    assert torch.equal(logits(model), made["task 0"][1])


def test_starts_and_configurations_of_several_kinds(tmp_path: Path) -> None:
    made = {
        "seed 7": one(1, tmp_path),
        "seed 8": one(2, tmp_path, start=8),
        "seed 7, too": one(3, tmp_path),
        "rank 2": one(4, tmp_path, rank=2),
        "alpha": one(5, tmp_path, lora_alpha=3),
        "seed 8, too": one(6, tmp_path, start=8),
    }
    model: Any = bert()
    for name, (adapter, _) in made.items():
        model = add_sparse_adapter(model, adapter, name)
    assert adapters(model) == 4
    for name in [*made, *reversed(made)]:
        set_sparse_adapter(model, name)
        assert torch.equal(logits(model), made[name][1])
    remove_sparse_adapter(model, "rank 2")
    assert adapters(model) == 3
    set_sparse_adapter(model, "seed 8, too")
    assert torch.equal(logits(model), made["seed 8, too"][1])


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
def test_beside_adapters_that_cannot_share(tmp_path: Path) -> None:
    shared, stored = one(1, tmp_path), trained(seed=None)
    own = (saved(stored, tmp_path), logits(stored))
    model = add_sparse_adapter(bert(), *[shared[0], "shared"])
    model = add_sparse_adapter(model, own[0], "own")
    assert adapters(model) == 2
    for _ in range(2):
        for name, (_, expected) in (("shared", shared), ("own", own)):
            set_sparse_adapter(model, name)
            assert torch.equal(logits(model), expected)
            assert count_trainable_parameters(model) == 0
    with pytest.raises(MaskError, match="'own' is the active one"):
        remove_sparse_adapter(model, "own")
    set_sparse_adapter(model, "shared")
    remove_sparse_adapter(model, "own")
    assert torch.equal(logits(model), shared[1])
    assert list_sparse_adapters(model) == ["shared"]


def test_beside_pefts_own_adapters(tmp_path: Path) -> None:
    model = lora(bert())
    expected = logits(model)
    adapter, sparse = one(1, tmp_path)
    assert add_sparse_adapter(model, adapter, "sparse") is model
    assert torch.equal(logits(model), sparse)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    set_sparse_adapter(model, "sparse")
    assert torch.equal(logits(model), sparse)


def test_the_last_one_leaves_the_base(tmp_path: Path) -> None:
    base = bert()
    with torch.no_grad():
        before = base.bert(BATCH["input_ids"]).pooler_output
    adapter, expected = one(1, tmp_path)
    model = add_sparse_adapter(base, adapter, "a")
    with pytest.raises(MaskError, match=r"'a' is the active one.* model.unload\(\) takes all adapters off"):
        remove_sparse_adapter(model, "a")
    base = model.unload()
    with torch.no_grad():
        assert torch.equal(base.bert(BATCH["input_ids"]).pooler_output, before)
    model = add_sparse_adapter(base, adapter, "b")
    assert list_sparse_adapters(model) == ["b"]
    assert torch.equal(logits(model), expected)


def test_other_methods_share_too(tmp_path: Path) -> None:
    ia3 = IA3Config(task_type="SEQ_CLS", target_modules=["key", "dense"], feedforward_modules=["dense"])
    for make in (
        lambda: get_peft_model(bert(), ia3),
        lambda: lora(bert(), target_modules=["word_embeddings", "query"], trainable_token_indices=None),
    ):
        made, model = [], bert()
        for seed in range(3):
            trained: Any = make()
            if "lora" in str(type(trained.base_model)).lower():
                start_from_seed(trained, 1)
            apply_mask(trained, random_mask(trained, 0.3, seed=seed, dense=["modules_to_save"]))
            train(trained)
            made.append((saved(trained, tmp_path), logits(trained)))
            model = add_sparse_adapter(model, made[-1][0], str(seed))
        for number in (0, 2, 1, 0):
            set_sparse_adapter(model, str(number))
            assert torch.equal(logits(model), made[number][1])


def test_it_is_an_ordinary_adapter_to_peft(tmp_path: Path) -> None:
    made = [one(seed, tmp_path) for seed in range(2)]
    model = bert()
    for number, (adapter, _) in enumerate(made):
        model = add_sparse_adapter(model, adapter, str(number))
    set_sparse_adapter(model, "0")
    model.save_pretrained(tmp_path / "of_model")
    write_adapter_folder(made[0][0], tmp_path / "written")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("of_model", "written")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "written").merge_and_unload()
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), logits(loaded))
    torch.testing.assert_close(logits(merged), made[0][1], rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_dtypes(tmp_path: Path) -> None:
    made = [one(seed, tmp_path) for seed in range(2)]
    model: Any = bert()
    for number, (adapter, _) in enumerate(made):
        model = add_sparse_adapter(model, adapter, str(number))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_sparse_adapter(copied, "0")
        assert torch.equal(logits(copied), made[0][1])
        assert torch.equal(logits(model), made[1][1])
    half = model.to(torch.float64)
    outputs = [logits(half)]
    for number in (0, 1):
        set_sparse_adapter(half, str(number))
        outputs.append(logits(half))
    assert torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1].float(), made[0][1], rtol=1e-4, atol=1e-5)


# Training on


def test_training_goes_on_with_the_same_mask(tmp_path: Path) -> None:
    model = trained()
    adapter = saved(model, tmp_path)
    again = add_sparse_adapter(bert(), tmp_path / "task.safetensors", is_trainable=True)
    assert_same_tensors(get_mask(again), get_mask(model))
    assert count_trainable_parameters(again) == count_trainable_parameters(model) == adapter.num_parameters
    assert_same_tensors(tensors(again), tensors(model))
    for each in (model, again):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            each.eval()(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_tensors(tensors(again), tensors(model))
    later = saved(again, tmp_path)
    assert (later.seed, later.base) == (7, adapter.base)
    assert torch.equal(logits(add_sparse_adapter(bert(), later)), logits(model))


@pytest.mark.filterwarnings("error::fish_tuning.FishTuningWarning")
def test_sixteen_bits_are_trained_on_in_thirty_two(tmp_path: Path) -> None:
    """PEFT makes float32 of them; the frozen entries are then those of the start, rounded."""
    adapter = saved(trained(dtype=torch.bfloat16), tmp_path)
    again = add_sparse_adapter(bert(), adapter, is_trainable=True)
    train(again)
    later = saved(again, tmp_path)
    factors = [tensor for tensor in later.tensors if "lora_A" in tensor.key]
    assert {tensor.dtype for tensor in factors} == {torch.float32}
    assert {tensor.start and tensor.start.through for tensor in factors} == {"bfloat16"}
    assert torch.equal(logits(add_sparse_adapter(bert(), later)), logits(again))


def test_a_prompt_trains_on(tmp_path: Path) -> None:
    model: Any = get_peft_model(bert(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    start_from_seed(model, 1)
    apply_mask(model, random_mask(model, dense=["modules_to_save"]))
    train(model)
    adapter = saved(model, tmp_path)
    again = add_sparse_adapter(bert(), adapter, "task", is_trainable=True)
    assert is_masked(again)
    assert count_trainable_parameters(again) == adapter.num_parameters
    train(model)
    train(again)
    assert torch.equal(logits(again), logits(model))
    later = saved(again, tmp_path, "task")
    assert later.seed == 1
    assert torch.equal(logits(add_sparse_adapter(bert(), later)), logits(model))


def test_one_trains_beside_shared_ones(tmp_path: Path) -> None:
    made = [one(seed, tmp_path) for seed in range(2)]
    model: Any = bert()
    for number, (adapter, _) in enumerate(made):
        model = add_sparse_adapter(model, adapter, str(number))
    model = add_sparse_adapter(model, made[0][0], "more", is_trainable=True)
    assert count_trainable_parameters(model) == made[0][0].num_parameters
    train(model)
    expected = logits(model)
    assert not torch.equal(expected, made[0][1])
    for name, outputs in (("1", made[1][1]), ("more", expected), ("0", made[0][1])):
        set_sparse_adapter(model, name)
        assert torch.equal(logits(model), outputs)
        trains = count_trainable_parameters(model)
        assert trains == (made[0][0].num_parameters if name == "more" else 0)
    set_sparse_adapter(model, "more")
    save_sparse_adapter(model, tmp_path / "more.safetensors", "more")
    assert torch.equal(logits(add_sparse_adapter(bert(), tmp_path / "more.safetensors")), expected)


# Refusals leave the model as it was


def assert_refused(model: Any, adapter: Any, message: str, name: str = "x", **options: Any) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(MaskError, match=message):
        add_sparse_adapter(model, adapter, name, **options)
    assert_same_tensors(model.state_dict(), before)
    assert "x" not in list_sparse_adapters(model)


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter, expected = one(1, tmp_path)
    small = bert()
    del small.bert.encoder.layer[1]
    assert_refused(bert(seed=1), adapter, "another base model: the weight of 'bert.encoder.layer.0.* has other")
    assert_refused(bert(hidden_size=8), adapter, r"has a weight of the shape \(8, 8\), not \(16, 16\)")
    assert_refused(small, adapter, "it has no layer 'bert.encoder.layer.1.attention.self.query'")
    slightly = bert()
    with torch.no_grad():
        slightly.bert.encoder.layer[1].attention.self.value.weight.mul_(1.01)
    assert_refused(slightly, adapter, "the weight of 'bert.encoder.layer.1.attention.self.value' has other entries")
    assert not torch.equal(logits(add_sparse_adapter(slightly, adapter, check_base=False)), expected)
    head = bert()
    with torch.no_grad():
        head.classifier.weight.add_(1)  # drawn anew at each load
    assert torch.equal(logits(add_sparse_adapter(head, adapter)), expected)


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_base_in_other_bits_is_the_base(trained_in: torch.dtype, tmp_path: Path) -> None:
    """Several times, since of few numbers a second rounding changes few."""
    for seed in range(4):
        model = lora(bert(seed=seed).to(trained_in))
        apply_mask(model, random_mask(model, dense=["modules_to_save"]))
        adapter = saved(model, tmp_path)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            added = add_sparse_adapter(bert(seed=seed).to(dtype), adapter)
            assert list_sparse_adapters(added) == ["default"]
            if {dtype, trained_in} != {torch.bfloat16, torch.float16}:  # these two tell nothing of each other
                assert_refused(bert(seed=seed + 1).to(dtype), adapter, "has other entries")


def test_names_and_files_that_are_refused(tmp_path: Path) -> None:
    adapter, expected = one(1, tmp_path)
    base = bert()
    model = add_sparse_adapter(base, adapter, "task 1")
    for taken in ("task 1", "default"):
        assert_refused(model, adapter, f"has an adapter '{taken}' already", name=taken)
    for name in ("", "a.b", "train", "type"):
        assert_refused(model, adapter, "cannot be the name of an adapter", name=name)
    assert_refused(base, adapter, "Pass the PEFT model: what the earlier add_sparse_adapter")
    assert_refused(model, tmp_path / "nothing", "There is no sparse adapter file at")
    with pytest.raises(MaskError, match=r"No sparse adapter 'task_1' is added to this model. Did you mean"):
        set_sparse_adapter(model, "task_1")
    with pytest.raises(MaskError, match=r"No sparse adapter 'task 1' is added to this model. Added are: none"):
        remove_sparse_adapter(bert(), "task 1")
    model = add_sparse_adapter(model, adapter, "task 3")
    with pytest.raises(MaskError, match=r"'task 3' is the active one. Call set_sparse_adapter"):
        remove_sparse_adapter(model, "task 3")
    model.merge_adapter()
    with pytest.raises(MaskError, match="merged into the base weights"):
        set_sparse_adapter(model, "task 1")
    model.unmerge_adapter()
    model.set_adapter("default")
    assert list_sparse_adapters(model) == ["task 1", "task 3"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.delete_adapter("default")
    with pytest.raises(MaskError, match="PEFT's adapter 'default', which 'task 1' is written into, was deleted"):
        set_sparse_adapter(model, "task 1")
    assert_refused(model, adapter, r"last adapter was deleted. Pass its base model: model.base_model.unload\(\)")
    again = add_sparse_adapter(model.base_model.unload(), adapter, check_base=False)  # which the merge has rounded
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_what_peft_has_deleted_is_loaded_anew(tmp_path: Path) -> None:
    adapter, expected = one(1, tmp_path)
    other, of_other = one(2, tmp_path, start=8)
    model = add_sparse_adapter(add_sparse_adapter(bert(), adapter, "task 1"), other, "other")
    model.delete_adapter("default")
    with pytest.raises(MaskError, match=r"which 'task 1' is written into, was deleted. Load it anew"):
        set_sparse_adapter(model, "task 1")
    model = add_sparse_adapter(model, adapter, "task 1")
    assert list_sparse_adapters(model) == ["other", "task 1"]
    assert torch.equal(logits(model), expected)
    set_sparse_adapter(model, "other")
    assert torch.equal(logits(model), of_other)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    adapter, _ = one(1, tmp_path)
    base = bert(num_labels=5)
    before = tensors(base)
    assert_refused(base, adapter, r"a head 'classifier' whose .* has the shape \(3.*\(num_labels=3\)")
    assert_same_tensors(tensors(base), before)
    mine, expected = one(2, tmp_path, modules_to_save=["classifier"])
    other = lora(bert(num_labels=5), init_lora_weights=True)
    apply_mask(other, random_mask(other, dense=["modules_to_save"]))
    with pytest.warns(FishTuningWarning, match="nothing can rebuild"):
        larger = saved(other, tmp_path)
    model = add_sparse_adapter(bert(), mine, "mine")
    assert_refused(model, larger, r"a head 'classifier' .*\(num_labels=5\)", name="larger")
    assert (list(model.peft_config), list_sparse_adapters(model)) == (["default"], ["mine"])
    assert torch.equal(logits(model), expected)


def test_nothing_is_added_or_changed_while_one_is_merged(tmp_path: Path) -> None:
    first, _ = one(1, tmp_path)
    same, other = one(2, tmp_path)[0], one(3, tmp_path, start=8)[0]
    model = add_sparse_adapter(add_sparse_adapter(bert(), first, "first"), other, "other")
    set_sparse_adapter(model, "first")
    model.merge_adapter()
    merged = logits(model)
    for adapter in (same, other):
        assert_refused(model, adapter, "is merged into the base weights", name="more", check_base=False)
    with pytest.raises(MaskError, match="is merged into the base weights"):
        set_sparse_adapter(model, "other")  # PEFT would unmerge, and round the base
    assert list_sparse_adapters(model) == ["first", "other"]
    assert torch.equal(logits(model), merged)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    one(1, tmp_path)
    path = tmp_path / "task.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 4
    path.write_bytes(whole)
    assert_refused(bert(), path, "task.safetensors' is damaged")


def test_a_trainer_goes_on(tmp_path: Path) -> None:
    from tiny import Rows
    from transformers import TrainingArguments

    adapter, _ = one(1, tmp_path)
    model = add_sparse_adapter(bert(), adapter, is_trainable=True)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01
    )
    mask = get_mask(model)
    FishTuningTrainer(model, arguments, mask=mask, train_dataset=Rows(BATCH)).train()
    save_sparse_adapter(model, tmp_path / "later.safetensors")
    later = load_sparse_adapter(tmp_path / "later.safetensors")
    assert later.seed == 7
    assert_same_tensors(later.mask(), adapter.mask())
    assert later.digest != adapter.digest


def test_a_base_of_plain_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0", "1"]))
    start_from_seed(model, 3)
    apply_mask(model, random_mask(model))
    train(model)
    adapter = saved(model, tmp_path)
    inputs = torch.ones(2, 6)
    assert torch.equal(add_sparse_adapter(base, adapter)(inputs), model(inputs))
