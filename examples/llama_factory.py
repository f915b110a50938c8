"""LLaMA-Factory's supervised fine-tuning with a mask: its Trainer masks itself before it trains.

DISABLE_VERSION_CHECK=1 python examples/llama_factory.py train_lora.yaml
"""

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from fish_tuning import (
    add_mask,
    calculate_fisher_information,
    calibration_of,
    create_mask_from_fisher,
    is_masked,
    load_mask,
)


class MaskedTrainer(workflow.CustomSeq2SeqTrainer):
    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:  # LLaMA-Factory names the newest one that output_dir has
            mask = load_mask(resume_from_checkpoint)
        else:
            scores = calculate_fisher_information(self.model, **calibration_of(self, num_samples=128))
            mask = create_mask_from_fisher(scores, keep_ratio=0.25)
        add_mask(self, mask)
        return super().train(resume_from_checkpoint, **kwargs)


class MaskedOnly(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not is_masked(model):
            raise SystemExit("No mask: this stage has a Trainer of its own. The script masks that of `stage: sft`.")


workflow.CustomSeq2SeqTrainer = MaskedTrainer

if __name__ == "__main__":
    run_exp(callbacks=[MaskedOnly()])
