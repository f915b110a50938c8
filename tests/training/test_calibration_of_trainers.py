"""What trl's trainers train on, against their own losses: one example at a time, and as a whole."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Rows, assert_scores_close, bert, classification_batch, lora, tensors
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fish_tuning import ConfigurationError, FishTuningWarning, calculate_fisher_information, calibration_of

pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
from trl_trainers import PREFERENCES, make, move, nothing_matters

MARGINS = {**PREFERENCES, "margin": [0.1 * number for number in range(16)]}


def pair(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """One preferred and one rejected answer of trl's batch, which holds all of the one kind and then the others."""
    half = len(batch["input_ids"]) // 2
    return {
        key: value[[number, half + number]] if len(value) == 2 * half else value[[number]]
        for key, value in batch.items()
    }


def by_trl(trainer: Any) -> tuple[dict[str, Tensor], float]:
    """Squares of the gradients of trl's own loss of one pair after the other, and the mean loss."""
    model = trainer.model.eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    totals, loss, number = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}, 0.0, 0
    for batch in trainer.get_train_dataloader():
        for row in range(len(batch["input_ids"]) // 2):
            own = trainer.compute_loss(model, pair(batch, row))
            for name, gradient in zip(trained, torch.autograd.grad(own, list(trained.values())), strict=True):
                totals[name] += gradient.square()
            loss, number = loss + float(own), number + 1
    return {name: total.detach() / number for name, total in totals.items()}, loss / number


@pytest.mark.parametrize(
    ("kind", "data", "settings"),
    [
        ("DPO", None, {}),
        ("DPO", None, {"beta": 0.5, "precompute_ref_log_probs": True}),
        ("Reward", None, {}),
        ("Reward", MARGINS, {"center_rewards_coefficient": 0.2}),
    ],
)
def test_a_pair_is_one_example_with_trls_own_loss(
    kind: str, data: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make(kind, tmp_path, data, **settings)
    move(trainer.model)
    reference, loss = by_trl(trainer)
    found = calibration_of(trainer)
    assert found["rows_per_example"] == 2
    assert_scores_close(calculate_fisher_information(trainer.model, **found, progress=False), reference)
    names = ("input_ids", "attention_mask")
    losses = [found["loss_fn"](trainer.model(**{n: b[n] for n in names}), b) for b in found["calibration_dataloader"]]
    assert float(torch.cat(losses).detach().mean()) == pytest.approx(loss, rel=1e-5)
    fewer = calibration_of(trainer, num_samples=3)
    assert sum(len(batch["input_ids"]) for batch in fewer["calibration_dataloader"]) == 8


def test_completions_have_the_gradient_of_trls_first_step(tmp_path: Path) -> None:
    trainer = make("GRPO", tmp_path, loss_type="grpo", temperature=0.7)
    move(trainer.model)
    drawn = {}
    original = trainer._generate_and_score_completions

    def kept(prompts: Any) -> Any:
        drawn["batch"] = original(prompts)
        return drawn["batch"]

    trainer._generate_and_score_completions = kept
    found = calibration_of(trainer, num_samples=4)
    (batch,) = found["calibration_dataloader"]
    model = trainer.model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = torch.autograd.grad(trainer.compute_loss(model, drawn["batch"]), trained)
    names = ("input_ids", "attention_mask")
    ours = torch.autograd.grad(found["loss_fn"](model(**{n: batch[n] for n in names}), batch).mean(), trained)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-7)


def test_no_prompt_is_drawn_from_twice_before_all_were(tmp_path: Path) -> None:
    trainer = make("GRPO", tmp_path, steps_per_generation=2, num_iterations=3)
    found = calibration_of(trainer, num_samples=32)["calibration_dataloader"]
    assert sum(len(batch["input_ids"]) for batch in found) == 32
    prompts = {tuple(prompt) for batch in found for prompt in prompts_of(batch)}
    assert len(prompts) > 4  # of eight groups, some of whose prompts are alike


def prompts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    starts = batch["completion_mask"].argmax(dim=1).tolist()
    rows = zip(batch["input_ids"], batch["attention_mask"], starts, strict=True)
    return [ids[:start][mask[:start] == 1].tolist() for ids, mask, start in rows]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "GRPO"])
def test_the_trainer_is_left_as_it_was(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path)
    weights, modes = tensors(trainer.model), [module.training for module in trainer.model.modules()]
    metrics, seen = copy.deepcopy(trainer._metrics), trainer.state.num_input_tokens_seen
    state = torch.get_rng_state(), random.getstate()
    scores = calculate_fisher_information(trainer.model, **calibration_of(trainer, num_samples=8), progress=False)
    assert any(bool(score.any()) for score in scores.values())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert trainer._metrics == metrics
    assert trainer.state.num_input_tokens_seen == seen
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors(trainer.model).items())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("SFT", {"packing": True, "max_length": 16}, "packing=True puts several examples into one row"),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sft'\]: of DPO's losses the sigmoid alone"),
        ("DPO", {"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence'"),
        ("DPO", {"ld_alpha": 0.0}, "ld_alpha=0.0"),
        ("KTO", {}, "trl's KTOTrainer is not known; known are SFTTrainer, RewardTrainer, DPOTrainer, GRPOTrainer"),
    ],
)
def test_what_cannot_be_scored_is_named(kind: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {"prompt": ["film"] * 4, "completion": ["good"] * 4, "label": [True, False] * 2} if kind == "KTO" else None
    trainer = make(kind, tmp_path, data, **settings)
    with pytest.raises(ConfigurationError, match=message) as told:
        calibration_of(trainer)
    assert "add_mask(trainer, mask)" in str(told.value)


def test_rewards_that_tell_nothing(tmp_path: Path) -> None:
    trainer = make("GRPO", tmp_path, rewards=nothing_matters)
    with pytest.raises(ConfigurationError, match="in no group of them do the rewards differ"):
        calibration_of(trainer, num_samples=8)
    assert not trainer._metrics["train"]


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("DPO", tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ConfigurationError, match=r"DPOTrainer in 2 processes.*load_mask\(file\)"):
        calibration_of(trainer)


def test_a_plain_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(lora(bert()), args, train_dataset=Rows(classification_batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        found = calibration_of(trainer, num_samples=3)
    assert set(found) == {"calibration_dataloader", "num_samples"}
    scores = calculate_fisher_information(trainer.model, **found, progress=False)
    assert scores.keys() == {name for name, each in trainer.model.named_parameters() if each.requires_grad}
    with pytest.raises(ConfigurationError, match="num_samples=0 must be a whole number of at least 1"):
        calibration_of(trainer, num_samples=0)
    trainer.train_dataset = None
    with pytest.raises(ConfigurationError, match="This Trainer has no train_dataset"):
        calibration_of(trainer)


class _OfLogits(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("kind", "arguments", "settings", "message"),
    [
        (_OfLogits, {}, {}, r"_OfLogits\.compute_loss: the Trainer trains on a loss of its own"),
        (Trainer, {"compute_loss_func": lambda *_, **__: None}, {}, "compute_loss_func: the Trainer trains"),
        (Trainer, {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the Trainer trains"),
    ],
)
def test_a_loss_that_is_not_the_models_is_told(
    kind: type[Trainer], arguments: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **settings)
    trainer = kind(lora(bert()), args, train_dataset=Rows(classification_batch()), **arguments)
    with pytest.warns(FishTuningWarning, match=message):
        calibration_of(trainer)


def test_of_trls_likelihoods_dft_is_another_loss(tmp_path: Path) -> None:
    with pytest.warns(FishTuningWarning, match="^loss_type='dft': the Trainer trains on a loss of its own"):
        calibration_of(make("SFT", tmp_path, loss_type="dft"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        calibration_of(make("SFT", tmp_path, loss_type="nll"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dr_grpo"}, "^loss_type='dr_grpo': a part of GRPOTrainer's loss that no entry is scored by"),
        ({"loss_type": "cispo", "top_entropy_quantile": 0.5}, r"^top_entropy_quantile=0\.5: a part"),
        ({"loss_type": "sapo", "entropy_coef": 0.1}, "^an entropy bonus: a part"),
    ],
)
def test_parts_of_grpo_that_are_not_scored_are_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(FishTuningWarning, match=message):
        calibration_of(make("GRPO", tmp_path, **settings), num_samples=4)


def test_the_routers_part_of_a_loss_of_preferences_is_told(tmp_path: Path) -> None:
    trainer = make("DPO", tmp_path)
    trainer.aux_loss_enabled = True
    with pytest.warns(FishTuningWarning, match="^router_aux_loss_coef: a part of DPOTrainer's loss"):
        calibration_of(trainer, num_samples=2)


@pytest.mark.parametrize(
    "name", ["llamafactory.train.sft.trainer.CustomSeq2SeqTrainer", "axolotl.core.trainers.base.AxolotlTrainer"]
)
def test_other_tools_trainers_that_train_on_the_models_loss_are_known(name: str, tmp_path: Path) -> None:
    module, _, own = name.rpartition(".")

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)

    kind = type(own, (Trainer,), {"__module__": module, "compute_loss": compute_loss})
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        calibration_of(kind(lora(bert()), args, train_dataset=Rows(classification_batch())))
    unknown = type("Mine", (kind,), {"__module__": module, "compute_loss": compute_loss})
    with pytest.warns(FishTuningWarning, match=r"Mine\.compute_loss: the Trainer trains on a loss of its own"):
        calibration_of(unknown(lora(bert()), args, train_dataset=Rows(classification_batch())))
    trainer = kind(lora(bert()), args, train_dataset=Rows(classification_batch()))
    vars(trainer.args)["orpo_alpha"] = 0.1
    with pytest.warns(FishTuningWarning, match="orpo_alpha: the Trainer trains on a loss of its own"):
        calibration_of(trainer)


def test_packing_is_seen_in_the_collator(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(lora(bert()), args, train_dataset=Rows(classification_batch()))
    trainer.data_collator = SimpleNamespace(neat_packing=True)
    with pytest.raises(ConfigurationError, match="neat_packing=True puts several examples into one row"):
        calibration_of(trainer)
