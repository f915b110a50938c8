"""Fisher masks in PEFT's SHiRA adapter: the right entries train, and stock PEFT loads what was saved."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import assert_only_selected_moved, bert, classification_batch, llama, tensors, vit
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, MaskError, calculate_fisher_information
from fish_tuning.sparse.shira import create_shira_config

BATCH = classification_batch()
QUERY = "bert.encoder.layer.{}.attention.self.query"


def random_scores(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters() if p.dim() == 2}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def top(scores: Tensor, k: int) -> Tensor:
    """The obvious way, for scores that do not tie."""
    return scores >= scores.flatten().sort(descending=True).values[k - 1]


def test_best_entries_of_each_layer_train() -> None:
    model = bert()
    scores, before = calculate_fisher_information(model, [BATCH], progress=False), tensors(bert())
    peft_model = get_peft_model(model, create_shira_config(model, scores, 2, ["query", "output.dense"]))
    layers = [name for name, module in bert().named_modules() if name.endswith(("query", "output.dense"))]
    k = {name: 2 * sum(before[f"{name}.weight"].shape) for name in layers}
    assert peft_model.get_nb_trainable_parameters()[0] == sum(k.values())
    train(peft_model)
    after = tensors(peft_model.merge_and_unload())
    mask = {f"{name}.weight": top(scores[f"{name}.weight"], k[name]) for name in layers}
    assert all(int(mask[f"{name}.weight"].sum()) == k[name] for name in layers)
    assert_only_selected_moved(before, after, mask)


@pytest.mark.slow
def test_stock_peft_loads_it_to_the_bit(tmp_path: Path, python_environment: dict[str, str]) -> None:
    model = bert()
    config = create_shira_config(model, random_scores(model), 2, ["query", "value"], task_type="SEQ_CLS")
    peft_model = get_peft_model(model, config)
    train(peft_model)
    peft_model.eval().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["mask_type"], saved["r"]) == ("SHIRA", "fisher", 2)
    code = (
        f"import sys, torch; from peft import PeftModel; from tiny import bert, classification_batch\n"
        f"model = PeftModel.from_pretrained(bert(), {str(tmp_path)!r}).eval()\n"
        "print([module for module in sys.modules if module.startswith('fish_tuning')])\n"
        f"torch.save(model(**classification_batch()).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=python_environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert "mask_type" not in done.stderr  # no warning that the mask function is missing
    here = peft_model.cpu()(**{key: value.cpu() for key, value in BATCH.items()}).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here)


def test_loaded_adapter_trains_on(tmp_path: Path) -> None:
    model = bert()
    peft_model = get_peft_model(model, create_shira_config(model, random_scores(model), 2, ["query"]))
    train(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    for one in (peft_model, loaded):
        train(one.eval())
    assert torch.equal(loaded(**BATCH).logits, peft_model(**BATCH).logits)
    loaded.save_pretrained(tmp_path / "again")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    indices = [name for name in one if "indices" in name]
    assert len(indices) == 2
    assert all(torch.equal(one[name], other[name]) for name in indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = bert().to(dtype)
    peft_model = get_peft_model(model, create_shira_config(model, random_scores(model), 1, ["query"]))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "shira" in name:
                parameter.normal_()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert().to(dtype), tmp_path).eval()
    assert torch.equal(loaded(**BATCH).logits, peft_model.eval()(**BATCH).logits)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_all_scored_linear_layers_but_the_head(targets: str | None) -> None:
    model = bert()
    config = create_shira_config(model, random_scores(model), 1, targets, task_type="SEQ_CLS")
    peft_model = get_peft_model(model, config)
    shira = {
        name.removeprefix("base_model.model.") for name, m in peft_model.named_modules() if hasattr(m, "shira_weight")
    }
    linear = {name for name, m in bert().named_modules() if isinstance(m, nn.Linear)}
    assert shira == linear - {"classifier"}


def test_modules_to_save_are_no_targets() -> None:
    model = vit()
    config = create_shira_config(model, random_scores(model), 1, modules_to_save=["classifier"])
    peft_model = get_peft_model(model, config)
    names = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {n for n in names if "classifier" in n} == {f"base_model.model.classifier.modules_to_save.default.{n}"
                                                       for n in ("weight", "bias")}  # fmt: skip
    assert sum("shira" in name for name in names) == 2 * 6


def test_regular_expression() -> None:
    model = llama()
    config = create_shira_config(model, random_scores(model), 1, r".*\.1\..*\.[qk]_proj")
    peft_model = get_peft_model(model, config)
    assert sum("shira" in name for name, p in peft_model.named_parameters() if p.requires_grad) == 2


def test_second_adapter_of_the_same_model() -> None:
    model = bert()
    scores = random_scores(model)
    config, other = create_shira_config(model, scores, 1, ["query"]), create_shira_config(model, scores, 2, ["query"])
    peft_model = get_peft_model(model, config)
    peft_model.add_adapter("other", other)
    layer = peft_model.get_submodule(f"base_model.model.{QUERY.format(0)}")
    first, second = (set(map(tuple, layer.shira_indices[name].T.tolist())) for name in ("default", "other"))
    assert (len(first), len(second)) == (32, 64)
    assert first < second


def test_ties_fall_by_the_seed() -> None:
    model = bert()
    scores = {name: torch.ones_like(tensor) for name, tensor in random_scores(model).items()}
    layer = model.get_submodule(QUERY.format(1))
    masks = [create_shira_config(model, scores, 1, ["query"], seed=s).mask_fn(layer, 1) for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert [int(mask.sum()) for mask in masks] == [32, 32, 32]


def test_config_keeps_no_model_alive() -> None:
    model = bert()
    config, dead = create_shira_config(model, random_scores(model), 1, ["query"]), weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert isinstance(config, ShiraConfig)


# Errors


def test_other_model_is_refused() -> None:
    model, other = bert(), bert()
    with pytest.raises(MaskError, match="belongs to another model"):
        get_peft_model(other, create_shira_config(model, random_scores(model), 1, ["query"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"r": 9},
            r"r=9 asks for r \* \(in \+ out\) = 288 entries of '.*query.weight', which has 256: r can be at most 8",
        ),
        ({"r": 0}, "r=0 must be a whole number"),
        ({"target_modules": ["querry"]}, r"target_modules=\['querry'\] matches no module.*14 Linear layers are 'bert"),
        ({"target_modules": ["LayerNorm"]}, "matches 'bert.*LayerNorm', a LayerNorm; SHiRA adapts torch.nn.Linear"),
        ({"target_modules": ["query", "key"]}, r"no scores of '.*layer.0.*key.weight'.*leave its layer out"),
        ({"fisher_scores": {"bert.pooler.dense.bias": torch.ones(16)}, "target_modules": None}, "None of the 1 scored"),
        (
            {"fisher_scores": {f"{QUERY.format(i)}.weight": torch.ones(2, 3) for i in (0, 1)}},
            r"have the shape \(2, 3\); the layer's weight has \(16, 16\)",
        ),
    ],
    ids=["rank", "no rank", "nothing", "no Linear", "not scored", "nothing scored", "shape"],
)
def test_configs_that_cannot_be(settings: dict[str, object], message: str) -> None:
    model = bert()
    scores = {name: tensor for name, tensor in random_scores(model).items() if "key" not in name}
    with pytest.raises(MaskError, match=message):
        create_shira_config(**{"model": model, "fisher_scores": scores, "r": 1, "target_modules": ["query"]} | settings)


def test_choice_among_zeros_is_told() -> None:
    model = bert()
    scores = random_scores(model)
    scores[f"{QUERY.format(0)}.weight"][2:] = 0
    create_shira_config(model, scores, 1, ["query"])
    scores[f"{QUERY.format(0)}.weight"][1:] = 0
    with pytest.warns(FishTuningWarning, match=r"In 1 of 2 layers, e.g. 'bert.encoder.layer.0.*at random"):
        create_shira_config(model, scores, 1, ["query"])
