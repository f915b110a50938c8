"""All three steps in one call, on a Trainer that is ready to train.

python examples/one_call.py
"""

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from fish_tuning import fish_tune

tokenizer = AutoTokenizer.from_pretrained("roberta-base")
data = load_dataset("rotten_tomatoes")
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")
model = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=["query", "key", "value"])

trainer = Trainer(
    model=get_peft_model(model, lora),
    args=TrainingArguments("output/one_call", learning_rate=1e-3, num_train_epochs=1),
    train_dataset=data["train"],
    eval_dataset=data["validation"],
    processing_class=tokenizer,
)
fish_tune(trainer, keep_ratio=0.05)  # resume_from_checkpoint=True goes on after a crash
trainer.save_model()
