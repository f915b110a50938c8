"""Named scores: their formulas, their names, and those of the user's own."""

from __future__ import annotations

import pytest
import torch
from tiny import bert, classification_batch, lora, rebatch
from torch import Tensor

from fish_tuning import (
    Evidence,
    FisherError,
    calculate_fisher_information,
    calculate_scores,
    measure_moments,
    register_score,
)
from fish_tuning.scores.named import SCORES


def evidence(g: list[float], f: list[float], weight: list[float], samples: int = 10, batch: int = 4) -> Evidence:
    moments = {"mean_gradient": torch.tensor(g), "mean_square": torch.tensor(f)}
    return Evidence("a.weight", torch.tensor(weight), moments, samples, batch, seed=0)


def score(name: str, known: Evidence) -> list[float]:
    return SCORES[name].function(known).tolist()


def test_gain_is_its_formula() -> None:
    """One entry of signal and noise, one of noise alone, one of nothing, one without noise."""
    known = evidence([0.5, 0.01, 0.0, -0.3], [1.25, 4.0, 0.0, 0.09], [1.0] * 4, samples=10, batch=4)
    signal = 0.25 - 1.0 / 9
    expected = [signal / (signal + 1.0 / 4) ** 0.5, 0.0, 0.0, 0.3]
    assert score("gain", known) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_gain_of_a_large_batch_is_the_gradient() -> None:
    known = evidence([0.5, -0.2], [0.26, 0.05], [1.0, 1.0], samples=10**6, batch=10**6)
    assert score("gain", known) == pytest.approx([0.5, 0.2], rel=1e-3)


def test_gain_needs_a_variance() -> None:
    with pytest.raises(FisherError, match="at least 2"):
        score("gain", evidence([1.0], [1.0], [1.0], samples=1))


def test_other_scores() -> None:
    known = evidence([0.5, -2.0], [1.0, 9.0], [-3.0, 0.5])
    assert score("gradient", known) == [0.5, 2.0]
    assert score("sensitivity", known) == [1.5, 1.0]
    assert score("magnitude", known) == [3.0, 0.5]
    assert score("fisher", known) == [1.0, 9.0]
    assert score("random", known) == score("random", known) != [0.0, 0.0]


def test_random_differs_between_tensors_and_seeds() -> None:
    drawn = [
        SCORES["random"].function(Evidence(name, torch.zeros(4), {}, 0, 1, seed)).tolist()
        for name, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert len({tuple(values) for values in drawn}) == 3


@pytest.mark.parametrize("name", ["gain", "gradient", "sensitivity"])
def test_scores_are_functions_of_the_moments_whatever_the_batches(name: str) -> None:
    model, batch = lora(bert()), classification_batch()
    moments = measure_moments(model, [batch], progress=False)
    scores = calculate_scores(model, rebatch(batch, 3), name, batch_size=8, progress=False)
    for tensor, found in scores.items():
        own = {"mean_gradient": moments.mean_gradients[tensor], "mean_square": moments.mean_squares[tensor]}
        known = Evidence(tensor, model.get_parameter(tensor).detach(), own, moments.num_samples, 8, 0)
        torch.testing.assert_close(found, SCORES[name].function(known), rtol=1e-3, atol=1e-6)


def test_fisher_is_the_fisher_information() -> None:
    model, batch = lora(bert()), classification_batch()
    fisher = calculate_fisher_information(model, [batch], progress=False)
    scores = calculate_scores(model, [batch], "fisher", progress=False)
    assert all(torch.equal(scores[name], tensor) for name, tensor in fisher.items())


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_what_needs_no_moments_reads_no_example(name: str) -> None:
    def loader() -> object:
        raise AssertionError("an example was read")
        yield

    scores = calculate_scores(lora(bert()), loader(), name, progress=False)  # type: ignore[arg-type]
    assert all(tensor.dtype == torch.float32 for tensor in scores.values())


def test_a_score_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "_members", dict(SCORES._members))

    @register_score("ratio", needs=("mean_gradient", "mean_square"))
    def ratio(evidence: Evidence) -> Tensor:
        return evidence.mean_gradient.square() / evidence.mean_square.clamp(min=1e-30)

    scores = calculate_scores(lora(bert()), [classification_batch()], "ratio", progress=False)
    assert all(bool((tensor <= 1.0001).all()) for tensor in scores.values())


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "_members", dict(SCORES._members))
    register_score("short")(lambda evidence: evidence.weight.flatten()[:1])
    register_score("infinite")(lambda evidence: evidence.weight / 0)
    register_score("undeclared")(lambda evidence: evidence.mean_square)
    model, batches = lora(bert()), [classification_batch()]
    for name, message in {
        "gian": "Did you mean 'gain'",
        "short": r"gave the shape \(1,\)",
        "infinite": "are not finite",
        "undeclared": r"register it with needs=\('mean_square',\)",
    }.items():
        with pytest.raises(FisherError, match=message):
            calculate_scores(model, batches, name, progress=False)
    with pytest.raises(FisherError, match="batch_size=0"):
        calculate_scores(model, batches, batch_size=0)
    with pytest.raises(FisherError, match="'hessian' is not known"):
        register_score("curvature", needs=("hessian",))
