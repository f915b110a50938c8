from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import assert_scores_close, bert, classification_batch, llama, lora, rebatch
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information
from fish_tuning.scores.checks import Check, Checksumming
from fish_tuning.scores.probes import Probes
from fish_tuning.scores.totals import Totals


def test_names_are_those_that_can_be_watched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))
    model.register_parameter("own", nn.Parameter(torch.ones(3)))
    names = [name for name, _ in model.named_parameters()]
    assert sorted(Probes(model, names).names) == sorted({*names} - {"own"}), "the whole model done again is the loop"
    assert Probes(model, ["0.bias"]).names == ["0.bias"]


def test_a_table_that_is_read_and_multiplied_with_is_watched_in_both() -> None:
    model = llama(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    assert set(names) == set(Probes(model, names).names)


def test_a_tensor_of_two_layers_is_where_both_have_a_rule_that_can_be_added_up() -> None:
    def names(*layers: nn.Module) -> list[str]:
        model = nn.Sequential(nn.Sequential(*layers))
        model[0][1].weight = model[0][0].weight
        return sorted(Probes(model, ["0.0.weight", "0.0.bias"]).names)

    assert names(nn.Linear(3, 3), nn.Linear(3, 3)) == ["0.0.bias", "0.0.weight"]
    assert names(nn.LayerNorm(3), nn.LayerNorm(3)) == ["0.0.bias"]


@pytest.mark.parametrize("layers", ["linear", "embeddings", "both", "held alone"])
def test_all_uses_of_a_tensor_are_added_up(layers: str) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.other = nn.Embedding(5, 5), nn.Embedding(5, 5)
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
            if layers == "linear":
                self.last.weight = self.first.weight
            elif layers == "embeddings":
                self.other.weight = self.table.weight
            elif layers == "both":
                self.last.weight = self.first.weight = self.other.weight = self.table.weight
            else:  # by a module that does not use it
                self.kept = self.last.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.table(x) * self.other(x.flip(1))).tanh().mean(1))  # type: ignore[no-any-return]

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")

    model = Shares()
    assert len(Probes(model, dict(model.named_parameters())).names) == len(list(model.parameters()))
    batch = {"x": torch.tensor([[0, 1, 2], [2, 2, 4], [3, 1, 0], [1, 1, 1]]), "y": torch.tensor([0, 3, 2, 4])}
    scores = calculate_fisher_information(model, [batch], loss_fn=loss_fn, progress=False)
    by_loop = calculate_fisher_information(model, [batch], loss_fn=loss_fn, method="loop", progress=False)
    assert_scores_close(scores, by_loop)


class Reads(nn.Module):
    """Two embeddings of one table, of which one has padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other, self.last = nn.Embedding(9, 4, **options), nn.Embedding(9, 4), nn.Linear(4, 3)
        self.other.weight = self.table.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last((self.table(x).mean(1) + self.other(y).mean(1) ** 2).tanh())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")  # what goes through the loop
@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_what_an_embedding_does_to_its_gradients_may_show_in_a_later_batch_alone(options: dict[str, Any]) -> None:
    """The first has neither padding nor an id twice, so that it proves nothing of them."""
    first = {"x": torch.arange(1, 9).view(2, 4), "y": torch.arange(1, 9).view(2, 4).flip(1)}
    later = {"x": torch.tensor([[0, 0, 2, 1], [3, 3, 3, 0]]), "y": torch.tensor([[0, 5, 5, 1], [1, 0, 0, 2]])}
    batches = [batch | {"labels": torch.tensor([0, 2])} for batch in (first, later)]

    def scores(method: Any) -> dict[str, Tensor]:
        return calculate_fisher_information(
            Reads(**options),
            batches,
            method=method,
            loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
            progress=False,
        )

    assert_scores_close(scores("auto"), scores("loop"))


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("head", [True, False], ids=["beside a head that is watched", "alone"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(3, 2, 1)], ids=["by rule", "done again"])
def test_layers_within_a_vmap_go_through_the_loop(layer: nn.Module, head: bool) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 3).requires_grad_(head)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.vmap(self.layer)(x).mean(1).tanh())  # type: ignore[no-any-return]

    def scores(method: Any) -> dict[str, Tensor]:
        return calculate_fisher_information(
            model,
            [batch, batch],
            method=method,
            loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
            progress=False,
        )

    torch.manual_seed(0)
    model, batch = Mapped(), {"x": torch.randn(5, 3, 4), "labels": torch.arange(5) % 3}
    assert_scores_close(scores("auto"), scores("loop"))


def test_hooks_are_there_only_within() -> None:
    model = lora(bert())
    probes = Probes(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    for _ in range(2):
        with probes:
            probes.start(4, torch.device("cpu"))
            assert sum(len(module._forward_hooks) for module in model.modules()) == 9  # 2 layers x 2 x (A, B), 1 head
        assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_looked_at_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single examples need no rule."""
    monkeypatch.delattr("fish_tuning.scores.probes.Candidates")
    model = lora(bert())
    calculate_fisher_information(model, rebatch(classification_batch(), 1), progress=False)
    calculate_fisher_information(model, rebatch(classification_batch(), 2), method="loop", progress=False)
    with pytest.raises(NameError):
        calculate_fisher_information(model, rebatch(classification_batch(), 2), progress=False)


def test_squares_and_what_a_check_is_given() -> None:
    model, batch, weights = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([1.5, -1.0, 1.25, -2.0])
    probes = Probes(model, ["weight"])
    into = Totals({"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(2, 3)})
    check = Check(frozenset(["weight"]), frozenset(["weight"]), [1], weights)
    with probes:
        probes.start(4, torch.device("cpu"))
        losses = model(batch).sum(1)
        probes.backward([losses, 2 * losses], into, check)  # two loss vectors: squares add up
    squares = 5 * (batch**2).sum(0).expand(2, 3)
    torch.testing.assert_close(into.squares["weight"], squares)
    assert into.gradients is not None
    torch.testing.assert_close(into.gradients["weight"], 3 * batch.sum(0).expand(2, 3))  # freed of the weights
    checksum = Checksumming().checksum
    torch.testing.assert_close(check.of_batch["weight"], checksum(squares))
    torch.testing.assert_close(check.of_row["weight"], checksum(5 * (batch[1] ** 2).expand(2, 3)))
    torch.testing.assert_close(check.of_sum["weight"], checksum(5 * (weights @ batch).square().expand(2, 3)))


def test_released_names_are_not_watched() -> None:
    model = nn.Linear(3, 2)
    probes = Probes(model, ["weight", "bias"])
    probes.release(["weight"])
    into = Totals({"bias": torch.zeros(2)})
    with probes:
        probes.start(4, torch.device("cpu"))
        probes.backward([model(torch.randn(4, 3)).sum(1)], into)
    assert probes.names == ["bias"]
    assert into.squares["bias"].tolist() == [4, 4]


def test_calls_in_the_wrong_shape_are_reported() -> None:
    model = nn.Linear(3, 2)
    probes = Probes(model, ["weight"])
    with probes:
        probes.start(4, torch.device("cpu"))
        probes.backward([model(torch.randn(5, 3)).sum(1)], Totals({"weight": torch.zeros(2, 3)}))
    assert "first dimension 5, not with the 4 examples" in probes.broken["weight"]


class Force(nn.Module):
    """Classifies by the gradient of an energy, which hangs on the weights by more than what layers gave."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        x = x.detach().requires_grad_()
        energy = self.outer(self.inner(x).tanh()).sum()
        return SimpleNamespace(logits=self.head(torch.autograd.grad(energy, x, create_graph=True)[0]))


def test_layers_that_a_gradient_passes_in_the_forward_pass_go_through_the_loop() -> None:
    model = Force()
    batches = [{"x": torch.randn(size, 5), "labels": torch.arange(size) % 3} for size in (4, 3, 4)]
    options: dict[str, Any] = {"warmup_steps": 2, "progress": False}
    with pytest.warns(FishTuningWarning, match="4 of 6 tensors, .* a gradient is taken through it to get the loss"):
        found = calculate_fisher_information(model, batches, **options)
    assert_scores_close(found, calculate_fisher_information(model, batches, method="loop", **options))
    assert found["inner.weight"].any()


def test_backward_leaves_no_gradient() -> None:
    model, batch = lora(bert()), classification_batch()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    probes = Probes(model, names)
    into = Totals.zeros({name: model.get_parameter(name) for name in names}, torch.float32, None, gradients=False)
    with probes:
        probes.start(4, torch.device("cpu"))
        probes.backward([model(**batch).logits.sum(1)], into)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.any() for tensor in into.squares.values())
