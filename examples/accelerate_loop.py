"""A loop of your own with accelerate, in one process or in several: mask first, then optimizer, then prepare().

accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from fish_tuning import apply_mask, calculate_fisher_information, create_mask_from_fisher, synchronize_mask

set_seed(0)  # every process starts from the same head and the same LoRA
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained("roberta-base")
data = load_dataset("rotten_tomatoes", split="train")
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")
collator = DataCollatorWithPadding(tokenizer)
model = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=["query", "key", "value"])
model = get_peft_model(model, lora).to(accelerator.device)

# Each process scores its share of these examples, and all get the same mask.
calibration = DataLoader(data.shuffle(seed=0), batch_size=16, collate_fn=collator)
scores = calculate_fisher_information(model, calibration, num_samples=128)
apply_mask(model, create_mask_from_fisher(scores, keep_ratio=0.05, names_to_exclude=["classifier"]))
synchronize_mask(model)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collator)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained("output/accelerate_loop")
