"""What LoRA files call the layers of a tree: the names of the code they were trained with.

A file says `down_blocks.0.attentions.0.proj_in`, or `down_blocks_0_attentions_0_proj_in`; the tree calls that layer
`DownBlocks.DownBlock_1.CrossAttention2d_1.Conv2d_1`. Every name a file may use is written out once, from the key map of
the port, and looked up. Nothing is taken apart: where the `_` of a name stood for a `.` is known, not guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from refiners.conversion.key_map import KeyMap
from refiners.errors import ConversionError
from refiners.fluxion.adapters.weights import base_of, named_base_modules


class LoraNames:
    """The layers of one tree under the names that LoRA files use.

    Receives:
        paths: the name of a layer in the published code -> its path in the tree.
        aliases: another spelling -> the name.
        kohya: the name -> the spelling that kohya's scripts make theirs from, where it is another one.
        layers: the layer at each path.
        title: what the tree is, for messages.
        part: what files of several models call this one: `unet`, `text_encoder`, `text_encoder_2`, or "".

    Example:
        >>> import refiners.fluxion.layers as fl
        >>> names = LoraNames.of(fl.Chain(fl.Linear(2, 2)), KeyMap({"mlp.fc_1": "Linear"}))
        >>> names.find("mlp.fc_1"), names.find("mlp_fc_1", joined=True), names.find("mlp.fc_2")
        (['Linear'], ['Linear'], [])
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        *,
        aliases: Mapping[str, str] | None = None,
        kohya: Mapping[str, str] | None = None,
        layers: Mapping[str, nn.Module] | None = None,
        title: str = "the model",
        part: str = "",
    ) -> None:
        self.paths = dict(paths)
        self.aliases = dict(aliases or {})
        self.kohya = dict(kohya or {})
        self.layers = dict(layers or {})
        self.title = title
        self.part = part

    @classmethod
    def of(cls, model: nn.Module, key_map: KeyMap, **about: Any) -> "LoraNames":
        """The names that a key map gives to the layers of a tree. Injected adapters do not count.

        An alias of the key map such as `{"text_model.{rest}": "{rest}"}` is one of the names too.

        Receives:
            model: the tree.
            key_map: from the published keys to those of the tree.
            about: the other arguments of `LoraNames`; `aliases` are added to those of the key map.
        """
        paths: dict[str, str] = {}
        layers: dict[str, nn.Module] = {}
        for path, layer in named_base_modules(model):
            weight = getattr(layer, "weight", None)
            name = None if weight is None else key_map.source_of(f"{path}.weight" if path else "weight")
            if name is not None and name.endswith(".weight"):
                paths.setdefault(name.removesuffix(".weight"), path)
                layers[path] = layer
        aliases = {f"{prefix}{name}": name for prefix in _prefixes(key_map) for name in paths}
        return cls(paths, aliases={**aliases, **about.pop("aliases", {})}, layers=layers, **about)

    def find(self, name: str, joined: bool = False) -> list[str]:
        """The paths that a name stands for: one, none, or several that it could stand for equally well.

        Receives:
            name: the name as the file has it.
            joined: whether it is written with `_` in the place of `.`.
        """
        if joined:
            return self._joined.get(name, [])
        name = self.aliases.get(name, name)
        return [self.paths[name]] if name in self.paths else []

    @cached_property
    def _joined(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for spelling in (*self.paths, *self.aliases):
            path = self.paths.get(self.aliases.get(spelling, spelling))
            if path is not None and path not in (paths := found.setdefault(spelling.replace(".", "_"), [])):
                paths.append(path)
        return found

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The path of a layer -> its name: the inverse of `paths`."""
        return {path: name for name, path in self.paths.items()}

    def joined_name(self, path: str) -> str:
        """The name of the layer at this path as kohya's scripts write it."""
        name = self.names[path]
        return self.kohya.get(name, name).replace(".", "_")

    def spellings(self, joined: bool = False) -> list[str]:
        """All names that are understood, for messages."""
        return list(self._joined) if joined else [*self.paths, *self.aliases]


def _prefixes(key_map: KeyMap) -> list[str]:
    """What may stand before every name: `text_model.` for the alias `{"text_model.{rest}": "{rest}"}`."""
    return [
        alias.removesuffix("{rest}")
        for alias, spelling in key_map.aliases.items()
        if spelling == "{rest}" and alias.endswith(".{rest}") and "{" not in alias.removesuffix("{rest}")
    ]


@dataclass(frozen=True, kw_only=True)
class LoraTarget:
    """A kind of tree that LoRA files are trained for. A family declares its own with `register`.

    Attributes:
        title: what all of them are, whatever the size.
        tree: the class of the tree; the most special one that fits a model counts.
        names: what files call the layers of such a tree.
        published: what is published in that form: a title, and what builds the tree of that size.
    """

    title: str
    tree: type[nn.Module]
    names: Callable[[Any], LoraNames]
    published: Mapping[str, Callable[[], nn.Module]]


_TARGETS: dict[type[nn.Module], LoraTarget] = {}


def register(*targets: LoraTarget) -> None:
    """Makes kinds of trees known to `LoraFile.specs_for` and to the recognition of files."""
    _TARGETS.update({target.tree: target for target in targets})


def registered() -> tuple[LoraTarget, ...]:
    """All kinds of trees whose families were imported."""
    return tuple(_TARGETS.values())


Named = nn.Module | LoraNames
"""A model of a registered family, or the names of its layers."""


def names_of(model: Named, key_map: KeyMap | None = None) -> LoraNames:
    """What LoRA files call the layers of a model.

    Receives:
        model: the tree. One that is no tree of a registered family needs a key map.
        key_map: from the published keys to those of the tree.

    Raises:
        ConversionError: nothing says how its layers are called.
    """
    if isinstance(model, LoraNames):
        return model
    if key_map is not None:
        return LoraNames.of(model, key_map, title=key_map.name)
    base = base_of(model)
    for kind in type(base).__mro__:
        if kind in _TARGETS:
            return _TARGETS[kind].names(model)
    known = ", ".join(sorted(kind.__name__ for kind in _TARGETS)) or "none: import a family of reference_ports"
    raise ConversionError(
        f"Nothing says what LoRA files call the layers of {type(base).__name__}. Give its key map: "
        f"specs_for(model, key_map). Known are the trees {known}."
    )
