"""trl's GRPOTrainer: 128 completions are drawn and rewarded as in training, and each is one example.

python examples/grpo.py
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher


def near_twenty_words(completions, **_):
    return [-abs(20 - len(completion.split())) for completion in completions]


trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B",
    reward_funcs=near_twenty_words,
    args=GRPOConfig("output/grpo", learning_rate=1e-5, max_steps=500, num_generations=8, max_completion_length=128),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
)
scores = calculate_fisher_information(trainer.model, **calibration_of(trainer, num_samples=128))
add_mask(trainer, create_mask_from_fisher(scores, keep_ratio=0.25))
trainer.train()
trainer.save_model()
