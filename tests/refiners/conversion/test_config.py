from pathlib import Path
from typing import Any

import pytest

from refiners.conversion import TRANSFORMERS_NEUTRAL, TRANSFORMERS_ONLY, ConfigReader, read_config
from refiners.errors import ConversionError, FileFormatError

CONFIG: dict[str, Any] = {
    "model_type": "toy",
    "hidden_size": 8,
    "eps": 1e-5,
    "causal": True,
    "hidden_act": "gelu",
    "sizes": [1, 2],
    "text_config": {"width": 3},
    "use_cache": True,
}


def read_all(config: dict[str, Any]) -> list[Any]:
    neutral = {"use_cache": "the port has no cache"}
    with ConfigReader(config, "toy", only={"model_type": "toy", "rotary": False}, neutral=neutral) as read:
        values: list[Any] = [read.integer("hidden_size"), read.number("eps", default=1e-6), read.flag("causal")]
        values += [read.choice("hidden_act", {"gelu": 1, "relu": 2}), read.integers("sizes")]
        values.append(read.section("text_config").integer("width"))
    return values


def test_a_reader_gives_the_values_that_the_port_needs() -> None:
    assert read_all(CONFIG) == [8, 1e-5, True, 1, (1, 2), 3]
    assert read_all({key: value for key, value in CONFIG.items() if key != "eps"})[1] == 1e-6


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"qk_norm": True}, "qk_norm: is True, the port does not know this attribute"),
        ({"rotary": True}, "rotary: is True, the port implements False only"),
        ({"rotary": 0}, "rotary: is 0, the port implements False only"),
        ({"model_type": "bert"}, "model_type: is 'bert', the port implements 'toy' only"),
        ({"hidden_size": None}, "hidden_size: is None, the port takes a whole number"),
        ({"hidden_size": 8.0}, "hidden_size: is 8.0, the port takes a whole number"),
        ({"hidden_size": True}, "hidden_size: is True, the port takes a whole number"),
        ({"eps": "small"}, "eps: is 'small', the port takes a number"),
        ({"causal": 1}, "causal: is 1, the port takes true or false"),
        ({"hidden_act": "silu"}, "hidden_act: is 'silu', the port takes one of 'gelu', 'relu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act: is ['gelu'], the port takes one of"),
        ({"sizes": "12"}, "sizes: is '12', the port takes a list of whole numbers"),
        ({"text_config": 3}, "text_config: is 3, the port takes a nested configuration"),
        ({"text_config": {"width": 3, "depth": 1}}, "text_config.depth: is 1, the port does not know this attribute"),
        ({"text_config": {}}, "text_config.width: is required"),
    ],
)
def test_an_attribute_that_cannot_be_honoured_is_an_error(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read_all(CONFIG | change)
    assert f"\n  {line}" in str(caught.value)
    assert "1 of its attributes" in str(caught.value)


def test_one_error_lists_all_attributes_and_the_nearest_names() -> None:
    with pytest.raises(ConversionError) as caught:
        read_all({"hiden_size": 8, "model_type": "bert"})
    message = str(caught.value)
    assert message.startswith("The configuration of toy cannot be honoured: 7 of its attributes do not fit.")
    assert "hidden_size: is required, a whole number, and is not there; nearest: 'hiden_size'" in message
    assert "hiden_size: is 8, the port does not know this attribute" in message
    assert "text_config: is required" in message


def test_a_failure_caused_by_a_bad_value_names_the_bad_value() -> None:
    with pytest.raises(ConversionError, match="num_heads: is None") as caught:
        with ConfigReader({"num_heads": None}, "toy") as read:
            raise RuntimeError(f"{read.integer('num_heads')} heads of nothing")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_asking_whether_an_attribute_is_there_does_not_handle_it() -> None:
    read = ConfigReader({"projection_dim": 4, "nothing": None}, "toy", neutral={"nothing": "is null"})
    assert [read.has(name) for name in ("projection_dim", "nothing", "absent")] == [True, False, False]
    with pytest.raises(ConversionError, match="projection_dim"):
        read.__exit__(None, None, None)


def test_a_neutral_attribute_needs_a_reason() -> None:
    with pytest.raises(ConversionError, match="use_cache has none"):
        ConfigReader({}, "toy", neutral={"use_cache": ""})
    assert all(reason.strip() for reason in TRANSFORMERS_NEUTRAL.values())
    assert not set(TRANSFORMERS_NEUTRAL) & set(TRANSFORMERS_ONLY)


def test_a_configuration_file_holds_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 8}')
    assert read_config(path) == {"hidden_size": 8}
    path.write_text("[]")
    with pytest.raises(FileFormatError, match="holds a JSON list"):
        read_config(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(FileFormatError, match="is not JSON"):
        read_config(path)
