"""Frozen weights in few bits: how many bytes they take, and what they do to a pass over the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning.experiments.models.targets import head_names

_BITS = ("bits", "w_bit", "weight_bits", "nbits")
_GROUP = ("group_size", "q_group_size")
_LEFT_OUT = ("llm_int8_skip_modules", "modules_to_not_convert")


class StoredWeights(NamedTuple):
    """How a model's linear layers are stored.

    Args:
        name: of the method, as configurations give it.
        bits: of an entry.
        entry_overhead: bytes an entry for the scales of its block.
        row_overhead: bytes a row for its scale.
        left_out: names of modules that stay as they are, beside the head.
        compute: the dtype that layers compute in; None for that of their inputs.
        prepared: whether PEFT makes all that is not quantised fp32.
        measured: whether these are the sizes that the method's library makes; else they are assumed.
    """

    name: str
    bits: float
    entry_overhead: float
    row_overhead: int
    left_out: tuple[str, ...]
    compute: torch.dtype | None
    prepared: bool
    measured: bool

    def nbytes(self, rows: int, columns: int) -> int:
        entries = rows * columns
        return math.ceil(entries * (self.bits / 8 + self.entry_overhead)) + rows * self.row_overhead


def stored_weights_of(*found: Any) -> StoredWeights | None:
    """The first quantisation given, as a mapping, a configuration of transformers or a section of a file; else None."""
    for given in found:
        settings = given
        for plain in ("to_dict", "model_dump"):
            settings = getattr(given, plain)() if hasattr(given, plain) else settings
        if isinstance(settings, Mapping) and settings:
            return _read(settings)
    return None


def _read(settings: Mapping[str, Any]) -> StoredWeights | None:
    left_out = tuple(name for key in _LEFT_OUT for name in settings.get(key) or ())
    method = settings.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    in_4, in_8 = (settings.get(key, settings.get(f"_{key}")) for key in ("load_in_4bit", "load_in_8bit"))
    if in_4:
        block = 64
        scale = 4 / block
        if settings.get("bnb_4bit_use_double_quant"):
            scale = (1 + 4 / 256) / block
        named = str(settings.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        compute = getattr(torch, named, torch.float32)
        return StoredWeights("bitsandbytes 4-bit", 4, scale, 0, left_out, compute, prepared=True, measured=True)
    if in_8:
        return StoredWeights("bitsandbytes 8-bit", 8, 0, 4, left_out, torch.float16, prepared=True, measured=True)
    bits = next((settings[key] for key in _BITS if isinstance(settings.get(key), int | float)), None)
    if method == "bitsandbytes" and bits is None:
        return None
    if bits is None:
        bits = 8 if "8" in method or "8" in str(settings.get("quant_type", "")) else 4
    group = next((settings[key] for key in _GROUP if isinstance(settings.get(key), int)), 128)
    overhead = 4 / group if group > 0 else 0  # a scale and a zero point of 16 bits
    return StoredWeights(
        f"{method} {bits}-bit", float(bits), overhead, 0, left_out, None, prepared=False, measured=False
    )


def quantize_like(model: Any, quantization: StoredWeights) -> None:
    """Have the frozen linear layers of a model without weights do as quantised ones.

    Their weights become bytes, and each pass through them makes the whole weight for a moment, as dequantising does.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    left_out = {*head_names(base), "lm_head", *quantization.left_out}
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    inside = {
        id(module)
        for layer in tuner_layers(base)
        for name, child in layer.named_children()
        if name != "base_layer"
        for module in child.modules()
    }
    changed: set[int] = set()
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in inside or module is output:
            continue
        if left_out & set(name.split(".")) or any(name.endswith(f".{end}") for end in left_out):
            continue
        if not module.weight.requires_grad:
            changed.add(id(_replace(module, quantization)))
    if quantization.prepared:
        _make_whole(model, changed)


def _make_whole(model: nn.Module, quantized: set[int]) -> None:
    """Of fp32, as PEFT's prepare_model_for_kbit_training leaves what is not quantised."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in quantized or parameter.dtype.itemsize != 2:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def tuner_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _replace(module: nn.Linear, quantization: StoredWeights) -> nn.Parameter:
    rows, columns = module.out_features, module.in_features
    stored = module.weight.new_empty(quantization.nbytes(rows, columns), dtype=torch.uint8)
    weight = nn.Parameter(stored, requires_grad=False)
    module._parameters["weight"] = weight

    def forward(x: Tensor) -> Tensor:
        given = x.dtype  # autocast does not reach into such layers
        output: Tensor = _Dequantized.apply(x.to(quantization.compute or given), rows, columns)  # type: ignore[no-untyped-call]
        output = output.to(given)
        return output if module.bias is None else output + module.bias.to(given)

    vars(module)["forward"] = forward
    return weight


class _Dequantized(torch.autograd.Function):
    """A product with a weight that is made for it, in either direction, and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int) -> Tensor:
        ctx.shape = rows, columns
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, x.new_empty(rows, columns))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None
