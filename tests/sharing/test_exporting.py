"""Adapters as LoRAs of a lower rank: against a whole SVD, and as stock PEFT computes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from folders import write_bert
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import random_mask, vit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from fish_tuning import (
    ConfigurationError,
    MaskError,
    apply_mask,
    complete_adapter,
    export_adapter,
    load_adapter,
    save_sparse_adapter,
    start_from_seed,
)
from fish_tuning.adapters import SerialAdapterConfig
from fish_tuning.cli import app
from fish_tuning.sharing.exporting import ExportedAdapter
from fish_tuning.sharing.low_rank import distance, norm, truncated
from fish_tuning.sharing.predicting import predict
from fish_tuning.sparse.compact import Factors

IDS = torch.arange(5, 17).reshape(2, 6)
LINEAR = ["query", "value", "intermediate.dense"]


def saved(base: Any, config: Any, folder: Path, seed: int = 0) -> Any:
    """A complete adapter, each of whose trainable entries is random."""
    model = get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    complete_adapter(model, folder)
    return model


def bert_adapter(base_folder: Path, folder: Path, **config: Any) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    settings = {"task_type": "SEQ_CLS", "r": 6, "target_modules": LINEAR} | config
    return saved(base, LoraConfig(**settings), folder)


def stock(folder: Path, base_folder: Path) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    return PeftModel.from_pretrained(base, folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def deltas(model: Any) -> dict[str, Tensor]:
    """By PEFT's own formula, as whole matrices."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().flatten(1)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def nearest(delta: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


# The mathematics


@pytest.mark.parametrize("rank", [1, 3, 6, 100])
@pytest.mark.parametrize("shape", [(9, 7, 6), (5, 40, 6), (3, 4, 6)], ids=str)
def test_it_is_the_nearest_of_its_rank(shape: tuple[int, int, int], rank: int) -> None:
    rows, columns, r = shape
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator), 0.5, ("A", "B")
    )
    small = truncated(factors, rank)
    delta = 0.5 * factors.b.double() @ factors.a.double()
    found = 0.5 * small.b.double() @ small.a.double()
    torch.testing.assert_close(found, nearest(delta, rank), rtol=1e-5, atol=1e-6)
    assert small.rank == min(rank, *shape)
    assert (small.scaling, small.keys, small.a.dtype) == (0.5, ("A", "B"), torch.float32)
    assert norm(factors) == pytest.approx(float(delta.norm()), rel=1e-9)
    assert distance(factors, small) == pytest.approx(float((delta - found).norm()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_a_share_is_kept_at_the_lowest_rank_that_does(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = Factors(torch.randn(8, 20, generator=generator), torch.randn(30, 8, generator=generator), 1.0)
    values = torch.linalg.svdvals(factors.b.double() @ factors.a.double())[:8].square()
    rank = truncated(factors, share).rank
    assert values[:rank].sum() >= share * values.sum() * (1 - 1e-12)
    assert values[: rank - 1].sum() < share * values.sum()


def test_what_is_zero_or_said_twice_takes_no_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    b[:, 1], a[2] = 0, 0
    kept = truncated(Factors(a, b, 1.0), 4)
    assert torch.equal(kept.a, a[[0, 3]])  # as they were, to the bit
    assert torch.equal(kept.b, b[:, [0, 3]])
    twice = truncated(Factors(a[[0, 0, 3]], b[:, [0, 0, 3]], 1.0), 3)
    assert twice.rank == 2
    assert truncated(Factors(a * 0, b, 1.0), 3).rank == 0


# The folder


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"0.attention.self.query": 3}},
        {"alpha_pattern": {"value": 3}, "rank_pattern": {"value": 2}},
        {"target_modules": ["word_embeddings", "query"]},
        {"target_modules": r".*layer\.1\.attention\.self\.(query|key)"},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ],
    ids=str,
)
def test_each_layer_is_the_nearest_in_stock_peft(config: dict[str, Any], base_folder: Path, tmp_path: Path) -> None:
    model = bert_adapter(base_folder, tmp_path / "adapter", **config)
    done = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=2)
    before, after = deltas(model), deltas(stock(tmp_path / "small", base_folder))
    assert before.keys() == after.keys() == done.ranks.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], nearest(delta, 2), rtol=1e-4, atol=1e-6)
        assert done.errors[name] == pytest.approx(float((delta - after[name]).norm() / delta.norm()), abs=1e-6)
    lost = sum(float((delta - after[name]).square().sum()) for name, delta in before.items()) ** 0.5
    whole = sum(float(delta.square().sum()) for delta in before.values()) ** 0.5
    assert done.error == pytest.approx(lost / whole, abs=1e-6)
    assert done.errors[done.worst_layer] == max(done.errors.values())
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("adapter", "small")]
    assert [done.bytes_before, done.bytes_after] == sizes


@pytest.mark.parametrize("rank", [6, 100, 1.0])
def test_the_full_rank_computes_the_same(rank: float, base_folder: Path, tmp_path: Path) -> None:
    model = bert_adapter(base_folder, tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", tmp_path / "same", rank=rank)
    assert torch.equal(logits(stock(tmp_path / "same", base_folder)), logits(model))
    assert done.error == 0.0
    assert set(done.ranks.values()) == {6}


def test_a_share_gives_each_layer_its_own_rank(base_folder: Path, tmp_path: Path) -> None:
    model = bert_adapter(base_folder, tmp_path / "adapter", rank_pattern={"value": 2})
    done = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=0.9)
    for name, delta in deltas(model).items():
        values = torch.linalg.svdvals(delta).square()
        assert done.ranks[name] == int((values.cumsum(0) / values.sum() < 0.9).sum()) + 1
        assert done.errors[name] <= 0.1**0.5
    assert len(set(done.ranks.values())) > 1
    exported = stock(tmp_path / "small", base_folder)
    assert {
        name: module.r["default"] for name, module in exported.named_modules() if isinstance(module, LoraLayer)
    } == {f"base_model.model.{name}": rank for name, rank in done.ranks.items()}


def test_components_that_a_mask_left_at_zero_cost_nothing(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=6, target_modules=["query", "value"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layer.0" in name:
                parameter[:, :2] = torch.randn(len(parameter), 2)
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.save_pretrained(tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=6)
    assert set(done.ranks.values()) == {2}
    assert all("layer.0" in name for name in done.ranks)  # the others' change is zero
    assert done.error == 0.0
    torch.testing.assert_close(logits(stock(tmp_path / "small", base_folder)), logits(model), rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "small" / "fish_mask.safetensors").exists()


def test_the_folder_stands_alone(classifier: Any, adapter: Path, tmp_path: Path) -> None:
    export_adapter(adapter, tmp_path / "small", rank=2)
    model = load_adapter(tmp_path / "small")
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    for name in ("weight", "bias"):
        key = f"base_model.model.classifier.{name}"
        assert torch.equal(*(load_file(f / "adapter_model.safetensors")[key] for f in (adapter, tmp_path / "small")))
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["modules_to_save"][:1]) == ("SEQ_CLS", 2, ["classifier"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}  # all layers are alike
    assert len(config["modules_to_save"]) == len(set(config["modules_to_save"]))
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("good film").input_ids
    assert predict(tmp_path / "small", [{"text": "good film"}])[0]["prediction"] in ("bad", "fair", "good")
    card = (tmp_path / "small" / "README.md").read_text()
    for text in ("exported as a LoRA of rank 2 in 4 layers", "made of | the adapter `adapter` (LORA", "lost | "):
        assert text in card
    assert str(tmp_path) not in card


def test_the_card_hands_on_what_the_other_told(base_folder: Path, tmp_path: Path) -> None:
    from fish_tuning import CardFacts

    model = bert_adapter(base_folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    facts = CardFacts(title="Reviews", dataset="rotten_tomatoes", rows={"score": "a | b"}, result="accuracy 0.81.")
    complete_adapter(model, tmp_path / "adapter", facts=facts)
    export_adapter(tmp_path / "adapter", tmp_path / "small", rank=1)
    card = (tmp_path / "small" / "README.md").read_text()
    for text in (
        "# Reviews, exported as a LoRA", "| data set | `rotten_tomatoes` |", "| score | a \\| b |",
        "This adapter was not measured. The card of that one told:\n\n> accuracy 0.81.\n\n## Use",
    ):  # fmt: skip
        assert text in card
    assert card.count("| lora_alpha |") == 1
    (tmp_path / "adapter" / "README.md").write_text("# Mine\n")
    export_adapter(tmp_path / "adapter", tmp_path / "again", rank=1)
    assert "# FISH-Tuning adapter, exported" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_16_bits(dtype: torch.dtype, base_folder: Path, tmp_path: Path) -> None:
    bert_adapter(base_folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    before = deltas(stock(tmp_path / "adapter", base_folder))
    done = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=3)
    state = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    after = deltas(stock(tmp_path / "small", base_folder))
    for name, delta in before.items():  # the error is that of what was written
        assert done.errors[name] == pytest.approx(float((delta - after[name]).norm() / delta.norm()), rel=1e-4)
    assert export_adapter(tmp_path / "adapter", tmp_path / "same", rank=6).error == 0.0


# Other architectures and methods


def test_convolutions(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = saved(base, LoraConfig(r=5, target_modules=["projection", "q_proj", "query"]), tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=2)
    (convolution,) = [name for name in done.ranks if "projection" in name]
    small = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "small")
    for name, delta in deltas(model).items():
        torch.testing.assert_close(deltas(small)[name], nearest(delta, 2), rtol=1e-4, atol=1e-6)
    assert done.errors[convolution] > 0.01


def test_transposed_and_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    model = saved(base, config, tmp_path / "adapter")
    for rank, off in ((4, 1e-6), (2, 10.0)):
        export_adapter(tmp_path / "adapter", tmp_path / f"small{rank}", rank=rank)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        small = PeftModel.from_pretrained(base, tmp_path / f"small{rank}")
        for name, delta in deltas(model).items():
            torch.testing.assert_close(deltas(small)[name], nearest(delta, rank), rtol=1e-4, atol=1e-5)
        assert (logits(small) - logits(model)).abs().max() < off


METHODS = {
    "LoHaConfig": {"r": 2, "target_modules": ["query", "classifier"]},
    "LoKrConfig": {"r": 2, "target_modules": ["query"]},
    "VeraConfig": {"r": 4, "target_modules": ["query"]},
    "MissConfig": {"r": 4, "target_modules": ["query"]},
    "RandLoraConfig": {"r": 4, "target_modules": ["query"]},
    "AdaLoraConfig": {"init_r": 6, "target_r": 4, "total_step": 9, "target_modules": ["query", "value"]},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_become_ordinary_loras(method: str, base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    config = getattr(peft, method)(task_type="SEQ_CLS", **METHODS[method])
    model = saved(base, config, tmp_path / "adapter")
    same = export_adapter(tmp_path / "adapter", tmp_path / "same", rank=1000)
    assert same.error < 1e-6
    small = stock(tmp_path / "same", base_folder)
    assert small.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)
    lossy = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=1)
    for name, delta in deltas(small).items():
        found = deltas(stock(tmp_path / "small", base_folder))[name]
        torch.testing.assert_close(found, nearest(delta, 1), rtol=1e-3, atol=1e-5)
        assert lossy.errors[name] == pytest.approx(float((delta - found).norm() / delta.norm()), abs=1e-4)


def test_a_head_of_several_layers_goes_with_other_methods_too(tmp_path: Path) -> None:
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForSequenceClassification(RobertaConfig(**settings, intermediate_size=24, num_labels=3)).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = saved(base, peft.LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]), tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "same", rank=100)
    torch.testing.assert_close(logits(stock(tmp_path / "same", tmp_path / "base")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_starts_that_change_the_base_become_ordinary_loras(
    init: str, use_rslora: bool, base_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"r": 3, "init_lora_weights": init, "use_rslora": use_rslora}
    model = bert_adapter(base_folder, tmp_path / "adapter", **settings)
    whole = dict(AutoModelForSequenceClassification.from_pretrained(base_folder).named_parameters())
    change = {
        name: module.get_base_layer().weight + module.get_delta_weight("default") - whole[f"{name}.weight"]
        for name, module in (
            (name.removeprefix("base_model.model."), module)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        )
    }
    same = export_adapter(tmp_path / "adapter", tmp_path / "same", rank=6)
    assert (same.error, set(same.ranks.values())) == (0.0, {6})
    found = stock(tmp_path / "same", base_folder)
    assert found.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)
    lossy = export_adapter(tmp_path / "adapter", tmp_path / "small", rank=2)
    for name, delta in deltas(stock(tmp_path / "small", base_folder)).items():
        wanted = nearest(change[name].detach().double(), 2)
        torch.testing.assert_close(delta, wanted, rtol=1e-3, atol=1e-4)
    assert lossy.error > 0
    assert f"| start of that adapter | `{init}`, which PEFT made" in (tmp_path / "small" / "README.md").read_text()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: LoraConfig(use_dora=True, target_modules=["query"]), "DoRA's magnitudes .* fish-tuning merge"),
    "pissa, drawn": (
        lambda: LoraConfig(init_lora_weights="pissa_niter_2", target_modules=["query"]),
        "changes the base weights.*path_initial_model_for_weight_conversion=start.* fish-tuning merge",
    ),
    "bias": (lambda: LoraConfig(bias="lora_only", target_modules=["query"]), "trained biases"),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "PEFT converts no IA3 layer .* merge",
    ),
    "oft": (lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["query"]), "OFT cannot be exported"),
    "serial": (lambda: SerialAdapterConfig(bottleneck_size=2), "SERIAL_ADAPTER .* Keep the adapter as it is"),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING .* Keep the adapter as it is"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_is_refused_by_name(name: str, base_folder: Path, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    config = make()
    config.task_type = "SEQ_CLS"
    saved(AutoModelForSequenceClassification.from_pretrained(base_folder), config, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "small", rank=2)
    assert not (tmp_path / "small").exists()


# Attacks


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, float("nan"), True, "4", None])
def test_ranks_that_cannot_be(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"rank=.* cannot be: allowed are a whole number from 1"):
        export_adapter(tmp_path / "nowhere", tmp_path / "small", rank=rank)


def test_nothing_is_written_over(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    for output in (tmp_path / "small", adapter, adapter / "README.md"):
        with pytest.raises(ConfigurationError, match="is there already"):
            export_adapter(adapter, output, rank=2)
    assert (tmp_path / "small" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert isinstance(export_adapter(adapter, tmp_path / "empty", rank=2), ExportedAdapter)


def spoil(folder: Path, value: float) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name in state:
        if "lora_B" in name:
            state[name] = torch.full_like(state[name], value)
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: spoil(folder, float("nan")), "not finite in 'bert"),
        (lambda folder: spoil(folder, 0.0), "changes nothing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "has no weights: there is no adapter_model.safetensors",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "does not fit|cannot be"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable JSON"),
        (shutil.rmtree, "There is no folder"),
    ],
)
def test_damage_is_told_and_leaves_nothing(damage: Any, message: str, adapter: Path, tmp_path: Path) -> None:
    damage(adapter)
    with pytest.raises(ConfigurationError, match=message):
        export_adapter(adapter, tmp_path / "small", rank=2)
    assert [path.name for path in tmp_path.iterdir() if "small" in path.name] == []


def test_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = write_bert(tmp_path / "wide", hidden_size=32)
    with pytest.raises(ConfigurationError, match=r"not those that .* was made on|does not fit"):
        export_adapter(adapter, tmp_path / "small", rank=2, base_model=str(other))


def test_a_sparse_adapter_s_file(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))
    start_from_seed(model, seed=1)
    apply_mask(model, random_mask(model, dense=["classifier"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_sparse_adapter(model, tmp_path / "task.safetensors")
    done = export_adapter(tmp_path / "task.safetensors", tmp_path / "same", rank=4)
    assert done.error == 0.0
    assert done.bytes_before == (tmp_path / "task.safetensors").stat().st_size
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "same")), logits(model))
    with pytest.raises(MaskError):
        export_adapter(tmp_path / "same" / "adapter_model.safetensors", tmp_path / "no", rank=4)


def test_the_command_tells_what_was_lost(adapter: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "small"), "--rank", "2"])
    assert done.exit_code == 0, done.output
    for text in (
        "small (a LoRA of rank 2 in 4 layers)", "% of the change of the weights (relative Frobenius error",
        "most in bert.encoder.layer.", "bytes of weights: ", "note: what that costs on the task was not measured",
    ):  # fmt: skip
        assert text in done.stdout
    whole = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "same"), "--rank", "1.0"])
    assert "lost: nothing" in whole.stdout
    assert "not measured" not in whole.stdout
    assert "it is not smaller" in whole.stdout
    for rank in ("0", "auto", "-3", "1.5", "nan"):
        wrong = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "no"), "--rank", rank])
        assert (wrong.exit_code, "cannot be: allowed are" in wrong.stderr) == (2, True), wrong.output
    assert not (tmp_path / "no").exists()
