"""The mask goes wherever the adapter goes: `save_pretrained` of a masked model writes it, and of no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import assert_same_tensors, bert, lora, random_mask, tensors
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from fish_tuning import MaskError, apply_mask, get_mask, is_masked, load_mask, remove_mask
from fish_tuning.files.mask_file import MASK_FILE_NAME


def masked_lora(dense: list[str] | None = None) -> tuple[PeftModel, dict[str, Tensor]]:
    model = lora(bert())
    mask = random_mask(model, dense=["classifier"] if dense is None else dense)
    apply_mask(model, mask)
    return model, mask


def mask_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(MASK_FILE_NAME))


@pytest.mark.parametrize("make", [lambda: lora(bert()), bert], ids=["adapter", "whole model"])
def test_saved_folder_is_that_of_the_unmasked_model_and_the_mask(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "unmasked")
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path / "masked")
    assert_same_tensors(load_mask(tmp_path / "masked" / MASK_FILE_NAME), dict(sorted(get_mask(model).items())))
    names = {path.name: path for path in (tmp_path / "unmasked").iterdir()}
    beside = {MASK_FILE_NAME, "model_config"} if isinstance(model, PeftModel) else {MASK_FILE_NAME}
    assert {path.name for path in (tmp_path / "masked").iterdir()} == names.keys() | beside
    for name, path in names.items():
        if name.endswith(".safetensors"):
            assert_same_tensors(load_file(tmp_path / "masked" / name), load_file(path))
        elif name.endswith(".json"):
            assert (tmp_path / "masked" / name).read_text() == path.read_text()


def test_stock_libraries_load_what_was_saved(tmp_path: Path) -> None:
    model, mask = masked_lora()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "adapter", is_trainable=True)
    assert not is_masked(loaded)
    apply_mask(loaded, load_mask(tmp_path / "adapter" / MASK_FILE_NAME))
    assert_same_tensors(dict(sorted(get_mask(loaded).items())), dict(sorted(mask.items())))
    whole = bert()
    apply_mask(whole, random_mask(whole))
    whole.save_pretrained(tmp_path / "whole")
    assert_same_tensors(BertForSequenceClassification.from_pretrained(tmp_path / "whole").state_dict(), tensors(whole))


def test_what_an_engine_leaves_out_of_its_state_dict_for_lack_of_entries_is_saved(tmp_path: Path) -> None:
    model, mask = lora(bert()), {}
    for number, (name, selected) in enumerate(random_mask(model, dense=["classifier"]).items()):
        mask[name] = selected & bool(number % 2)
    apply_mask(model, mask)
    model.save_pretrained(tmp_path / "whole")
    for parameter in model.parameters():
        parameter.ds_id = 0  # what ZeRO-3 knows a parameter by; it consolidates these and no other tensor
    model.save_pretrained(tmp_path / "given", state_dict=dict(model.named_parameters()))
    assert_same_tensors(*(load_file(tmp_path / each / "adapter_model.safetensors") for each in ("given", "whole")))
    trained = {name: tensor for name, tensor in model.named_parameters() if "lora_" not in name}
    with pytest.raises(MaskError, match=r"state_dict has no .*so what has been trained would not be saved"):
        model.save_pretrained(tmp_path / "short", state_dict=trained)


def test_without_a_mask_there_is_no_file(tmp_path: Path) -> None:
    model, _ = masked_lora()
    own = vars(model).keys()
    remove_mask(model)
    assert "save_pretrained" not in own
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("_fish_tuning_before")]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not mask_files(tmp_path)


def test_a_copy_saves_its_own_mask(tmp_path: Path) -> None:
    model, mask = masked_lora()
    twin = copy.deepcopy(model)
    remove_mask(model)
    other = random_mask(model, seed=1)
    apply_mask(model, other)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    assert_same_tensors(load_mask(tmp_path / "twin" / MASK_FILE_NAME), dict(sorted(mask.items())))
    assert_same_tensors(load_mask(tmp_path / "model" / MASK_FILE_NAME), dict(sorted(other.items())))
    assert not load_file(tmp_path / "twin" / "adapter_model.safetensors")["base_model.model.classifier.weight"].any()
    remove_mask(twin)
    twin.save_pretrained(tmp_path / "unmasked")
    assert mask_files(tmp_path) == ["model/fish_mask.safetensors", "twin/fish_mask.safetensors"]


def test_each_adapter_has_its_own_mask_in_its_own_folder(tmp_path: Path) -> None:
    model = lora(bert())
    model.add_adapter("b", LoraConfig(target_modules=["key"], r=2, init_lora_weights=False, task_type="SEQ_CLS"))
    model.add_adapter("c", LoraConfig(target_modules=["key"], r=2, task_type="SEQ_CLS"))
    masks = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        masks[name] = random_mask(model, dense=["classifier"])
        apply_mask(model, masks[name])
    model.save_pretrained(tmp_path / "all")
    assert mask_files(tmp_path / "all") == ["b/fish_mask.safetensors", "fish_mask.safetensors"]
    assert_same_tensors(load_mask(tmp_path / "all" / MASK_FILE_NAME), dict(sorted(masks["default"].items())))
    assert_same_tensors(load_mask(tmp_path / "all" / "b" / MASK_FILE_NAME), dict(sorted(masks["b"].items())))
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert mask_files(tmp_path / "one") == ["b/fish_mask.safetensors"]
    model.save_pretrained(tmp_path / "unmasked", selected_adapters=["c"])
    assert not mask_files(tmp_path / "unmasked")
    remove_mask(model, "b")
    model.save_pretrained(tmp_path / "left")
    assert mask_files(tmp_path / "left") == ["fish_mask.safetensors"]


def test_prompts_have_their_mask_in_their_adapters_folder(tmp_path: Path) -> None:
    model: Any = get_peft_model(bert(), PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), "a")
    mask = random_mask(model, dense=["classifier"])
    apply_mask(model, mask)
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert mask_files(tmp_path) == ["a/fish_mask.safetensors"]
    assert_same_tensors(load_mask(tmp_path / "a" / MASK_FILE_NAME), dict(sorted(mask.items())))
    assert get_mask(model, "a").keys() == mask.keys()


def test_processes_that_are_not_the_first_write_nothing(tmp_path: Path) -> None:
    model, _ = masked_lora()
    model.save_pretrained(tmp_path / "peft", is_main_process=False)
    model.save_pretrained(tmp_path / "peft", True, None, "auto", False)
    whole = bert()
    apply_mask(whole, random_mask(whole))
    whole.save_pretrained(tmp_path / "whole", False)
    assert not mask_files(tmp_path)


def test_model_inside_another_saves_under_its_own_names(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = lora(bert())

    wrapper = Wrapper()
    mask = random_mask(wrapper)
    apply_mask(wrapper, mask)
    wrapper.module.save_pretrained(tmp_path)
    names = {name.removeprefix("module."): selected for name, selected in sorted(mask.items())}
    assert_same_tensors(load_mask(tmp_path / MASK_FILE_NAME), names)


def test_model_with_an_adapter_of_transformers_own(tmp_path: Path) -> None:
    model = bert()
    for name in ("a", "b"):
        model.add_adapter(LoraConfig(target_modules=["query"], r=2, init_lora_weights=False), name)
    model.set_adapter("a")
    mask_a = random_mask(model)
    apply_mask(model, mask_a)
    model.set_adapter("b")
    mask_b = random_mask(model)
    apply_mask(model, mask_b)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert_same_tensors(load_mask(tmp_path / MASK_FILE_NAME), dict(sorted(mask_b.items())))


def test_merged_model_has_no_mask(tmp_path: Path) -> None:
    model, _ = masked_lora()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not mask_files(tmp_path)


def test_the_objects_own_method_is_called_and_comes_back(tmp_path: Path) -> None:
    model = lora(bert())
    calls = []

    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> str:
        calls.append(self)
        return save_directory

    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]
    own = model.save_pretrained
    apply_mask(model, random_mask(model))
    assert model.save_pretrained(str(tmp_path)) == str(tmp_path)
    assert calls == [model]
    assert mask_files(tmp_path) == [MASK_FILE_NAME]
    remove_mask(model)
    assert model.save_pretrained == own


def test_errors_of_save_pretrained_stay_its_own(tmp_path: Path) -> None:
    model, _ = masked_lora()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["no"])
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()  # type: ignore[call-arg]


def test_mask_is_there_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = masked_lora()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the middle of saving")

    monkeypatch.setattr(type(model), "create_or_update_model_card", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.save_pretrained(tmp_path)
    assert mask_files(tmp_path) == [MASK_FILE_NAME]


def test_an_overwritten_checkpoint_does_not_count_until_it_is_written(tmp_path: Path) -> None:
    model, _ = masked_lora()
    for folder, kept in ((tmp_path / "checkpoint-4", False), (tmp_path / "final", True)):
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        model.save_pretrained(folder)
        assert (folder / "trainer_state.json").exists() is kept


def test_a_masked_model_is_told_where_its_mask_cannot_be_written(tmp_path: Path) -> None:
    model, _ = masked_lora()
    (tmp_path / MASK_FILE_NAME).mkdir()
    with pytest.raises(MaskError, match="is a folder"):
        model.save_pretrained(tmp_path)
