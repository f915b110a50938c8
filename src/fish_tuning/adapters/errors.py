"""The error of the adapters: one for fish-tuning's callers and for PEFT's."""

from __future__ import annotations

from fish_tuning.errors import FishTuningError


class AdapterError(FishTuningError, ValueError):
    """An adapter that cannot be configured, or that a model cannot take; a ValueError, as PEFT's own are."""
