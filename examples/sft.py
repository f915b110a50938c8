"""trl's SFTTrainer, which makes the PEFT model itself: score on its own batches, add the mask, train.

python examples/sft.py
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher

trainer = SFTTrainer(
    model="Qwen/Qwen3-0.6B",
    args=SFTConfig("output/sft", learning_rate=2e-4, num_train_epochs=1, max_length=1024),
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
)
scores = calculate_fisher_information(trainer.model, **calibration_of(trainer, num_samples=128))
add_mask(trainer, create_mask_from_fisher(scores, keep_ratio=0.25))
trainer.train()
trainer.save_model()  # an ordinary LoRA, with its mask beside it
