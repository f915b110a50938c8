"""Small models of every architecture of transformers, batches of their tasks, and adapters away from their start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 4_000_000
SMALL: dict[str, Any] = {
    **dict.fromkeys((
        "hidden_size", "d_model", "embed_dim", "n_embd", "dim", "emb_dim", "hidden_dim", "embedding_size", "d_embed",
        "word_embed_proj_dim", "pooler_hidden_size", "rnn_hidden_size"), 32),
    **dict.fromkeys((
        "intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim",
        "ffn_hidden_size", "dim_feedforward"), 48),
    **dict.fromkeys((
        "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "image_size"), 16),
    **dict.fromkeys((
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_encoder_layers", "num_decoder_layers", "num_key_value_heads", "type_vocab_size", "expand",
        "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "patch_size", "attention_window",
        "time_step_rank", "conv_kernel"), 4),
    **dict.fromkeys((
        "head_dim", "d_kv", "d_head", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
        "state_size", "sliding_window", "num_mel_bins"), 8),
    **dict.fromkeys((
        "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "sparse_step", "encoder_sparse_step",
        "decoder_sparse_step"), 1),
    **dict.fromkeys((
        "vocab_size", "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions",
        "max_target_positions"), 64),
    "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "use_cache": False, "initializer_range": 0.2,
}  # fmt: skip


def made_small(config: Any) -> Any:
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int | float) or (
            name.endswith("token_id") and hasattr(config, name)
        ):
            with suppress(NotImplementedError):  # XLNet's and ProphetNet's, which have some under other names
                setattr(config, name, value)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            made_small(value)
        elif name == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds + kinds)[:2])
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def texts(lengths: tuple[int, ...] = (9, 5, 7, 9)) -> dict[str, Tensor]:
    """Padded, each with its end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 60, (length,), generator=generator)
        ids[row, length - 1] = 2
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def labelled(batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def causal_lm(config: Any) -> dict[str, Tensor]:
    return labelled(texts(), texts()["input_ids"])


def seq_cls(config: Any) -> dict[str, Tensor]:
    return texts() | {"labels": torch.tensor([0, 1, 2, 1])}


def token_cls(config: Any) -> dict[str, Tensor]:
    return labelled(texts(), texts()["input_ids"] % 3)


def question_answering(config: Any) -> dict[str, Tensor]:
    return texts() | {"start_positions": torch.tensor([1, 2, 3, 0]), "end_positions": torch.tensor([2, 4, 3, 1])}


def multiple_choice(config: Any) -> dict[str, Tensor]:
    pairs = {key: value.view(3, 2, -1) for key, value in texts((9, 5, 7, 9, 8, 9)).items()}
    return pairs | {"labels": torch.tensor([0, 1, 1])}


def seq_2_seq_lm(config: Any) -> dict[str, Tensor]:
    answers = texts((6, 4, 5, 6))
    return texts() | {"labels": answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)}


def image_cls(config: Any) -> dict[str, Tensor]:
    size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 16
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, getattr(config, "num_channels", 3), size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}


TASKS: dict[str, tuple[str, Callable[[Any], dict[str, Tensor]]]] = {
    "causal_lm": ("CAUSAL_LM", causal_lm),
    "seq_cls": ("SEQUENCE_CLASSIFICATION", seq_cls),
    "image_cls": ("IMAGE_CLASSIFICATION", image_cls),
    "seq_2_seq_lm": ("SEQ_TO_SEQ_CAUSAL_LM", seq_2_seq_lm),
    "masked_lm": ("MASKED_LM", causal_lm),
    "multiple_choice": ("MULTIPLE_CHOICE", multiple_choice),
    "question_answering": ("QUESTION_ANSWERING", question_answering),
    "token_cls": ("TOKEN_CLASSIFICATION", token_cls),
}


def classes_of(tasks: Sequence[str], kinds: Sequence[str] | None) -> Iterator[tuple[str, str, str]]:
    """Tasks, kinds of models (None: all) and their classes."""
    for task in tasks:
        for kind, found in getattr(modeling_auto, f"MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES").items():
            for name in (found,) if isinstance(found, str) else found:
                if kinds is None or kind in kinds:
                    yield task, kind, name


class Unbuilt(Exception):
    """What a small default configuration does not build, or run: nothing to check."""


def built(kind: str, name: str, task: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    try:
        config = made_small(transformers.AutoConfig.for_model(kind))
        if task == "question_answering":
            config.num_labels = 2
        made = getattr(transformers, name)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made(config).parameters())
        if size > MOST_PARAMETERS:
            raise Unbuilt(f"{size / 1e6:.0f} M parameters")
        torch.manual_seed(0)
        model, batch = made(config).eval().to(dtype), TASKS[task][1](config)
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        model(**batch)
    except (Exception, SystemExit) as error:  # other people's code, whose errors are of every kind
        raise (
            error if isinstance(error, Unbuilt | TimeoutError) else Unbuilt(f"{type(error).__name__}: {error}")
        ) from None
    return model, batch


def linear_layers(model: nn.Module) -> list[str]:
    """Names of layers that are no heads."""
    found = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(found - {"lm_head", "score", "classifier"})


def feedforward(model: nn.Module) -> list[str]:
    return [
        name for name in linear_layers(model) if name in ("fc2", "down_proj", "wo", "dense_4h_to_h", "w2", "c_proj")
    ]


def norms(model: nn.Module) -> list[str]:
    return sorted(
        {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
        }
    )


def embeddings(model: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, module in model.named_modules() if type(module) is nn.Embedding})[:2]


ALL: dict[str, Any] = {"target_modules": "all-linear"}
ADAPTERS: dict[str, Callable[[nn.Module], peft.PeftConfig]] = {
    "lora": lambda model: peft.LoraConfig(r=4, init_lora_weights=False, **ALL),
    "dora": lambda model: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **ALL),
    "lora_of_embeddings": lambda model: peft.LoraConfig(
        r=2, target_modules=[*embeddings(model), *linear_layers(model)[:2]], init_lora_weights=False
    ),
    "ia3": lambda model: peft.IA3Config(
        target_modules=linear_layers(model), feedforward_modules=feedforward(model), init_ia3_weights=False
    ),
    "vera": lambda model: peft.VeraConfig(r=4, init_weights=False, **ALL),
    "oft": lambda model: peft.OFTConfig(oft_block_size=4, r=0, init_weights=False, **ALL),
    "loha": lambda model: peft.LoHaConfig(r=2, target_modules=linear_layers(model), init_weights=False),
    "lokr": lambda model: peft.LoKrConfig(r=2, target_modules=linear_layers(model), init_weights=False),
    "ln_tuning": lambda model: peft.LNTuningConfig(target_modules=norms(model)),
    "prefix": lambda model: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda model: peft.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": lambda model: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}
WHOLE = "none"  # all of the model's weights
TASK_TYPES = {
    "causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS", "seq_2_seq_lm": "SEQ_2_SEQ_LM", "token_cls": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}  # fmt: skip


def adapted(model: nn.Module, adapter: str = "lora", task: str | None = None) -> nn.Module:
    """The adapter away from its start, where some of its tensors would have no gradient."""
    torch.manual_seed(1)
    config = ADAPTERS[adapter](model)
    if adapter in ("prefix", "prompt", "p_tuning"):
        config.task_type = TASK_TYPES.get(task or "")
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return made
