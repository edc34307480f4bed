"""Ports by name: what `refiners tree clip-text-l` and `refiners convert clip-text-l …` mean by `clip-text-l`.

The framework knows no model. Packages that hold ports say so with an entry point of the group `refiners.ports`, whose
value names a mapping from port names to `refiners.conversion.port.Port`, or a function that returns one:

    [project.entry-points."refiners.ports"]
    my_ports = "my_package:PORTS"

A checkout that is not installed has no entry points; there, the same table is read from the pyproject.toml beside it.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refiners.errors import ConversionError

if TYPE_CHECKING:
    from refiners.conversion.port import Port

GROUP = "refiners.ports"
CHECKOUT = Path(__file__).resolve().parent.parent


def find_ports() -> dict[str, "Port"]:
    """All ports of all packages, by name, in the order of their packages.

    Raises:
        ConversionError: an entry point leads nowhere, or two packages give the same name to two ports.
    """
    ports: dict[str, Port] = {}
    owners: dict[str, str] = {}
    for value in _entry_point_values():
        for name, port in _load(value).items():
            if name in ports and ports[name] is not port:
                raise ConversionError(f'Two ports are called "{name}": one of {owners[name]}, one of {value}.')
            ports[name], owners[name] = port, value
    return ports


def find_port(name: str) -> "Port":
    """The port of that name.

    Raises:
        ConversionError: there is none. The message lists the nearest names, or says that no package has any.
    """
    ports = find_ports()
    if name in ports:
        return ports[name]
    if not ports:
        raise ConversionError(
            f'No port is called "{name}", because no port is installed: no package here has an entry point of the '
            f'group "{GROUP}". Install one, such as this project itself: pip install -e .'
        )
    near = difflib.get_close_matches(name, ports, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConversionError(f'No port is called "{name}". {hint}The ports are: {", ".join(ports)}.')


def _entry_point_values() -> Iterator[str]:
    """`module:attribute` of every entry point: those of the checkout first, then those of installed packages."""
    values = dict.fromkeys(_values_of_checkout(CHECKOUT / "pyproject.toml"))
    values |= dict.fromkeys(entry.value for entry in entry_points(group=GROUP))
    yield from values


def _values_of_checkout(pyproject: Path) -> list[str]:
    if not pyproject.is_file():
        return []
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    # In site-packages the file beside this package may be anything: only our own speaks for our checkout.
    return list(project.get("entry-points", {}).get(GROUP, {}).values()) if project.get("name") == "refiners" else []


def _load(value: str) -> "Mapping[str, Port]":
    """The ports behind one `module:attribute`."""
    try:
        found = EntryPoint(name=value, value=value, group=GROUP).load()
    except (ImportError, AttributeError) as error:
        raise ConversionError(
            f'The entry point "{value}" of the group "{GROUP}" cannot be loaded: {error}. '
            "Repair or uninstall the package that declares it."
        ) from error
    ports = found() if callable(found) else found
    if not isinstance(ports, Mapping):
        raise ConversionError(
            f'The entry point "{value}" of the group "{GROUP}" must be a mapping from names to ports, or a function '
            f"that returns one, not {type(ports).__name__}."
        )
    return ports  # pyright: ignore[reportUnknownVariableType] because an entry point can hold anything
