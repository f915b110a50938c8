"""PEFT's prompts, computed once and repeated for all examples: a row each, so that gradients arrive by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fish_tuning.model_walks import every_module

_REPEATED = ("PROMPT_TUNING", "P_TUNING")


@contextmanager
def a_prompt_each(model: nn.Module) -> Iterator[None]:
    """Until this is left, prompt tuning and P-tuning call their encoder with a row for each example.

    The prompts are the same. Where the encoder is called so already (prefixes, multitask prompts), nothing changes.
    """
    modules = every_module(model)
    kinds = {kind for kind in set(map(type, modules)) if hasattr(kind, "get_prompt")}
    changed = [module for module in modules if type(module) in kinds and _repeats_a_prompt(module)] if kinds else []
    for module in changed:
        vars(module)["get_prompt"] = _by_row(module, module.get_prompt)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["get_prompt"]


def _repeats_a_prompt(module: Any) -> bool:
    if "get_prompt" in vars(module):
        return False
    config = module.active_peft_config
    if str(getattr(config.peft_type, "value", config.peft_type)) not in _REPEATED or config.inference_mode:
        return False
    with torch.no_grad():  # other versions of PEFT may do more
        return torch.equal(module.get_prompt(1), _prompts(module, 1))


def _prompts(module: Any, batch_size: int) -> Any:
    adapter = module.active_adapter
    encoder, tokens = module.prompt_encoder[adapter], module.prompt_tokens[adapter]
    return encoder(tokens.expand(batch_size, -1).to(encoder.embedding.weight.device))


def _by_row(module: Any, get_prompt: Callable[..., Any]) -> Callable[..., Any]:
    def prompts(batch_size: int, *args: Any, **kwargs: Any) -> Any:
        return _prompts(module, batch_size) if batch_size > 1 else get_prompt(batch_size, *args, **kwargs)

    return prompts
