"""Where the benchmarks compute: one mechanism for all, which says so where a device is not there."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("bench_*.py"))
ABSENT = next(kind for kind in ("cuda", "mps", "xpu") if not torch.get_device_module(kind).is_available())


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_there_are_benchmarks() -> None:
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_device_that_is_not_there_is_one_message(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--device", ABSENT, "--dtype", "bfloat16"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("error:") == 1
    assert f"'{ABSENT}' is not on this machine" in told.err


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_what_is_no_device(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_fisher", "--device", name])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("bench_fisher").main()
    assert "is no device" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
def test_models_are_made_where_they_compute(shape: str) -> None:
    common: Any = importlib.import_module("common")
    place = common.Place(torch.device("cpu"), torch.bfloat16)
    model = common.with_lora(shape, place)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora" not in name and "modules_to" not in name} == {
        torch.bfloat16
    }
    assert torch.get_default_dtype() == torch.float32
    data = common.batches(2, place, shape, examples=4, tokens=8)
    assert [len(batch["labels"]) for batch in data] == [2, 2]
    common.plain_pass(model, data)
    assert all(p.grad is None for p in model.parameters())
    (parameter, *_) = common.base_model(shape, common.Place(torch.device("meta"))).parameters()
    assert parameter.is_meta


def test_ways_take_turns_and_the_first_rounds_do_not_count() -> None:
    common: Any = importlib.import_module("common")
    place, done = common.Place(torch.device("cpu")), []
    seconds = common.turns({"one": lambda: done.append(1), "two": lambda: done.append(2)}, place, rounds=3, warm_up=2)
    assert done == [1, 2] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"one": 3, "two": 3}
    assert common.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_gpu_is_waited_for_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    common: Any = importlib.import_module("common")
    done: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: done.append("waited"))
    common.Place(torch.device("cuda")).seconds(lambda: done.append("ran"))
    assert done == ["waited", "ran", "waited"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peaks_are_taken_one_by_one_on_a_cpu_and_together_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: Any = importlib.import_module("common")
    ways, together = ["plain", "masked", "loop"], 3 if device == "cuda" else 1
    all_there = threading.Barrier(together)
    asked: list[tuple[str, ...]] = []

    def peak(script: str, *args: str) -> int:
        all_there.wait(timeout=10)
        asked.append((script, *args))
        return ways.index(args[0])

    monkeypatch.setattr(common, "peak_of_own_process", peak)
    found = common.peaks_of_own_processes("script.py", ways, common.Place(torch.device(device)), "--shape", "tiny")
    assert found == {"plain": 0, "masked": 1, "loop": 2}
    place = ("--shape", "tiny", "--device", device, "--dtype", "float32")
    assert sorted(asked) == sorted(("script.py", way, *place) for way in ways)


@pytest.fixture
def architectures() -> Iterator[Any]:
    """The check of architectures; what it sets for its process is put back."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield importlib.import_module("check_architectures")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def checked(architectures: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    asked = ["check_architectures", "--tasks", "seq_cls", "image_cls", "--models", "bert", "vit", *arguments]
    monkeypatch.setattr(sys, "argv", asked)
    code: int = architectures.main()
    return code


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_are_checked(
    dtype: str, architectures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(architectures, monkeypatch, "--dtype", dtype) == 0
    told = capsys.readouterr().out
    assert "seq_cls BertForSequenceClassification: the same (69 tensors, 0 by the loop)" in told
    assert f"{dtype}: 2 the same" in told


@pytest.mark.slow
def test_adapters_of_architectures_are_checked(
    architectures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(architectures, monkeypatch, "--adapters", *architectures.ADAPTERS) == 0
    told = capsys.readouterr().out
    assert re.search(r"seq_cls BertForSequenceClassification: the same \(\d{3} tensors, 0 by the loop\)", told)
    assert "image_cls ViTForImageClassification: the same" in told  # which takes no prompts


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scores", "frozen entries", "losses", "an error"])
def test_an_architecture_that_is_not_the_same(
    what: str, architectures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, unmask = architectures.calculate_fisher_information, architectures.remove_mask

    def scored(*args: Any, **options: Any) -> dict[str, Any]:
        if what == "an error":
            raise RuntimeError("it fell over")
        scores: dict[str, Any] = score(*args, **options)
        if what == "scores" and options.get("method") != "loop":
            scores["classifier.weight" if "classifier.weight" in scores else next(iter(scores))] *= 1.01
        return scores

    def unmasked(model: Any) -> None:
        unmask(model)
        if what == "frozen entries":
            next(parameter for parameter in model.parameters() if parameter.requires_grad).data += 1

    class Losses(architectures.LossVectors):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            return [2 * loss if what == "losses" else loss for loss in super().__call__(*args)]

    monkeypatch.setattr(architectures, "LossVectors", Losses)
    monkeypatch.setattr(architectures, "calculate_fisher_information", scored)
    monkeypatch.setattr(architectures, "remove_mask", unmasked)
    assert checked(architectures, monkeypatch) == 1
    told = capsys.readouterr().out
    said = {
        "scores": "off by 1.0e-02", "frozen entries": "frozen entries of", "losses": "loss of example 0",
        "an error": "RuntimeError: it fell over",
    }  # fmt: skip
    assert said[what] in told


def test_what_is_too_large_is_not_built(
    architectures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("architectures"), "MOST_PARAMETERS", 10)
    assert checked(architectures, monkeypatch) == 0
    assert "float32: 2 not built" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1.2], ids=["as measured", "off"])
def test_plans_are_checked(
    factor: float, architectures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = importlib.import_module("check_plans")
    peak = plans.scoring_peak
    monkeypatch.setattr(plans, "scoring_peak", lambda *args, **options: more(peak(*args, **options), factor))
    monkeypatch.setattr(sys, "argv", ["check_plans", "--tasks", "seq_cls", "--models", "bert", "longformer"])
    assert plans.main() == (factor != 1)
    told = capsys.readouterr().out
    assert re.search(r"seq_cls BertForSequenceClassification: dense 1\.0.*masked 1\.0.*scores", told)
    assert re.search(r"LongformerForSequenceClassification: .*not traced: .*DataDependentOutputException", told)
    assert f"{3 - (factor != 1)} within a tenth" in told


def more(peak: Any, factor: float) -> Any:
    return peak._replace(peak=factor * peak.peak)
