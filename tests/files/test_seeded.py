from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch

from fish_tuning.files.seeded import SEEDS, find_seed, uniform

STEP, WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def mixed(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def one_number(seed: int, name: str, bound: float, place: int) -> float:
    """By the definition, with Python's whole numbers, which do not wrap around."""
    named = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    first = mixed((named + seed * STEP) & WORD)
    upper = mixed((first + (place + 1) * STEP) & WORD) >> 40
    factor = struct.unpack("f", struct.pack("f", bound / 2**24))[0]
    return struct.unpack("f", struct.pack("f", (2 * upper + 1 - 2**24) * factor))[0]


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs from the state 1234567, as in the reference implementation's users' tests."""
    assert [mixed((1234567 + n * STEP) & WORD) for n in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(("seed", "name", "bound"), [(0, "a", 1.0), (7, "x.lora_A.weight", 0.051), (65535, "", 3e-5)])
def test_numbers_are_the_definitions(seed: int, name: str, bound: float) -> None:
    numbers = uniform(seed, name, bound, 50)
    assert numbers.dtype == np.float32
    assert numbers.tolist() == [one_number(seed, name, bound, place) for place in range(50)]
    assert uniform(seed, name, bound, np.array([49, 3])).tolist() == numbers[[49, 3]].tolist()


def test_these_bits_are_never_to_change() -> None:
    """Files rest on them: a change of these numbers needs another form of start in the file."""
    numbers = uniform(7, "base_model.model.0.lora_A.weight", 0.5, 10_000)
    assert (numbers[:4] * 2**25).tolist() == [-6498305.0, -11412753.0, -6054803.0, -13690965.0]
    assert (
        hashlib.sha256(numbers.tobytes()).hexdigest()
        == "9a8eb34bc09ccf16ff675ef468e476f0381021c5f68d1056dddbff4a338f4e2b"
    )


def test_they_are_uniform_and_streams_differ() -> None:
    numbers = uniform(1, "a", 2.0, 100_000)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 2 / np.sqrt(3)) < 0.01
    assert -2 < numbers.min() < -1.999 < 1.999 < numbers.max() < 2
    counts = np.histogram(numbers, 50, (-2, 2))[0]
    assert abs(counts - 2000).max() < 200
    for other in (uniform(2, "a", 2.0, 100_000), uniform(1, "b", 2.0, 100_000), numbers[::-1]):
        assert abs(np.corrcoef(numbers[:-1], other[1:])[0, 1]) < 0.02


def test_the_seed_is_found_by_looking() -> None:
    places = np.arange(0, 800, 100)
    for seed in (0, 1, 777, SEEDS - 1):
        entries = uniform(seed, "a", 0.1, places)
        assert find_seed("a", 0.1, places, entries, lambda numbers: numbers) == seed
        assert find_seed("b", 0.1, places, entries, lambda numbers: numbers) is None
        half = torch.from_numpy(entries).bfloat16().float().numpy()
        assert find_seed("a", 0.1, places, half, lambda numbers: numbers) is None
        rounded = find_seed(
            "a", 0.1, places, half, lambda numbers: torch.from_numpy(numbers).bfloat16().float().numpy()
        )
        assert rounded == seed
    assert find_seed("a", 0.1, places[:0], entries[:0], lambda numbers: numbers) is None
