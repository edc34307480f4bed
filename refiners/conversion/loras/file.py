"""A LoRA file in memory: what it holds for each layer, under the names that it uses itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from refiners.conversion.header import Header
from refiners.conversion.key_map import KeyMap
from refiners.conversion.loras.peft_config import PeftConfig
from refiners.conversion.problems import Problems
from refiners.fluxion.adapters.lora.spec import DeltaSpec, is_finite

if TYPE_CHECKING:
    from refiners.conversion.loras.matching import LoraSpecs
    from refiners.conversion.loras.names import Named

METHODS = ("lora", "dora", "locon", "loha", "lokr")
"""The methods whose adapters are LoRAs, by a wide meaning of the word: `inject_loras` takes them."""


@dataclass(frozen=True)
class LoraEntry:
    """What a file holds for one layer.

    Attributes:
        prefix: what stands before the name of the layer, such as `unet.` or `lora_te1_`.
        part: the model it is for: `unet`, `text_encoder`, `text_encoder_2`; "" for the only one.
        module: the name of the layer.
        spec: the adapter, its tensors mapped from the file.
        keys: the key of each tensor by role, `alpha` included.
        stored: tensors whose shape or type in the file is another than in the spec, by role.
    """

    prefix: str
    part: str
    module: str
    spec: DeltaSpec
    keys: Mapping[str, str]
    stored: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def name(self) -> str:
        """The name with what stands before it."""
        return self.prefix + self.module

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the keys of the file, as they are stored in it."""
        tensors = {self.keys[role]: tensor for role, tensor in self.spec.tensors.items()}
        for role, tensor in self.stored.items():
            given = self.spec.tensors.get(role)
            tensors[self.keys[role]] = tensor if given is None else given.reshape(tensor.shape)
        return tensors

    def problems(self, with_values: bool = True) -> list[str]:
        """What is wrong with it, whatever the layer.

        Receives:
            with_values: whether the values are looked at, which reads the file.
        """
        spec = self.spec
        found = spec.validate(with_values) if spec.method in METHODS else _problems_of_others(spec, with_values)
        alpha = self.spec.alpha
        if alpha is not None and not math.isfinite(alpha):
            found.append(f"alpha is {alpha}")
        return found


def _problems_of_others(spec: DeltaSpec, with_values: bool) -> list[str]:
    return [
        f"{role} holds values that are not finite"
        for role, tensor in spec.tensors.items()
        if with_values and not is_finite(tensor)
    ]


@dataclass(frozen=True)
class LoraFile:
    """The adapters of a LoRA file. `read_loras` gives one.

    Attributes:
        layout: `diffusers`, `peft` or `kohya`.
        entries: what it holds, by the name of the layer with what stands before it.
        metadata: what the file says about itself; kohya's scripts note there how it was trained (`ss_…`).
        config: the attributes of peft's adapter_config.json, None without one.
        configs: what was read of configurations, by part.
        path: where it was read from.
        header: the header of the file, None if it was no file.
        problems: what could not be read and is left out; empty unless it was read with `strict=False`.
    """

    layout: str
    entries: Mapping[str, LoraEntry]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] | None = None
    configs: Mapping[str, PeftConfig] = field(default_factory=dict[str, PeftConfig])
    path: Path | None = None
    header: Header | None = None
    problems: Problems = field(default_factory=Problems)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        where = "" if self.path is None else f"{str(self.path)!r}, "
        parts = ", ".join(f"{len(self.of_part(part))} layers of {part or 'one model'}" for part in self.parts)
        return f"LoraFile({where}{self.layout}, {parts})"

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return "The state dict" if self.path is None else str(self.path)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The models it is for: `unet`, `text_encoder`, `text_encoder_2`; "" for a file of one model."""
        return tuple(dict.fromkeys(entry.part for entry in self.entries.values()))

    @property
    def specs(self) -> dict[str, DeltaSpec]:
        """All adapters by the names of the file. `specs_for` gives them by the paths of a tree."""
        return {name: entry.spec for name, entry in self.entries.items()}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods it makes use of, such as `lora` or `loha`."""
        return tuple(dict.fromkeys(entry.spec.method for entry in self.entries.values()))

    def of_part(self, part: str) -> list[LoraEntry]:
        """What it holds for one model."""
        return [entry for entry in self.entries.values() if entry.part == part]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the keys of the file: what it is written from."""
        return {key: tensor for entry in self.entries.values() for key, tensor in entry.tensors.items()}

    def specs_for(
        self, model: "Named", key_map: KeyMap | None = None, *, part: str | None = None, strict: bool = True
    ) -> "LoraSpecs":
        """The adapters for the layers of a model, by path: what `inject_loras` takes. See `matching.specs_for`.

        Raises:
            ConversionError: names, shapes or values do not fit, or the file holds nothing for the model. Lists all.
        """
        # What matches files to trees is built on files.
        from refiners.conversion.loras.matching import specs_for

        return specs_for(self, model, key_map, part=part, strict=strict)
