"""UniPELT: what its three parts and their gates compute, against formulas and PEFT's own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapter_models as models
import pytest
import test_serial
import tiny
import torch
from device import DEVICE
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ATTENTION_LAYERS = {
    "bert": "attention.self",
    "roberta": "attention.self",
    "modernbert": "attn",
    "llama": "self_attn",
    "qwen2": "self_attn",
    "vit": "attention",
    "distilbert": "attention",
    "gpt2": "attn",
}
KINDS = ("lora", "adapter", "prefix")
QUERIES = {
    "bert": "query",
    "roberta": "query",
    "modernbert": "Wqkv",
    "llama": "q_proj",
    "qwen2": "q_proj",
    "vit": "q_proj",
    "distilbert": "q_lin",
    "gpt2": "c_attn",
}


def eager_with_prefix(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """softmax over [the prefix's logits + log sigmoid(gate), the model's own logits], one head at a time."""
    log_gate, prefix_key, prefix_value = module.own_prefix  # (n, T, 1), (P, width), (P, width)
    size, groups = key.shape[-1], query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        mine = slice(head // groups * size, (head // groups + 1) * size)
        logits = query[:, head] @ key[:, head // groups].transpose(1, 2) * kwargs["scaling"]
        if mask is not None:
            logits = logits + mask[:, 0]
        of_prefix = query[:, head] @ prefix_key[:, mine].T * kwargs["scaling"] + log_gate
        weights = torch.cat([of_prefix, logits], dim=-1).softmax(-1)
        tokens = prefix_key.shape[0]
        heads.append(weights[..., :tokens] @ prefix_value[:, mine] + weights[..., tokens:] @ value[:, head // groups])
    return torch.stack(heads, dim=2), None


AttentionInterface.register("eager_with_prefix", eager_with_prefix)
AttentionMaskInterface.register("eager_with_prefix", eager_mask)


def straightforward(model: PeftModel, family: str) -> nn.Module:
    """The family's model with hooks that compute what UniPELT is said to compute, from the same tensors."""
    expected = models.FAMILIES[family][0]()
    state = model.get_submodule("base_model.model").state_dict()

    def apply(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.default.weight"], state.get(f"{name}.default.bias"))

    for name, module in expected.named_modules():
        if f"{name}.unipelt_lora_A.default.weight" in state:
            module.register_forward_hook(_lora(apply, f"{name}.unipelt_lora_"))
        if f"{name}.unipelt_adapter_up.default.weight" in state:
            module.register_forward_hook(_adapter(apply, f"{name}.unipelt_adapter_"))
        prefix = f"{name}.{QUERIES[family]}.unipelt_prefix_"
        if f"{prefix}key.default.weight" in state:
            module.register_forward_pre_hook(_prefix(apply, state, prefix), with_kwargs=True)
    expected.set_attn_implementation("eager_with_prefix")  # type: ignore[operator]
    return expected


def _lora(apply: Callable[..., Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        update = apply(f"{name}B", apply(f"{name}A", args[0])) * 16 / 2
        return output + apply(f"{name}gate", args[0]).sigmoid() * update

    return hook


def _adapter(apply: Callable[..., Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], h: Tensor) -> Tensor:
        return h + apply(f"{name}gate", h).sigmoid() * apply(f"{name}up", F.gelu(apply(f"{name}down", h)))

    return hook


def _prefix(apply: Callable[..., Tensor], state: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        log_gate = apply(f"{name}gate", x).sigmoid().log()
        module.own_prefix = (log_gate, state[f"{name}key.default.weight"], state[f"{name}value.default.weight"])

    return hook


def randomise_gates(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "_gate." in name:
            nn.init.normal_(parameter, std=0.5)


LORA = {
    "bert": ("attention.self.query", "attention.self.value"),
    "roberta": ("attention.self.query", "attention.self.value"),
    "modernbert": ("attn.Wqkv",),
    "llama": ("self_attn.q_proj", "self_attn.v_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.v_proj"),
    "vit": ("attention.q_proj", "attention.v_proj"),
    "distilbert": ("attention.q_lin", "attention.v_lin"),
    "gpt2": ("attn.c_attn",),
}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_layer_gets_the_three_parts_where_they_belong(family: str) -> None:
    model = models.adapted("unipelt", family, layers_to_transform=[1])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("unipelt_" in name or "modules_to_save" in name for name in trainable)
    parts = {
        kind: {name.partition(".unipelt_")[0] for name in trainable if f"unipelt_{kind}" in name} for kind in KINDS
    }
    ends = {kind: {name.partition(".1.")[2] for name in names} for kind, names in parts.items()}
    feedforward = test_serial.TARGETS[family][1]
    query = f"{ATTENTION_LAYERS[family]}.{QUERIES[family]}"
    assert ends == {"lora": set(LORA[family]), "adapter": {feedforward}, "prefix": {query}}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_output_equals_the_formulas(family: str) -> None:
    model, batch = models.adapted("unipelt", family), models.batch(family)
    randomise_gates(model)
    mask = batch.get("attention_mask")
    out, expected = models.logits(model, batch), models.logits(straightforward(model, family), batch)
    if mask is not None and out.dim() == 3:  # what stands at padding has no meaning
        out, expected = out[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_closed_gates_leave_the_model_as_it_was(family: str) -> None:
    batch = models.batch(family)
    before = models.logits(models.FAMILIES[family][0](), batch)
    model = models.adapted("unipelt", family)
    models.set_gates(model, -1e4)
    after = models.logits(model, batch)
    mask = batch.get("attention_mask")
    if mask is not None and after.dim() == 3:
        after, before = after[mask.bool()], before[mask.bool()]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_open_prefix_gate_alone_is_prefix_tuning(family: str) -> None:
    batch = {key: value for key, value in models.batch(family).items() if key != "labels"}
    peft_model = get_peft_model(
        models.FAMILIES[family][0](), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    model = models.adapted("unipelt", family)
    models.set_gates(model, -1e4)
    tokens = peft_model.prompt_encoder["default"].embedding.weight  # (P, layers * 2 * width)
    layers = tokens.unflatten(1, (2, 2, -1))
    for name, parameter in model.named_parameters():
        if "unipelt_prefix_" in name:
            number = int(next(part for part in name.split(".") if part.isdigit()))
            for part, kind in enumerate(("key", "value")):
                if f"prefix_{kind}." in name:
                    parameter.data.copy_(layers[:, number, part])
            if name.endswith("gate.default.bias"):
                parameter.data.fill_(1e4)
    # A prefix in the cache moves the positions of the tokens behind it.
    positions = torch.arange(5, 5 + batch["input_ids"].shape[1], device=DEVICE)[None]
    keep = batch["attention_mask"].bool()
    expected = models.logits(peft_model, batch)[keep]
    torch.testing.assert_close(
        models.logits(model, batch | {"position_ids": positions})[keep], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", models.CONFIGS)
@pytest.mark.parametrize(
    ("family", "side"),
    [("llama", "left"), *((family, "right") for family in models.FAMILIES if family != "vit")],
)
def test_padding_does_not_change_an_example(method: str, family: str, side: str) -> None:
    model = models.adapted(method, family)
    randomise_gates(model)
    padded = tiny.text_batch((3, 9), side=side)
    if family in ("llama", "qwen2"):
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    keep = padded["attention_mask"][0].bool()
    alone = {key: value[:1, keep] for key, value in padded.items()}
    one, other = models.logits(model, padded)[0], models.logits(model, alone)[0]
    torch.testing.assert_close(one[keep] if one.dim() == 2 else one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_later_tokens_do_not_reach_earlier_ones(family: str) -> None:
    model = models.adapted("unipelt", family)
    randomise_gates(model)
    batch = tiny.text_batch((7,))
    before = models.logits(model, batch)
    batch["input_ids"][0, 4:] = 30
    after = models.logits(model, batch)
    torch.testing.assert_close(after[0, :4], before[0, :4])
    assert (after[0, 4:] - before[0, 4:]).abs().max() > 0.1


@pytest.mark.parametrize("method", models.CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("lengths", [(3, 6), (6, 6)])
def test_generation_with_a_cache_equals_generation_without(method: str, family: str, lengths: tuple[int, int]) -> None:
    model = models.adapted(method, family)
    batch = tiny.text_batch(lengths, side="left")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": tiny.PAD}
    fast, slow = (model.generate(**batch, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.equal(fast.sequences, model.generate(**batch, **settings, use_cache=True).sequences)


def test_gates_start_half_open_and_can_start_almost_closed() -> None:
    batch = models.batch()
    before = models.logits(tiny.bert(), batch)
    distances = []
    for bias in (0.0, -5.0):
        model = models.adapted("unipelt", gate_bias=bias, init_std=0.01)
        gates = [parameter for name, parameter in model.named_parameters() if "_gate." in name]
        assert all(gate.unique().item() == (bias if gate.dim() == 1 else 0) for gate in gates)
        distances.append(float((models.logits(model, batch) - before).abs().max()))
    assert distances[1] < 0.05 * before.abs().max()
    assert distances[1] < distances[0] / 5


def test_the_dropout_of_the_attention_acts_in_training() -> None:
    base = tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model, batch = models.adapted("unipelt", model=base), models.batch()
    model.train()
    assert (models.logits(model, batch) - models.logits(model, batch)).abs().max() > 0


def test_a_half_precision_model_keeps_its_dtype_and_comes_close() -> None:
    batch = models.batch("llama")
    exact, model = (
        models.adapted("unipelt", "llama", model=tiny.llama().to(dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    keep = batch["attention_mask"].bool()
    out = models.logits(model, batch)
    assert out.dtype == torch.bfloat16
    difference = (out[keep].float() - models.logits(exact, batch)[keep]).abs().mean()
    assert difference < 0.1 * models.logits(exact, batch)[keep].abs().mean()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_four_dimensions_is_taken_as_it_is(kind: str) -> None:
    model, batch = models.adapted("unipelt", "llama"), tiny.text_batch((6, 6))
    expected = models.logits(model, {"input_ids": batch["input_ids"]})
    seen = torch.ones(2, 1, 6, 6, device=DEVICE).tril().bool()
    mask = seen if kind == "bool" else torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(models.logits(model, batch | {"attention_mask": mask}), expected)


@pytest.mark.parametrize("method", models.CONFIGS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_autocast_comes_close(method: str, family: str) -> None:
    model, batch = models.adapted(method, family), models.batch(family)
    keep = batch["attention_mask"].bool() if family == "llama" else slice(None)
    expected = models.logits(model, batch)[keep]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = models.logits(model, batch)[keep].float()
    assert (out - expected).abs().mean() < 0.1 * expected.abs().mean()
