"""add_mask and fish_tune: bit-equal to the three steps by hand, resumed, and refused where they cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_llama
from peft import PeftModel
from recorder import Recorder
from tiny import (
    Rows,
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    classification_batch,
    lora,
    random_mask,
    tensors,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from fish_tuning import (
    ConfigurationError,
    FisherError,
    FishMaskCallback,
    FishTuningTrainer,
    MaskError,
    add_mask,
    apply_mask,
    calculate_fisher_information,
    calibration_of,
    count_trainable_parameters,
    create_mask_from_fisher,
    fish_tune,
    get_mask,
    is_masked,
    load_mask,
)

DATA = Rows(classification_batch((5, 9, 3, 7, 6, 8, 4, 5)))


def plain(folder: Path, model: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    model = lora(bert(), init_lora_weights=True) if model is None else model
    return Trainer(model, TrainingArguments(**(defaults | settings)), train_dataset=DATA)


def test_one_call_is_the_three_steps_to_the_bit(tmp_path: Path) -> None:
    one = plain(tmp_path)
    before = tensors(one.model)
    assert fish_tune(one, keep_ratio=0.3, num_samples=6, progress=False) is one
    assert_only_selected_moved(before, tensors(one.model), get_mask(one.model))

    by_hand = lora(bert(), init_lora_weights=True)
    loader = plain(tmp_path, by_hand).get_train_dataloader()
    scores = calculate_fisher_information(by_hand, loader, num_samples=6, progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.3, names_to_exclude=["classifier"])
    FishTuningTrainer(by_hand, one.args, mask=mask, train_dataset=DATA).train()
    assert_same_tensors(tensors(one.model), tensors(by_hand))
    assert_same_tensors(get_mask(one.model), get_mask(by_hand))


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "GRPO"])
def test_one_call_is_the_three_steps_of_trl_to_the_bit(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
    from trl_trainers import make

    one = make(kind, tmp_path)
    fish_tune(one, keep_ratio=0.25, num_samples=8, progress=False)

    by_hand = make(kind, tmp_path)
    before = tensors(by_hand.model)
    scores = calculate_fisher_information(by_hand.model, **calibration_of(by_hand, 8), progress=False)
    head = ["modules_to_save"] if kind == "Reward" else []
    mask = create_mask_from_fisher(scores, keep_ratio=0.25, names_to_exclude=head)
    add_mask(by_hand, mask)
    by_hand.train()
    assert_only_selected_moved(before, tensors(by_hand.model), {name: m for name, m in mask.items() if m.any()})
    assert_same_tensors(tensors(one.model), tensors(by_hand.model))

    k = sum(int(selected.sum()) for selected in mask.values())
    assert count_trainable_parameters(by_hand.model) == k
    state = [value for entry in by_hand.optimizer.state.values() for value in entry.values() if value.dim()]
    assert sum(value.numel() for value in state) == 2 * k
    by_hand.save_model(str(tmp_path / "adapter"))
    assert_same_tensors(load_mask(tmp_path / "adapter" / "fish_mask.safetensors"), get_mask(by_hand.model))
    if kind != "Reward":
        base = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "again"), dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        ids = torch.arange(4, 12)[None]
        assert torch.equal(loaded(input_ids=ids).logits, by_hand.model.eval()(input_ids=ids).logits)


def test_a_mask_added_is_a_mask_given(tmp_path: Path) -> None:
    models = [lora(bert()) for _ in range(2)]
    mask = random_mask(models[0], dense=["classifier"])
    added = plain(tmp_path, models[0])
    add_mask(added, mask)
    added.train()
    Trainer(models[1], added.args, train_dataset=DATA, callbacks=[FishMaskCallback(mask)]).train()
    assert_same_tensors(tensors(models[0]), tensors(models[1]))


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    first, second = (plain(tmp_path, lora(bert()), save_strategy="steps", save_steps=4) for _ in range(2))
    add_mask(first, random_mask(first.model, seed=0))
    first.train()
    add_mask(second, random_mask(second.model, seed=1))
    with pytest.raises(MaskError, match="was trained with another mask"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_figures_are_logged_and_checkpoints_hold_the_mask(tmp_path: Path, recorders: list[Recorder]) -> None:
    trainer = plain(tmp_path, save_strategy="steps", save_steps=2, report_to="recorder")
    fish_tune(trainer, num_trainable=80, head_learning_rate=1e-3, progress=False)
    figures = trainer.state.log_history[0]
    assert figures["trainable_parameters"] == count_trainable_parameters(trainer.model) == 80
    assert 0 < figures["keep_ratio"] < 1
    assert len(recorders) == 1
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 0.02}
    for step in (2, 4):
        assert_same_tensors(
            load_mask(tmp_path / f"checkpoint-{step}" / "fish_mask.safetensors"), get_mask(trainer.model)
        )


class Stop(Exception):
    pass


def test_resumed_it_trains_on_with_the_checkpoints_mask_and_scores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fish_tune(plain(tmp_path / "whole", save_strategy="steps", save_steps=2), 0.3, progress=False)

    cut = plain(tmp_path / "cut", save_strategy="steps", save_steps=2)
    monkeypatch.setattr(cut, "training_step", _stopping(cut.training_step, after=3))
    with pytest.raises(Stop):
        fish_tune(cut, 0.3, resume_from_checkpoint=True, progress=False)  # there is none yet: it starts anew

    monkeypatch.setattr("fish_tuning.training.one_call.calculate_scores", None)
    again = plain(tmp_path / "cut", save_strategy="steps", save_steps=2)
    fish_tune(again, 0.3, resume_from_checkpoint=True, progress=False)
    assert_same_tensors(tensors(whole.model), tensors(again.model))
    by_path = plain(tmp_path / "cut", save_strategy="steps", save_steps=2)
    fish_tune(by_path, 0.3, resume_from_checkpoint=tmp_path / "cut" / "checkpoint-2", progress=False)
    assert_same_tensors(tensors(whole.model), tensors(by_path.model))


def _stopping(step: Any, after: int) -> Any:
    left = [after]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return step(*args, **kwargs)

    return stopping


def test_checkpoints_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    plain(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = plain(tmp_path)
    with pytest.raises(MaskError, match=r"has no fish_mask.safetensors: it was trained without a mask"):
        fish_tune(trainer, 0.3, resume_from_checkpoint=True)
    with pytest.raises(MaskError, match="There is no folder"):
        fish_tune(trainer, 0.3, resume_from_checkpoint=tmp_path / "checkpoint-7")
    assert not is_masked(trainer.model)


def test_wrong_use(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    for numbers in ({}, {"keep_ratio": 0.1, "num_trainable": 80}):
        with pytest.raises(ConfigurationError, match="give one of the two"):
            fish_tune(trainer, **numbers)  # type: ignore[arg-type]
    mask = random_mask(trainer.model)
    with pytest.raises(MaskError, match="no_such"):
        add_mask(trainer, {"no_such": torch.ones(2, dtype=torch.bool)})
    assert not is_masked(trainer.model)
    assert not any(isinstance(each, FishMaskCallback) for each in trainer.callback_handler.callbacks)
    add_mask(trainer, mask)
    with pytest.raises(MaskError, match="has a mask already"):
        add_mask(trainer, mask)
    with pytest.raises(MaskError, match="has a mask already"):
        fish_tune(trainer, 0.1)
    dense = plain(tmp_path)
    dense.train()
    with pytest.raises(MaskError, match="has its optimizer already"):
        fish_tune(dense, 0.1)
    assert not is_masked(dense.model)
    synchronized = plain(tmp_path)
    synchronized.ref_model, synchronized.args.sync_ref_model = lora(bert()), True  # type: ignore[attr-defined]
    with pytest.raises(MaskError, match=r"sync_ref_model=True copies .* apply_mask\(trainer.ref_model, mask\) first"):
        add_mask(synchronized, random_mask(synchronized.model))
    assert not is_masked(synchronized.model)
    apply_mask(synchronized.ref_model, random_mask(synchronized.model))  # type: ignore[attr-defined]
    add_mask(synchronized, random_mask(synchronized.model))
    anew = Trainer(model_init=lambda: lora(bert()), args=trainer.args, train_dataset=DATA)
    with pytest.raises(MaskError, match=r"makes its model anew .* FishTuningTrainer\(model_init=.*, mask=.*\)"):
        fish_tune(anew, 0.1)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio=1.5 is outside \(0, 1\]"),
        ({"keep_ratio": 0.0}, r"keep_ratio=0.0 is outside"),
        ({"keep_ratio": float("nan")}, r"keep_ratio=nan is outside"),
        ({"keep_ratio": "0.5"}, r"keep_ratio='0.5' must be a number in"),
        ({"keep_ratio": True}, r"keep_ratio=True must be a number in"),
        ({"num_trainable": 80.0}, r"num_trainable=80.0 must be a whole number"),
        ({"num_trainable": True}, r"num_trainable=True must be a whole number"),
        ({"num_trainable": 7}, r"num_trainable=7 cannot be met: .* always train, .* are possible"),
        ({"keep_ratio": 0.5, "head_learning_rate": 0.0}, r"head_learning_rate=0.0 must be a number above 0"),
        ({"keep_ratio": 0.5, "head_learning_rate": float("inf")}, r"head_learning_rate=inf must be a number above 0"),
        ({"keep_ratio": 0.5, "head_learning_rate": "1e-3"}, r"head_learning_rate='1e-3' must be a number above 0"),
        ({"keep_ratio": 0.5, "head_learning_rate": True}, r"head_learning_rate=True must be a number above 0"),
        ({"keep_ratio": 0.5, "names_to_exclude": ["no_such"]}, r"'no_such' matches none of"),
        ({"keep_ratio": 0.5, "names_to_exclude": ["lora", "classifier"]}, r"matches all of them"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_computed(
    asked: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_compute(monkeypatch)
    trainer = plain(tmp_path)
    with pytest.raises(MaskError, match=told):
        fish_tune(trainer, **asked)
    assert not is_masked(trainer.model)


def test_a_score_that_is_none_and_a_rate_without_a_head_are_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_compute(monkeypatch)
    with pytest.raises(FisherError, match=r"score='fihser' is not known"):
        fish_tune(plain(tmp_path), 0.5, score="fihser")
    headless = plain(tmp_path, lora(bert(), task_type="FEATURE_EXTRACTION"))
    with pytest.raises(MaskError, match=r"head_learning_rate=0.001: .* has no head"):
        fish_tune(headless, 0.5, head_learning_rate=1e-3)
    with pytest.raises(MaskError, match=r"head_learning_rate=0.001: .* has no head"):
        fish_tune(plain(tmp_path, bert()), 0.5, head_learning_rate=1e-3)


def test_a_rate_for_the_head_of_a_model_without_peft(tmp_path: Path) -> None:
    trainer = plain(tmp_path, bert())
    fish_tune(trainer, 0.05, names_to_exclude=["classifier"], head_learning_rate=1e-3, progress=False)
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates[id(trainer.model.classifier.weight)] == 1e-3
    assert sorted(set(rates.values())) == [1e-3, 0.02]


def refuse_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither batches are made nor scores: trl's completions are generated with the former."""
    for name in ("calibration_of", "calculate_scores"):
        monkeypatch.setattr(f"fish_tuning.training.one_call.{name}", None)


def test_the_pool_of_a_model_without_a_head(tmp_path: Path) -> None:
    trainer = fish_tune(plain(tmp_path, bert()), 0.05, names_to_exclude=["classifier"], progress=False)
    assert get_mask(trainer.model)["classifier.weight"].all()
    assert not get_mask(trainer.model)["bert.encoder.layer.0.output.dense.weight"].all()


def test_scoring_leaves_the_random_state_of_a_shuffled_loader(tmp_path: Path) -> None:
    model = lora(bert(), init_lora_weights=True)  # scored after warm-up steps
    loader = DataLoader(DATA, batch_size=2, shuffle=True, collate_fn=default_data_collator)
    before = torch.get_rng_state()
    calculate_fisher_information(model, loader, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_the_card_tells_the_score(tmp_path: Path) -> None:
    trainer = fish_tune(plain(tmp_path), keep_ratio=0.25, num_samples=8, progress=False)
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| score | fisher, on up to 8 training examples |" in card
    assert "| training | 4 steps, learning_rate 0.02, batches of 2, seed 42 |" in card
