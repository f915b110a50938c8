"""A delta file holds what was trained: added it gives the trained model to the bit, removed it gives back the base."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import assert_same_tensors, bert, classification_batch, lora, on_cpu, only_trainable, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, MaskError, apply_mask, remove_mask, synchronize_mask
from fish_tuning.files.delta_file import Delta, load_delta
from fish_tuning.sparse import values
from fish_tuning.sparse.delta import add_delta, merge_delta, remove_delta, save_delta
from fish_tuning.sparse.masked_tensors import masked_tensors
from fish_tuning.sparse.values import frozen_sum

BATCH = classification_batch()


def train(model: nn.Module, steps: int = 2) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)  # AdamW overflows in pure fp16
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_bert(mask: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = bert().to(dtype)
    apply_mask(model, mask or random_mask(model, 0.1, dense=["classifier"]))
    train(model)
    return model


def delta_of(model: nn.Module, folder: Path) -> Path:
    save_delta(model, folder / "delta.safetensors")
    return folder / "delta.safetensors"


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return trained_bert()


@pytest.fixture
def path(trained: nn.Module, tmp_path: Path) -> Path:
    return delta_of(trained, tmp_path)


def test_a_state_dict_may_stand_for_the_model(trained: nn.Module, path: Path, tmp_path: Path) -> None:
    state, other = trained.state_dict(), tmp_path / "other.safetensors"
    save_delta(trained, other, state_dict=state)
    assert other.read_bytes() == path.read_bytes()
    dense, masked = "classifier.weight", next(iter(masked_tensors(trained))).name
    for name in (dense, masked):
        for wrong, text in ({}, f"has no '{name}'"), ({name: state[name][:1]}, r"the delta needs|what is saved needs"):
            cut = {key: tensor for key, tensor in state.items() if key != name} | wrong
            with pytest.raises(MaskError, match=text):
                save_delta(trained, other, state_dict=cut)
    assert other.read_bytes() == path.read_bytes(), "what was there stays"


@pytest.mark.parametrize("frozen", ["", "classifier"])
def test_a_head_that_was_frozen_after_training_is_in_the_file(frozen: str, path: Path, tmp_path: Path) -> None:
    """Of a model that is frozen for evaluation, or of which the head was trained first and frozen then."""
    model = copy.deepcopy(trained_bert())
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    other = tmp_path / "frozen.safetensors"
    save_delta(model, other)
    assert other.read_bytes() == path.read_bytes()


def linear_delta(rows: list[int], tmp_path: Path, base: nn.Linear, value: float = 1.0) -> Delta:
    """A delta that adds `value` to whole rows of the weight of `base`."""
    model = copy.deepcopy(base)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[rows] = True
    model.bias.requires_grad_(False)
    apply_mask(model, {"weight": mask})
    with torch.no_grad():
        dict(model.named_parameters())["weight"].add_(value)
    return load_delta(delta_of(model, tmp_path))


# The file


def test_file_holds_positions_values_and_digests(trained: nn.Module, path: Path) -> None:
    delta, mask = load_delta(path), on_cpu(random_mask(bert(), 0.1, dense=["classifier"]))
    assert delta.num_parameters == sum(int(selected.sum()) for selected in mask.values())
    state = on_cpu(trained.state_dict())
    for name, tensor in delta.tensors.items():
        assert tensor.shape == state[name].shape
        if "classifier" in name:
            assert (tensor.index, tensor.digest) == (None, None)
            assert torch.equal(tensor.values, state[name])
        else:
            assert tensor.index is not None
            assert tensor.index.dtype == torch.int32
            assert torch.equal(tensor.index.long(), mask[name].flatten().nonzero()[:, 0])
            assert torch.equal(tensor.values, state[name][mask[name]])
            assert tensor.digest is not None
            assert tensor.digest.startswith("float32:")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fish_tuning"])
    assert header["format"] == "fish_tuning.delta.v2"
    assert header["tensors"]["classifier.bias"] == {"shape": [3], "dtype": "float32", "digest": None}
    assert repr(delta) == f"Delta({delta.num_parameters:,} parameters of {len(delta.tensors)} tensors)"


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.bfloat16, 6)])
def test_bytes_an_entry(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    model = nn.Linear(1000, 400, bias=False).to(dtype)
    apply_mask(model, random_mask(model, 0.05))
    path = delta_of(model, tmp_path)
    assert size <= path.stat().st_size / load_delta(path).num_parameters < 1.05 * size


def test_tensors_without_selected_entries_are_left_out(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    apply_mask(model, {"weight": torch.zeros(4, 3, dtype=torch.bool), "bias": torch.arange(4) < 2})
    assert load_delta(delta_of(model, tmp_path)).tensors.keys() == {"bias"}


def test_file_is_a_snapshot_of_any_time(tmp_path: Path) -> None:
    model = trained_bert()
    first, then = load_delta(delta_of(model, tmp_path)), tensors(model)
    train(model)
    second = load_delta(delta_of(model, tmp_path))
    for delta, state in ((first, then), (second, tensors(model))):
        base = bert()
        add_delta(base, delta)
        assert_same_tensors(base.state_dict(), state)


def test_what_was_written_into_the_whole_tensor_is_in_the_file(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3))
    apply_mask(model, {"0.weight": torch.eye(3, 4, dtype=torch.bool)})
    with torch.no_grad():
        model[0].weight.diagonal().mul_(2)
    kept = load_delta(delta_of(model, tmp_path)).tensors["0.weight"].values
    assert torch.equal(kept, model[0].weight.diagonal())


def test_biases_alone_without_a_mask(tmp_path: Path) -> None:
    model = bert()
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    only_trainable(model, biases)
    train(model)
    base = bert()
    add_delta(base, delta_of(model, tmp_path))
    assert load_delta(tmp_path / "delta.safetensors").tensors.keys() == set(biases)
    assert_same_tensors(base.state_dict(), model.state_dict())


@pytest.mark.parametrize("trainable", [True, False])
def test_model_that_tells_no_selection(trainable: bool, tmp_path: Path) -> None:
    model = bert().requires_grad_(trainable)
    with pytest.raises(MaskError, match="after apply_mask and before remove_mask"):
        save_delta(model, tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def test_running_statistics_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    apply_mask(model, random_mask(model))
    with pytest.warns(FishTuningWarning, match="running statistics"):
        save_delta(model, tmp_path / "delta.safetensors")


# Adding, removing, merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_delta_is_the_trained_model_and_removed_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    model, base = trained_bert(dtype=dtype), bert().to(dtype)
    before, parameters = tensors(base), dict(base.named_parameters())
    logits = base(**BATCH).logits
    add_delta(base, delta_of(model, tmp_path))
    assert torch.equal(base(**BATCH).logits, model(**BATCH).logits)
    assert not torch.equal(base(**BATCH).logits, logits)
    assert_same_tensors(base.state_dict(), model.state_dict())
    assert all(base.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert dict(base.named_buffers()).keys() == dict(bert().named_buffers()).keys()
    remove_delta(base)
    assert_same_tensors(base.state_dict(), before)
    assert torch.equal(base(**BATCH).logits, logits)


def test_values_keep_the_dtype_the_model_is_cast_to(tmp_path: Path) -> None:
    model = trained_bert().to(torch.bfloat16)
    base = bert().to(torch.bfloat16)
    add_delta(base, delta_of(model, tmp_path), check_base=False)
    assert_same_tensors(base.state_dict(), model.state_dict())


def test_adapter_with_a_masked_pool(tmp_path: Path) -> None:
    model, base = lora(bert()), lora(bert())
    apply_mask(model, random_mask(model, dense=["classifier"]))
    train(model)
    before = tensors(base)
    add_delta(base, delta_of(model, tmp_path))
    assert_same_tensors(base.state_dict(), model.state_dict())
    remove_delta(base)
    assert_same_tensors(base.state_dict(), before)


def test_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    base.weight = nn.Parameter(torch.randn(3, 4).T)
    before = tensors(base)
    add_delta(base, linear_delta([1, 2], tmp_path, base))
    assert torch.equal(base.weight[[1, 2]], before["weight"][[1, 2]] + 1)
    assert torch.equal(base.weight[[0, 3]], before["weight"][[0, 3]])
    remove_delta(base)
    assert_same_tensors(base.state_dict(), before)


def test_whole_tensors_that_are_views(tmp_path: Path) -> None:
    model, storage = nn.Linear(3, 4), torch.randn(2, 12)
    model.weight, model.bias = nn.Parameter(storage[0].view(3, 4).T), nn.Parameter(storage[1, :4])
    model.register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False))
    delta = load_delta(delta_of(model, tmp_path))
    assert torch.equal(delta.tensors["weight"].values, model.weight)
    assert torch.equal(delta.tensors["bias"].values, model.bias)


def test_signs_of_zero_and_nan_come_back_to_the_bit(tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    with torch.no_grad():
        base.weight[0] = torch.tensor([-0.0, torch.nan, torch.inf])
    bits = base.weight.detach().view(torch.int32).clone()
    add_delta(base, linear_delta([0], tmp_path, base))
    remove_delta(base)
    assert torch.equal(base.weight.detach().view(torch.int32), bits)


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_several_deltas_go_in_any_order(order: tuple[str, str], tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    before = tensors(base)
    deltas = {"one": linear_delta([0, 2], tmp_path, base), "two": linear_delta([1], tmp_path, base, 5.0)}
    for name, delta in deltas.items():
        add_delta(base, delta, name)
    assert torch.equal(base.weight, before["weight"] + torch.tensor([1.0, 5.0, 1.0, 0.0])[:, None])
    remove_delta(base, order[0])
    alone = nn.Linear(3, 4)
    alone.load_state_dict(before)
    add_delta(alone, deltas[order[1]])
    assert_same_tensors(base.state_dict(), alone.state_dict())
    remove_delta(base, order[1])
    assert_same_tensors(base.state_dict(), before)


@pytest.mark.parametrize("check_base", [True, False])
def test_deltas_with_a_common_entry_are_refused(check_base: bool, tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    one, two = linear_delta([0, 2], tmp_path, base), linear_delta([2, 3], tmp_path, base)
    add_delta(base, one, "one")
    before = tensors(base)
    with pytest.raises(
        MaskError, match=r"'two' and 'one' both hold 3 entries of 'weight'.*remove_delta\(model, 'one'\)"
    ):
        add_delta(base, two, "two", check_base=check_base)
    assert_same_tensors(base.state_dict(), before)
    remove_delta(base, "one")
    add_delta(base, two, "two")


def test_whole_tensors_overlap_with_everything(path: Path) -> None:
    model = bert()
    add_delta(model, path, "one")
    head = {"classifier.bias": torch.tensor([True, False, False])}
    other = bert()
    only_trainable(other, head)
    apply_mask(other, head)
    with pytest.raises(MaskError, match=r"both hold 1 entries of 'classifier.bias'"):
        add_delta(model, load_delta(delta_of(other, path.parent)), "two")


def test_merged_delta_stays_and_another_may_follow(tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    add_delta(base, linear_delta([0, 1], tmp_path, base))
    merge_delta(base)
    merged = tensors(base)
    with pytest.raises(MaskError, match="No delta 'default' is added to this model; added are: none"):
        remove_delta(base)
    add_delta(base, linear_delta([1, 2], tmp_path, base))  # trained on top of the first
    remove_delta(base)
    assert_same_tensors(base.state_dict(), merged)


def test_copies_and_pickles_have_backups_of_their_own(path: Path) -> None:
    model = bert()
    before = tensors(model)
    add_delta(model, path)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    remove_delta(model)
    for twin in twins:
        remove_delta(twin)
        assert_same_tensors(twin.state_dict(), before)


def test_training_on_top_of_a_delta(path: Path) -> None:
    model = bert()
    add_delta(model, path)
    apply_mask(model, random_mask(model, 0.1, seed=1))
    with pytest.raises(MaskError, match=r"remove_mask\(model\) before removing"):
        remove_delta(model)
    train(model)
    remove_mask(model)
    then = tensors(model)
    with pytest.raises(MaskError, match=r"has changed since the delta 'default' was added.*merge_delta"):
        remove_delta(model)
    assert_same_tensors(model.state_dict(), then)
    merge_delta(model)


# Errors


def test_other_base_is_noticed(path: Path) -> None:
    other = bert(seed=7)
    before = tensors(other)
    with pytest.raises(MaskError, match=r"another base: in \d+ of \d+ tensors, e.g. 'bert.*check_base=False"):
        add_delta(other, path)
    assert_same_tensors(other.state_dict(), before)
    add_delta(other, path, check_base=False)
    remove_delta(other)
    assert_same_tensors(other.state_dict(), before)


def test_one_changed_entry_is_noticed_where_it_is_overwritten(tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    delta = linear_delta([1], tmp_path, base)
    with torch.no_grad():
        base.weight[0] += 1
    add_delta(base, delta)
    remove_delta(base)
    with torch.no_grad():
        base.weight[1, 2] = torch.nextafter(base.weight[1, 2], torch.tensor(9.0))
    with pytest.raises(MaskError, match=r"in 1 of 1 tensors, e.g. 'weight'"):
        add_delta(base, delta)


def test_digest_is_that_of_the_base_after_resuming(tmp_path: Path) -> None:
    state = trained_bert().state_dict()
    model = bert()
    apply_mask(model, random_mask(model, 0.1, dense=["classifier"]))
    model.load_state_dict(state)
    base = bert()
    add_delta(base, delta_of(model, tmp_path))
    assert_same_tensors(base.state_dict(), state)


def test_ranks_take_over_the_digest_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    for model in (first, second):
        apply_mask(model, {"weight": torch.eye(4, 3, dtype=torch.bool)})
    digests = [
        [(each.masked.digest, each.masked.frozen_sum) for each in masked_tensors(model)] for model in (first, second)
    ]
    assert digests[0] != digests[1]

    def gather(ranks: list[Any], own: Any) -> None:
        ranks[:] = [(own[0], digests[0]), own]

    fakes = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_gather_object": gather,
        "get_backend": lambda: "gloo",
    }
    for name, fake in (fakes | {"broadcast": lambda tensor, src: None}).items():
        monkeypatch.setattr(torch.distributed, name, fake)
    synchronize_mask(second)
    assert [(each.masked.digest, each.masked.frozen_sum) for each in masked_tensors(second)] == digests[0]


@pytest.mark.parametrize("selected", [[1], []])
@pytest.mark.parametrize("change", ["clamp", "load", "one", "swap"])
def test_frozen_entries_that_have_changed_are_refused(change: str, selected: list[int], tmp_path: Path) -> None:
    """A delta would give another model."""
    base = nn.Linear(3, 4)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[selected] = True
    apply_mask(base, {"weight": mask, "bias": torch.arange(4) == 0})
    delta_of(base, tmp_path)
    weight = base.weight.detach().clone()
    with torch.no_grad():
        if change == "clamp":
            base.weight.clamp_(-0.1, 0.1)
        elif change == "load":
            base.load_state_dict(nn.Linear(3, 4).state_dict())
        elif change == "one":
            base.weight[0, 2] = torch.nextafter(weight[0, 2], torch.tensor(9.0))
        else:
            base.weight[[0, 3]] = weight[[3, 0]]
    with pytest.raises(MaskError, match=r"changed since apply_mask, in \d masked tensors, e.g. '(weight|bias)'"):
        delta_of(base, tmp_path)
    save_delta(base, tmp_path / "all the same", check_frozen=False)
    if change != "load":
        base.load_state_dict({"weight": weight, "bias": base.bias.detach()})
        delta_of(base, tmp_path)


def test_the_sum_of_frozen_entries_is_what_it_says() -> None:
    whole, index = torch.randn(700, 100).bfloat16(), torch.arange(3, 70_000, 1000)
    bits = whole.view(torch.int16).flatten().tolist()
    frozen = set(range(70_000)) - set(index.tolist())
    total = sum(bits[place] * (place * values._FACTOR + values._SHIFT) for place in frozen)
    assert frozen_sum(whole, index) == (torch.bfloat16, (total + 2**63) % 2**64 - 2**63)


def test_frozen_entries_in_another_dtype_are_the_same(tmp_path: Path) -> None:
    model = nn.Linear(3, 4).bfloat16()
    apply_mask(model, {"weight": torch.eye(4, 3, dtype=torch.bool)})
    delta_of(model.float(), tmp_path)
    with torch.no_grad():
        model.weight[0, 2] += 1
    with pytest.raises(MaskError, match="changed since apply_mask"):
        delta_of(model, tmp_path)
    delta_of(model.half(), tmp_path)  # in which nobody can tell


def test_new_head_is_not_checked(path: Path, trained: nn.Module) -> None:
    base = bert()
    nn.init.normal_(base.classifier.weight)
    add_delta(base, path)
    assert torch.equal(base(**BATCH).logits, trained(**BATCH).logits)


def test_other_dtype(path: Path) -> None:
    with pytest.raises(
        MaskError, match=r"bfloat16 in the model, and the delta was trained on float32.*dtype=torch.float32"
    ):
        add_delta(bert().to(torch.bfloat16), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: bert(layers=1),
            r"names 'bert.encoder.layer.1.* which the model does not have. Did you mean 'bert.enc",
        ),
        (lambda: lora(bert()), "wrapped alike"),
        (
            lambda: bert(num_labels=5),
            r"'classifier.bias' has the shape \(5,\) in the model; the delta needs \(3,\)",
        ),
        (lambda: bert().to("meta"), "no data"),
        (trained_bert, r"Call remove_mask\(model\) before adding"),
    ],
    ids=["name", "wrapped", "shape", "meta", "masked"],
)
def test_models_that_do_not_fit(make: Callable[[], Any], message: str, path: Path) -> None:
    model = make()
    with pytest.raises(MaskError, match=message):
        add_delta(model, path)
    assert not getattr(model, "_fish_tuning_deltas", {})


def test_names_of_deltas(tmp_path: Path) -> None:
    base = nn.Linear(3, 4)
    delta = linear_delta([1], tmp_path, base)
    add_delta(base, delta, "task")
    with pytest.raises(MaskError, match="A delta 'task' is added already; added are 'task'"):
        add_delta(base, delta, "task")
    for function in (remove_delta, merge_delta):
        with pytest.raises(MaskError, match="No delta 'default' is added to this model; added are: 'task'"):
            function(base)
