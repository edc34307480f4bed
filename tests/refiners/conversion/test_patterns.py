import pytest

from refiners.conversion.patterns import Pattern, PatternIndex
from refiners.errors import ConversionError


def found(patterns: list[str], key: str, bare: bool = False) -> list[tuple[str, dict[str, int | str], str]]:
    index: PatternIndex[str] = PatternIndex(bare=bare)
    for pattern in patterns:
        index.add(Pattern(pattern), pattern)
    return [(match.value, dict(match.bindings), match.below) for match in index.find(key)]


@pytest.mark.parametrize(
    ("pattern", "key", "bindings"),
    [
        ("layers.{i}.fc", "layers.12.fc", {"i": 12}),
        ("layers.{i+1}.fc", "layers.12.fc", {"i": 11}),
        ("layers.{i-1}.fc", "layers.12.fc", {"i": 13}),
        ("layers.{2*i+1}.fc", "layers.13.fc", {"i": 6}),
        ("layers.{block:int}.fc", "layers.3.fc", {"block": 3}),
        ("Layer_{i+1}.norm{n}", "Layer_1.norm2", {"i": 0, "n": 2}),
        ("a.{i}.b.{j}.c.{k}", "a.0.b.1.c.2", {"i": 0, "j": 1, "k": 2}),
        ("norm.{p}", "norm.bias", {"p": "bias"}),
        ("{side:down|up}_blocks.{i}", "up_blocks.3", {"side": "up", "i": 3}),
        ("text_model.{rest}", "text_model.a.b.c", {"rest": "a.b.c"}),
        ("{rest}.gamma", "a.LayerNorm.gamma", {"rest": "a.LayerNorm"}),
        ("{tower}_model.fc", "vision_model.fc", {"tower": "vision"}),
        ("a.{i}.b.{i}", "a.4.b.4", {"i": 4}),
    ],
)
def test_a_pattern_binds_what_stands_between_its_braces(pattern: str, key: str, bindings: dict[str, int | str]) -> None:
    assert found([pattern], key) == [(pattern, bindings, "")]
    assert Pattern(pattern).fill(bindings) == key


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ("layers.{i}.fc", "layers.x.fc"),
        ("layers.{i}.fc", "layers.01.fc"),
        ("layers.{i+1}.fc", "layers.0.fc"),
        ("layers.{2*i}.fc", "layers.3.fc"),
        ("norm.{p}", "norm.gamma"),
        ("a.{i}.b.{i}", "a.4.b.5"),
        ("a.b.c", "a.b"),
        ("a.{name}.c", "a.x.y.c"),
        ("Layer_{i+1}.fc", "Layer.fc"),
    ],
)
def test_a_pattern_does_not_match_what_it_could_not_write(pattern: str, key: str) -> None:
    assert found([pattern], key) == []


def test_a_pattern_covers_every_key_below_it() -> None:
    assert found(["a.{i}"], "a.0.b.weight") == [("a.{i}", {"i": 0}, ".b.weight")]


def test_the_pattern_with_most_literal_segments_wins() -> None:
    patterns = ["encoder", "encoder.layers.{i}", "encoder.layers.{i}.norm", "{rest}"]
    assert [value for value, _, _ in found(patterns, "encoder.layers.0.norm.weight")] == ["encoder.layers.{i}.norm"]
    assert [value for value, _, _ in found(patterns, "encoder.embedding")] == ["encoder"]


def test_equally_good_patterns_are_all_found() -> None:
    assert len(found(["a.{name}", "a.{p}"], "a.bias")) == 2


def test_the_name_of_an_only_child_has_no_number() -> None:
    assert found(["Layer_{i+1}.fc"], "Layer.fc", bare=True) == [("Layer_{i+1}.fc", {"i": 0}, "")]
    assert found(["Layer_1.fc"], "Layer.fc", bare=True) == []


@pytest.mark.parametrize("pattern", ["a..b", "", "a.{i", "a.{}", "a.{i+}", "a.x{rest}", "a.{name+1}", "a.{i:x|y}"])
def test_a_pattern_that_is_not_understood_is_refused_with_its_text(pattern: str) -> None:
    with pytest.raises(ConversionError, match="pattern"):
        Pattern(pattern)
