"""Ports are found by name through entry points, and what is wrong with an entry point is said."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refiners import ports
from refiners.errors import ConversionError

TEXT, IMAGE = SimpleNamespace(summary="a text encoder"), SimpleNamespace(summary="an image encoder")
AS_A_MAPPING = {"clip-text-l": TEXT, "clip-image-h": IMAGE}
NEITHER = 3


def as_a_function() -> dict[str, Any]:
    return {"bert": TEXT}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The values of the entry points that packages declare. No checkout says anything."""
    values: list[str] = []
    module = SimpleNamespace(mapping=AS_A_MAPPING, function=as_a_function, neither=NEITHER, other={"bert": IMAGE})
    monkeypatch.setitem(sys.modules, "third_party", module)
    monkeypatch.setattr(ports, "CHECKOUT", tmp_path)
    monkeypatch.setattr(
        ports, "entry_points", lambda group: [EntryPoint(name="x", value=value, group=group) for value in values]
    )
    return values


def test_ports_of_all_packages_are_found_by_name(installed: list[str]) -> None:
    installed += ["third_party:mapping", "third_party:function"]
    assert list(ports.find_ports()) == ["clip-text-l", "clip-image-h", "bert"]
    assert ports.find_port("clip-text-l") is TEXT


def test_bundles_are_found_in_a_group_of_their_own(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.append("third_party:mapping")
    assert list(ports.find_bundles()) == ["clip-text-l", "clip-image-h"]
    groups: list[str] = []
    monkeypatch.setattr(ports, "entry_points", lambda group: groups.append(group) or [])
    ports.find_bundles()
    ports.find_ports()
    assert groups == ["refiners.bundles", "refiners.ports"]


def test_an_unknown_name_is_answered_with_the_nearest_ones(installed: list[str]) -> None:
    installed.append("third_party:mapping")
    with pytest.raises(ConversionError, match=r'"clip-txt-l". Did you mean clip-text-l.*The ports are: clip-text-l, '):
        ports.find_port("clip-txt-l")


def test_no_port_at_all_is_answered_with_what_to_install(installed: list[str]) -> None:
    assert installed == []
    with pytest.raises(ConversionError, match="no port is installed.*pip install"):
        ports.find_port("bert")


@pytest.mark.parametrize("value", ["nowhere:PORTS", "third_party:nothing"])
def test_an_entry_point_that_leads_nowhere_is_named(value: str, installed: list[str]) -> None:
    installed.append(value)
    with pytest.raises(ConversionError, match=f'"{value}".*cannot be loaded.*Repair or uninstall'):
        ports.find_ports()


def test_an_entry_point_of_another_kind_is_refused(installed: list[str]) -> None:
    installed.append("third_party:neither")
    with pytest.raises(ConversionError, match="must be a mapping.*not int"):
        ports.find_ports()


def test_two_ports_of_one_name_are_refused(installed: list[str]) -> None:
    installed += ["third_party:function", "third_party:other"]
    with pytest.raises(ConversionError, match='Two ports are called "bert".*third_party:function.*third_party:other'):
        ports.find_ports()


def test_a_checkout_that_is_not_installed_is_read(installed: list[str], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "refiners"\n[project.entry-points."refiners.ports"]\nx = "third_party:function"\n'
    )
    assert installed == []
    assert list(ports.find_ports()) == ["bert"]


def test_another_project_beside_the_package_says_nothing(installed: list[str], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "other"\n[project.entry-points."refiners.ports"]\nx = "third_party:function"\n'
    )
    assert installed == []
    assert ports.find_ports() == {}


def test_this_project_declares_its_reference_ports() -> None:
    found = ports.find_ports()
    assert found
    assert all(port.summary for port in found.values())


def test_commands_that_need_models_are_found_by_name(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["third_party"], "mapping", {"generate": as_a_function})
    installed.append("third_party:mapping")
    assert ports.find_command("generate") is as_a_function


def test_a_command_without_its_package_is_answered_with_what_to_install(installed: list[str]) -> None:
    assert installed == []
    with pytest.raises(ConversionError, match='"refiners generate" needs models.*pip install'):
        ports.find_command("generate")
