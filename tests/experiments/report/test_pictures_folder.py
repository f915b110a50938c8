"""Pictures of a results folder, the user's own among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import scores
from matplotlib.figure import Figure

from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.pictures.canvas import Picture
from fish_tuning.experiments.report.pictures.folder import PICTURES, draw_pictures, register_picture


def test_a_picture_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PICTURES, "_members", dict(PICTURES))

    @register_picture("seeds")
    def seeds(arms: Sequence[str], runs: Sequence[RunRecord]) -> Picture | None:
        figure = Figure()
        figure.subplots().bar(arms, [sum(run.arm == arm for run in runs) for arm in arms])
        return Picture(figure, "seeds", "Seeds", "How many runs each arm has.") if runs else None

    written = draw_pictures(["lora"], scores("lora", [0.5, 0.6, 0.7]), tmp_path)
    assert written[tmp_path / "seeds.png"] == "Seeds. How many runs each arm has."
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")
    assert list(draw_pictures(["lora"], [], tmp_path)) == [tmp_path / "metric.png"]
