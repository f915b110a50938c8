"""How long texts may be: what the tokenizer adds to each, and the positions that a model has."""

from __future__ import annotations

from typing import Any

from fish_tuning.errors import ConfigurationError

# Model types whose position embeddings start after the padding token's number.
NUMBERED_AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "xmod", "mpnet",
    "longformer", "esm", "ibert", "luke", "layoutlmv3",
)  # fmt: skip


def positions_of(model_config: Any) -> int | None:
    """How many tokens the model has positions for; None where it sets no bound."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # relative positions only
        return None
    if model_config.model_type in NUMBERED_AFTER_PADDING:
        positions -= (model_config.pad_token_id or 0) + 1
    return positions


def check_room(tokenizer: Any, key: str, length: int, columns: int) -> None:
    """Refuse a length that leaves no room for a text: tokenizers then cut nothing at all.

    Args:
        tokenizer: of the model.
        key: what the length is called, for the error.
        length: tokens that texts are cut to.
        columns: 2 for pairs of texts, else 1.
    """
    added = tokenizer.num_special_tokens_to_add(pair=columns == 2)
    if length <= added:
        raise ConfigurationError(
            f"{key}={length} leaves no room for {'texts' if columns == 2 else 'a text'} beside the {added} tokens that "
            f"the tokenizer adds; set it to {added + columns} or more."
        )
