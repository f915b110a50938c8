"""trl's RewardTrainer: a preferred and a rejected answer are one example; the reward head trains as a whole.

python examples/reward.py
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher

trainer = RewardTrainer(
    model="Qwen/Qwen3-0.6B",
    args=RewardConfig("output/reward", learning_rate=2e-4, num_train_epochs=1, max_length=1024),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"),
)
scores = calculate_fisher_information(trainer.model, **calibration_of(trainer, num_samples=128))
add_mask(trainer, create_mask_from_fisher(scores, keep_ratio=0.25, names_to_exclude=["modules_to_save"]))
trainer.train()
trainer.save_model()
