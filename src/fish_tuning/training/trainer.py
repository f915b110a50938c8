"""Masks in transformers' Trainer: one callback for every Trainer subclass, and a thin Trainer that brings it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fish_tuning.errors import MaskError
from fish_tuning.files.adapter_folders import MODEL_CONFIG
from fish_tuning.files.atomic import sync_folder, write_atomically
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask, save_mask
from fish_tuning.sharing.card import CardFacts
from fish_tuning.sharing.folder import ADAPTER_CONFIG, TOLD, complete_adapter
from fish_tuning.sparse.adapter_names import idle_names
from fish_tuning.sparse.applying import apply_mask, synchronize_mask, take_off_trained
from fish_tuning.sparse.ddp import together
from fish_tuning.sparse.masked_tensors import get_mask, mark_replaced, replaced_parameters, trains_masked
from fish_tuning.sparse.replacing import Choice, replace_mask
from fish_tuning.sparse.sharding import (
    FSDP1,
    ZERO3,
    ZERO12,
    engine_of,
    plain_name,
    training_engine_of,
)
from fish_tuning.training.card_facts import data_rows, training_facts
from fish_tuning.training.checkpoints import check_mask, checkpoint_folders, find_fault, last_checkpoint, same_selection
from fish_tuning.training.head_rate import set_head_learning_rate
from fish_tuning.training.reporting import report_figures


class FishMaskCallback(TrainerCallback):
    """Applies a mask when a Trainer (SFTTrainer, or any other subclass) has been made, before its optimizer is.

    Every checkpoint holds the mask as `fish_mask.safetensors`; the adapter in it stays an ordinary PEFT adapter. After
    a kill, `trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))` goes on from the newest whole one.
    `report_figures(trainer)` brings the mask's figures into the loggers that `report_to` names.

    Args:
        mask: {parameter name: bool tensor}, from `create_mask_from_fisher`.
        reselect_every: choose again after every so many optimizer steps, with `choose`; see `replace_mask`. Checkpoints
            then hold the mask of their step. FishTuningTrainer resumes with it; with another Trainer make the callback
            of `load_mask(f"{checkpoint}/fish_mask.safetensors")`.
        choose: `choose(model) -> mask` of the same number of entries, from the model as trained, whose mask is off
            meanwhile: `lambda model: create_mask_from_fisher(calculate_scores(model, loader, warmup_steps=0), ...)`.
            Under DDP it runs in every process, and all must come to the same mask; calculate_scores shares its work.

    Raises:
        MaskError: when the mask does not fit the model, when training starts with an optimizer that was made before
            the mask was applied, when it resumes a checkpoint of another mask, or when a new choice has another number
            of entries, differs between processes, or comes under FSDP or DeepSpeed.

    Example:
        >>> trainer = SFTTrainer(model=peft_model, ..., callbacks=[FishMaskCallback(mask)])  # doctest: +SKIP
    """

    def __init__(
        self, mask: Mapping[str, Tensor], reselect_every: int | None = None, choose: Choice | None = None
    ) -> None:
        if (reselect_every is None) != (choose is None):
            raise MaskError("reselect_every and choose belong together: how often, and how. Give both or neither.")
        if reselect_every is not None and (not isinstance(reselect_every, int) or reselect_every < 1):
            raise MaskError(f"reselect_every={reselect_every!r} must be a whole number of at least 1.")
        self.mask = {plain_name(name): selected for name, selected in mask.items()}
        self.reselect_every, self.choose = reselect_every, choose
        self.resumed_from: Path | None = None  # where it is not in the Trainer's own folder
        self.rows: dict[str, str] = {}  # for the card: how the mask was made, and of which data

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if not trains_masked(model):
            apply_mask(model, self.mask)
        elif not self._is_applied_to(model):
            raise MaskError(
                "The model has another mask already. Call remove_mask(model) before training with this one."
            )

    def _is_applied_to(self, model: Any) -> bool:
        applied = get_mask(model)
        idle = idle_names(model, applied)  # of other adapters, which may have other masks
        return same_selection({name: applied[name] for name in applied.keys() - idle}, self.mask)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        held = (
            {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if optimizer else set()
        )
        if not trains_masked(model) and not all(selected.all() for selected in self.mask.values()):
            raise MaskError(
                "The model that is trained has no mask: the callback was added after the Trainer was made, the model "
                "was replaced (model_init? FishTuningTrainer masks what it makes), or the mask was removed. Pass model "
                "and callback when making the Trainer, or use add_mask(trainer, mask)."
            )
        # DeepSpeed's optimizer holds pieces of memory; the parameters themselves tell that it has taken them.
        others = held.isdisjoint(trained) and not all(engine_of(p) for p in model.parameters() if p.requires_grad)
        if optimizer is not None and (others or held & replaced_parameters(model)):
            raise MaskError(
                "The optimizer holds parameters that a mask has replaced: it was made before the mask was applied. "
                "Call apply_mask(model, mask) first, then make the optimizer."
            )

        folder = self.resumed_from or _checkpoint_folder(args, state)
        if state.global_step and folder.is_dir():
            check_mask(folder, model)
        engine = training_engine_of(model)
        if self.reselect_every and engine:
            raise MaskError(
                f"reselect_every={self.reselect_every}: {engine} goes on with the entries that it was given. Train in "
                "one process or with DDP, or without it."
            )
        if engine:
            _check_engine(args, engine)
        if self.reselect_every and args.load_best_model_at_end:
            raise MaskError(
                f"reselect_every={self.reselect_every} with load_best_model_at_end=True: the best step's weights may "
                "belong to an earlier mask. Leave one of the two out."
            )
        synchronize_mask(model)
        self.rows |= data_rows(train_dataloader)
        self._tell(args, state, model)

    def _tell(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Have the model know what the card of the adapter tells of this training."""
        setattr(model, TOLD, training_facts(args, state, self.rows))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._tell(args, state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._tell(args, state, model)  # a checkpoint may follow

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._tell(args, state, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        due = bool(self.reselect_every) and state.global_step % (self.reselect_every or 1) == 0
        if due and state.global_step < state.max_steps:
            with together():
                self.mask = replace_mask(model, self._chosen, optimizer)
            synchronize_mask(model)
        if control.should_save:
            self._tell(args, state, model)

    def _chosen(self, model: nn.Module) -> Mapping[str, Tensor]:
        if self.choose is None:
            raise MaskError("There is nothing to choose with.")
        chosen = self.choose(model)
        kept, before = (sum(int(mask.sum()) for mask in masks.values()) for masks in (chosen, self.mask))
        if kept != before:
            raise MaskError(f"choose gave a mask of {kept:,} entries; the one before has {before:,}, as it must have.")
        return chosen

    def go_on_with(self, model: nn.Module, folder: Path) -> None:
        """Take the mask of a checkpoint, which may be another choice than the first."""
        paths = [*folder.glob(MASK_FILE_NAME), *folder.glob(f"*/{MASK_FILE_NAME}")]
        if not self.reselect_every or not paths or not trains_masked(model):
            return
        earlier = take_off_trained(model)
        try:
            saved = {name: mask for path in paths for name, mask in load_mask(path).items()}
            apply_mask(model, {name: mask for name, mask in saved.items() if name in earlier})
        except BaseException:
            apply_mask(model, earlier)
            raise
        self.mask = {name: mask for name, mask in saved.items() if name in earlier}
        mark_replaced(model)  # other entries may have been trained before

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = _checkpoint_folder(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        # Written before the weights by save_pretrained, unless the model has none or trains as a whole.
        if not any(folder.rglob(MASK_FILE_NAME)):
            save_mask(self.mask, folder / MASK_FILE_NAME)
        sync_folder(folder)


class FishTuningTrainer(Trainer):
    """transformers' Trainer that trains only the entries a mask selects; all its other arguments are Trainer's own.

    The number of trainable parameters and the keep ratio go with the logs to all that `report_to` names.

    Args:
        model: the PEFT model (or any model) the mask was made for; `apply_mask` changes it in place.
        args: TrainingArguments.
        mask: {parameter name: bool tensor}, from `create_mask_from_fisher`.
        figures: further figures to log, such as `{"fisher_seconds": seconds}`; see `report_figures`.
        head_learning_rate: a learning rate of its own for the head; see `set_head_learning_rate`. Default:
            `args.learning_rate`, as all else.
        reselect_every, choose: to choose again while it trains; see `FishMaskCallback`.
        **kwargs: everything else that Trainer takes (`train_dataset`, `processing_class`, `data_collator`, ...). With
            `model_init`, as `hyperparameter_search` needs it, every model that it makes gets the mask; let it start
            where the mask was made for (a seed, or a saved adapter).

    Raises:
        MaskError: the mask does not fit the model, the checkpoint to resume from was trained with another mask, or
            `head_learning_rate` without a head.

    Example:
        >>> trainer = FishTuningTrainer(
        ...     model=peft_model, args=training_args, mask=mask, train_dataset=train_dataset
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        mask: Mapping[str, Tensor],
        figures: Mapping[str, float] | None = None,
        head_learning_rate: float | None = None,
        reselect_every: int | None = None,
        choose: Choice | None = None,
        **kwargs: Any,
    ) -> None:
        self._first_mask = dict(mask)
        self._mask_callback = FishMaskCallback(mask, reselect_every, choose)
        callbacks = [self._mask_callback, *(kwargs.pop("callbacks", None) or ())]
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)
        report_figures(self, figures)
        if head_learning_rate is not None:
            set_head_learning_rate(self, head_learning_rate)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model by `model_init`, with the mask."""
        model = super().call_model_init(trial)
        if not trains_masked(model):
            apply_mask(model, self._first_mask)
            self._mask_callback.mask = dict(self._first_mask)
        return model

    @property
    def mask(self) -> dict[str, Tensor]:
        """The mask that is trained with now."""
        return self._mask_callback.mask

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint=True` passes over checkpoints that a kill left half-written.

        Raises MaskError when the checkpoint was trained with another mask, or a checkpoint given by its path is not
        whole; warns (FishTuningWarning) of those that are passed over, and starts anew when none is whole.
        """
        output_dir = Path(self.args.output_dir or "")
        if resume_from_checkpoint is True and checkpoint_folders(output_dir):  # none at all is Trainer's own error
            resume_from_checkpoint = last_checkpoint(output_dir)
        elif isinstance(resume_from_checkpoint, str | Path) and (fault := find_fault(Path(resume_from_checkpoint))):
            raise MaskError(f"{fault[:1].upper()}{fault[1:]}. Give another checkpoint to resume from.")
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str | Path) else None
        if folder is not None:
            self._mask_callback.go_on_with(cast(nn.Module, self.model), folder)
            check_mask(folder, cast(nn.Module, self.model))
        self._mask_callback.resumed_from = folder
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save and not isinstance(self.model, PreTrainedModel | PeftModel):
            # The others have it from their save_pretrained. Before the weights, as there.
            folder = Path(output_dir or self.args.output_dir or "")
            folder.mkdir(parents=True, exist_ok=True)
            save_mask(get_mask(cast(nn.Module, self.model)), folder / MASK_FILE_NAME)
        super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files that it knows from the checkpoint to the folder that it pushes.
        for name in (MASK_FILE_NAME, f"{MODEL_CONFIG}/config.json"):
            beside = Path(checkpoint_folder, name)
            if self.is_world_process_zero() and beside.is_file():
                copy = Path(self.args.output_dir or "", name)
                copy.parent.mkdir(exist_ok=True)
                write_atomically(copy, beside.read_bytes())
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter's own card with this training's figures; a user's stays. Trainer's, of a model without PEFT."""
        folder = Path(self.args.output_dir or "")
        if not isinstance(self.model, PeftModel) or not (folder / ADAPTER_CONFIG).is_file():
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_adapter(self.model, folder, processing_class=self.processing_class, facts=self._facts(kwargs))
        return None

    def _facts(self, asked: Mapping[str, Any]) -> CardFacts:
        """What `create_model_card` was asked to tell, and what this training was."""
        dataset = asked.get("dataset")
        facts = training_facts(self.args, self.state, self._mask_callback.rows)
        return replace(
            facts,
            title=asked.get("model_name") or CardFacts.title,
            base_model=asked.get("finetuned_from"),
            dataset=dataset if isinstance(dataset, str) else None,
        )


def _check_engine(args: TrainingArguments, engine: str) -> None:
    """Refuse at once what would fail at the first checkpoint or at the end, or would train with stale values."""
    plugin = getattr(AcceleratorState(), "deepspeed_plugin", None)
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin is not None else {}
    if engine == ZERO3 and args.save_strategy != "no" and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise MaskError(
            "DeepSpeed ZeRO-3 without stage3_gather_16bit_weights_on_model_save: no checkpoint would hold an adapter. "
            "Set it to true in DeepSpeed's configuration (accelerate calls it zero3_save_16bit_model)."
        )
    if engine == FSDP1 and args.save_strategy != "no":
        raise MaskError(
            f"save_strategy={str(getattr(args.save_strategy, 'value', args.save_strategy))!r}: under FSDP1 PEFT leaves "
            "an adapter's tensors out of what a Trainer saves. Use FSDP2 (fsdp_config={'version': 2}), or "
            "save_strategy='no', and load trainer.model_wrapped.state_dict() into a model that is not wrapped."
        )
    if args.torch_compile and engine in (ZERO12, FSDP1):
        raise MaskError(
            f"torch_compile=True: a compiled model does not see what {engine} does to the selected entries, and would "
            "go on with old ones. Leave one of the two out."
        )


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
