"""What docs/initialisation.md says of A's scores just off B = 0: the closed form against an average over draws of B."""

from __future__ import annotations

import torch
from tiny import bert, classification_batch, examples, lora

from fish_tuning import calculate_fisher_information
from fish_tuning.starts.along_gradient import lora_layers

SIGMA, DRAWS = 1e-3, 60


def test_expected_fisher_information_of_a_near_zero_b() -> None:
    model, batch = lora(bert(layers=1), rank=4, init_lora_weights=True), classification_batch()
    _, layers = lora_layers(model, None)
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers.values()]
    squares = [torch.zeros(weight.shape[1], device=weight.device) for weight in weights]  # of each input column
    for row in examples(batch):
        for total, gradient in zip(squares, torch.autograd.grad(model(**row).loss, weights), strict=True):
            total += gradient.square().sum(0) / len(batch["labels"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.lora_A["default"].weight.requires_grad_()

    averages = [torch.zeros_like(layer.lora_A["default"].weight) for layer in layers.values()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        for layer in layers.values():
            weight = layer.lora_B["default"].weight.data
            weight.copy_(SIGMA * torch.randn(weight.shape, generator=generator))
        scores = calculate_fisher_information(model, [batch], progress=False)
        for average, name in zip(averages, layers, strict=True):
            average += scores[f"{name}.lora_A.default.weight"] / DRAWS

    for average, total, layer in zip(averages, squares, layers.values(), strict=True):
        expected = SIGMA**2 * layer.scaling["default"] ** 2 * total
        # 4 rows x 60 draws of a sum of squared normal numbers, each some 1.4 of its mean off at most
        torch.testing.assert_close(average.mean(0), expected, rtol=0.3, atol=0)
        torch.testing.assert_close(average.sum(), 4 * expected.sum(), rtol=0.1, atol=0)
