"""LLaMA-Factory's supervised fine-tuning with a mask: its Trainer masks itself before it trains.

python examples/llama_factory.py train_lora.yaml
"""

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher


class MaskedTrainer(workflow.CustomSeq2SeqTrainer):
    def train(self, *args, **kwargs):
        scores = calculate_fisher_information(self.model, **calibration_of(self, num_samples=128))
        add_mask(self, create_mask_from_fisher(scores, keep_ratio=0.25))
        return super().train(*args, **kwargs)


workflow.CustomSeq2SeqTrainer = MaskedTrainer

if __name__ == "__main__":
    run_exp()
