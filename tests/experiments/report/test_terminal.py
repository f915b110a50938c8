"""Nothing that is printed acts on the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from typer.testing import CliRunner

from fish_tuning import save_mask
from fish_tuning.cli import app
from fish_tuning.experiments.report.tables import plain_table
from fish_tuning.experiments.report.terminal import PlainConsole

CLEAR = "\x1b[2J"


def test_escape_codes_are_shown_and_not_obeyed() -> None:
    console = PlainConsole(file=io.StringIO(), width=80)
    console.print(f"a{CLEAR}b")
    console.print(plain_table([f"h{CLEAR}"], [[f"c{CLEAR}"]], title=f"t{CLEAR}"))
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert "\x1b" not in told
    assert told.count(r"\x1b[2J") == 4


def test_names_in_a_mask_do_not_act(tmp_path: Path) -> None:
    save_mask({f"layer.0.{CLEAR}query.lora_A.weight": torch.tensor([True, False])}, tmp_path / "mask.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "mask.safetensors")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "\x1b" not in result.output


def test_a_wrong_name_is_told_without_its_codes() -> None:
    result = CliRunner().invoke(app, ["inspect", f"no{CLEAR}file"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "\x1b" not in result.output
