"""What the adapters share: the fields of their configurations, and PEFT's tuner as they use it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fish_tuning.adapters.bottleneck import NON_LINEARITIES
from fish_tuning.adapters.errors import AdapterError
from fish_tuning.adapters.families import Names, base_modules, check_layers, check_names, is_targeted, matches
from fish_tuning.errors import did_you_mean


class AdapterType(str, enum.Enum):  # noqa: UP042 (PEFT cuts `str(member)` at the dot, as its own enum prints)
    """The methods that this package adds to PEFT; made like PEFT's closed `PeftType`, so equal to its own text."""

    SERIAL_ADAPTER = "SERIAL_ADAPTER"
    UNIPELT = "UNIPELT"


def register(adapter_type: AdapterType, config: type[PeftConfig], tuner: type[AdapterTuner]) -> None:
    """Make PEFT know a method by its name.

    PEFT's `register_peft_method` refuses names outside its enum, but all that PEFT does with a method goes through
    these three dictionaries. Their keys hash and compare like strings, as the name in an `adapter_config.json` does.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[adapter_type] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[adapter_type] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[adapter_type] = tuner.prefix  # type: ignore[index]


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that the configurations have in common."""

    bottleneck_size: int = 8
    non_linearity: str = "gelu"
    dropout: float = 0.0
    init_std: float = 0.01
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None

    list_fields: ClassVar[tuple[str, ...]] = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        require_peft(type(self).__name__)
        for name in self.list_fields:
            value = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, [value])
            elif value is not None and not isinstance(value, str):  # sets have no order that a file could keep
                setattr(self, name, sorted(value) if isinstance(value, set | frozenset) else list(value))
        self.require_count("bottleneck_size")
        self.require("dropout", is_number(self.dropout) and 0 <= self.dropout < 1, "a probability below 1")
        self.require("init_std", is_number(self.init_std) and self.init_std > 0, "a number above 0")
        self.require("layers_to_transform", self.layers_to_transform != [], "layer numbers, or None for all layers")
        if self.non_linearity not in NON_LINEARITIES:
            raise AdapterError(
                f"{type(self).__name__}: non_linearity={self.non_linearity!r} is not one of "
                f"{', '.join(NON_LINEARITIES)}.{did_you_mean(self.non_linearity, NON_LINEARITIES)}"
            )

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise AdapterError for the field `name` unless it `holds`."""
        if not holds:
            raise AdapterError(f"{type(self).__name__}: {name}={getattr(self, name)!r} must be {allowed}.")

    def require_count(self, name: str) -> None:
        """Raise AdapterError unless the field `name` is 1 or more."""
        value: object = getattr(self, name)
        self.require(name, isinstance(value, int) and is_number(value) and value >= 1, "a whole number from 1")


def require_peft(name: str) -> None:
    """Raise AdapterError for a PEFT that would train the adapter and then refuse to save it."""
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        raise AdapterError(
            f"{name} needs peft 0.21 or later, and {peft.__version__} is installed: older ones cannot save a method "
            "that is not their own. Upgrade with pip install -U peft."
        )


def is_number(value: object) -> bool:
    """Whether a value, perhaps read from a file, is a number; YAML reads 1e-2 as a text."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class AdapterTuner(BaseTuner):
    """PEFT's tuner for methods that wrap linear layers and cannot be merged into them."""

    adapter_type: AdapterType

    def name_fields(self) -> tuple[str, ...]:
        """The configuration's fields that name modules to wrap."""
        return ("target_modules",)

    def fill_names(self, config: Any) -> None:
        """Fill in the fields that are None for `self.model`."""
        raise NotImplementedError

    def new_layer(self, target: nn.Module, config: Any, key: str) -> AdapterLayer:
        """The wrapper, with no adapter yet, of the linear layer that is called `key` in the model."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Fill in and check the modules' names. PEFT calls this before it changes anything."""
        self.fill_names(peft_config)
        named: list[Names] = [getattr(peft_config, name) for name in self.name_fields()]
        every_linear = named == ["all-linear"]
        if not every_linear:
            for name, names in zip(self.name_fields(), named, strict=True):
                check_names(self.model, name, names)
        if peft_config.layers_to_transform is not None:
            found = [
                name
                for name, _ in base_modules(self.model)
                if every_linear or any(matches(name, names) for names in named)
            ]
            check_layers(self.model, found, peft_config.layers_to_transform)
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        answers = [is_targeted(key, getattr(peft_config, name), peft_config) for name in self.name_fields()]
        return next((answer for answer in answers if answer), answers[0])

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, AdapterLayer) else self.new_layer(target, peft_config, current_key)
        layer.add_adapter(adapter_name, peft_config, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        refuse_to_merge(self.adapter_type)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer with adapters around it: what is common to all kinds."""

    adapter_type: AdapterType

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names + self.other_param_names:
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add_adapter(self, adapter_name: str, config: Any, key: str) -> None:
        """Add a new adapter, which PEFT then makes active or not; `key` is the layer's name in the model."""
        self.make_adapter(adapter_name, config, key)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def make_adapter(self, adapter_name: str, config: Any, key: str) -> None:
        """Make the modules of a new adapter."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_to_merge(self.adapter_type)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def refuse_to_merge(adapter_type: AdapterType) -> NoReturn:
    raise AdapterError(
        f"{adapter_type.value} is not linear in its input and cannot be merged into the model's weights. Keep the "
        "adapter beside the model (save_pretrained, PeftModel.from_pretrained), or take it off with unload()."
    )
