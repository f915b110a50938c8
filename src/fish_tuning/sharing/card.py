"""The model card of an adapter: what it is of, how it was made, how to use it. No dates and no local paths."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2504.04050"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The card's own digest: whoever changes a word of it has written it.
_MARK = re.compile(r"<!-- Written by fish-tuning \(([0-9a-f]{12})\);[^\n]*-->\n\n")
_RESULT = re.compile(r"^## Result\n\n(.*?)\n\n## Use$", re.DOTALL | re.MULTILINE)
_FOLDER_NOTE = " (a folder, not a model of the hub; put its own name in its place)"
# Rows of the card's table that the adapter's own files tell.
OF_THE_FILES = (
    "base model", "method", "r", "lora_alpha", "num_virtual_tokens", "bottleneck_size", "target_modules",
    "modules_to_save", "chosen entries", "trained entries", "versions",
)  # fmt: skip
_NO_LICENSE = "# license:  # the base model's card names none that is known here; set the adapter's own\n"

CITATION = """\
```bibtex
@article{xue2025fishtuning,
  title   = {FISH-Tuning: Enhancing PEFT Methods with Fisher Information},
  author  = {Xue, Kang and Dong, Ming and Tu, Xinhui and He, Tingting},
  journal = {arXiv preprint arXiv:2504.04050},
  year    = {2025}
}

@software{fish_tuning,
  title   = {fish-tuning: Fisher-scored sparse masks for PEFT adapters},
  author  = {{The fish-tuning authors}},
  version = {VERSION},
  license = {MIT}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells beside what the adapter's own files tell. All of it may be left out.

    Args:
        title: of the card; "FISH-Tuning adapter" by default.
        base_model, revision: as they were named when the model was loaded; by default what the model knows of itself.
        dataset: what was trained on, a hub's name or a folder, of which the card tells the last part.
        rows: more of how it was made, by what it is ("score": "fisher, on 128 examples"); in the card's table.
        metric, value: what was measured, and the number.
        result: a sentence on that number.
    """

    title: str = "FISH-Tuning adapter"
    base_model: str | None = None
    revision: str | None = None
    dataset: str | None = None
    rows: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    value: float | None = None
    result: str = ""


def joined(facts: CardFacts, asked: CardFacts) -> CardFacts:
    """Both, where they differ what was asked for."""
    return replace(asked, rows={**facts.rows, **asked.rows}, result=asked.result or facts.result)


@dataclass(frozen=True)
class Described:
    """What the adapter itself tells: the first rows of the card's table, how it is loaded, and what it is."""

    rows: Mapping[str, str]
    loading: str
    what: str = "An ordinary PEFT adapter"
    library_name: str = "peft"
    is_masked: bool = False
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()


def is_local(name: str) -> bool:
    """Whether the name is of a folder or file here, not of the hub."""
    return name.startswith((".", "~", "/")) or "\\" in name or Path(os.path.expanduser(name)).exists()


def public_name(name: str) -> str:
    """A name that tells nothing of this machine: a local folder's last part."""
    return Path(os.path.expanduser(name).replace("\\", "/")).resolve().name if is_local(name) else name


def is_hub_name(name: str) -> bool:
    return not is_local(name) and bool(_HUB_NAME.fullmatch(name))


def users_card(path: Path) -> bytes | None:
    """The card at `path` where a user wrote it, or changed ours; None where there is none, or a library's."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return None if _split(content) is not None or _is_nobodys(content) else content


def card_text(described: Described, facts: CardFacts) -> str:
    """The whole card, metadata first. The same facts always give the same text."""
    body = "\n\n".join(part for part in _parts(described, facts) if part) + "\n"
    return _marked(_metadata(described, facts), body)


def with_base_model(content: bytes, name: str) -> bytes:
    """Our card of an adapter whose base model was a folder, with that model's name on the hub; a user's as it is."""
    parts = _split(content)
    if parts is None or _FOLDER_NOTE not in parts[1]:
        return content
    metadata, body = parts
    body = re.sub(rf"`[^`]*`([^`|]*(?:`[^`]*`)?){re.escape(_FOLDER_NOTE)}", rf"`{name}`\1", body, count=1)
    return _marked(f"base_model: {name}\n{metadata}", body).encode()


class ReadCard(NamedTuple):
    """What one of our cards told of how the adapter was made, beside what its own files tell."""

    title: str
    rows: dict[str, str]
    result: str


def read_card(content: bytes) -> ReadCard | None:
    """What a card of ours tells; None for one that a user has written or changed."""
    parts = _split(content)
    if parts is None:
        return None
    body = parts[1]
    title = re.match(r"# ([^\n]*)", body)
    rows = dict(re.findall(r"^\| ([^|\n]+?) \| (.*) \|$", body, re.MULTILINE))
    result = _RESULT.search(body)
    return ReadCard(
        title[1] if title else "",
        {name: text.replace("\\|", "|") for name, text in rows.items() if name not in OF_THE_FILES},
        result[1] if result else "",
    )


def with_paragraph(content: bytes, paragraph: str) -> bytes:
    """Our card with this paragraph after its result, in place of the one that was there; a user's as it is."""
    parts = _split(content)
    if parts is None or not (found := _RESULT.search(parts[1])):
        return content
    metadata, body = parts
    own = found[1].partition("\n\n")[0]
    return _marked(metadata, f"{body[: found.start(1)]}{own}\n\n{paragraph}{body[found.end(1) :]}").encode()


def _marked(metadata: str, body: str) -> str:
    mark = hashlib.sha256((metadata + body).encode()).hexdigest()[:12]
    told = "once a word of it is changed, it is never written over."
    return f"---\n{metadata}---\n\n<!-- Written by fish-tuning ({mark}); {told} -->\n\n{body}"


def _split(content: bytes) -> tuple[str, str] | None:
    """Metadata and text of a card that is ours, word for word; else None."""
    text = content.decode(errors="replace").replace("\r\n", "\n")
    mark = _MARK.search(text)
    if mark is None:
        return None
    metadata, body = text[: mark.start()], text[mark.end() :]
    metadata = metadata.removeprefix("---\n").removesuffix("\n").removesuffix("---\n")
    ours = hashlib.sha256((metadata + body).encode()).hexdigest()[:12] == mark[1]
    return (metadata, body) if ours else None


def _is_nobodys(content: bytes) -> bool:
    """Whether a library wrote it by itself: PEFT's empty template, or what a Trainer of transformers' or trl's makes.

    Those Trainers write over whatever card lies in their output folder, so a user has no card of his own there.
    """
    text = content.decode(errors="replace")
    empty = "# Model Card for Model ID" in text and text.count("[More Information Needed]") > 20
    # PEFT, which adds to transformers' card, takes its tags away.
    transformers = "generated automatically according to the information the Trainer had access to" in text
    trl = "generated_from_trainer" in text and "It has been trained using [TRL](" in text
    return empty or transformers or trl


def _metadata(described: Described, facts: CardFacts) -> str:
    base = facts.base_model
    on_hub = base is not None and is_hub_name(base)
    license_: dict[str, Any] = _license(base, facts.revision) if base else {}
    results = None
    if facts.metric and facts.value is not None and facts.dataset:
        name = public_name(facts.dataset)
        results = [EvalResult(
            task_type=described.pipeline_tag or "other", dataset_type=name, dataset_name=name,
            metric_type=facts.metric, metric_value=round(facts.value, 6),
        )]  # fmt: skip
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[facts.dataset] if facts.dataset and is_hub_name(facts.dataset) else None,
        eval_results=results,
        model_name=facts.title if results else None,
        library_name=described.library_name,
        pipeline_tag=described.pipeline_tag,
        tags=[
            "fish-tuning",
            *([f"base_model:adapter:{base}"] if on_hub and described.library_name == "peft" else []),
            *described.tags,
        ],
        **license_,
    )
    text: str = data.to_yaml() + "\n"
    return text if license_ else text + _NO_LICENSE


def _license(base: str, revision: str | None) -> dict[str, str]:
    """The licence that the base model's card names, where that card is here; nothing is downloaded."""
    folder = Path(os.path.expanduser(base))
    found: Any = folder / CARD if folder.is_dir() else None
    if found is None and is_hub_name(base):
        found = try_to_load_from_cache(base, CARD, revision=revision)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return {}
    try:
        data = ModelCard.load(Path(found)).data
    except Exception:  # another's file, which need be no card; YAML's errors are of a package that is not ours
        return {}
    kept = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    texts = {name: value for name, value in kept.items() if isinstance(value, str)}
    return texts if "license" in texts else {}


def _parts(described: Described, facts: CardFacts) -> list[str]:
    from fish_tuning import __version__

    base = facts.base_model
    rows = dict(described.rows)
    if base:
        local = _FOLDER_NOTE if is_local(base) else ""
        at = f", revision `{facts.revision}`" if facts.revision else ""
        rows = {"base model": f"`{public_name(base)}`{at}{local}"} | rows
    if facts.dataset:
        rows["data set"] = f"`{public_name(facts.dataset)}`"
    rows |= facts.rows
    table = "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(text)} |" for name, text in rows.items())])
    return [
        f"# {_cell(facts.title)}",
        f"{described.what}, made with fish-tuning"
        + (f": only chosen entries of it were trained ([FISH-Tuning]({PAPER}))." if described.is_masked else "."),
        table,
        f"## Result\n\n{facts.result}" if facts.result else "",
        f"## Use\n\n{described.loading}",
        f"## Citation\n\n{CITATION.replace('VERSION', __version__)}",
    ]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
