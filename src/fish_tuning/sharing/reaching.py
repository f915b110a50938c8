"""Whether the hub can be reached, found out before libraries ask for one file after another and wait for each."""

from __future__ import annotations

import time

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError

from fish_tuning.errors import ConfigurationError
from fish_tuning.sharing.card import is_hub_name

# The errors of the HTTP library that this version of huggingface_hub speaks with, whichever it is.
TRANSPORT: type[BaseException] = HfHubHTTPError.__bases__[0]
_OF_MODELS = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WAITS = (0, 1, 2)  # seconds before each try: a network may fail for a moment
_LONGEST = 10  # seconds after which no further try is made: a firewall that answers nothing takes that long for one


def hub_arguments(
    name: str, *, revision: str | None = None, token: str | bool | None = None, asked: str, way_out: str
) -> dict[str, bool]:
    """What `from_pretrained(name, ...)` is to be given beside its arguments, by what can be reached.

    Nothing for a folder, in offline mode, and where the hub answers, whatever it answers: that the libraries tell, and
    their retries stay. Where no connection can be made, `local_files_only` for a model that is in the hub's cache. For
    another the libraries would try each of its files six times, over half a minute, with two lines for each try.

    Args:
        name: the model's, of the hub or a folder.
        revision: a branch, tag or commit.
        token: as huggingface_hub takes it.
        asked: what the message begins with, up to the name.
        way_out: a sentence that says how a local folder is given.

    Raises:
        ConfigurationError: the model is not in the cache, and the hub cannot be reached.
    """
    if is_offline_mode() or not is_hub_name(name):
        return {}
    reason = _why_unreachable(name, revision, token)
    if reason is None:
        return {}
    if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _OF_MODELS):
        return {"local_files_only": True}
    raise ConfigurationError(
        f"{asked}{name!r} is no folder here and not in the cache ({constants.HF_HUB_CACHE}), and the hub "
        f"({constants.ENDPOINT}) cannot be reached: {reason}. {way_out} HF_HUB_OFFLINE=1 uses what is cached, and "
        "HF_HOME says where."
    )


def _why_unreachable(name: str, revision: str | None, token: str | bool | None) -> str | None:
    """Why no try has come through to the hub; None where one has."""
    reason, began = None, time.monotonic()
    for wait in _WAITS:
        if time.monotonic() - began > _LONGEST:
            break
        time.sleep(wait)
        try:
            get_hf_file_metadata(hf_hub_url(name, _OF_MODELS[0], revision=revision), token=token)
        except HfHubHTTPError:  # an answer, if a bad one
            return None
        except TRANSPORT as error:
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        except (OSError, ValueError):  # of the name, or of what came back: the libraries tell it
            return None
        else:
            return None
    return reason
