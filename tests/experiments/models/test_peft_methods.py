"""PEFT methods by name: what they get, what is refused, and that each runs with its masked arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from tiny import bert, llama_classifier, vit
from transformers import AutoModelForSequenceClassification, ModernBertConfig, ModernBertForSequenceClassification

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import PeftMethodConfig
from fish_tuning.experiments.models.peft_methods import check_method, method_names, peft_config, size_text
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]
PAPER = ("lora", "dora", "serial_adapter", "prefix_tuning", "ia3", "unipelt")


def test_the_papers_methods_and_pefts_are_known() -> None:
    assert set(PAPER) <= set(method_names())
    assert {"vera", "loha", "oft", "ln_tuning", "p_tuning"} <= set(method_names())
    assert {"adalora", "base"} <= set(method_names())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"method": "dorra"}, r"peft\.method='dorra' is not known\. Did you mean 'dora'\?"),
        ({"method": "poly"}, r"peft\.method='poly' cannot run here: it needs a task for each example"),
        ({"method": "ia3", "args": {"rank": 3}}, r"peft\.args\.rank: IA3Config has no 'rank'\."),
        ({"fish_args": {"lora_alfa": 3}}, r"peft\.fish_args\.lora_alfa: .*Did you mean 'lora_alpha'\?"),
    ],
)
def test_what_does_not_exist_is_told(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_method(PeftMethodConfig(**section))  # type: ignore[arg-type]


def test_lora_takes_its_section_and_pefts_arguments_change_it(experiment: MakeExperiment) -> None:
    config = experiment("peft.args={use_rslora: true}", "peft.fish_args={r: 6}", "lora.dropout=0.1")
    dense, pool = (
        peft_config(config, config.peft[0], bert(), Variant(small=dense)).to_dict() for dense in (True, False)
    )
    assert (dense["r"], dense["lora_alpha"], dense["use_rslora"], dense["lora_dropout"]) == (2, 4, True, 0.1)
    assert (pool["r"], pool["lora_alpha"]) == (6, 12)
    assert dense["target_modules"] == {"query", "key", "value"}
    assert peft_config(experiment("peft.method=dora"), PeftMethodConfig(method="dora"), bert(), Variant()).to_dict()[
        "use_dora"
    ]


@pytest.mark.parametrize("model", [bert, llama_classifier, vit])
def test_ia3_scales_keys_values_and_the_feed_forward_input(
    experiment: MakeExperiment, model: Callable[[], object]
) -> None:
    from peft import get_peft_model

    base = model()
    adapted = get_peft_model(base, peft_config(experiment(), PeftMethodConfig(method="ia3"), base, Variant()))  # type: ignore[arg-type]
    names = [name for name, _ in adapted.named_parameters() if "ia3_l" in name]
    assert len(names) == 2 * 3
    assert sum(parameter.numel() for name, parameter in adapted.named_parameters() if "ia3_l" in name) in (
        2 * (16 + 16 + 24),
        2 * (8 + 8 + 24),  # grouped keys and values
    )


def test_sizes_in_words(experiment: MakeExperiment) -> None:
    def text(method: str) -> str:
        return size_text(peft_config(experiment(), PeftMethodConfig(method=method), bert(), Variant()))

    assert [text(method) for method in ("lora", "serial_adapter", "prefix_tuning", "ia3")] == [
        "r 4", "bottleneck 4", "30 tokens", "-",
    ]  # fmt: skip


def test_prefixes_are_refused_where_a_model_cannot_take_them(experiment: MakeExperiment) -> None:
    section = PeftMethodConfig(method="prefix_tuning")
    modern = ModernBertForSequenceClassification(
        ModernBertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=24, pad_token_id=0)
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"cannot adapt ModernBert.*past keys and values"):
        peft_config(experiment(), section, modern, Variant())
    with pytest.raises(ConfigurationError, match="ViTForImageClassification reads images"):
        peft_config(experiment(), section, vit(), Variant())


@pytest.mark.parametrize("method", [*PAPER, "vera"])
def test_every_method_runs_with_its_masked_arms(
    experiment: MakeExperiment, bert_folder: Path, tmp_path: Path, method: str
) -> None:
    selections = ["", "-fish", "-fish-rand", "-fish-rev", "-fish-quota", "-fish-norm"]
    arms = [f"{method}{selection}" for selection in selections]
    config = experiment(
        f"peft.method={method}", f"fish_tuning.methods_to_run=[{', '.join(arms)}]", "fish_tuning.warmup_steps=2",
        "fish_tuning.prune_to_ratio_of_baseline=0.7",
    )  # fmt: skip
    plan = plan_experiment(config)
    records = {record.arm: record for record in run_experiment(config, plan)}
    assert {record.status for record in records.values()} == {"ok"}, [r.error for r in records.values()]
    budget = records[f"{method}-fish"].trainable_parameters
    assert budget == round(0.7 * (records[method].trainable_parameters or 0))
    assert {records[arm].trainable_parameters for arm in arms[1:]} == {budget}
    assert all(0 < sum(share.kept for share in records[arm].kept) < plan.arms[1].pool for arm in arms[1:])
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder)
    PeftModel.from_pretrained(base, tmp_path / "results" / "adapters" / f"{method}-fish-seed1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["peft.args.target_modules=[querry]"],
            r"Asked for were \['querry'\]; its linear layers are classifier, dense",
        ),
        (["peft.args.layers_to_transform=[9]"], "cannot adapt BertForSequenceClassification: No modules were targeted"),
        (["peft.args.r=0"], "`r` should be a positive integer value but the value passed is 0$"),
        (["peft.method=serial_adapter", "peft.args.bottleneck_size=0"], "bottleneck_size=0 must be a whole number"),
        (["peft.method=serial_adapter", "peft.args.target_modules=[foo]"], "has no module 'foo'; its linear layers"),
        (["peft.method=unipelt", "peft.args.layers_to_transform=[7]"], "has layers 0 to 1, not \\[7\\]"),
        (["peft.method=prefix_tuning", "peft.args.num_virtual_tokens=many"], "'many': must be a whole number from 1"),
    ],
)
def test_arguments_that_fit_no_model_are_told(experiment: MakeExperiment, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_experiment(experiment(*overrides))


def test_a_budget_that_is_the_whole_pool_is_noted(experiment: MakeExperiment) -> None:
    config = experiment("peft.method=ia3", "fish_tuning.prune_to_ratio_of_baseline=1.0")
    assert "ia3-fish-rev: the budget is the whole pool, so nothing is masked" in plan_experiment(config).notes[0]


def test_quotas_are_checked_before_anything_is_trained(experiment: MakeExperiment) -> None:
    arms = "fish_tuning.methods_to_run=[lora, lora-fish-quota]"
    with pytest.raises(ConfigurationError, match=r"fish_tuning\.quotas: 'lora_A' = 0\.9 .* have only 192"):
        plan_experiment(experiment(arms, "fish_tuning.quotas={lora_A: 0.9, lora_B: 0.1}", "lora.fish_rank=2",
                                   "fish_tuning.prune_to_ratio_of_baseline=1.0"))  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"fish_tuning\.quotas: 'prefix' matches none"):
        plan_experiment(experiment(arms, "fish_tuning.quotas={lora: 0.9, prefix: 0.1}"))
