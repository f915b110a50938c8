"""A checkpoint is whole or is none, and a training goes on from the newest whole one, with its own mask alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_trainings
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig
from tiny import Rows, assert_same_tensors, bert, classification_batch, lora, random_mask, tensors
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fish_tuning import (
    FishMaskCallback,
    FishTuningTrainer,
    FishTuningWarning,
    MaskError,
    apply_mask,
    last_checkpoint,
    load_mask,
    save_mask,
)
from fish_tuning.files import atomic
from fish_tuning.files.mask_file import MASK_FILE_NAME
from fish_tuning.training.checkpoints import find_fault, same_selection

DATA = Rows(classification_batch((5, 9, 3, 7, 6, 8, 4, 5)))


def trainer_in(folder: Path, model: Any = None, mask: dict[str, Tensor] | None = None, **settings: Any) -> Trainer:
    model = lora(bert()) if model is None else model
    defaults = {
        "output_dir": str(folder), "max_steps": 3, "save_strategy": "steps", "save_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": [], "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    mask = random_mask(model, dense=["classifier"]) if mask is None else mask
    args = TrainingArguments(**(defaults | settings))
    return FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_in(folder)
    trainer.train()
    return folder, tensors(trainer.model)  # type: ignore[arg-type]


@pytest.fixture
def output(trained: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A folder with checkpoints of three steps."""
    return Path(shutil.copytree(trained[0], tmp_path / "output"))


# Whole or not


def cut(name: str, length: int = -5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "half-written"),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "has no trainer_state.json.*half-written"),
    "half a state": (cut("trainer_state.json"), r"trainer_state\.json' is damaged or half-written"),
    "half the weights": (cut("adapter_model.safetensors"), r"adapter_model\.safetensors' is damaged"),
    "half an optimizer": (cut("optimizer.pt"), r"optimizer\.pt' is damaged"),
    "empty random state": (cut("rng_state.pth", 0), r"rng_state\.pth' is damaged"),
    "configuration of zeros": (
        lambda folder: (folder / "adapter_config.json").write_bytes(bytes(99)) and None,
        r"adapter_config\.json' is damaged",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    damage: Callable[[Path], None], message: str, output: Path, trained: tuple[Path, dict[str, Tensor]]
) -> None:
    damage(output / "checkpoint-3")
    with pytest.warns(FishTuningWarning, match=rf"passed over: .*{message}.* Now '.*checkpoint-2' is resumed from"):
        assert last_checkpoint(output) == str(output / "checkpoint-2")
    again = trainer_in(output)
    with pytest.raises(MaskError, match=message):
        again.train(resume_from_checkpoint=str(output / "checkpoint-3"))
    with pytest.warns(FishTuningWarning, match="checkpoint-2' is resumed from"):
        again.train(resume_from_checkpoint=True)
    assert_same_tensors(tensors(again.model), trained[1])  # type: ignore[arg-type]
    assert find_fault(output / "checkpoint-3") is None  # written anew


SHARDED = "pytorch_model_fsdp_0"  # as accelerate calls it
SHARD, METADATA = f"{SHARDED}/__0_0.distcp", f"{SHARDED}/.metadata"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut(SHARD), METADATA),
        (lambda folder: (folder / SHARD).unlink(), METADATA),
        (cut(METADATA), METADATA),
        (cut(METADATA, 0), METADATA),
        (lambda folder: (folder / METADATA).unlink(), SHARD),
    ],
    ids=["half a shard", "no shard", "half the metadata", "empty metadata", "no metadata"],
)
def test_a_checkpoint_by_shards_is_whole_when_its_shards_are(
    damage: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    state = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    dcp.save(state, checkpoint_id=tmp_path / SHARDED, no_dist=True)
    assert find_fault(tmp_path) is None
    damage(tmp_path)
    assert find_fault(tmp_path) == f"'{tmp_path / named}' is damaged or half-written"


def test_when_no_checkpoint_is_whole_training_starts_anew(
    output: Path, trained: tuple[Path, dict[str, Tensor]]
) -> None:
    for folder in output.iterdir():
        (folder / "trainer_state.json").unlink()
    again = trainer_in(output)
    with pytest.warns(FishTuningWarning, match="checkpoint-1' has no .* none is whole, so there is nothing to resume"):
        again.train(resume_from_checkpoint=True)
    assert_same_tensors(tensors(again.model), trained[1])  # type: ignore[arg-type]


def test_without_any_checkpoint_the_error_is_the_trainers_own(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(MaskError, match=r"There is no folder '.*checkpoint-9'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_whole_checkpoints_are_resumed_without_a_word(output: Path) -> None:
    (output / "checkpoint-10.bak").mkdir()
    (output / "checkpoint-x").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        assert last_checkpoint(str(output)) == str(output / "checkpoint-3")
        trainer_in(output).train(resume_from_checkpoint=output / "checkpoint-2")  # type: ignore[arg-type]


def test_the_callback_in_another_trainer_resumes_from_the_last_whole_one(
    output: Path, trained: tuple[Path, dict[str, Tensor]]
) -> None:
    (output / "checkpoint-3" / "trainer_state.json").unlink()
    model = lora(bert())
    callback = FishMaskCallback(random_mask(model, dense=["classifier"]))
    args = trainer_in(output, mask={}).args
    trainer = Trainer(model=model, args=args, train_dataset=DATA, callbacks=[callback])
    with pytest.warns(FishTuningWarning, match="passed over"):
        trainer.train(resume_from_checkpoint=last_checkpoint(output))
    assert_same_tensors(tensors(model), trained[1])


def test_checkpoints_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = atomic._sync
    monkeypatch.setattr(atomic, "_sync", lambda path: (synced.append(path), sync(path)))
    trainer_in(tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    assert {*folder.iterdir(), folder, tmp_path} <= set(synced)


# The mask in it


def test_a_checkpoint_without_its_mask_is_told(output: Path) -> None:
    (output / "checkpoint-3" / MASK_FILE_NAME).unlink()
    for checkpoint in (True, str(output / "checkpoint-3")):
        with pytest.raises(MaskError, match=r"checkpoint-3' has no fish_mask\.safetensors: it was trained without"):
            trainer_in(output).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_with_a_damaged_mask_is_told(output: Path) -> None:
    path = output / "checkpoint-3" / MASK_FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for checkpoint in (True, str(output / "checkpoint-3")):
        with pytest.raises(MaskError, match=r"checkpoint-3' cannot be resumed from: .*fish_mask.safetensors' is damag"):
            trainer_in(output).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_another_folder_is_the_one_that_counts(output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(output, elsewhere)
    save_mask({"a": torch.tensor([False])}, elsewhere / "checkpoint-2" / MASK_FILE_NAME)
    trainer_in(elsewhere).train(resume_from_checkpoint=str(output / "checkpoint-2"))
    save_mask({"a": torch.tensor([False])}, elsewhere / "checkpoint-2" / MASK_FILE_NAME)
    with pytest.raises(MaskError, match="elsewhere/checkpoint-2' was trained with another mask"):
        trainer_in(output).train(resume_from_checkpoint=str(elsewhere / "checkpoint-2"))


def test_adapters_that_are_not_called_default(tmp_path: Path) -> None:
    def model() -> Any:
        made = lora(bert())
        made.add_adapter("b", LoraConfig(target_modules=["query"], r=2, init_lora_weights=False, task_type="SEQ_CLS"))
        apply_mask(made, random_mask(made, dense=["classifier"]))
        made.set_adapter("b")
        return made

    whole = trainer_in(tmp_path, model())
    whole.train()
    names = {path.parent.name for path in (tmp_path / "checkpoint-2").rglob(MASK_FILE_NAME)}
    assert names == {"checkpoint-2", "b"}
    again = trainer_in(tmp_path, model())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained = tensors(whole.model)  # type: ignore[arg-type]
    assert_same_tensors(tensors(again.model), trained)  # type: ignore[arg-type]
    other = model()
    with pytest.raises(MaskError, match="another mask than the one given"):
        trainer_in(tmp_path, other, random_mask(other, seed=1)).train(resume_from_checkpoint=True)


def test_a_mask_that_keeps_all_can_be_resumed(tmp_path: Path) -> None:
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = lora(bert())
        trainer = trainer_in(tmp_path, model, random_mask(model, share=2.0))
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(tensors(model))
    assert load_mask(tmp_path / "checkpoint-3" / MASK_FILE_NAME)
    assert_same_tensors(*results)


class Plain(nn.Module):
    """A model without save_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_models_of_no_library_have_their_mask_in_what_is_saved(tmp_path: Path) -> None:
    rows = Rows({"x": torch.randn(8, 4), "labels": torch.arange(8) % 3})
    trainer = trainer_in(tmp_path, Plain(), {"layer.weight": torch.eye(3, 4, dtype=torch.bool)})
    trainer.train_dataset = rows
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-1", "final"):
        mask = load_mask(tmp_path / folder / MASK_FILE_NAME)
        assert mask["layer.weight"].sum() == 3
        assert mask["layer.bias"].all()


def test_what_a_trainer_saves_has_the_mask(tmp_path: Path) -> None:
    model = lora(bert())
    mask = random_mask(model, dense=["classifier"])
    args = trainer_in(tmp_path, mask={}).args
    for trainer in (
        trainer_in(tmp_path, lora(bert()), mask),
        Trainer(model=model, args=args, train_dataset=DATA, callbacks=[FishMaskCallback(mask)]),
    ):
        trainer.save_model(str(tmp_path / "final"))
        assert_same_tensors(load_mask(tmp_path / "final" / MASK_FILE_NAME), dict(sorted(mask.items())))
        shutil.rmtree(tmp_path / "final")


def test_what_is_pushed_while_training_has_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[list[str]] = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, _: pushed.append([p.name for p in tmp_path.iterdir()])
    )
    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.model.save_pretrained(tmp_path / "checkpoint-1")  # type: ignore[union-attr]
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert MASK_FILE_NAME in pushed[0]


def test_same_selection() -> None:
    some, every = {"a": torch.tensor([True, False])}, {"b": torch.tensor([True])}
    assert same_selection(some, some | every)
    assert same_selection({}, every)
    assert not same_selection({}, some)
    assert not same_selection(some, {"a": torch.tensor([False, True])})
    assert not same_selection(some, {"a": torch.tensor([True])})


# Kills


def killed(tmp_path: Path, environment: dict[str, str], kind: str, limit: int, first: int, step: int) -> int:
    arguments = [sys.executable, killed_trainings.__file__, str(tmp_path), kind, str(limit), str(first), str(step)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit", "first", "step"), [("adapter", 1, 17, 23), ("whole", 0, 9, 31)])
def test_trainings_killed_while_they_write_are_resumed_as_if_never_stopped(
    kind: str, limit: int, first: int, step: int, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    assert killed(tmp_path, python_environment, kind, limit, first, step) >= 2


def test_the_state_that_is_written_last_is_the_step_of_the_folder(output: Path) -> None:
    for step in (1, 2, 3):
        assert json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
