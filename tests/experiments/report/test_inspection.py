"""Where masks went, from masks small enough to count by hand."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from fish_tuning import MaskError, apply_mask, save_delta, save_mask
from fish_tuning.cli import app
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.masks.mask_files import read_mask, short_names
from fish_tuning.experiments.masks.overlaps import overlap
from fish_tuning.experiments.records.kept import kept_shares
from fish_tuning.experiments.records.run_record import KeptShare
from fish_tuning.experiments.report.inspection import inspect_masks, kept_picture, layer_tables, percent
from fish_tuning.files.delta_file import Delta, DeltaTensor, write_delta

LAYER = "base_model.model.bert.encoder.layer"
HEAD = "base_model.model.classifier.modules_to_save.default"


def first(kept: int, *shape: int) -> Tensor:
    """A mask of that shape that keeps its first entries."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[:kept] = True
    return mask


def lora(*kept: int, total: int = 8) -> dict[str, Tensor]:
    """A and B of `query` in as many layers as pairs of numbers are given, and a head."""
    names = [f"{LAYER}.{n // 2}.attention.self.query.lora_{'AB'[n % 2]}.default.weight" for n in range(len(kept))]
    masks = {name: first(number, 2, total // 2) for name, number in zip(names, kept, strict=True)}
    return {**masks, f"{HEAD}.weight": first(6, 2, 3), f"{HEAD}.bias": first(2, 2)}


def saved(mask: dict[str, Tensor], folder: Path) -> str:
    folder.mkdir()
    save_mask(mask, folder / "fish_mask.safetensors")
    return str(folder)


def printed(*paths: str, width: int = 80, picture: str | None = None) -> str:
    output = io.StringIO()
    inspect_masks(Console(file=output, width=width), paths, picture)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def test_one_mask(tmp_path: Path) -> None:
    folder = saved(lora(1, 8, 0, 3), tmp_path / "run")
    expected = f"""\
{folder}/fish_mask.safetensors
masked tensors: 4 with 32 entries, 12 kept (37.5%); 1 kept whole, 1 not at all
dense tensors: 2 with 8 entries (head classifier 8)

                             share     of
module type   entries  kept   kept  total
-----------------------------------------
query.lora_A       16     1   6.2%   8.3%
query.lora_B       16    11  68.8%  91.7%

share of entries kept by layer, %
        query   query
layer  lora_A  lora_B
---------------------
0        12.5     100
1           0    37.5

LoRA: kept 1 of A (6.2%) and 11 of B (68.8%), 0.09 of A for each of B.
Layer 0 keeps the largest share of its entries, 56.2%, layer 1 the smallest,
18.8%.
"""
    assert printed(folder) == expected
    assert printed(f"{folder}/fish_mask.safetensors") == expected


def test_masks_beside_each_other(tmp_path: Path) -> None:
    one, two = saved(lora(4, 0), tmp_path / "one"), saved(lora(2, 6), tmp_path / "two")
    text = printed(one, two)
    assert text.startswith(f"1: {one}/fish_mask.safetensors\n")
    assert f"\n2: {two}/fish_mask.safetensors\n" in text
    assert "LoRA: kept 4 of A (50.0%) and 0 of B (0%).\n" in text
    assert text.endswith("""\
overlap of the kept entries
                                  by
       kept                   chance
         by   of the      by     per               by
masks  both  smaller  chance  tensor  Jaccard  chance
-----------------------------------------------------
1, 2      2    50.0%   50.0%   25.0%    0.200   0.200
By chance: of random masks of these sizes. Per tensor: of random masks that keep
as many entries in each tensor as these do; only what lies above that is
agreement on entries rather than on tensors.""")


def test_every_pair_is_compared(tmp_path: Path) -> None:
    paths = [saved(lora(kept, 8 - kept), tmp_path / str(kept)) for kept in (1, 2, 3)]
    rows = [line.split()[:3] for line in printed(*paths).splitlines() if line[:3] in ("1, ", "2, ")]
    assert rows == [["1,", "2", "7"], ["1,", "3", "6"], ["2,", "3", "7"]]


def test_chance_is_what_random_masks_have_in_common(tmp_path: Path) -> None:
    names = ("a.0.weight", "a.1.weight")

    def drawn(n: int) -> dict[str, Tensor]:
        return {
            name: torch.randperm(1000).reshape(10, 100) < kept for name, kept in zip(names, (100, 700), strict=True)
        }

    masks = [read_mask(saved(drawn(n), tmp_path / str(n))) for n in range(2)]
    found = overlap(*masks)
    assert (found.kept, found.total, found.left_out) == ((800, 800), 2000, 0)
    assert (found.by_chance, found.by_tensor) == (320, 500)
    assert found.both == sum(int((masks[0].tensors[name] & masks[1].tensors[name]).sum()) for name in names)
    assert found.both == pytest.approx(found.by_tensor, abs=40)


def test_only_tensors_that_both_have_are_compared(tmp_path: Path) -> None:
    one, two = lora(4, 4), lora(4, 2, 8, 1)
    found = overlap(read_mask(saved(one, tmp_path / "one")), read_mask(saved(two, tmp_path / "two")))
    assert (found.kept, found.both, found.total, found.left_out) == ((8, 6), 6, 16, 2)
    assert "note: 1, 2: 2 tensors that only one has are left out." in printed(
        str(tmp_path / "one"), str(tmp_path / "two")
    )


def test_outside_peft_wholly_kept_tensors_are_dense(tmp_path: Path) -> None:
    mask = {
        "h.0.fc.weight": first(1, 2, 4),
        "h.0.fc.bias": first(2, 2),
        "h.0.ln.weight": first(2, 2),
        "out.weight": first(3, 3),
    }
    text = printed(saved(mask, tmp_path / "run"))
    assert "masked tensors: 1 with 8 entries, 1 kept (12.5%); 0 kept whole, 0 not at all\n" in text
    assert "dense tensors: 3 with 7 entries (h.fc 2, h.ln 2, out 3)\n" in text
    assert "LoRA" not in text
    assert "Layer" not in text


def test_a_weight_and_its_bias_count_together(tmp_path: Path) -> None:
    name = f"{LAYER}.0.output.dense.adapter_up.default"
    mask = read_mask(saved({f"{name}.weight": first(1, 4, 2), f"{name}.bias": first(4, 4)}, tmp_path / "run"))
    assert kept_shares(mask.masked) == [KeptShare(0, "dense.adapter_up", 5, 12)]


def test_a_tensor_of_no_layer_stands_apart(tmp_path: Path) -> None:
    mask = read_mask(saved(lora(1, 2) | {f"{HEAD}.weight": first(5, 2, 3)}, tmp_path / "run"))
    assert kept_shares(mask.masked)[0] == KeptShare(None, "classifier.modules_to_save", 5, 6)
    assert mask.dense == {f"{HEAD}.bias"}


def test_equal_layers_are_called_equal(tmp_path: Path) -> None:
    text = printed(saved(lora(2, 2, 2, 2), tmp_path / "run"))
    assert text.endswith("Every layer keeps the same share of its entries, 25.0%.\n")


def shares(layers: int, modules: int) -> list[KeptShare]:
    return [KeptShare(n, f"projection_{m}.lora_A", n * m, 1000) for n in range(layers) for m in range(modules)]


def rendered(table_shares: list[KeptShare], width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(*layer_tables(table_shares, width))
    return output.getvalue().splitlines()


def test_few_module_types_stand_side_by_side() -> None:
    some = [KeptShare(n, f"{m}.lora_{f}", 1, 8) for n in range(12) for m in ("q", "k", "v", "up") for f in "AB"]
    lines = rendered(some, 80)
    assert sum(line.startswith("layer") for line in lines) == 1
    assert lines[-1].split() == ["11", *["12.5"] * 8]
    needed = max(map(len, lines))
    assert needed == 69
    assert [len(layer_tables(some, width)) for width in (needed, needed - 1)] == [1, 2]


@pytest.mark.parametrize(("width", "blocks"), [(80, 4), (40, 11)])
def test_many_module_types_stand_below_each_other(width: int, blocks: int) -> None:
    lines = rendered(shares(32, 14), width)
    heads = [line.split() for line in lines if line.startswith("layer")]
    assert len(heads) == blocks
    assert [n for _, *layers in heads for n in layers] == [str(n) for n in range(32)]
    assert lines[-1].split()[:: len(heads[-1]) - 1] == ["projection_9.lora_A", "27.9"]
    assert all(line.isascii() and len(line) <= width for line in lines)


def test_a_terminal_too_narrow_for_the_names_gets_a_layer_a_table() -> None:
    assert len(layer_tables(shares(5, 14), 10)) == 5


def test_a_module_that_a_layer_lacks_is_blank() -> None:
    some = [KeptShare(None, "head.lora_A", 1, 4), KeptShare(0, "q.lora_A", 0, 4), KeptShare(1, "q.lora_A", 4, 4)]
    assert [line.split() for line in rendered(some, 80)[-3:]] == [["-", "25.0"], ["0", "0"], ["1", "100"]]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "0"), (0, 9, "0"), (9, 9, "100"), (1, 8, "12.5"), (1, 10_000, "<0.1"), (9_999, 10_000, "100.0")],
)
def test_percent(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


def test_a_sparse_delta_is_read_as_the_mask_it_was_trained_with(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    mask = {"0.weight": torch.eye(3, 4, dtype=torch.bool), "1.weight": torch.zeros(2, 3, dtype=torch.bool)}
    apply_mask(model, mask)
    save_delta(model, tmp_path / "delta.safetensors")
    read = read_mask(str(tmp_path / "delta.safetensors"))
    assert read.tensors.keys() == {"0.weight", "0.bias"}
    assert torch.equal(read.tensors["0.weight"], mask["0.weight"])
    assert read.dense == {"0.bias"}
    text = printed(str(tmp_path / "delta.safetensors"))
    assert "masked tensors: 1 with 12 entries, 3 kept (25.0%)" in text
    assert "A delta leaves out tensors without a kept entry: shares are of those it has." in text


def adapter(folder: Path, heads: list[str] | None) -> str:
    folder.mkdir()
    tensors = {f"{LAYER}.0.query.lora_A.weight": torch.ones(2, 4), "base_model.model.classifier.bias": torch.ones(2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"modules_to_save": heads}))
    return str(folder)


@pytest.mark.parametrize(("heads", "head"), [(["classifier"], "head classifier"), (None, "model.classifier")])
def test_an_adapter_without_a_mask_is_dense(tmp_path: Path, heads: list[str] | None, head: str) -> None:
    folder = adapter(tmp_path / "adapter", heads)
    lines = printed(folder).splitlines()
    assert lines[1] == "masked tensors: none"
    assert lines[2].startswith("dense tensors: 2 with 10 entries (")
    assert f"{head} 2" in lines[2]
    assert "query.lora_A 8" in lines[2]
    assert lines[3] == "No fish_mask.safetensors lies beside it: nothing is masked."


def test_the_picture_has_a_panel_for_each_mask(tmp_path: Path) -> None:
    paths = [saved(lora(1, 8, 0, 3), tmp_path / "fish"), saved(lora(4, 4, 4, 4), tmp_path / "rand")]
    figure = kept_picture([read_mask(path) for path in paths]).figure
    fish, rand, *_ = (axes for axes in figure.axes if axes.images)
    assert [text.get_text() for text in figure.texts] == ["fish", "rand"]
    assert fish.images[0].get_array().tolist() == [[0.125, 0.0], [1.0, 0.375]]
    assert [label.get_text() for label in fish.get_yticklabels()] == ["query.lora_A", "query.lora_B"]
    assert [text.get_text() for text in rand.texts] == ["layer", *["50"] * 4]


def test_the_picture_is_written_and_named(tmp_path: Path) -> None:
    folder, picture = saved(lora(1, 2), tmp_path / "run"), tmp_path / "kept.png"
    assert "written:" not in printed(folder)
    assert printed(folder, picture=str(picture)).endswith(f"written: {picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_that_cannot_be(tmp_path: Path) -> None:
    folder, dense = saved(lora(1, 2), tmp_path / "run"), adapter(tmp_path / "dense", None)
    for path, picture, message in (
        (folder, "kept.pdf", "must end in .png"),
        (folder, str(tmp_path / "nowhere" / "kept.png"), "cannot write .*: No such file or directory"),
        (dense, str(tmp_path / "kept.png"), "no tensor is masked"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            printed(path, picture=picture)


def test_names_are_as_long_as_tells_them_apart() -> None:
    a, b = Path("/r/sst2/seed1/fish_mask.safetensors"), Path("/r/cola/seed1/fish_mask.safetensors")
    assert short_names([a]) == ["seed1"]
    assert short_names([a, b]) == ["sst2/seed1", "cola/seed1"]
    assert short_names([a, a]) == ["seed1", "seed1"]
    assert short_names([a, Path("/r/delta.safetensors")]) == ["seed1", "delta.safetensors"]


def _empty(folder: Path) -> list[str]:
    return [str(folder)]


def _weights(folder: Path) -> list[str]:
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    return [str(folder / "model.safetensors")]


def _text(folder: Path) -> list[str]:
    (folder / "notes.txt").write_text("nothing")
    return [str(folder / "notes.txt")]


def _no_tensors(folder: Path) -> list[str]:
    return [saved({}, folder / "none")]


def _of_a_run(folder: Path) -> list[str]:
    saved(lora(1, 2), folder / "run")
    return [str(folder)]


def _other_model(folder: Path) -> list[str]:
    return [saved(lora(1, 2), folder / "one"), saved({"other.weight": first(1, 4)}, folder / "two")]


def _other_rank(folder: Path) -> list[str]:
    return [saved(lora(1, 2), folder / "one"), saved(lora(1, 2, total=4), folder / "two")]


def _unmasked(folder: Path) -> list[str]:
    return [saved(lora(1, 2), folder / "one"), adapter(folder / "two", None)]


def _mistyped(folder: Path) -> list[str]:
    saved(lora(1, 2), folder / "lora-fish")
    return [str(folder / "lora-fihs")]


def _nothing_kept(folder: Path) -> list[str]:
    return [saved(lora(1, 2), folder / "one"), saved(lora(0, 0), folder / "two")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda folder: [str(folder / "gone")], "There is no file or folder at '{}/gone'."),
        (_mistyped, "There is no file or folder at '{}/lora-fihs'. Did you mean 'lora-fish'?"),
        (_empty, "The folder '{}' has neither fish_mask.safetensors nor adapter_model.safetensors."),
        (_of_a_run, "nor adapter_model.safetensors. Folders below have masks, e.g. '{}/run'."),
        (
            _weights,
            "'{}/model.safetensors' holds weights, but is neither a mask, a sparse delta nor a sparse adapter of "
            "fish-tuning.",
        ),
        (_text, "'{}/notes.txt' is not a readable safetensors file: "),
        (_no_tensors, "'{}/none/fish_mask.safetensors' holds no tensors."),
        (
            _other_model,
            "have no masked tensor in common, so there is nothing to compare: they are of other models or methods",
        ),
        (_other_rank, "have tensors of other shapes (first 2 x 4 against 2 x 2), so there is nothing to compare"),
        (_unmasked, "cannot be compared: no tensor is masked in the second."),
        (_nothing_kept, "'{}/two/fish_mask.safetensors' keeps no entry of the tensors in common."),
    ],
)
def test_wrong_use_is_exit_code_2(tmp_path: Path, arguments: Callable[[Path], list[str]], message: str) -> None:
    result = CliRunner().invoke(app, ["inspect", *arguments(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message.format(tmp_path) in result.stderr


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"\xff\xfe\x00"),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_config.json", b"[1]"),
        ("adapter_config.json", b'"classifier"'),
        ("adapter_config.json", b'{"modules_to_save": 1}'),
        ("adapter_config.json", b'{"modules_to_save": [[]]}'),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\xff" * 100),
        ("fish_mask.safetensors", b""),
        ("fish_mask.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
    ],
)
def test_a_damaged_adapter_folder_is_one_error_that_names_the_file(file: str, content: bytes, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", None)
    (tmp_path / "adapter" / file).write_bytes(content)
    with pytest.raises(MaskError, match=re.escape(str(tmp_path / "adapter" / file))):
        read_mask(folder)
    assert CliRunner().invoke(app, ["inspect", folder], catch_exceptions=False).exit_code == 2


def test_an_adapter_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    file = Path(adapter(tmp_path / "adapter", None)) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(MaskError, match=r"adapter_model\.safetensors' is not a readable safetensors file"):
            read_mask(str(file.parent))


def test_a_delta_of_tensors_larger_than_memory_is_told(tmp_path: Path) -> None:
    file = tmp_path / "delta.safetensors"
    tensor = DeltaTensor(torch.ones(1), torch.tensor([2**50]), torch.Size([2**60]), "float32:" + "0" * 64)
    write_delta(Delta({"a": tensor}), file)
    with pytest.raises(MaskError, match=r"1,152,921,504,606,846,976 entries, too many for .* bytes of memory"):
        read_mask(str(file))


def test_paths_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / ("x" * 300), "File name too long"), (tmp_path / "file" / "in a file", "no file")):
        (tmp_path / "file").touch()
        with pytest.raises(MaskError, match=reason):
            read_mask(str(path))


def test_the_command(tmp_path: Path) -> None:
    folder, picture = saved(lora(1, 2), tmp_path / "run"), tmp_path / "kept.png"
    result = CliRunner().invoke(app, ["inspect", folder, "--picture", str(picture)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "masked tensors: 2 with 16 entries, 3 kept (18.8%)" in result.stdout
    assert result.stdout.endswith(f"written: {picture}\n")
    assert picture.is_file()


def test_the_command_as_json(tmp_path: Path) -> None:
    folders = [saved(lora(1, 8, 0, 3), tmp_path / "a"), saved(lora(2, 4, 1, 3), tmp_path / "b")]
    done = CliRunner().invoke(app, ["inspect", *folders, "--json", "--picture", str(tmp_path / "kept.png")])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    first = found["masks"][0]
    assert (first["path"], first["entries"], first["kept_entries"]) == (f"{folders[0]}/fish_mask.safetensors", 32, 12)
    assert (first["masked_tensors"], first["dense_tensors"], first["dense_entries"]) == (4, 2, 8)
    assert first["kept"][0] == {"layer": 0, "module": "query.lora_A", "kept": 1, "total": 8}
    (pair,) = found["overlaps"]
    assert (pair["masks"], pair["kept"], pair["both"], pair["total"]) == ([1, 2], [12, 10], 8, 32)
    assert pair["by_chance"] == pytest.approx(12 * 10 / 32)
    assert pair["by_chance_per_tensor"] == pytest.approx((1 * 2 + 8 * 4 + 0 * 1 + 3 * 3) / 8)
    assert found["files"] == [str(tmp_path / "kept.png")]
    wrong = CliRunner().invoke(app, ["inspect", str(tmp_path / "no"), "--json"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_its_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import app\ntry: app(['inspect', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', [name for name in ('torch', 'numpy', 'matplotlib', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--picture" in done.stdout
    assert done.stdout.endswith("heavy: []\n")
