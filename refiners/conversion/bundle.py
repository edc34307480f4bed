"""A published model made of several parts, as the command line knows it: `sd15` in `refiners convert sd15 DIR out/`.

A *bundle* says of each part how it is built, and how its weights are named in the two layouts that are published: the
folder (one sub-folder a part, each with a config.json) and the single file (all weights in one, no configuration).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from refiners.conversion.key_map import KeyMap

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a bundle, such as its UNet.

    Attributes:
        name: what it is called here, and its file after conversion: `unet` for `unet.safetensors`.
        folder: its sub-folder in the published layout.
        config: its published configuration, which single files lack.
        build: builds the port of a configuration, on torch's default device (`meta` included).
        keys: the key map from the published keys to the port's, for a configuration.
        prefixes: what its keys begin with in a single file, other spellings included; none if it is in no single file.
        single_file: the key map from the keys of a single file, without the prefix, to the published ones.
    """

    name: str
    folder: str
    config: Config
    build: Callable[[Config], nn.Module]
    keys: Callable[[Config], KeyMap]
    prefixes: tuple[str, ...] = ()
    single_file: Callable[[Config], KeyMap] | None = None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A published model made of several parts. One without parts is known by sight only, for a better message.

    A package that holds bundles declares a mapping of them, or a function that returns one, in the entry-point group
    `refiners.bundles` (see `refiners.ports`).

    Attributes:
        name: what the command line calls it, such as `sd15`.
        title: its name in messages, such as `SD 1.5`.
        summary: one line for lists.
        recognises: whether weights with these keys and shapes are such a model. Keys are those of a single file, or
            `folder/key` for a folder.
        parts: the models it is made of.
        scheduler: its published scheduler_config.json, which single files lack.
        pipeline: what its model_index.json says beside the parts.
        tokenizers: the sub-folders with tokenizer files.
        ignore: keys of single files that belong to no part: pattern to reason.
    """

    name: str
    title: str
    summary: str = ""
    recognises: Callable[[Mapping[str, torch.Size]], bool]
    parts: tuple[Part, ...] = ()
    scheduler: Config = field(default_factory=dict[str, Any])
    pipeline: Config = field(default_factory=dict[str, Any])
    tokenizers: tuple[str, ...] = ()
    ignore: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def prediction_type(self) -> str:
        """What the model predicts: two models with the same keys may differ by this alone."""
        return self.scheduler.get("prediction_type", "epsilon")
