"""The commands on saved adapters: `fish-tuning push`, `pull`, `predict`, `merge` and `export`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fish_tuning.cli.application import app, errors_told, quiet_libraries, tell

Folder = Annotated[
    str,
    typer.Argument(metavar="FOLDER", help="An adapter's folder, a checkpoint, a sparse adapter's file, or a hub name."),
]
BaseModel = Annotated[
    str | None, typer.Option(metavar="NAME", help="The base model, where the adapter names one that is not here.")
]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit of the hub's repository.")]


@contextmanager
def _notes_told() -> Iterator[None]:
    """Errors as everywhere; the library's warnings as notes, after the work."""
    quiet_libraries()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from fish_tuning.errors import FishTuningWarning

    with errors_told("Make room, or write elsewhere."), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FishTuningWarning)
        yield
        for warning in caught:
            tell(f"note: {warning.message}", err=True)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An adapter's folder, or a checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository on the hub: user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public, not private.")] = False,
    base_model: BaseModel = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch to commit to; made if new.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request, not a commit.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's message.")] = None,
) -> None:
    """Put an adapter onto the hub, as one commit.

    Its weights, mask, labels, tokenizer and card go together.
    The token is the one of `hf auth login`, or HF_TOKEN. Exit code: 0, 1 when the disk is full, 2 for wrong use or
    what the hub refuses.
    """
    with _notes_told():
        from fish_tuning.sharing.hub import push_adapter

        address = push_adapter(
            folder,
            repo_id,
            private=not public,
            base_model=base_model,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    tell(f"{'pull request' if create_pr else 'pushed'}: {address}")


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository on the hub: user/name.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    revision: Revision = None,
) -> None:
    """Bring an adapter from the hub, whole or not at all.

    Its mask is checked.
    Exit code: 0, 1 when the disk is full, 2 for wrong use, a damaged mask or what the hub refuses.
    """
    with _notes_told():
        from fish_tuning.sharing.hub import pull_adapter

        pull_adapter(repo_id, folder, revision=revision)
    tell(f"written: {folder}")


@app.command()
def predict(
    folder: Folder,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A csv, tsv, json, jsonl or txt file, a text, an image, or a folder of images."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="A .csv, .json or .jsonl file; else the terminal."),
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A column of texts; twice for pairs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a text is cut to; as in training where that is known.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model may write.")] = 256,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--no-chat-template", help="By default where there is one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output FILE where it is there already.")] = False,
    base_model: BaseModel = None,
    revision: Revision = None,
) -> None:
    """Predict with an adapter: labels, numbers, tags or texts.

    Exit code: 0, 1 when the disk is full, 2 when an input or the adapter cannot be used.
    """
    with _notes_told():
        from fish_tuning.sharing.predicting import predict as predictions
        from fish_tuning.sharing.rows import check_output, read_rows, write_rows, written

        if output is not None:
            check_output(output, source, force=force)
        options: dict[str, Any] = {"base_model": base_model, "revision": revision}
        rows = predictions(
            folder,
            read_rows(source),
            columns=tuple(text_column or ()),
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            chat_template=chat_template,
            **options,
        )
        if output is not None:
            write_rows(rows, output)
    tell(f"written: {output} ({len(rows):,} rows)" if output else written(rows, ".jsonl").rstrip("\n"))


@app.command()
def merge(
    folder: Folder,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="A new or empty folder.")],
    base_model: BaseModel = None,
    revision: Revision = None,
) -> None:
    """Write the base model with the adapter in its weights.

    Stock transformers loads it.
    Exit code: 0, 1 when the disk is full, 2 when the method or the base model cannot be merged.
    """
    with _notes_told():
        from fish_tuning.sharing.merging import merge_adapter

        merge_adapter(folder, output, base_model=base_model, revision=revision)
    tell(f"written: {output}")


@app.command()
def export(
    folder: Folder,
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    rank: Annotated[
        str,
        typer.Option(
            metavar="R",
            help="The highest rank of a layer, such as 4; or, with a point, the share of each layer's squared singular "
            "values to keep at the lowest rank that does, such as 0.99.",
        ),
    ],
    base_model: BaseModel = None,
    revision: Revision = None,
) -> None:
    """Write an adapter as an ordinary LoRA of a lower rank.

    Stock PEFT loads it; what that lost is told.
    Exit code: 0, 1 when the disk is full, 2 when the rank cannot be or the method is no LoRA's.
    """
    with _notes_told():
        from fish_tuning.sharing.exporting import export_adapter, lost_text, parse_rank, ranks_text

        done = export_adapter(folder, output, rank=parse_rank(rank), base_model=base_model, revision=revision)
    tell(f"written: {output} (a LoRA of {ranks_text(done)})")
    tell(f"lost: {lost_text(done)}")
    tell(f"bytes of weights: {done.bytes_before:,} before, {done.bytes_after:,} after")
    if done.bytes_after >= done.bytes_before:
        tell("note: it is not smaller than what it was made of.")
    if done.error:
        tell("note: what that costs on the task was not measured; predict with both and compare.")
