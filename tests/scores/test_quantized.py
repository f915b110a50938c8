"""4-bit weights on the CPU: scoring neither packs them nor takes gradients through packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import assert_scores_close, causal_batch, llama, lora, rebatch
from torch import Tensor

from fish_tuning import FisherError, calculate_fisher_information
from fish_tuning.scores.quantized import allow_packing, keep_unpacked

bitsandbytes = pytest.importorskip("bitsandbytes", reason="base weights in 4 bits need bitsandbytes")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantisation = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    )
    if not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in base.modules()):
        pytest.skip("weights are packed only on processors with bfloat16 instructions")
    return lora(base)


def scored(model: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, rebatch(causal_batch(), 2), warmup_steps=0, progress=False)


def scales(model: Any) -> dict[str, Tensor]:
    """What packing rounds for good."""
    states = {name: getattr(getattr(m, "weight", None), "quant_state", None) for name, m in model.named_modules()}
    return {name: state.absmax.clone() for name, state in states.items() if state is not None}


def test_scoring_changes_no_weight(model: Any) -> None:
    before = scales(model)
    first = scored(model)
    after = scales(model)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "compute_dtype"))
    assert_scores_close(scored(model), first)


def test_packed_weights_are_refused(model: Any) -> None:
    with torch.no_grad():
        model.eval()(**causal_batch())
    with pytest.raises(FisherError, match=r"4-bit weight of '.*q_proj.base_layer' is packed.*Load the model again"):
        scored(model)


def test_kept_unpacked_gradients_outlive_an_evaluation(model: Any) -> None:
    layers = keep_unpacked(model)
    before = scored(model)
    with torch.no_grad():
        model.eval()(**causal_batch())
    assert_scores_close(scored(model), before)
    allow_packing(layers)
    with torch.no_grad():
        model(**causal_batch())
    with pytest.raises(FisherError, match="is packed"):
        scored(model)
