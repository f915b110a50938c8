"""Masks in transformers' Trainer, through the callback and through FishTuningTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from peft import PeftModel
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
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from fish_tuning import (
    FishMaskCallback,
    FishTuningTrainer,
    MaskError,
    apply_mask,
    count_trainable_parameters,
    get_mask,
    is_masked,
    load_mask,
    remove_mask,
    save_delta,
)

DATA = Rows(classification_batch((5, 9, 3, 7, 6, 8, 4, 5)))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(**(defaults | settings))


def masked_lora(**config: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    model = lora(bert(), **config)
    return model, random_mask(model, dense=["classifier"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"bf16": True},
        {"activation_checkpointing": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
@pytest.mark.parametrize("how", ["callback", "trainer", "applied before"])
def test_only_selected_entries_move(how: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, mask = masked_lora()
    before = tensors(model)
    shared: dict[str, Any] = {"model": model, "args": arguments(tmp_path, **settings), "train_dataset": DATA}
    if how == "callback":
        trainer = Trainer(**shared, callbacks=[FishMaskCallback(mask)])
    elif how == "trainer":
        trainer = FishTuningTrainer(mask=mask, **shared)
    else:
        apply_mask(model, mask)
        trainer = Trainer(**shared)
    trainer.train()
    assert trainer.state.global_step == 4
    assert_only_selected_moved(before, tensors(model), mask)


def test_optimizer_state_is_two_numbers_a_trainable_entry(tmp_path: Path) -> None:
    model, mask = masked_lora()
    k = sum(int(selected.sum()) for selected in mask.values())
    trainer = FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)
    trainer.train()
    assert trainer.optimizer is not None
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values() if value.dim()]
    assert sum(value.numel() for value in state) == 2 * k
    assert count_trainable_parameters(model) == trainer.get_num_trainable_parameters() == k


def test_callback_and_trainer_give_the_same_weights(tmp_path: Path) -> None:
    results = []
    for kind in (Trainer, FishTuningTrainer):
        model, mask = masked_lora()
        extra: dict[str, Any] = {"mask": mask} if kind is FishTuningTrainer else {"callbacks": [FishMaskCallback(mask)]}
        kind(model=model, args=arguments(tmp_path), train_dataset=DATA, **extra).train()
        results.append(tensors(model))
    assert_same_tensors(*results)


def test_all_arguments_of_trainer_pass(tmp_path: Path) -> None:
    model, mask = masked_lora()
    seen: list[str] = []

    class Witness(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append("step")

    optimizer_kwargs = (torch.optim.SGD, {"lr": 0.5})
    trainer = FishTuningTrainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=4),
        mask=mask,
        data_collator=default_data_collator,
        train_dataset=DATA,
        eval_dataset=DATA,
        processing_class=None,
        compute_loss_func=lambda outputs, labels, **_: nn.functional.cross_entropy(outputs.logits, labels),
        compute_metrics=lambda prediction: {"hits": float((prediction.predictions.argmax(-1) == 1).sum())},
        callbacks=[Witness()],
        optimizer_cls_and_kwargs=optimizer_kwargs,
        preprocess_logits_for_metrics=lambda logits, labels: logits,
    )
    trainer.train()
    assert seen == ["step"] * 4
    assert "eval_hits" in trainer.state.log_history[-1] | trainer.evaluate()
    assert trainer.optimizer is not None
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


# Checkpoints


def test_checkpoints_hold_the_ordinary_adapter_and_the_mask(tmp_path: Path) -> None:
    model, mask = masked_lora()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA)
    trainer.train()
    batch = classification_batch()
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(loaded(**batch).logits, model.to(DEVICE).eval()(**batch).logits)
    for step in (2, 4):
        assert_same_tensors(load_mask(tmp_path / f"checkpoint-{step}" / "fish_mask.safetensors"), mask)
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "final").eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("through", ["callback", "trainer"])
def test_resumed_run_equals_one_that_never_stopped(through: str, dropout: float, tmp_path: Path) -> None:
    def trainer_in(folder: Path, seed: int) -> Trainer:
        model, mask = masked_lora(lora_dropout=dropout)
        if seed:  # other start values: they must all come from the checkpoint
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in mask:
                        parameter.add_(1.0)
        args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        if through == "trainer":
            return FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA)
        return Trainer(model=model, args=args, train_dataset=DATA, callbacks=[FishMaskCallback(mask)])

    whole = trainer_in(tmp_path, 0)
    whole.train()
    resumed = trainer_in(tmp_path, 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_tensors(tensors(resumed.model), tensors(whole.model))  # type: ignore[arg-type]


def test_resumed_full_fine_tuning_equals_one_that_never_stopped(tmp_path: Path) -> None:
    def trainer(seed: int) -> Trainer:
        model = bert(seed=seed)
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        return FishTuningTrainer(model=model, args=args, mask=random_mask(model), train_dataset=DATA)

    whole = trainer(0)
    whole.train()
    resumed = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(tensors(resumed.model), tensors(whole.model))  # type: ignore[arg-type]


def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, mask = masked_lora()
    evaluations = iter([{"score": 2.0}, {"score": 1.0}])
    args = arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer = FishTuningTrainer(
        model=model,
        args=args,
        mask=mask,
        train_dataset=DATA,
        eval_dataset=DATA,
        compute_metrics=lambda _: next(evaluations),
    )
    trainer.train()
    best = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-2")
    assert_same_tensors(model.state_dict(), best.state_dict())
    assert is_masked(model)


def test_resuming_with_another_mask_is_an_error(tmp_path: Path) -> None:
    model, mask = masked_lora()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA).train()
    again = lora(bert())
    trainer = FishTuningTrainer(
        model=again, args=args, mask=random_mask(again, seed=1, dense=["classifier"]), train_dataset=DATA
    )
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(MaskError, match=r"another mask.*load_mask\('.*fish_mask.safetensors'\)"):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_through_the_callback_with_another_mask_is_an_error(tmp_path: Path) -> None:
    model, mask = masked_lora()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    Trainer(model=model, args=args, train_dataset=DATA, callbacks=[FishMaskCallback(mask)]).train()
    again = lora(bert())
    other = FishMaskCallback(random_mask(again, seed=1, dense=["classifier"]))
    with pytest.raises(MaskError, match="another mask"):
        Trainer(model=again, args=args, train_dataset=DATA, callbacks=[other]).train(resume_from_checkpoint=True)


# Errors


def test_every_model_of_model_init_gets_the_mask(tmp_path: Path) -> None:
    mask = random_mask(lora(bert()), 0.3)
    made = []

    def model_init() -> Any:
        made.append(lora(bert()))
        return made[-1]

    trainer = FishTuningTrainer(args=arguments(tmp_path), mask=mask, model_init=model_init, train_dataset=DATA)
    trainer.train()
    first = tensors(made[-1])
    trainer.train()
    assert len(made) >= 3
    assert len({id(model) for model in made}) == len(made)
    assert_same_tensors(first, tensors(made[-1]))  # trained anew, from the same start
    assert_only_selected_moved(tensors(lora(bert())), first, mask)


def test_hyperparameter_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the search's backend")
    mask = random_mask(lora(bert()), 0.3)
    made = []

    def model_init(trial: Any = None) -> Any:
        made.append(lora(bert()))
        return made[-1]

    trainer = FishTuningTrainer(
        args=arguments(tmp_path), mask=mask, model_init=model_init, train_dataset=DATA, eval_dataset=DATA
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [0.02, 0.05])},
        n_trials=3, direction="minimize", backend="optuna",
    )  # fmt: skip
    assert best.hyperparameters.keys() == {"learning_rate"}
    assert len(made) >= 3
    for model in made[-3:]:
        assert_only_selected_moved(tensors(lora(bert())), tensors(model), mask)


def test_model_made_after_the_trainer_is_an_error(tmp_path: Path) -> None:
    _, mask = masked_lora()
    trainer = Trainer(
        args=arguments(tmp_path),
        model_init=lambda: lora(bert()),
        train_dataset=DATA,
        callbacks=[FishMaskCallback(mask)],
    )
    with pytest.raises(MaskError, match="model_init"):
        trainer.train()


def test_mask_taken_off_before_training_is_an_error(tmp_path: Path) -> None:
    model, mask = masked_lora()
    trainer = FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)
    remove_mask(model)
    with pytest.raises(MaskError, match="the mask was removed"):
        trainer.train()


@pytest.mark.parametrize("head", ["dense", "masked"])
def test_optimizer_made_before_masking_is_an_error(head: str, tmp_path: Path) -> None:
    # With a dense head the optimizer still holds something that trains, while the adapter would stand still.
    model = lora(bert())
    mask = random_mask(model, dense=["classifier"] if head == "dense" else [])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = FishTuningTrainer(
        model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA, optimizers=(optimizer, None)
    )
    with pytest.raises(MaskError, match="made before the mask was applied"):
        trainer.train()


def test_optimizer_made_after_masking_is_fine(tmp_path: Path) -> None:
    model, mask = masked_lora()
    before = tensors(model)
    apply_mask(model, mask)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    trainer = FishTuningTrainer(
        model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA, optimizers=(optimizer, None)
    )
    trainer.train()
    assert_only_selected_moved(before, tensors(model), mask)


def test_model_with_another_mask_is_an_error(tmp_path: Path) -> None:
    model, mask = masked_lora()
    other = random_mask(model, seed=1)
    apply_mask(model, mask)
    FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)
    with pytest.raises(MaskError, match="another mask already"):
        FishTuningTrainer(model=model, args=arguments(tmp_path), mask=other, train_dataset=DATA)


def test_mask_of_some_tensors_may_be_applied_before(tmp_path: Path) -> None:
    model, mask = masked_lora()
    some = {name: selected for name, selected in mask.items() if "lora_A" in name}
    apply_mask(model, some)
    FishTuningTrainer(model=model, args=arguments(tmp_path), mask=some, train_dataset=DATA)
    with pytest.raises(MaskError, match="another mask already"):
        FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)


def test_mask_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    model, mask = masked_lora()
    with pytest.raises(MaskError, match="does not have"):
        FishTuningTrainer(
            model=model, args=arguments(tmp_path), mask=mask | {"nothing": torch.ones(1).bool()}, train_dataset=DATA
        )
    assert not is_masked(model)


def test_dense_mask_trains_like_no_mask(tmp_path: Path) -> None:
    results = []
    for kind in (Trainer, FishTuningTrainer):
        model = lora(bert())
        extra: dict[str, Any] = {"mask": get_mask(model)} if kind is FishTuningTrainer else {}
        kind(model=model, args=arguments(tmp_path), train_dataset=DATA, **extra).train()
        results.append(tensors(model))
    assert_same_tensors(*results)


# Choosing again


def chosen_masks(model: nn.Module) -> list[dict[str, Tensor]]:
    """Of one number of entries."""
    made = [random_mask(model, seed=seed, dense=["classifier"]) for seed in range(4)]
    least = min(sum(int(mask.sum()) for mask in masks.values()) for masks in made)
    for masks in made:
        flat = torch.cat([mask.flatten() for name, mask in masks.items() if "classifier" not in name])
        surplus = sum(int(mask.sum()) for mask in masks.values()) - least
        flat[flat.nonzero()[:surplus, 0]] = False
        start = 0
        for name, mask in masks.items():
            if "classifier" not in name:
                masks[name] = flat[start : start + mask.numel()].view(mask.shape)
                start += mask.numel()
    return made


class Chooses:
    """Another mask every time, told by how far the model is: the same after a resume."""

    def __init__(self, masks: list[dict[str, Tensor]], folder: Path, every: int) -> None:
        self.masks, self.every, self.calls = masks, every, 0

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        assert not is_masked(model)
        self.calls += 1
        return self.masks[self.calls]


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_choosing_again_resumes_to_the_bit(stop: int, tmp_path: Path) -> None:
    """Killed before, at and after a choice; the resumed training must not tell."""
    masks = chosen_masks(lora(bert()))

    def make(folder: Path, calls: int = 0) -> FishTuningTrainer:
        choose = Chooses(masks, folder, 2)
        choose.calls = calls
        return FishTuningTrainer(
            model=lora(bert()),
            args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=1),
            mask=masks[0],
            reselect_every=2,
            choose=choose,
            train_dataset=DATA,
            data_collator=default_data_collator,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    assert whole.mask.keys() == masks[2].keys()
    assert all(torch.equal(mask, masks[2][name]) for name, mask in whole.mask.items())  # none after the last step
    resumed = make(tmp_path / "whole", calls=stop // 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_same_tensors(tensors(resumed.model), tensors(whole.model))
    for trainer in (whole, resumed):
        with pytest.raises(MaskError, match="replaced while it trained"):
            save_delta(trainer.model, tmp_path / "delta.safetensors")


def test_choosing_again_in_another_trainer(tmp_path: Path) -> None:
    masks = chosen_masks(lora(bert()))
    callback = FishMaskCallback(masks[0], reselect_every=3, choose=Chooses(masks, tmp_path, 3))
    model = lora(bert())
    args = arguments(tmp_path, max_steps=4, lr_scheduler_type="linear", gradient_accumulation_steps=2)
    Trainer(
        model=model, args=args, callbacks=[callback], train_dataset=DATA, data_collator=default_data_collator
    ).train()
    assert_same_tensors(get_mask(model), {name: masks[1][name] for name in get_mask(model)})


def test_choosing_again_keeps_the_number(tmp_path: Path) -> None:
    masks = chosen_masks(lora(bert()))
    name = next(name for name in masks[1] if "lora" in name)
    masks[1][name] = torch.zeros_like(masks[1][name])
    trainer = FishTuningTrainer(
        model=lora(bert()), args=arguments(tmp_path), mask=masks[0], reselect_every=1,
        choose=Chooses(masks, tmp_path, 1), train_dataset=DATA, data_collator=default_data_collator,
    )  # fmt: skip
    with pytest.raises(MaskError, match=r"choose gave a mask of .* entries; the one before has"):
        trainer.train()
    for wrong in ({"reselect_every": 2}, {"choose": Chooses(masks, tmp_path, 1)}):
        with pytest.raises(MaskError, match="belong together"):
            FishMaskCallback(masks[0], **wrong)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="reselect_every=0"):
        FishMaskCallback(masks[0], 0, Chooses(masks, tmp_path, 1))
