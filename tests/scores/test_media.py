"""Images beside texts are no rows of the batch because they are as many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Batch, assert_scores_close
from torch import Tensor, nn
from transformers import LlavaConfig, PretrainedConfig

from fish_tuning import FisherError, calculate_fisher_information
from fish_tuning.scores.media import beside_texts, media_tokens, rows_by_data

IMAGE = 39
TOKENS = {"image": [IMAGE], "video": [38], "audio": []}


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 6, 4), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.patches(images).flatten(2).transpose(1, 2)
        return self.layer(patches.tanh()).tanh()  # type: ignore[no-any-return]


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(40, 6), nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden).tanh()  # type: ignore[no-any-return]


class Reader(nn.Module):
    """Its images are one token each; those that are blank are left out, as Idefics does."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig(image_token_id=IMAGE)
        self.vision, self.text, self.head = Vision(), Text(), nn.Linear(6, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.text.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> object:
        hidden = self.text.words(input_ids)
        images = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        images = images[images.flatten(1).any(1)]
        if len(images):
            hidden = hidden.masked_scatter((input_ids == IMAGE)[..., None], self.vision(images))
        return type("Output", (), {"logits": self.head(self.text(hidden).mean(1))})()


def batch_of(*images: int, in_rows: bool) -> Batch:
    generator = torch.Generator().manual_seed(len(images))
    ids = torch.randint(0, 30, (len(images), 6), generator=generator)
    pixels = torch.randn(len(images), 2, 3, 4, 4, generator=generator)
    for row, number in enumerate(images):
        ids[row, 1 : 1 + number] = IMAGE
        pixels[row, number:] = 0
    real = pixels.flatten(0, 1)
    pixels = pixels if in_rows else real[real.flatten(1).any(1)]
    return {"input_ids": ids, "pixel_values": pixels, "labels": torch.arange(len(images)) % 3}


def scores(batches: list[Batch], **options: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(Reader(), batches, warmup_steps=0, progress=False, **options)


def test_images_that_are_not_one_a_row_are_refused_by_name() -> None:
    told = "'pixel_values' has as many entries as the batch has rows, 4.* 1, 2, 0, 1 image tokens.*batch_size=1"
    with pytest.raises(FisherError, match=told):
        scores([batch_of(1, 1, 1, 1, in_rows=False), batch_of(1, 2, 0, 1, in_rows=False)])


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("images", [[(1, 1, 1, 1), (2, 0, 1, 1)], [(1, 2, 0, 1)]], ids=["later", "at once"])
def test_images_that_data_leave_out_are_no_examples(
    images: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    batches = [batch_of(*numbers, in_rows=True) for numbers in images]
    with caplog.at_level("INFO", "fish_tuning"):
        found = scores(batches)
    told = {record.args[0] for record in caplog.records if isinstance(record.args, tuple) and len(record.args) == 2}
    assert {name for name in told if "." in str(name)} == {name for name in found if name.startswith("vision.")}
    assert "5 tensors by rules" in caplog.text
    assert_scores_close(found, scores(batches, method="loop"))


@pytest.mark.parametrize("in_rows", [True, False])
def test_one_a_row_goes_by_rule(in_rows: bool, caplog: pytest.LogCaptureFixture) -> None:
    batches = [batch_of(*[1] * number, in_rows=in_rows) for number in (4, 3)]
    with caplog.at_level("INFO", "fish_tuning"):
        found = scores(batches)
    assert "by the loop" not in caplog.text
    assert_scores_close(found, scores(batches, method="loop"))


def test_images_of_several_sizes_have_unlike_numbers_of_tokens() -> None:
    ids = torch.tensor([[IMAGE, 1, 2, 3], [IMAGE, IMAGE, 1, 2]])
    for shape in ((2, 3, 4, 4), (2, 5, 3, 4, 4)):
        assert not rows_by_data({"input_ids": ids, "pixel_values": torch.randn(shape), "image_sizes": ids}, TOKENS)
    assert rows_by_data({"input_ids": ids, "pixel_values": torch.randn(2, 5, 3, 4, 4)}, TOKENS)
    assert not rows_by_data({"input_ids": ids, "pixel_values": torch.randn(2, 1, 3, 4, 4)}, TOKENS)


def test_each_kind_has_its_own_tokens() -> None:
    ids = torch.tensor([[IMAGE, 38, 38, 3], [IMAGE, 0, 1, 2]])
    assert not rows_by_data({"input_ids": ids, "pixel_values": torch.randn(2, 3, 4, 4)}, TOKENS)
    with pytest.raises(FisherError, match=r"'pixel_values_videos' .*2, 0 video tokens.*videos per row"):
        rows_by_data({"input_ids": ids, "pixel_values_videos": torch.randn(2, 8, 3, 4, 4)}, TOKENS)
    assert not rows_by_data({"input_ids": ids, "input_features": torch.randn(2, 3, 4)}, TOKENS), "has no tokens"


def test_what_the_configuration_says() -> None:
    config = LlavaConfig(image_token_id=7)
    model = nn.Linear(1, 1)
    assert media_tokens(model) == {"image": [], "video": [], "audio": []}
    model.config = config  # type: ignore[assignment]
    assert media_tokens(model)["image"] == [7]
    model.config = PretrainedConfig(vision_config=PretrainedConfig(image_token_id=9))  # type: ignore[assignment]
    assert media_tokens(model)["image"] == [9]


def test_what_may_see_images() -> None:
    model = Reader()
    found = beside_texts(model)
    assert set(model.vision.modules()) <= found
    assert found.isdisjoint({*model.text.modules(), model.head})
    assert beside_texts(model.vision) == set(model.vision.modules())
