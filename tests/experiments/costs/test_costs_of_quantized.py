"""Quantised weights: their bytes, against bitsandbytes' own, and what they do to a pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from tiny import causal_batch, llama, llama_config, lora
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from fish_tuning.experiments.costs.fake_models import make_fake
from fish_tuning.experiments.costs.live_bytes import LiveBytes
from fish_tuning.experiments.costs.quantized import quantize_like, stored_weights_of
from fish_tuning.experiments.costs.training_pass import training_pass
from fish_tuning.files.sizes import Described


@pytest.mark.parametrize("double", [False, True])
def test_bytes_in_4_bits(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(512, 256, bias=False, quant_type="nf4", compress_statistics=double)
    layer.load_state_dict({"weight": torch.randn(256, 512)})
    weight = layer.to("cpu").weight
    state = weight.quant_state
    stored = [weight.data, state.absmax]
    if double:
        stored.append(state.state2.absmax)
    found = stored_weights_of({"load_in_4bit": True, "bnb_4bit_use_double_quant": double})
    assert found is not None
    assert found.nbytes(256, 512) == sum(tensor.nbytes for tensor in stored)


def test_where_it_is_told() -> None:
    assert stored_weights_of(None, {}) is None
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["v_proj"])
    found = stored_weights_of(None, config)
    assert found is not None
    assert (found.bits, found.left_out, found.nbytes(10, 100)) == (8, ("v_proj",), 1040)
    gptq = stored_weights_of({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert gptq is not None
    assert gptq.nbytes(100, 1280) == 100 * 1280 // 2 + 100 * 40
    assert not gptq.measured
    assert stored_weights_of({"load_in_4bit": False}) is None


def model(quantized: bool, **skip: Any) -> tuple[Any, FakeTensorMode]:
    made = lora(llama(hidden_size=64, intermediate_size=128))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(made, mode)
    if quantized:
        found = stored_weights_of({"load_in_4bit": True, **skip})
        assert found is not None
        with mode:
            quantize_like(made, found)
    return made, mode


def test_weights_shrink_and_the_rest_stays() -> None:
    plain, small, skipping = (
        model(*how)[0] if len(how) == 1 else model(how[0], llm_int8_skip_modules=["down_proj"])[0]
        for how in ((False,), (True,), (True, "skip"))
    )
    before, after = dict(plain.named_parameters()), dict(small.named_parameters())
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if before[name].nbytes != after[name].nbytes}
    assert changed == {"base_layer", "o_proj", "gate_proj", "up_proj"}  # neither adapters nor the output layer
    for name, parameter in after.items():
        if before[name].nbytes != parameter.nbytes:
            entries = before[name].numel()
            assert parameter.nbytes == entries // 2 + entries // 16
    kept = dict(skipping.named_parameters())
    assert all(kept[name].nbytes == before[name].nbytes for name in before if "down_proj" in name)


def quantized_for_real(folder: Path, asked: BitsAndBytesConfig) -> tuple[Any, list[torch.Tensor]]:
    """A model as transformers and PEFT load it in few bits, and all that it keeps."""
    loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.bfloat16, device_map="cpu")
    made = lora(prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False))
    held = [*made.parameters(), *made.buffers()]
    for module in made.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        held += [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        held += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    return made, held


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_the_peak_is_that_of_a_real_step(tmp_path: Path, how: dict[str, bool], bf16: bool) -> None:
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(**how)
    real, held = quantized_for_real(tmp_path, asked)
    with torch.device("meta"):
        config = llama_config(hidden_size=64, intermediate_size=128)
        said = lora(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    found = stored_weights_of(asked)
    assert found is not None
    quantize_like(said, found)
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(tensor.nbytes for tensor in (*said.parameters(), *said.buffers())) == sum(memories.values())

    batch, args = causal_batch((60, 40, 50)), SimpleNamespace(bf16=bf16, fp16=False, activation_checkpointing=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(said, mode)
    shapes = {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    planned = training_pass(said, mode, shapes, args, gpu=False)  # type: ignore[arg-type]
    real.train()
    with LiveBytes(held) as live:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = real(**inputs).loss
        loss.backward()
    assert planned.peak() == pytest.approx(live.peak(), rel=0.1)


def test_what_is_not_quantised_is_fp32() -> None:
    """As transformers and PEFT leave a model on which a run trains."""
    pytest.importorskip("bitsandbytes")
    found = stored_weights_of(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16))
    assert found is not None
    assert found.compute is torch.bfloat16
    made = lora(llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16))
    quantize_like(made, found)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.uint8, torch.float32}
    assert sum(parameter.requires_grad for parameter in made.parameters()) == 16
