"""Adapter methods that PEFT lacks. Once this package is imported, PEFT makes, saves and loads them as its own."""

from __future__ import annotations

from fish_tuning.adapters.errors import AdapterError
from fish_tuning.adapters.serial import SerialAdapterConfig, SerialAdapterModel
from fish_tuning.adapters.unipelt import UniPELTModel
from fish_tuning.adapters.unipelt_config import UniPELTConfig

__all__ = ["AdapterError", "SerialAdapterConfig", "SerialAdapterModel", "UniPELTConfig", "UniPELTModel"]
