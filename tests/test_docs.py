"""The documentation: its code runs, its links lead somewhere, and what it must name it names."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from folders import write_bert, write_sentences
from house import MODULES
from pages import DOCS, PAGES, README, ROOT, anchors, blocks, links

import fish_tuning
import fish_tuning.adapters
from fish_tuning.experiments.config.loading import load_experiments
from fish_tuning.experiments.config.task_kinds import TASKS
from fish_tuning.experiments.report.pictures.folder import PICTURES
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.peft_methods import PEFT_METHODS
from fish_tuning.scores import layer_rules
from fish_tuning.scores.named import SCORES

# Pages whose code is run by a test of their own.
ELSEWHERE = {
    "recipes.md": "tests/test_recipes.py",
    "many-devices.md": "tests/sparse/test_sharded_by_hand.py",
    "sharing.md": "tests/sharing/test_page_on_sharing.py",
}
WITH_CODE = [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]

# Local folders under the names that pages take from the hub.
STAND_INS = {
    "bert-base-cased": write_bert,
    "roberta-base": write_bert,
    "rotten_tomatoes": write_sentences,
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; what a page registers is forgotten afterwards."""
    for registry in (SCORES, SELECTIONS, TASKS, PICTURES, PEFT_METHODS):
        monkeypatch.setattr(registry, "_members", dict(registry))
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_runs_as_printed(page: Path, desk: Path) -> None:
    """The blocks of a page are one script, from top to bottom."""
    code = blocks(page, "python")
    for name, write in STAND_INS.items():
        if any(f'"{name}"' in block.code or name in block.code for block in code):
            write(desk / name)
    script = "\n".join(block.code for block in code if block.not_run is None)
    exec(compile(script, str(page), "exec"), {"__name__": "__main__"})


def test_what_is_not_run_says_why() -> None:
    left_out = [block for page in PAGES for block in blocks(page, "python") if block.not_run is not None]
    assert all(len(block.not_run or "") > 10 for block in left_out)
    assert len(left_out) <= 2, "as few as possible"
    assert [test for page, test in ELSEWHERE.items() if (DOCS / page).is_file() and not (ROOT / test).is_file()] == []


def test_experiments_on_pages_are_accepted(desk: Path) -> None:
    files = [block.code for page in PAGES for block in blocks(page, "yaml")]
    whole = [file for file in files if {"model", "dataset"} <= (yaml.safe_load(file) or {}).keys()]
    assert len(whole) >= 3
    for number, file in enumerate(whole):
        path = desk / f"page-{number}.yaml"
        path.write_text(file)
        assert load_experiments(path)


def test_links_lead_somewhere() -> None:
    dead = []
    for page in PAGES:
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                dead.append(f"{page.name}: {link}")
    assert dead == []


def test_every_page_is_in_the_index() -> None:
    """The site's build fails too; this needs no Sphinx."""
    listed = [
        line
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.S | re.M)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    names = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert [name for name in sorted(names) if not any(fnmatch(name, pattern) for pattern in listed)] == []
    assert [pattern for pattern in listed if not pattern.endswith("*") and pattern not in names] == []


def test_every_public_name_is_on_the_api_page() -> None:
    listed: set[str] = set()
    module = ""
    for line in (DOCS / "api.md").read_text().splitlines():
        if found := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.fullmatch(r"\.\. auto\w+:: (\w+)", line):
            listed.add(f"{module}.{found[1]}")
    assert listed == {f"{at.__name__}.{name}" for at in (fish_tuning, fish_tuning.adapters) for name in at.__all__}


def _texts() -> str:
    """All texts of the package's code; what is filled in is `…`."""
    found = []
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_troubleshooting_explains_exist() -> None:
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.M)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) >= 10
    texts = _texts()
    parts = {message: [part.strip() for part in message.split("…") if part.strip()] for message in messages}
    assert {message for message, needed in parts.items() if not all(part in texts for part in needed)} == set()


def test_pictures_are_what_their_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_docs_pictures", ROOT / "scripts" / "draw_docs_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = {f"{name}.svg": draw() for name, draw in script.PICTURES.items()}
    assert {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()} == drawn


def test_the_yaml_of_the_readme_is_the_shipped_experiment() -> None:
    shipped = ROOT / "configs" / "experiments" / "my_experiment.yaml"
    lines = [line for line in shipped.read_text().splitlines() if not line.startswith("#")]
    assert [block.code for block in blocks(README, "yaml")] == ["\n".join(lines) + "\n"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path, python_environment: dict[str, str]) -> None:
    for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(module, reason="needs the extra docs: pip install 'fish-tuning[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "site")],
        capture_output=True, text=True, env=python_environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "create_mask_from_fisher" in (tmp_path / "site" / "api.html").read_text()
