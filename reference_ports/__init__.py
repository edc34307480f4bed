"""Models as trees: one package a family, each with its key maps, its README and its printed tree.

Importing this package imports no family; `PORTS()` imports them all.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from refiners.conversion import Bundle, Port

FAMILIES = ("autoencoder", "bert", "clip", "unet", "vit")


def PORTS() -> "Mapping[str, Port]":
    """All ports of all families, by the name that the command line calls them."""
    return {name: port for family in FAMILIES for name, port in import_module(f"{__name__}.{family}").PORTS.items()}


def BUNDLES() -> "Mapping[str, Bundle]":
    """All models of several parts, by the name that the command line calls them."""
    return import_module(f"{__name__}.pipelines.stable_diffusion.checkpoints").BUNDLES


def COMMANDS() -> "Mapping[str, Callable[..., str]]":
    """What does the work of the command line's commands that need models."""
    return import_module(f"{__name__}.pipelines.stable_diffusion.command").COMMANDS
