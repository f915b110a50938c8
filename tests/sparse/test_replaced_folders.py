"""What is written as a whole folder takes the place of an earlier adapter, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tiny import bert, lora, random_mask

from fish_tuning import MaskError, apply_mask, save_compact_adapter, save_sparse_adapter, write_adapter_folder


@pytest.fixture
def model() -> Any:
    model = lora(bert())
    apply_mask(model, random_mask(model, dense=["modules_to_save"]))
    return model


@pytest.fixture(params=["compact", "sparse"])
def write(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> Callable[[Path], Any]:
    if request.param == "compact":
        return lambda folder: save_compact_adapter(model, folder)
    save_sparse_adapter(model, tmp_path / "task.safetensors")
    return lambda folder: write_adapter_folder(tmp_path / "task.safetensors", folder)


@pytest.mark.parametrize("other", ["notes.txt", "checkpoint-8/optimizer.pt"])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")  # what starts at random is stored
def test_nothing_else_is_taken_away(
    other: str, with_adapter: bool, write: Callable[[Path], Any], model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "output"
    if with_adapter:
        model.save_pretrained(folder)
        other = "trainer_state.json" if other == "notes.txt" else other  # a checkpoint's, to resume from
    (folder / other).parent.mkdir(parents=True, exist_ok=True)
    (folder / other).write_text("mine")
    with pytest.raises(MaskError, match=rf"output' holds more than an adapter, such as '{other.split('/')[0]}'"):
        write(folder)
    assert (folder / other).read_text() == "mine"


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
def test_an_earlier_adapter_is_replaced_as_a_whole(write: Callable[[Path], Any], model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    write(folder)
    model.save_pretrained(folder)
    (folder / "model_config" / "config.json").write_text("an earlier one's")
    write(folder)
    configs = [path.read_text() for path in folder.glob("model_config/*")]  # a sparse adapter's file may hold its own
    assert "an earlier one's" not in configs
    PeftModel.from_pretrained(bert(), folder)
