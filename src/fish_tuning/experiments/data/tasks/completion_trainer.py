"""trl's SFTTrainer, measured by the likelihood of whole completions and by the answers that the model writes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from fish_tuning.experiments.data.metrics import Metrics, exact_match
from fish_tuning.experiments.data.tasks.chats import PROMPT, REFERENCE
from fish_tuning.scores.losses import IGNORED, align_labels


def sft_config(args: TrainingArguments) -> SFTConfig:
    """The same arguments for trl, whose own defaults (bf16, checkpointing, 1,024 tokens) would change them."""
    given = args.to_dict() | {"hub_token": args.hub_token}
    config = SFTConfig(**given, max_length=None)  # rows are cut already
    if config.n_gpu != args.n_gpu:  # which the arguments do not hold
        config._n_gpu = args.n_gpu
    return config


class _OwnWeights(TrainerCallback):
    """Gives a model its trained tensors back once the Trainer is made, and before a mask takes them.

    Of a quantised model trl casts them to bfloat16, in which steps as small as a usual learning rate's are lost; scores
    and starts are of float32, and so are other tasks' adapters.
    """

    def __init__(self, model: Any) -> None:
        self.weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        for name, weight in self.weights.items():
            parameter = model.get_parameter(name)
            if parameter.dtype != weight.dtype:
                parameter.data = weight
        self.weights = {}


class CompletionTrainer(SFTTrainer):
    """An SFTTrainer of rows with `input_ids` and `labels`. `max_new_tokens` above 0 makes it generate answers.

    Every evaluation gives the mean log-likelihood of a completion's token over all tokens, not over batches; with
    answers also the share that matches. They take `prompt_ids` and `reference` of the evaluation rows.
    """

    def __init__(self, *, max_new_tokens: int = 0, callbacks: Sequence[TrainerCallback] = (), **arguments: Any) -> None:
        self.max_new_tokens = max_new_tokens
        self.rows: Dataset = arguments["eval_dataset"]
        super().__init__(callbacks=[_OwnWeights(arguments["model"]), *callbacks], **arguments)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        model: Any = self.model
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            metrics = self._likelihood(model, dataloader)
            if self.max_new_tokens:
                metrics |= self._exact_match(model)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        nothing: Any = None  # the predictions, which nobody asks for
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=named, num_samples=len(self.rows))

    def _likelihood(self, model: Any, dataloader: Any) -> Metrics:
        sums = torch.zeros(3, dtype=torch.float64)  # of losses, of right answers, of tokens
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            labels = align_labels(model, logits, labels, batch.get("attention_mask"))
            rows = _row_sums(logits, labels)
            # Processes look at parts, the last of which they fill up with examples that others have.
            sums += self.accelerator.gather_for_metrics(rows).cpu().double().sum(0)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, correct, tokens = sums.tolist()
        mean = loss / tokens
        perplexity = math.exp(min(mean, 700.0))  # of a diverged model: the largest that a float holds
        return {"loss": mean, "log_likelihood": -mean, "perplexity": perplexity, "token_accuracy": correct / tokens}

    def _exact_match(self, model: Any) -> Metrics:
        args = self.args
        # Each process answers a part, but for models that processes hold together: they must take the same steps.
        alone = self.is_fsdp_enabled or self.is_deepspeed_enabled
        own = range(len(self.rows)) if alone else range(args.process_index, len(self.rows), args.world_size)
        prompts = self.rows[PROMPT]
        answers = generate(
            model,
            self.processing_class,
            [prompts[index] for index in own],
            max_new_tokens=self.max_new_tokens,
            batch_size=args.per_device_eval_batch_size,
            on_batch=lambda: self.callback_handler.on_prediction_step(args, self.state, self.control),
        )
        found = dict(gather_object(list(zip(own, answers, strict=True))))
        return exact_match([found[index] for index in range(len(self.rows))], self.rows[REFERENCE])


def _row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, 3): each row's sum of losses, right answers and counted tokens."""
    counted = labels != IGNORED
    chosen, wanted = logits[counted], labels[counted]
    of_tokens = torch.stack(
        [
            F.cross_entropy(chosen, wanted, reduction="none"),
            (chosen.argmax(-1) == wanted).float(),
            torch.ones_like(wanted, dtype=torch.float32),
        ],
        dim=1,
    )
    return of_tokens.new_zeros(len(labels), 3).index_add_(0, counted.nonzero()[:, 0], of_tokens)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Any = lambda: None,
) -> list[str]:
    """The model's likeliest answer to each prompt, token by token (greedy), without special tokens."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths waste no padding
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        written = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None,
        )
        texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
        on_batch()
    return answers
