"""Every PEFT method: scored, masked, trained and reloaded, or refused. `shelf.py` has them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file
from shelf import (
    CASES,
    DOCUMENT,
    HEAD,
    REFUSALS,
    Case,
    Method,
    Refusal,
    adapted,
    base_model,
    batch_for,
    case_row,
    document,
    peft_version,
    scored,
    supported,
)
from tiny import Batch, assert_only_selected_moved, assert_scores_close, random_mask, reference_fisher, tensors
from torch import Tensor, nn

from fish_tuning import (
    FisherError,
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
    remove_mask,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, on settings made for tiny models

WRITTEN = DOCUMENT.read_text(encoding="utf-8")
OF_THIS_PEFT = f"all that PEFT {peft_version()} has" in WRITTEN


def skip_unless_supported(method: Method) -> None:
    if not supported(method):
        pytest.skip("not in the installed PEFT")


def parameter_ids(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model.eval()(**batch).logits.detach()  # recorded as in training: some layers round otherwise without


def mask_a_third(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return create_mask_from_fisher(scores, 0.3, [HEAD] if any(HEAD in name for name in scores) else [])


def train(model: nn.Module, batch: Batch, steps: int = 3) -> None:
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapter_folder(case: Case, folder: Path) -> Path:
    return folder / "second" if case.first else folder


def shapes(folder: Path) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in load_file(folder / "adapter_model.safetensors").items()}


def check_scores(case: Case, model: nn.Module, batch: Batch, scores: dict[str, Tensor]) -> None:
    loop = calculate_fisher_information(model, [batch], method="loop", progress=False)
    assert_scores_close(scores, loop, tolerance=1e-4)  # sums of more than one batch
    assert_scores_close(loop, reference_fisher(model, batch))
    silent = {name for name, tensor in loop.items() if not tensor.any()}
    assert silent == {name for name in loop if re.search(case.silent, name)}


def check_training(model: nn.Module, batch: Batch, mask: dict[str, Tensor]) -> None:
    before, outputs = tensors(model), logits(model, batch)
    aliases = parameter_ids(model).keys() - dict(model.named_parameters()).keys()
    apply_mask(model, mask)
    assert count_trainable_parameters(model) == sum(int(selected.sum()) for selected in mask.values())
    assert torch.equal(logits(model, batch), outputs)
    train(model, batch)
    after = tensors(model)
    own = [{name: tensor for name, tensor in state.items() if name not in aliases} for state in (before, after)]
    assert_only_selected_moved(*own, mask)
    assert all((before[name] != after[name])[selected].all() for name, selected in mask.items())


def check_reload(case: Case, model: PeftModel, batch: Batch, unmasked: Path, unmasked_logits: Tensor) -> None:
    saved = adapter_folder(case, unmasked.with_name("masked"))
    model.save_pretrained(unmasked.with_name("masked"))
    assert shapes(saved) == shapes(adapter_folder(case, unmasked))
    expected, reloaded = logits(model, batch), logits(PeftModel.from_pretrained(base_model(case), saved), batch)
    if case.reload == "yes":
        assert torch.equal(reloaded, expected)
        return
    if case.reload == "to rounding":
        torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-4)
        return
    if OF_THIS_PEFT:
        stock = PeftModel.from_pretrained(base_model(case), adapter_folder(case, unmasked))
        assert not torch.allclose(logits(stock, batch), unmasked_logits), "PEFT reloads it now: say so on the shelf"


@pytest.mark.parametrize("name", CASES)
def test_method_is_scored_masked_trained_and_reloaded(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    skip_unless_supported(case)
    model, batch = adapted(case, tmp_path), batch_for(case)
    parameters, before = parameter_ids(model), logits(model, batch)
    scores, how = scored(model, batch)
    check_scores(case, model, batch, scores)
    assert parameter_ids(model) == parameters
    assert torch.equal(logits(model, batch), before)
    model.save_pretrained(tmp_path / "unmasked")
    check_training(model, batch, mask_a_third(scores))
    check_reload(case, model, batch, tmp_path / "unmasked", before)
    trained = logits(model, batch)
    remove_mask(model)
    assert torch.equal(logits(model, batch), trained)
    if OF_THIS_PEFT:
        assert case_row(name, how) in WRITTEN.splitlines(), "run `python tests/helpers/shelf.py`"


def mask_at_random(refusal: Refusal, folder: Path) -> None:
    model = adapted(refusal, folder)
    apply_mask(model, random_mask(model))


@pytest.mark.parametrize("name", REFUSALS)
def test_method_is_refused(name: str, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    skip_unless_supported(refusal)
    with pytest.raises(refusal.error, match=refusal.message):
        mask_at_random(refusal, tmp_path)


def test_lily_is_not_scored_either(tmp_path: Path) -> None:
    lily = REFUSALS["Lily"]
    skip_unless_supported(lily)
    with pytest.raises(FisherError, match=lily.message):
        scored(adapted(lily, tmp_path), batch_for(lily))


def test_every_method_of_the_installed_peft_is_on_the_shelf() -> None:
    known = {method.peft_type for method in (*CASES.values(), *REFUSALS.values())}
    assert set(PeftType.__members__) <= known, "new in PEFT: add it to tests/shelf.py"


@pytest.mark.skipif(not OF_THIS_PEFT, reason="written with another PEFT")
def test_document_is_what_the_shelf_writes() -> None:
    """But for how each case was scored, which the test of the case compares."""
    rows = [line.split(" | ") for line in WRITTEN.splitlines()]
    hows = {cells[0].removeprefix("| "): cells[3] for cells in rows if len(cells) > 3}
    assert document({name: hows.get(name, "missing") for name, case in CASES.items() if supported(case)}) == WRITTEN, (
        "run `python tests/helpers/shelf.py`"
    )
