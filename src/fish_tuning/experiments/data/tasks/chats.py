"""From a prompt and its completion to tokens, with a tokenizer's chat template or without."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

# Kept in the encoded rows where answers are generated: what to generate from, and what to compare with.
PROMPT, REFERENCE = "prompt_ids", "reference"

Message = Mapping[str, Any]


class ChatTemplateError(Exception):
    """A conversation that the template cannot write, or that has nothing to learn."""


class Chat(NamedTuple):
    """The messages that are given, and the one that is learned."""

    prompt: list[Message]
    completion: list[Message]


class Tokens(NamedTuple):
    """What a model reads, and what it is to write after it."""

    prompt: list[int]
    completion: list[int]


def plain_tokens(prompt: str, completion: str, tokenizer: Any) -> Tokens:
    """The two texts one after the other, each cut into tokens by itself, and the end token.

    Cut by itself, a prompt has the tokens that it will have when the answer is generated. A tokenizer that starts its
    texts with a token of its own starts the prompt with it.
    """
    given = tokenizer(prompt)["input_ids"] if prompt else []
    if given and given[-1] == tokenizer.eos_token_id:
        given = given[:-1]  # of a tokenizer that ends every text
    learned = tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
    ended = learned[-1:] == [tokenizer.eos_token_id]
    return Tokens(given, learned if ended or tokenizer.eos_token_id is None else [*learned, tokenizer.eos_token_id])


def template_tokens(chat: Chat, tokenizer: Any) -> Tokens:
    """The conversation as the chat template writes it.

    The completion begins where the whole conversation's tokens leave those of the prompt.
    """
    if not chat.completion or chat.completion[0].get("role") != "assistant":
        raise ChatTemplateError("the last message of a conversation must be the assistant's, which is what is learned.")
    try:
        prompt = _written(tokenizer, chat.prompt, add_generation_prompt=True)
        whole = _written(tokenizer, [*chat.prompt, *chat.completion])
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ChatTemplateError(f"the model's chat template refuses a conversation: {error}") from error
    shared = next(
        (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    if shared < len(prompt):
        _warn_once(tokenizer.decode(prompt[shared:]))
    return Tokens(whole[:shared], whole[shared:])


@functools.cache  # each ending once, not for every row
def _warn_once(ending: str) -> None:
    logger.warning(
        "The chat template writes a prompt otherwise when its answer follows: what is generated from ends with %r, "
        "what is trained on does not.",
        ending,
    )


def _written(tokenizer: Any, messages: list[Message], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


@dataclass(frozen=True)
class Rows:
    """How a data set's rows are read: the prompt's columns, that of the completion, and whether as chats.

    Without a prompt's columns a row is a conversation, or with no template a plain text.
    """

    prompt: tuple[str, ...]
    completion: str
    with_template: bool

    def tokens(self, row: Mapping[str, Any], tokenizer: Any) -> Tokens:
        if self.with_template:
            return template_tokens(self._chat(row), tokenizer)
        return plain_tokens(self._asked(row) + "\n" if self.prompt else "", row[self.completion], tokenizer)

    def reference(self, row: Mapping[str, Any]) -> str:
        """The completion as text."""
        completion = row[self.completion]
        return completion if isinstance(completion, str) else str(completion[-1]["content"])

    def _asked(self, row: Mapping[str, Any]) -> str:
        return "\n\n".join(text for text in (row.get(column) for column in self.prompt) if text)

    def _chat(self, row: Mapping[str, Any]) -> Chat:
        if not self.prompt:
            return Chat(list(row[self.completion][:-1]), row[self.completion][-1:])
        return Chat(
            [{"role": "user", "content": self._asked(row)}],
            [{"role": "assistant", "content": row[self.completion]}],
        )
