"""The site: `make docs` builds it, with every warning as an error."""

from __future__ import annotations

import re
from pathlib import Path

from fish_tuning import __version__

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "fish-tuning"
author = "The fish-tuning authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "results/**/*.md"]

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block"]

default_role = "code"
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"fish-tuning {release}"
html_show_copyright = False
html_static_path = ["pictures"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# Files beside docs/ that are pages of the site. In docs/ lies a line that leads to them where there is no site.
_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def _read(app: object, name: str, source: list[str]) -> None:
    """Links are written for a reader of the repository; here they are made links between pages."""
    if name in _PAGES:
        source[0] = (ROOT / _PAGES[name]).read_text(encoding="utf-8").replace("](docs/", "](")
    if name == "index":  # patterns of pages that are not there
        lines = source[0].splitlines()
        source[0] = "\n".join(line for line in lines if not line.endswith("*") or list(HERE.glob(f"{line}.md")))
    # Markdown that is a result, and no page of the site
    source[0] = re.sub(r"\[([^\]]*)\]\((results/[^)]*\.md)\)", r"{download}`\1 <\2>`", source[0])
    for page, file in _PAGES.items():
        source[0] = source[0].replace(f"](../{file}", f"]({page}.md").replace(f"]({file}", f"]({page}.md")


def setup(app: object) -> None:
    app.connect("source-read", _read)  # type: ignore[attr-defined]
