from __future__ import annotations

import torch

from fish_tuning.experiments.records.kept import kept_shares
from fish_tuning.experiments.records.run_record import KeptShare


def test_kept_shares_tell_layer_and_module() -> None:
    query = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_A.default.weight"
    head = "base_model.model.classifier.modules_to_save.default.weight"
    mask = {
        query.format(10): torch.tensor([True, False]),
        query.format(3): torch.tensor([True, False]),
        "base_model.model.bert.encoder.layer.3.attention.self.query.lora_A.default.bias": torch.tensor([True]),
        "base_model.model.prompt.default": torch.tensor([False]),
        head: torch.ones(2, dtype=torch.bool),
    }
    assert kept_shares(mask, {head}) == [
        KeptShare(None, "model.prompt", 0, 1),
        KeptShare(3, "query.lora_A", 2, 3),
        KeptShare(10, "query.lora_A", 1, 2),
    ]
