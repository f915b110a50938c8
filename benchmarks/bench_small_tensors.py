"""A step, a forward pass and generation with hundreds of small masked tensors, against plain LoRA.

    python benchmarks/bench_small_tensors.py [--device cuda] [--dtype bfloat16] [--hidden-size 32 128] [--rounds 60]

A Llama of 24 layers with LoRA r=8 on seven projections of each: 336 tensors, half of their entries trained, where what
is done for each tensor counts most. Arms take turns in one process; a ratio is the median over rounds of the ratio
within the round. Limits: 1.02 for the step and the forward pass, 1 / 0.98 for generation, 1 for the optimizer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, median, print_table, synchronize, verdict
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fish_tuning import apply_mask

LIMITS = {"forward": 1.02, "backward": None, "optimizer": 1.0, "step": 1.02, "generation": 1 / 0.98}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(hidden_size: int, masked: bool, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=128, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(device, dtype)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=PROJECTIONS))
    if masked:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        apply_mask(model, {name: torch.rand(p.shape, device=device) < 0.5 for name, p in trained.items()})
    return model


class Arm:
    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.ids = torch.randint(1, 128, (2, 32), generator=torch.Generator().manual_seed(0)).to(device)

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = work()
        synchronize(self.device)
        return time.perf_counter() - start, result

    def round(self) -> dict[str, float]:
        self.model.train()
        forward, output = self._timed(lambda: self.model(input_ids=self.ids, labels=self.ids))
        backward, _ = self._timed(output.loss.backward)
        step, _ = self._timed(self.optimizer.step)
        self.optimizer.zero_grad()
        self.model.eval()
        with torch.no_grad():
            generation, _ = self._timed(
                lambda: self.model.generate(
                    input_ids=self.ids[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False
                )
            )
        return {
            "forward": forward, "backward": backward, "optimizer": step, "step": forward + backward + step,
            "generation": generation,
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    print(f"{machine(asked.device)}; {asked.dtype}")
    missed = []
    for size in asked.hidden_size:
        dtype = getattr(torch, asked.dtype)
        # Plain twice: what its ratio to itself is not 1 is noise.
        arms = {
            name: Arm(model_of(size, name == "masked", asked.device, dtype), asked.device)
            for name in ("plain LoRA", "masked", "plain again")
        }
        rounds = [{name: arm.round() for name, arm in arms.items()} for _ in range(asked.rounds + 3)][3:]
        rows = []
        for what, limit in LIMITS.items():
            ratios = {name: median([each[name][what] / each["plain LoRA"][what] for each in rounds]) for name in arms}
            seconds = median([each["plain LoRA"][what] for each in rounds])
            rows.append([what, f"{1e3 * seconds:.1f}", *(f"{ratios[name]:.3f}" for name in ("masked", "plain again"))])
            if limit is not None:
                missed.append(verdict(f"hidden size {size}: {what}", ratios["masked"], limit, at_most=True))
        print_table(["", "plain LoRA, ms", "masked / plain", "plain / plain"], rows)
    return 0 if all(missed) else 1


if __name__ == "__main__":
    sys.exit(main())
