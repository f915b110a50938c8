"""What cannot be scored is an error that names the tensor or the example, and the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    Batch,
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    llama,
    lora,
    rebatch,
    regression_batch,
    text_batch,
)
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

from fish_tuning import FisherError, calculate_fisher_information
from fish_tuning.scores.finite import check_finite

pytestmark = pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def scored(model: nn.Module, loader: Batch | list[Batch], **kwargs: Any) -> dict[str, Tensor]:
    batches = [loader] if isinstance(loader, dict) else loader
    return calculate_fisher_information(model, batches, progress=False, **kwargs)


# Models


class Scripted(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.jit.script(nn.Sequential(nn.Linear(5, 8), nn.Tanh())), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.body(x)))


def test_torchscript_is_refused_where_it_trains() -> None:
    model, batch = Scripted(), {"x": torch.randn(4, 5), "labels": torch.arange(4) % 3}
    for whole in (model, model.body):
        with pytest.raises(FisherError, match=r"'(body\.)?0\.weight' is a tensor of a TorchScript module"):
            scored(whole, batch)
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    assert scored(model, batch)["head.weight"].any()


# Outputs


def test_question_answering_by_a_loss_of_ones_own() -> None:
    model = BertForQuestionAnswering(BertConfig(vocab_size=40, **SMALL))
    positions = {"start_positions": torch.zeros(4, dtype=torch.long), "end_positions": torch.ones(4, dtype=torch.long)}
    batch = text_batch() | positions

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        start, end = (nn.functional.cross_entropy(logits, batch[key], reduction="none") for logits, key in (
            (outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions")))  # fmt: skip
        return (start + end) / 2

    scores, known = scored(model, batch, loss_fn=loss_fn), scored(model, batch)
    torch.testing.assert_close(scores["qa_outputs.weight"], known["qa_outputs.weight"])


class Squeezes(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self, outputs: int, dims: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.dims = nn.Linear(5, outputs), dims

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(x)
        wanted = None if labels is None else labels.view_as(logits) if logits.shape[1] == 1 else labels
        loss = nn.functional.mse_loss(logits, wanted) if wanted is not None and wanted.is_floating_point() else None
        return SimpleNamespace(logits=logits.squeeze(self.dims), loss=loss)


@pytest.mark.parametrize("options", [{}, {"method": "loop"}, {"fisher_type": "expected"}, {"fisher_type": "sampled"}])
def test_regressions_of_one_output_may_be_squeezed(options: dict[str, Any]) -> None:
    batch = {"x": torch.randn(4, 5), "labels": torch.randn(4)}
    expected = scored(Squeezes(1, ()), batch, **options)
    for dims in ((-1,), (0, 1)):  # the latter takes a single example's row away too
        for size in (4, 3, 1):
            assert_scores_close(scored(Squeezes(1, dims), rebatch(batch, size), **options), expected)


def test_classes_of_one_example_may_not() -> None:
    batch = {"x": torch.randn(4, 5), "labels": torch.arange(4) % 3}
    with pytest.raises(FisherError, match=r"The logits have shape \(3,\) for 1 example; they must be"):
        scored(Squeezes(3, (0,)), rebatch(batch, 1))


def test_contrastive_outputs_are_named() -> None:
    side = {**SMALL, "projection_dim": 8}
    text, vision = {**side, "vocab_size": 40, "eos_token_id": 2}, {**side, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    batch = text_batch((4, 4)) | {"pixel_values": torch.randn(2, 3, 8, 8)}
    with pytest.raises(FisherError, match=r"no logits \(outputs: logits_per_image, logits_per_text.*loss_fn"):
        scored(model, batch)


def test_pairs_without_labels_are_shown_the_way_out() -> None:
    with pytest.raises(FisherError, match=r"no 'labels' tensor \(found: input_ids, attention_mask\).*pass loss_fn=f"):
        scored(bert(num_labels=1), text_batch())


def test_outputs_without_names() -> None:
    model = bert()
    model.config.return_dict = False
    with pytest.raises(FisherError, match=r"returned a tuple of 2, not outputs by name.*return_dict = True.*loss_fn"):
        scored(model, classification_batch())


class Gives(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Linear(6, 3), outputs

    def forward(self, x: Tensor, **_: Tensor) -> Any:
        return self.outputs(self.layer(x))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda y: SimpleNamespace(logits=[y]), r"logits that are a list \(outputs: logits\)"),
        (lambda y: {"scores": y}, r"no logits \(outputs: scores\)"),
        (lambda y: y, r"no logits \(outputs: Tensor\)"),
        (lambda y: None, r"no logits \(outputs: NoneType\)"),
    ],
    ids=["list", "mapping", "tensor", "none"],
)
def test_logits_that_are_no_tensor(outputs: Any, message: str) -> None:
    with pytest.raises(FisherError, match=message):
        scored(Gives(outputs), {"x": torch.randn(4, 6), "labels": torch.arange(4) % 3})


def test_a_loss_without_gradient() -> None:
    model = Gives(lambda y: SimpleNamespace(logits=y.detach()))
    with pytest.raises(FisherError, match=r"depends on no trainable tensor \(there are 2, e\.g\. 'layer\.weight'\)"):
        scored(model, {"x": torch.randn(4, 6), "labels": torch.arange(4) % 3})


# Labels


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_class_that_the_model_does_not_have(label: int, method: str) -> None:
    batch = classification_batch()
    batch["labels"][2] = label
    with pytest.raises(FisherError, match=rf"example 2 has the label {label}; allowed are 0 to 2\."):
        scored(lora(bert()), rebatch(batch, 2), method=method)


def test_labels_that_are_drawn_need_no_range() -> None:
    batch = classification_batch()
    batch["labels"][:] = -1
    assert any(score.any() for score in scored(lora(bert()), batch, fisher_type="sampled").values())


@pytest.mark.parametrize("token", [40, -7])
def test_a_token_that_the_model_does_not_have(token: int) -> None:
    batch = causal_batch()
    batch["labels"][1, 4] = token
    with pytest.raises(FisherError, match=rf"example 1 has the label {token}; allowed are 0 to 39 and -100"):
        scored(lora(llama()), batch)


def test_labels_of_an_encoder_decoder_are_checked_before_its_forward_pass() -> None:
    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0)  # fmt: skip
    batch = text_batch() | {"labels": torch.randint(3, 40, (4, 6))}
    batch["labels"][3, 1] = 41
    with pytest.raises(FisherError, match="example 3 has the label 41; allowed are 0 to 39 and -100"):
        scored(BartForConditionalGeneration(config), batch)


@pytest.mark.parametrize("silent", [[2], [0, 1, 2, 3]], ids=["one", "all"])
def test_an_example_without_a_label_that_counts(silent: list[int]) -> None:
    batch = causal_batch()
    batch["labels"][silent] = -100
    with pytest.raises(FisherError, match=f"example {silent[0]} has no label that counts: all are -100"):
        scored(lora(llama()), rebatch(batch, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_small_whole_numbers_are_labels_too(dtype: torch.dtype) -> None:
    model, batch = lora(llama()), causal_batch(ignore_padding=False)
    same = scored(model, batch | {"labels": batch["labels"].to(dtype)})
    assert all(torch.equal(score, same[name]) for name, score in scored(model, batch).items())


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (bert(), text_batch() | {"labels": torch.ones(4, 3, dtype=torch.bool)}, "must be floats"),
        (bert(num_labels=2), text_batch() | {"labels": torch.ones(4, 3)}, r"shape \(1, 3\), are not one for each"),
        (llama(), text_batch() | {"labels": torch.ones(4, dtype=torch.long)}, r"labels \(1,\) of torch.int64 and logi"),
        (llama(), text_batch() | {"labels": torch.ones(4, 12, dtype=torch.long)}, r"labels \(1, 12\) of torch.int64"),
        (llama(), causal_batch() | {"labels": torch.ones(4, 9)}, r"labels \(1, 9\) of torch.float32"),
    ],
    ids=["bools", "too-many-values", "one-a-text", "wider-than-logits", "floats"],
)
def test_labels_that_do_not_fit_the_logits(model: nn.Module, batch: Batch, message: str) -> None:
    with pytest.raises(FisherError, match=message):
        scored(model, batch)


# Batches and arguments


def test_an_empty_batch_is_named() -> None:
    batch = classification_batch()
    empty = {key: value[:0] for key, value in batch.items()}
    with pytest.raises(FisherError, match=r"batch 1 .*holds no example"):
        scored(lora(bert()), [batch, empty])


@pytest.mark.parametrize(
    "arguments", [{"num_samples": 2.5}, {"num_samples": "3"}, {"seed": 2**70}, {"seed": 1.5}], ids=str
)
def test_numbers_that_are_none(arguments: dict[str, Any]) -> None:
    ((name, _),) = arguments.items()
    with pytest.raises(FisherError, match=rf"{name}=.* must be a whole number"):
        scored(lora(bert()), classification_batch(), **arguments)


# Tensors that are no numbers, or elsewhere


def test_a_part_of_a_tensor_is_named() -> None:
    """As tensor parallelism leaves one, which no engine gathers."""
    model: Any = lora(bert())
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.__class__ = type(
        "Part", (nn.Parameter,), {"full_tensor": nn.Parameter.detach}
    )  # by which DTensors are known
    with pytest.raises(FisherError, match=r"is sharded: this process holds a part.*save_mask.*FSDP2.*ZeRO-3"):
        scored(model, classification_batch())


def test_a_complex_tensor_is_named() -> None:
    model = Gives(lambda y: y)
    model.phases = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(FisherError, match=r"'phases' is torch\.complex64.*requires_grad_\(False\)"):
        scored(model, {"x": torch.randn(2, 6), "labels": torch.zeros(2)})
    model.phases.requires_grad_(False)
    scored(model, {"x": torch.randn(2, 6), "labels": torch.zeros(2)}, loss_fn=lambda outputs, batch: outputs.sum(-1))


def test_the_meta_device_is_named() -> None:
    with pytest.raises(FisherError, match=r"word_embeddings\.weight' is on the meta device.*Load the model's weights"):
        scored(lora(bert().to("meta")), classification_batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_a_weight_that_is_no_number_is_named(value: float, method: str) -> None:
    model = lora(bert())
    name = "base_model.model.bert.encoder.layer.1.output.dense.weight"
    model.get_parameter(name).data[0, 0] = value
    with pytest.raises(FisherError, match=rf"'{name}' holds NaN or infinite values"):
        scored(model, classification_batch(), method=method)


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_squares_beyond_fp32_name_their_tensor(method: str) -> None:
    model = Gives(lambda y: y)
    batch = {"x": torch.full((2, 6), 1e20), "labels": torch.zeros(2)}
    with pytest.raises(
        FisherError, match=r"scores of 'layer\.weight' are not finite: a squared gradient is beyond fp32"
    ):
        scored(model, batch, loss_fn=lambda outputs, batch: outputs.sum(-1), method=method)


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_a_gradient_that_is_nan_names_its_tensor(method: str) -> None:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - outputs.detach()).sum(-1).abs().sqrt()  # 0, with a slope of 0 * infinity

    with pytest.raises(FisherError, match=r"scores of 'layer\.weight' are not finite: a gradient is NaN"):
        scored(Gives(lambda y: y), {"x": torch.randn(2, 6), "labels": torch.zeros(2)}, loss_fn=loss_fn, method=method)


def test_scores_whose_sum_alone_is_too_large_are_fine() -> None:
    check_finite(nn.Linear(1, 1), {"weight": torch.full((4,), 2e38)})


def test_a_model_on_several_devices_names_tensors_on_each() -> None:
    class Elsewhere(Gives):
        def forward(self, x: Tensor, **_: Tensor) -> Any:
            raise RuntimeError("Expected all tensors to be on the same device, but got mat1 is on cuda:0")

    model = Elsewhere(None)
    model.register_buffer("far", torch.empty(2, device="meta"))
    model._hf_hook = None  # what makes tensors without values allowed
    with pytest.raises(FisherError, match=r"the batches go to cpu, but 'far' is on meta.*model\.to\(device\)"):
        scored(model, {"x": torch.randn(2, 6), "labels": torch.zeros(2)})


def test_other_errors_of_a_model_on_several_devices_are_raised_as_they_came() -> None:
    error = RuntimeError("device lost")

    class Fails(Gives):
        def forward(self, x: Tensor, **_: Tensor) -> Any:
            raise error

    model = Fails(None)
    with pytest.raises(RuntimeError) as raised:
        scored(model, {"x": torch.randn(2, 6), "labels": torch.zeros(2)})
    assert raised.value is error


def test_a_regression_label_that_is_nan_names_the_example() -> None:
    batch = regression_batch()
    batch["labels"][3] = float("nan")
    with pytest.raises(
        FisherError, match=r"example 3 is not finite.*tensors are finite; check the calibration examples"
    ):
        scored(lora(bert(num_labels=1)), rebatch(batch, 2))


def test_parameters_of_one_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(FisherError, match=r"'0.weight' is in one memory with '1.weight', as a parameter of its own"):
        calculate_fisher_information(
            model, [{"input": torch.ones(2, 4)}], loss_fn=lambda outputs, batch: outputs.sum(1)
        )
