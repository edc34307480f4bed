"""Ports and bundles by name: what `refiners tree clip-text-l` and `refiners convert sd15 …` mean by those names.

The framework knows no model. Packages that hold ports say so with an entry point of the group `refiners.ports`, whose
value names a mapping from port names to `refiners.conversion.port.Port`, or a function that returns one:

    [project.entry-points."refiners.ports"]
    my_ports = "my_package:PORTS"

A published model made of several ports is a `refiners.conversion.bundle.Bundle`; the group of those is
`refiners.bundles`. The group `refiners.commands` names mappings from commands, such as `generate`, to functions.

A checkout that is not installed has no entry points; there, the same table is read from the pyproject.toml beside it.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refiners.errors import ConversionError

if TYPE_CHECKING:
    from refiners.conversion.bundle import Bundle
    from refiners.conversion.port import Port

GROUP = "refiners.ports"
BUNDLES = "refiners.bundles"
COMMANDS = "refiners.commands"
CHECKOUT = Path(__file__).resolve().parent.parent


def find_ports() -> dict[str, "Port"]:
    """All ports of all packages, by name, in the order of their packages.

    Raises:
        ConversionError: an entry point leads nowhere, or two packages give the same name to two ports.
    """
    return _find(GROUP, "ports")


def find_bundles() -> dict[str, "Bundle"]:
    """All bundles of all packages, by name, those known by sight only included.

    Raises:
        ConversionError: an entry point leads nowhere, or two packages give the same name to two bundles.
    """
    return _find(BUNDLES, "bundles")


def _find(group: str, what: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for value in _entry_point_values(group):
        for name, entry in _load(value, group, what).items():
            if name in entries and entries[name] is not entry:
                raise ConversionError(f'Two {what} are called "{name}": one of {owners[name]}, one of {value}.')
            entries[name], owners[name] = entry, value
    return entries


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


def find_convertible(name: str) -> "Port | Bundle":
    """The port or the bundle of that name: what `refiners convert` takes.

    Raises:
        ConversionError: there is none. The message lists the nearest names.
    """
    bundles = {name: bundle for name, bundle in find_bundles().items() if bundle.parts}
    if name in bundles:
        return bundles[name]
    if not bundles or name in find_ports():
        return find_port(name)
    names = [*bundles, *find_ports()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConversionError(f'No model and no port is called "{name}". {hint}There are: {", ".join(names)}.')


def find_command(name: str) -> Callable[..., str]:
    """What does the work of a command that needs models, such as `refiners generate`.

    Raises:
        ConversionError: no package here has it.
    """
    commands: dict[str, Callable[..., str]] = _find(COMMANDS, "commands")
    if name not in commands:
        raise ConversionError(
            f'"refiners {name}" needs models, and no package here has an entry point of the group "{COMMANDS}" for it. '
            "Install one, such as this project itself: pip install -e ."
        )
    return commands[name]


def _entry_point_values(group: str) -> Iterator[str]:
    """`module:attribute` of every entry point: those of the checkout first, then those of installed packages."""
    values = dict.fromkeys(_values_of_checkout(CHECKOUT / "pyproject.toml", group))
    values |= dict.fromkeys(entry.value for entry in entry_points(group=group))
    yield from values


def _values_of_checkout(pyproject: Path, group: str) -> list[str]:
    if not pyproject.is_file():
        return []
    project: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    # In site-packages the file beside this package may be anything: only our own speaks for our checkout.
    return list(project.get("entry-points", {}).get(group, {}).values()) if project.get("name") == "refiners" else []


def _load(value: str, group: str, what: str) -> Mapping[str, Any]:
    """The ports or bundles behind one `module:attribute`."""
    try:
        found = EntryPoint(name=value, value=value, group=group).load()
    except (ImportError, AttributeError) as error:
        raise ConversionError(
            f'The entry point "{value}" of the group "{group}" cannot be loaded: {error}. '
            "Repair or uninstall the package that declares it."
        ) from error
    entries = found() if callable(found) else found
    if not isinstance(entries, Mapping):
        raise ConversionError(
            f'The entry point "{value}" of the group "{group}" must be a mapping from names to {what}, or a function '
            f"that returns one, not {type(entries).__name__}."
        )
    return entries  # pyright: ignore[reportUnknownVariableType] because an entry point can hold anything
