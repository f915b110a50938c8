"""The constant answer, the head alone, and tasks that no arm learns."""

from __future__ import annotations

from fakes import ok, scores

from fish_tuning.experiments.compare.numbers import number, signed
from fish_tuning.experiments.compare.references import (
    constant_name,
    fallen_note,
    learning_notes,
    nothing_learned,
    unlearned_note,
    with_references,
)
from fish_tuning.experiments.compare.summaries import summarize


def test_reference_rows_come_first() -> None:
    runs = [
        *scores("lora", [0.7, 0.8, 0.75], constant_value=0.5),
        *scores("head", [0.6, 0.6, 0.61], constant_value=0.5),
    ]
    rows = with_references(summarize(runs), runs)
    assert [row.arm for row in rows] == ["always the largest class", "head", "lora"]
    assert (rows[0].mean, rows[0].low) == (0.5, None)
    assert with_references(summarize(scores("lora", [0.7])), scores("lora", [0.7]))[0].arm == "lora"  # none is known


def test_numbers_have_a_mean() -> None:
    assert constant_name([ok("lora", 1, 0.5, metrics={"pearson": 0.5})]) == "always the mean"


def test_a_task_that_no_arm_learns() -> None:
    chance = scores("lora", [0.49, 0.5, 0.52], constant_value=0.5)
    assert nothing_learned(chance)
    assert "No arm is shown to learn rte: none is above always the largest class (0.500)" in unlearned_note(
        "rte", chance
    )
    assert not nothing_learned([*chance, *scores("lora-fish", [0.8, 0.81, 0.82], constant_value=0.5)])
    assert not nothing_learned(scores("lora", [0.4, 0.5], constant_value=0.5))  # too few to tell
    assert nothing_learned(scores("lora", [0.5, 0.5, 0.5], constant_value=0.5))  # as a constant answer gives it
    assert not nothing_learned(scores("lora", [0.8, 0.8, 0.8], constant_value=0.5))
    assert not nothing_learned(scores("lora", [0.4, 0.5, 0.45]))  # no record tells the constant


def test_seeds_whose_training_fell_apart() -> None:
    settings = {"constant_value": 0.5, "learning_rate": 0.08}
    runs = scores("lora", [0.7, 0.72, 0.75, 0.7], **settings) + scores("lora-fish", [0.5, 0.78, 0.4, 0.77], **settings)
    (note,) = learning_notes("sst2", runs)
    assert "on sst2 than always the largest class (0.500)" in note
    assert "lora-fish 2 of 4 at learning rate 0.08. The means" in note
    head = scores("head", [0.5, 0.6, 0.61], constant_value=0.5)
    chance = scores("lora-fish-rand", [0.5, 0.5, 0.49], constant_value=0.5)  # all alike: its mean says it
    assert fallen_note("sst2", [*scores("lora", [0.7, 0.72, 0.75], **settings), *head, *chance]) is None
    assert learning_notes("rte", scores("lora", [0.5, 0.52, 0.49], constant_value=0.5))[0].startswith("No arm is shown")
    assert fallen_note("sst2", scores("lora", [0.5, 0.9, 0.9])) is None  # no record tells the constant


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [signed(value) for value in (-0.0004, 0.0004, -0.0, -0.0006, 0.5)] == [
        "0.000", "0.000", "0.000", "-0.001", "+0.500",
    ]  # fmt: skip
    assert [number(value) for value in (-0.0004, -0.0, 0.5)] == ["0.000", "0.000", "0.500"]
