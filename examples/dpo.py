"""trl's DPOTrainer: a preferred and a rejected answer are one example, with DPO's own loss.

python examples/dpo.py
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher

trainer = DPOTrainer(
    model="Qwen/Qwen3-0.6B",
    args=DPOConfig("output/dpo", learning_rate=5e-5, num_train_epochs=1, max_length=1024),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
)
scores = calculate_fisher_information(trainer.model, **calibration_of(trainer, num_samples=128))
add_mask(trainer, create_mask_from_fisher(scores, keep_ratio=0.25))
trainer.train()
trainer.save_model()
