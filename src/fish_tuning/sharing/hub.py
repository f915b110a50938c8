"""Adapters to the hub and back, with mask, labels, tokenizer and card."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from fish_tuning.errors import ConfigurationError, FishTuningWarning, MaskError, did_you_mean_beside
from fish_tuning.files.atomic import disk_full, recover_folder, whole_folder
from fish_tuning.files.delta_file import DELTA_FILE_NAME
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.sharing.card import CARD, is_hub_name, is_local, public_name, users_card, with_base_model
from fish_tuning.sharing.folder import ADAPTER_CONFIG, check_new, check_weights, read_adapter_config
from fish_tuning.sharing.reaching import TRANSPORT

# Of a Trainer's checkpoint: what serves to resume alone, and its arguments, a pickle that names folders of this place.
_OF_CHECKPOINTS = re.compile(
    r"optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin|\..*"
)

_NO_FOLDER = (
    "{!r} is a file, and no folder of an adapter. Of a sparse adapter's file write_adapter_folder(file, folder) makes "
    "one, and add_sparse_adapter(model, file) puts it onto its base model."
)
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may do this."


def push_adapter(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = True,
    base_model: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Put an adapter's folder onto the hub as one commit, its mask, labels, tokenizer and card with it.

    What a checkpoint holds for resuming alone (optimizer, random state, arguments) stays here, and so does the path of
    a local base model: its last part goes in its place, unless `base_model` gives its name. A card that a user has
    written in the repository is left as it is there.

    Args:
        folder: of an adapter, or a checkpoint with one.
        repo_id: the repository, `user/name`; made where there is none.
        private: whether a new repository is private; None leaves it to the account's default.
        base_model: the base model's name on the hub, where the adapter names a folder.
        token: as huggingface_hub takes it; the one of `hf auth login` or HF_TOKEN by default.
        revision: the branch to commit to; made where there is none.
        create_pr: whether to open a pull request in place of a commit.
        commit_message, commit_description: of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ConfigurationError: no adapter there, a name that cannot be one, or what the hub answered.
        MaskError: the mask in the folder is damaged.

    Warns:
        FishTuningWarning: the base model is a local folder, whose name says nothing to others.

    Example:
        >>> push_adapter("results/x/adapters/lora-fish-seed42", "me/my-adapter")  # doctest: +SKIP
    """
    folder = Path(folder)
    recover_folder(folder)
    _check(folder, repo_id)
    if base_model is not None and not is_hub_name(base_model):
        raise ConfigurationError(f"base_model={base_model!r} is no name of the hub, such as 'roberta-base' or 'a/b'.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent, _told(f"{repo_id!r} cannot be written", token):
        copy = Path(parent, "adapter")
        _copy(folder, copy, base_model)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if _has_users_card(repo_id, revision, token):
            (copy / CARD).unlink(missing_ok=True)
        # Not upload_folder, which may make several commits: an adapter is on the hub as a whole, or not at all.
        done = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(file.relative_to(copy).as_posix(), file)
                for file in sorted(copy.rglob("*"))
                if file.is_file()
            ],
            commit_message=commit_message or f"Upload the adapter {folder.name}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.pr_url if create_pr and done.pr_url else done.commit_url)


def push_model(model: Any, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> str:
    """What `push_to_hub` of a masked model does: save it, and push what was saved. The arguments are transformers'."""
    kwargs.pop("max_shard_size", None)  # of whole models
    if tags:
        base = model.get_base_model()
        base.model_tags = sorted({*(getattr(base, "model_tags", None) or ()), *tags})
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, repo_id.rpartition("/")[2] or "adapter")
        model.save_pretrained(str(folder))
        return push_adapter(folder, repo_id, **{"private": None, **kwargs})


def pull_adapter(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Bring an adapter from the hub into a new folder, whole or not at all, and check its mask.

    Args:
        repo_id: the repository, `user/name`.
        folder: where to; it must be empty or not there yet.
        revision: a branch, tag or commit.
        token: as huggingface_hub takes it.

    Returns:
        `folder`.

    Raises:
        ConfigurationError: the folder has something in it, the repository holds no adapter, or what the hub answered.
        MaskError: the mask is damaged.

    Warns:
        FishTuningWarning: the hub cannot be reached, and what its cache on this machine holds was taken.

    Example:
        >>> pull_adapter("me/my-adapter", "adapter")  # doctest: +SKIP
    """
    folder = Path(folder)
    check_new(folder)
    with _told(f"{repo_id!r} cannot be read from the hub", token):
        validate_repo_id(repo_id)
        unreachable = _why_unreachable(repo_id, revision, token)
        found = Path(snapshot_download(repo_id, revision=revision, token=token))
    with whole_folder(folder) as unfinished:
        if found.is_dir():  # of an empty repository there is none
            shutil.copytree(found, unfinished, dirs_exist_ok=True)
        _check_adapter(unfinished, shown=repo_id)
    if unreachable is not None:
        warnings.warn(
            f"The hub cannot be reached ({unreachable}): {str(folder)!r} is what this machine's cache had of "
            f"{repo_id!r}, which may be older.",
            FishTuningWarning,
            stacklevel=2,
        )
    return folder


def _why_unreachable(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """Why no connection can be made, where the cache would answer in silence; None where the hub answers."""
    if is_offline_mode():  # as the user wants it
        return None
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=10)
    except HfHubHTTPError:  # an answer: what the cache has of a repository that may not be read is none of ours
        raise
    except TRANSPORT as error:
        return textwrap.shorten(str(error), 200, placeholder=" …")
    return None


def fetched(folder: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder itself, or that of the hub's repository of this name in its cache."""
    recover_folder(folder)
    if Path(folder).is_dir():
        return Path(folder)
    name = os.fspath(folder)
    if Path(folder).is_file():
        raise ConfigurationError(_NO_FOLDER.format(name))
    if is_local(name) or not is_hub_name(name):
        raise ConfigurationError(f"There is no folder {name!r}.{did_you_mean_beside(name)}")
    return _snapshot(name, revision, token)


def _snapshot(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    with _told(f"{repo_id!r} is no folder here, and cannot be read from the hub", token, did_you_mean_beside(repo_id)):
        validate_repo_id(repo_id)
        return Path(snapshot_download(repo_id, revision=revision, token=token))


def _check(folder: Path, repo_id: str) -> None:
    if folder.is_file():
        raise ConfigurationError(_NO_FOLDER.format(str(folder)))
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder {str(folder)!r}.{did_you_mean_beside(folder)}")
    _check_adapter(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(f"{repo_id!r} can be no repository's name: {error}") from error


def _check_adapter(folder: Path, shown: str | None = None) -> None:
    """Refuse what is no whole adapter; `shown` is its name where the folder has one of our own."""
    if (folder / ADAPTER_CONFIG).is_file() or not (folder / DELTA_FILE_NAME).is_file():
        read_adapter_config(folder, shown)
        check_weights(folder, shown)
    if (folder / MASK_FILE_NAME).is_file():
        try:
            load_mask(folder)  # whose checksum tells whether it came whole
        except MaskError as error:
            if shown is None:
                raise
            raise MaskError(str(error).replace(str(folder), shown)) from error


def _copy(folder: Path, copy: Path, base_model: str | None) -> None:
    """What is to go, without what belongs to this machine."""
    try:
        shutil.copytree(
            folder, copy, ignore=lambda _, names: [name for name in names if _OF_CHECKPOINTS.fullmatch(name)]
        )
    except shutil.Error as error:
        file, _, reason = error.args[0][0]
        raise ConfigurationError(f"{str(file)!r} cannot be read: {reason}") from error
    for file in copy.rglob(ADAPTER_CONFIG):
        config = json.loads(file.read_bytes())
        base = config.get("base_model_name_or_path")
        if base_model is not None:
            if (card := file.with_name(CARD)).is_file():
                card.write_bytes(with_base_model(card.read_bytes(), base_model))
            config["base_model_name_or_path"] = base_model
        elif base and is_local(base):
            config["base_model_name_or_path"] = public_name(base)
            warnings.warn(
                f"The adapter's base model is a folder of this machine; its last part, {public_name(base)!r}, goes to "
                "the hub, where others cannot load it. Give base_model= the name of the model on the hub.",
                FishTuningWarning,
                stacklevel=4,
            )
        file.write_text(json.dumps(config, indent=2, sort_keys=True))
    for file in copy.rglob("tokenizer_config.json"):
        try:
            config = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{str(folder / file.relative_to(copy))!r} is not readable JSON: {error}"
            ) from error
        kept = {name: value for name, value in config.items() if name not in ("name_or_path", "_name_or_path")}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True))


def _has_users_card(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    try:
        there = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError):
        return False
    return users_card(Path(there)) is not None


@contextmanager
def _told(what: str, token: str | bool | None, hint: str = "") -> Iterator[None]:
    """The hub's errors as one of ours, which never tell the token."""
    try:
        yield
    except (TRANSPORT, HFValidationError, OSError, ValueError) as error:
        if disk_full(error):
            raise
        reason = _reason(error)
        if isinstance(token, str) and token:
            reason = reason.replace(token, "***")
        raise ConfigurationError(f"{what}: {reason}{hint}") from error


def _reason(error: BaseException) -> str:
    """What the hub answered; of frequent answers, in few words, with the way out."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; a branch, a tag or a commit is needed."
    if isinstance(error, GatedRepoError):
        return f"its owner must grant access first, on its page. {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it may not be read with the token at hand. {_LOG_IN}"
    if status == 401:
        return f"the hub wants a token, and none, or a wrong one, is at hand (401 Unauthorized). {_LOG_IN}"
    return textwrap.shorten(str(error), 400, placeholder=" …")
