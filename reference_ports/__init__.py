"""Models as trees: one package a family, each with its key maps, its README and its printed tree.

Importing this package imports no family; `PORTS()` imports them all.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refiners.conversion import Port

FAMILIES = ("bert", "clip", "vit")


def PORTS() -> "Mapping[str, Port]":
    """All ports of all families, by the name that the command line calls them."""
    return {name: port for family in FAMILIES for name, port in import_module(f"{__name__}.{family}").PORTS.items()}
