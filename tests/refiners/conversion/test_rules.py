import pytest
import torch
from torch import Tensor

from refiners.conversion import Merge, Rule, Split, Squeeze, Transpose, Unsqueeze
from refiners.conversion.rules import Rename
from refiners.errors import ConversionError

RULES: dict[str, tuple[Rule, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "rename": (Rename("a"), [(2, 3)], [(2, 3)]),
    "split in equal pieces": (Split("a", "b"), [(4, 3)], [(2, 3), (2, 3)]),
    "split by sizes": (Split("a", "b", dim=1, sizes=(1, 2)), [(4, 3)], [(4, 1), (4, 2)]),
    "merge": (Merge("a").with_count(3), [(2, 3)] * 3, [(6, 3)]),
    "merge of sizes": (Merge("a", dim=-1, sizes=(1, 2)), [(4, 1), (4, 2)], [(4, 3)]),
    "transpose": (Transpose("a"), [(2, 3)], [(3, 2)]),
    "transpose of other axes": (Transpose("a", -1, -3), [(2, 3, 4)], [(4, 3, 2)]),
    "unsqueeze": (Unsqueeze("a", count=2), [(2, 3)], [(2, 3, 1, 1)]),
    "unsqueeze in front": (Unsqueeze("a", dim=0), [(2, 3)], [(1, 2, 3)]),
    "unsqueeze inside": (Unsqueeze("a", dim=-2), [(2, 3)], [(2, 1, 3)]),
    "squeeze": (Squeeze("a", count=2), [(2, 3, 1, 1)], [(2, 3)]),
    "squeeze in front": (Squeeze("a", dim=0), [(1, 2, 3)], [(2, 3)]),
    "transpose, then split": (Transpose(Split("a", "b", "c")), [(2, 6)], [(2, 2)] * 3),
    "split, one piece transposed": (Split(Transpose("a"), "b", sizes=(1, 3)), [(4, 2)], [(2, 1), (3, 2)]),
    "merge, then transpose": (Merge(Transpose("a")).with_count(2), [(2, 3)] * 2, [(3, 4)]),
    "split of a split": (Split(Split("a", "b", dim=1), "c"), [(4, 2)], [(2, 1), (2, 1), (2, 2)]),
}


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_the_shapes_it_says_and_its_inverse_gives_back_the_bits(name: str, dtype: torch.dtype) -> None:
    rule, before, after = RULES[name]
    tensors = draw(before, dtype)
    made = rule.to_port(tensors)
    assert [tuple(tensor.shape) for tensor in made] == after
    assert len(rule.leaves) == len(after)
    back = rule.to_upstream(made)
    assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))
    assert {tensor.dtype for tensor in (*made, *back)} == {dtype}


@pytest.mark.parametrize("name", [name for name, (rule, _, _) in RULES.items() if not isinstance(rule, Merge)])
def test_what_a_view_can_do_copies_nothing(name: str) -> None:
    rule, before, _ = RULES[name]
    tensors = draw(before, torch.float32)
    storages = {tensor.untyped_storage().data_ptr() for tensor in rule.to_port(tensors)}
    assert storages == {tensors[0].untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Split("a", "b"), [(3, 2)]),
        (Split("a", "b", sizes=(1, 1)), [(3, 2)]),
        (Split("a", "b", dim=2), [(4, 2)]),
        (Merge("a").with_count(2), [(3, 2), (3, 3)]),
        (Merge("a").with_count(2), [(3, 2), (4, 2)]),
        (Merge("a", sizes=(3, 3)), [(3, 2), (4, 2)]),
        (Transpose("a"), [(3,)]),
        (Squeeze("a"), [(3, 2)]),
        (Squeeze("a", dim=4), [(3, 1)]),
        (Unsqueeze("a", dim=4), [(3, 1)]),
    ],
)
def test_a_shape_that_a_rule_cannot_take_is_a_conversion_error(rule: Rule, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConversionError):
        rule.to_port(draw(shapes, torch.float32))


def test_tensors_of_two_dtypes_are_not_joined_by_promoting_one() -> None:
    with pytest.raises(ConversionError, match="float32 on cpu and torch.float64 on cpu"):
        Merge("a").with_count(2).to_port([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])


def test_a_rule_without_target_or_with_too_few_sizes_is_refused() -> None:
    with pytest.raises(ConversionError, match="no target"):
        Split()
    with pytest.raises(ConversionError, match="2 pieces and 3 sizes"):
        Split("a", "b", sizes=(1, 2, 3))
    with pytest.raises(ConversionError, match="put it first"):
        Transpose(Merge("a"))


def test_a_rule_shows_its_targets_and_its_numbers() -> None:
    assert repr(Split("a", Transpose("b"), dim=1)) == "Split('a', Transpose('b', dim0=0, dim1=1), dim=1, sizes=None)"


def test_a_tensor_that_lacks_the_axes_already_is_taken_as_it_is_where_that_is_said() -> None:
    (flat,) = draw([(2, 3)], torch.float32)
    assert torch.equal(Squeeze("a", count=2, ndim=2).to_port([flat])[0], flat)
    with pytest.raises(ConversionError, match="longer than 1"):
        Squeeze("a", count=2).to_port([flat])
