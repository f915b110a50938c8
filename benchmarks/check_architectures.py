"""Scores and masks of every architecture of transformers that its own default configuration, made small, can build.

    python benchmarks/check_architectures.py [--tasks causal_lm ...] [--models bert llama ...] [--dtype bfloat16]
        [--adapters dora ia3 prefix ...]

For each: LoRA on all linear layers, then all of the model's weights, or the adapters that are asked for. Scores in
batches are compared with those of the loop (`method="loop"`), entry by entry in 32 bits and tensor by tensor in 16; a
masked step of SGD with the dense gradient, in 32 bits. A line a model, and a table of what is not the same; exit code 1
where anything is not.
"""

from __future__ import annotations

import argparse
import copy
import logging
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from common import DTYPES, print_table
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fish_tuning import FishTuningError, FishTuningWarning, apply_mask, calculate_fisher_information, remove_mask

SECONDS, MOST_PARAMETERS = 100, 4_000_000
# In 32 bits of a tensor's largest score, in 16 of its norm.
LIMITS = {torch.float32: 2e-3, torch.bfloat16: 0.15}
NEGLIGIBLE = {torch.float32: 1e-8, torch.bfloat16: 1e-4}  # of the largest tensor's norm
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


@dataclass
class Found:
    """Of one model: what was looked at, and whatever is not as it should be."""

    tensors: int = 0
    looped: int = 0
    wrong: list[str] = field(default_factory=list)


def compare_scores(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, found: Found) -> None:
    by_loop = calculate_fisher_information(model, [batch], method="loop", warmup_steps=0, progress=False)
    with loop_counted(found), warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        scores = calculate_fisher_information(model, [batch], warmup_steps=0, progress=False)
    found.tensors += len(scores)
    largest = max((float(each.norm()) for each in by_loop.values()), default=0.0)
    for name, each in by_loop.items():
        if not float(each.norm()) > NEGLIGIBLE[dtype] * largest:
            continue  # all rounding
        difference = scores[name] - each
        off, size = (
            (difference.abs().amax(), each.amax()) if dtype == torch.float32 else (difference.norm(), each.norm())
        )
        if not float(off) <= LIMITS[dtype] * float(size):
            found.wrong.append(f"score of {name} off by {float(off) / float(size):.1e}")


@contextmanager
def loop_counted(found: Found) -> Iterator[None]:
    class Counted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "by the loop" in record.getMessage():
                found.looped += record.args[0] if isinstance(record.args, tuple) else 0  # type: ignore[operator]

    logger, handler = logging.getLogger("fish_tuning.scores.fisher"), Counted()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def compare_masked_step(model: nn.Module, batch: dict[str, Tensor], found: Found) -> None:
    """A step of SGD with a rate of 1 takes the gradient off selected entries, and leaves the others as they were."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for parameter in model.parameters():
        if places[id(parameter)] > 1:
            parameter.requires_grad_(False)  # tied tensors cannot be masked
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    before = {name: (p.detach().clone(), g) for (name, p), g in zip(trained.items(), gradients, strict=True)}
    generator = torch.Generator().manual_seed(1)
    mask = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in trained.items()}
    apply_mask(model, mask)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    masked_loss = model(**batch).loss
    masked_loss.backward()
    optimizer.step()
    remove_mask(model)
    if not torch.allclose(loss, masked_loss, rtol=1e-5):
        found.wrong.append("loss under a mask")
    for name, (weight, gradient) in before.items():
        now, selected = model.get_parameter(name).detach(), mask[name]
        step = torch.zeros_like(weight) if gradient is None else gradient
        if not torch.equal(now[~selected], weight[~selected]):
            found.wrong.append(f"frozen entries of {name}")
        largest = float(step.abs().amax()) if step.numel() else 0.0
        if not torch.allclose(now, torch.where(selected, weight - step, weight), rtol=1e-5, atol=1e-4 * largest + 1e-7):
            found.wrong.append(f"step of {name}")


def check(kind: str, name: str, task: str, dtype: torch.dtype, adapters: Sequence[str]) -> Found:
    model, batch = built(kind, name, task, dtype)
    found = Found()
    models = []
    for adapter in adapters:
        try:
            each = model if adapter == WHOLE else adapted(model, adapter, task).to(dtype)
            each(**batch)
        except (Exception, SystemExit) as error:  # PEFT adapts not every layer
            reason = f"{adapter}: {type(error).__name__}: {error}"
        else:
            models.append(each)
    if not models:
        raise Unbuilt(reason)
    for each in models:
        compare_scores(each, batch, dtype, found)
        if dtype == torch.float32 and getattr(each(**batch), "loss", None) is not None:
            compare_masked_step(each, batch, found)
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ended(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--models", nargs="+", help="kinds of models as transformers calls them; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--adapters", choices=[*ADAPTERS, WHOLE], nargs="+", default=["lora", WHOLE], metavar="ADAPTER",
        help=f"{', '.join(ADAPTERS)}, or {WHOLE} for all of the model's weights",
    )  # fmt: skip
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    seen: Counter[str] = Counter()
    rows = []
    for task, kind, name in classes_of(asked.tasks, asked.models):
        try:
            with at_most(SECONDS):
                found = check(kind, name, task, DTYPES[asked.dtype], asked.adapters)
            told = f"{found.tensors} tensors, {found.looped} by the loop"
            outcome = "not the same" if found.wrong else "the same"
            rows += [[task, name, wrong] for wrong in found.wrong[:3]]
        except FishTuningError as refusal:
            outcome, told = "refused", str(refusal)
        except (Unbuilt, TimeoutError) as reason:
            outcome, told = "not built", str(reason).splitlines()[0][:90]
        except Exception as error:  # of any kind: it is what is looked for
            outcome, told = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append([task, name, told[:150]])
        seen[outcome] += 1
        print(f"{task} {name}: {outcome} ({told})", flush=True)
    print(f"\n{asked.dtype}: " + ", ".join(f"{number} {outcome}" for outcome, number in seen.most_common()))
    if rows:
        print_table(["task", "model", "what is not the same"], rows)
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
