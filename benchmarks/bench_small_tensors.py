"""A step, a forward pass and generation with hundreds of small masked tensors, against plain LoRA.

    python benchmarks/bench_small_tensors.py [--device cuda] [--dtype bfloat16] [--hidden-size 32 128] [--rounds 60]
    python benchmarks/bench_small_tensors.py --shape llama-1b bert-base [--keep-ratio 0.1]

A Llama of 24 layers with LoRA r=8 on seven projections of each: 336 tensors, half of their entries trained, where what
is done for each tensor counts most. With --shape, models of that shape with LoRA r=8 on all linear layers in its place.
Batches of 2 x 32 tokens. Arms take turns in one process; a ratio is the median over rounds of the ratio
within the round, with its 95 % interval (by order statistics). Limits, for the median: 1.02 for the step and the
forward pass, 1 / 0.98 for generation, 1 for the optimizer.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from common import BERT, SHAPES, WARM_UP_ON_GPU, Place, add_place, base_model, median, place_of, print_table, verdict
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fish_tuning import apply_mask

LIMITS: dict[str, float | None] = {
    "forward": 1.02,
    "backward": None,
    "optimizer": 1.0,
    "step": 1.02,
    "generation": 1 / 0.98,
}


def deep_llama(hidden_size: int, place: Place) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=128, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    with place.made_here():
        return LlamaForCausalLM(config)


def model_of(what: int | str, masked: bool, place: Place, keep_ratio: float = 0.5) -> Any:
    """A model of that hidden size, or of that shape, with LoRA; masked, of that share of its entries."""
    base = deep_llama(what, place) if isinstance(what, int) else base_model(what, place)
    task = "SEQ_CLS" if what in BERT else "CAUSAL_LM"
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type=task))
    if masked:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        apply_mask(model, {name: torch.rand(p.shape, device=p.device) < keep_ratio for name, p in trained.items()})
    return model


class Arm:
    def __init__(self, model: Any, place: Place) -> None:
        self.model, self.place = model, place
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.ids = torch.randint(1, 128, (2, 32), generator=torch.Generator().manual_seed(0)).to(place.device)
        self.generates = hasattr(model.base_model.model, "generate")
        self.labels = self.ids if self.generates else self.ids[:, 0] % 2
        self.output: Any = None

    def run_forward(self) -> None:
        self.output = self.model(input_ids=self.ids, labels=self.labels)

    def run_generation(self) -> None:
        if self.generates:
            self.model.generate(
                input_ids=self.ids[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
            )

    def round(self) -> dict[str, float]:
        seconds = self.place.seconds
        self.model.train()
        forward = seconds(self.run_forward)
        backward = seconds(self.output.loss.backward)
        step = seconds(self.optimizer.step)
        self.optimizer.zero_grad()
        self.model.eval()
        with torch.no_grad():
            generation = seconds(self.run_generation)
        return {
            "forward": forward, "backward": backward, "optimizer": step, "step": forward + backward + step,
            "generation": generation,
        }  # fmt: skip


def one_round(arms: dict[str, Arm], number: int) -> dict[str, dict[str, float]]:
    """Of every arm; who comes first goes round, since an arm finds the caches as the one before left them."""
    names = list(arms)
    first = number % len(names)
    return {name: arms[name].round() for name in names[first:] + names[:first]}


def told(ratios: list[float]) -> str:
    """Their median, with the order statistics that enclose it in 95 of 100 samples, if there are enough."""
    among, number = sorted(ratios), len(ratios)
    beyond = math.floor(number / 2 - 0.98 * math.sqrt(number))  # of a binomial distribution, by the normal one
    if beyond < 1:
        return f"{median(ratios):.3f}"
    return f"{median(ratios):.3f} [{among[beyond - 1]:.3f}, {among[-beyond]:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    asked_for = parser.add_mutually_exclusive_group()
    asked_for.add_argument("--hidden-size", type=int, nargs="+", default=[32, 128], help="of a Llama of 24 layers")
    asked_for.add_argument("--shape", choices=SHAPES, nargs="+", default=[])
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="share of the entries that train under a mask")
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    place = place_of(asked)
    print(place.describe())
    kept = []
    for what in asked.shape or [int(size) for size in asked.hidden_size]:
        # Plain twice: what its ratio to itself is not 1 is noise.
        arms = {
            name: Arm(model_of(what, name == "masked", place, asked.keep_ratio), place)
            for name in ("plain LoRA", "masked", "plain again")
        }
        rounds = [one_round(arms, number) for number in range(asked.rounds + WARM_UP_ON_GPU)][WARM_UP_ON_GPU:]
        rows, title = [], f"hidden size {what}" if isinstance(what, int) else f"{what} shape"
        for part, limit in LIMITS.items():
            if part == "generation" and not arms["masked"].generates:
                continue
            ratios = {name: [each[name][part] / each["plain LoRA"][part] for each in rounds] for name in arms}
            seconds = median([each["plain LoRA"][part] for each in rounds])
            rows.append([part, f"{1e3 * seconds:.1f}", *(told(ratios[name]) for name in ("masked", "plain again"))])
            if limit is not None:
                kept.append(verdict(f"{title}: {part}", median(ratios["masked"]), limit, at_most=True))
        print_table(["", "plain LoRA, ms", "masked / plain", "plain / plain"], rows)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
