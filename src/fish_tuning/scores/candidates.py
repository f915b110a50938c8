"""From where a tensor can be watched: its own layer, by rule, else that module, or one around it, done again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from fish_tuning.scores.layer_rules import rule_for
from fish_tuning.scores.recomputed_layers import RecomputedLayer
from fish_tuning.scores.sharded_models import is_gathered
from fish_tuning.scores.tied_layers import TiedLayers
from fish_tuning.scores.watched_layers import Pass, RuleLayer, WatchedLayer

# Modules that hold tensors for the module around them, and are not called.
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


class Candidates:
    """The layers of a model that could be watched for its tensors, the innermost first."""

    def __init__(self, model: nn.Module) -> None:
        get_base_model: Any = getattr(model, "get_base_model", lambda: model)
        # Doing these again is the loop.
        self._whole = {id(model), id(getattr(model, "base_model", None)), id(get_base_model())}
        self._modules = dict(model.named_modules())
        self._users: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self._modules.values():
            for parameter in module._parameters.values():
                self._users[id(parameter)].append(module)
        self._parents = Counter(id(child) for module in self._modules.values() for child in module._modules.values())
        self._seen: dict[int, list[torch.Size]] = defaultdict(list)
        self._seen_of = Pass()
        self._tried: dict[str, list[str]] = defaultdict(list)  # by tensor: the modules that were done again

    def first(self, names: set[str], state: Pass) -> list[WatchedLayer]:
        """The innermost layers for these tensors, as far as there are any."""
        layers: list[WatchedLayer] = []
        left = set(names)
        ids = {id(self._tensor(name)): name for name in names}
        ruled: dict[str, list[nn.Module]] = defaultdict(list)  # the modules that hold a tensor, and have a rule for it
        named = []
        for module in self._modules.values():
            if (rule := rule_for(module)) is None:
                continue
            found = {local: ids.get(id(_parameter(module, local)), "") for local in rule.parameters(module)}
            named.append((module, rule, found))
            for local in found.keys() & module._parameters.keys():
                ruled[found[local]].append(module)
        for module, rule, found in named:
            # A tensor shared by two layers needs the sum of both before squaring, which no single layer sees. Of those
            # that have it and no rule for it, as heads hold their decoder's bias, its proof shows that none uses it.
            own = {
                local: name
                for local, name in found.items()
                if name in left and (len(self._users_of(name)) == 1 or ruled[name] == [module])
            }
            if own:
                layers.append(RuleLayer(module, own, state, rule))
                left -= set(own.values())
        for name in sorted(left):
            users = ruled[name]
            if len(users) > 1 and TiedLayers.can_watch(users, self._tensor(name)):
                layers.append(TiedLayers(users, name, state))
                left.remove(name)
        return [*layers, *self._done_again({name: self._innermost(name) for name in left}, state)]

    def further_out(self, names: Iterable[str], state: Pass) -> list[WatchedLayer]:
        """The next layers for these tensors, after their last ones failed."""
        return self._done_again({name: self._around(name, state.repeated) for name in names}, state)

    @contextmanager
    def shapes_seen(self, state: Pass) -> Iterator[None]:
        """Remember the shapes that the modules give in a forward pass, with what batch they are of."""

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            shapes = [value.shape for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad]
            self._seen[id(module)] += shapes

        self._seen.clear()
        handle = register_module_forward_hook(remember)
        try:
            yield
        finally:
            handle.remove()
            self._seen_of = Pass(state.batch_size, state.shapes)

    def _done_again(self, places: dict[str, str | None], state: Pass) -> list[WatchedLayer]:
        own: dict[str, dict[str, str]] = {}
        for name, prefix in sorted(places.items()):
            if prefix is not None:
                self._tried[name].append(prefix)
                own.setdefault(prefix, {})[name.removeprefix(f"{prefix}.")] = name
        return [RecomputedLayer(self._modules[prefix], found, state) for prefix, found in own.items()]

    def _tensor(self, name: str) -> Any:
        prefix, _, local = name.rpartition(".")
        return self._modules[prefix]._parameters[local]

    def _users_of(self, name: str) -> list[nn.Module]:
        return self._users[id(self._tensor(name))]

    def _innermost(self, name: str) -> str | None:
        """The module that holds the tensor and is called."""
        prefix = name.rpartition(".")[0]
        if len(self._users_of(name)) > 1:
            return None
        while isinstance(self._modules[prefix], _CONTAINERS) and self._parents[id(self._modules[prefix])] == 1:
            prefix = prefix.rpartition(".")[0]
        module = self._modules[prefix]
        if is_gathered(module):
            return None
        # Several modules use a container that is none's alone.
        return None if isinstance(module, _CONTAINERS) or id(module) in self._whole else prefix

    def _around(self, name: str, repeated: set[nn.Module]) -> str | None:
        """The next module further out that keeps examples apart, by the shapes that it gives."""
        if len(self._users_of(name)) > 1:
            return None
        tried = self._tried[name]
        prefix = tried[-1].rpartition(".")[0] if tried else name.rpartition(".")[0]
        while prefix:
            module = self._modules[prefix]
            shapes = self._seen.get(id(module), [])
            if id(module) in self._whole or is_gathered(module):
                return None
            seen_of = self._seen_of
            for_all = isinstance(module, nn.Embedding) and module not in repeated  # positions, in one row
            rows = {seen_of.batch_size, 1} if for_all else {seen_of.batch_size}
            if shapes and all(shape[:1].numel() in rows or seen_of.relations(shape) for shape in shapes):
                return prefix
            prefix = prefix.rpartition(".")[0]
        return None


def _parameter(module: nn.Module, local: str) -> Any:
    """A module's own parameter, or that of a part of it: of a masked tensor its values, which reading does not give."""
    path, _, name = local.rpartition(".")
    return module.get_submodule(path)._parameters.get(name)
