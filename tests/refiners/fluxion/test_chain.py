"""Chain and its relatives when they run: api.md §2."""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import InputError, TreeTypeError


def plus(number: int) -> fl.Lambda:
    return fl.Lambda(lambda x: x + number)


# --- building ---------------------------------------------------------------------------------------------------


def test_children_may_be_arguments_a_list_or_a_generator() -> None:
    keys = ["Linear_1", "Linear_2"]
    assert list(fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1))._modules) == keys
    assert list(fl.Chain([fl.Linear(1, 1), fl.Linear(1, 1)])._modules) == keys
    assert list(fl.Chain(fl.Linear(1, 1) for _ in range(2))._modules) == keys
    assert list(fl.Chain(iter((fl.Linear(1, 1), fl.Linear(1, 1))))._modules) == keys


def test_a_single_chain_is_a_child_and_not_an_iterable() -> None:
    inner = fl.Chain(fl.Identity(), fl.Identity())
    outer = fl.Chain(inner)
    assert list(outer) == [inner]
    assert inner.parent is outer


def test_a_single_sequential_is_a_child() -> None:
    assert list(fl.Chain(nn.Sequential(nn.Identity()))._modules) == ["Sequential"]


@pytest.mark.parametrize("not_a_module", [1, "x", None, [1], nn.Identity, len], ids=repr)
def test_a_child_that_is_no_module_is_refused(not_a_module: Any) -> None:
    with pytest.raises(TypeError, match="takes modules") as error:
        fl.Chain(fl.Identity(), not_a_module)
    assert isinstance(error.value, TreeTypeError)


def test_the_constructor_refuses_a_child_that_has_a_parent() -> None:
    child, free = fl.Chain(), fl.Chain()
    parent = fl.Chain(child)
    with pytest.raises(AssertionError, match="parent"):
        fl.Chain(free, child)
    assert free.parent is None
    assert child.parent is parent


def test_a_leaf_may_have_two_parents() -> None:
    leaf = fl.Linear(1, 1)
    first, second = fl.Chain(leaf), fl.Chain(leaf)
    assert first[0] is second[0]


def test_an_attribute_may_be_set_before_the_constructor() -> None:
    class Named(fl.Chain):
        def __init__(self, size: int) -> None:
            self.size = size
            super().__init__(fl.Linear(size, size))

    assert Named(3).size == 3
    assert str(Named(3)) == "Named(size=3)"


def test_a_chain_that_overrides_forward_and_calls_its_parents_runs_as_a_child() -> None:
    class Twice(fl.Chain):
        def forward(self, x: Any, factor: int = 2) -> Any:
            return super().forward(x) * factor

    twice = Twice(plus(1))
    assert twice(1, factor=3) == 6
    assert fl.Chain(twice, fl.Sum(Twice(plus(0)), plus(0)))(1) == 12


# --- names -------------------------------------------------------------------------------------------------------


def test_a_child_is_named_after_its_class_and_all_are_numbered_when_it_occurs_more_than_once() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU(), fl.Linear(1, 1), nn.Linear(1, 1))
    assert list(chain._modules) == ["Linear_1", "ReLU", "Linear_2", "Linear_3"]
    assert [name for name, _ in chain.named_children()] == list(chain._modules)
    assert list(chain.state_dict())[0::2] == ["Linear_1.weight", "Linear_2.weight", "Linear_3.weight"]


def test_names_are_made_anew_after_every_edit() -> None:
    chain = fl.Chain(fl.Linear(1, 1))
    assert list(chain._modules) == ["Linear"]
    chain.append(fl.Linear(1, 1))
    assert list(chain._modules) == ["Linear_1", "Linear_2"]
    chain.pop(0)
    assert list(chain._modules) == ["Linear"]
    chain.insert(0, fl.ReLU())
    assert list(chain._modules) == ["ReLU", "Linear"]
    chain.replace(chain[0], fl.Linear(1, 1))
    assert list(chain._modules) == ["Linear_1", "Linear_2"]


def test_the_same_leaf_twice_has_two_keys_and_one_parameter() -> None:
    leaf = fl.Linear(1, 1)
    chain = fl.Chain(leaf, leaf)
    assert list(chain._modules) == ["Linear_1", "Linear_2"]
    assert list(chain.state_dict()) == ["Linear_1.weight", "Linear_1.bias", "Linear_2.weight", "Linear_2.bias"]
    assert len(list(chain.parameters())) == 2
    x = torch.randn(1, 1)
    assert torch.equal(chain(x), leaf(leaf(x)))


def test_a_class_that_looks_like_a_numbered_name_takes_nobodys_place() -> None:
    class Linear_1(nn.Linear):
        pass

    chain = fl.Chain(fl.Linear(1, 1), Linear_1(1, 1), fl.Linear(1, 1))
    assert len(set(chain._modules)) == len(chain) == 3


def test_names_that_collide_at_the_second_order_lose_no_child() -> None:
    Linear_1 = type("Linear_1", (nn.Linear,), {})
    Linear_1_1 = type("Linear_1_1", (nn.Linear,), {})
    children = [fl.Linear(1, 1), fl.Linear(1, 1), Linear_1(1, 1), Linear_1_1(1, 1)]
    for order in (children, children[::-1]):
        chain = fl.Chain(*order)
        assert [id(child) for child in chain] == [id(child) for child in order]
        assert len(set(chain._modules)) == 4


# --- running -----------------------------------------------------------------------------------------------------


def test_children_run_in_order() -> None:
    assert fl.Chain(plus(1), fl.Lambda(lambda x: x * 10))(1) == 20


def test_a_tuple_is_spread_into_the_next_call() -> None:
    assert fl.Chain(fl.Lambda(lambda x: (x, x + 1)), fl.Lambda(lambda a, b: a * b))(2) == 6
    assert fl.Chain(fl.Lambda(lambda a, b: a - b))(5, 3) == 2


def test_a_named_tuple_is_spread_too_and_comes_out_as_it_is() -> None:
    Pair = namedtuple("Pair", "a b")
    assert fl.Chain(fl.Lambda(lambda x: Pair(x, 2)), fl.Lambda(lambda a, b: a * b))(4) == 8
    assert type(fl.Chain(fl.Lambda(lambda x: Pair(x, 2)))(1)) is Pair


def test_a_list_is_not_spread() -> None:
    assert fl.Chain(fl.Lambda(lambda x: [x, x]), fl.Lambda(len))(1) == 2


def test_an_empty_tuple_calls_the_next_child_without_arguments() -> None:
    assert fl.Chain(fl.Lambda(lambda x: ()), fl.Lambda(lambda: 7))(1) == 7


def test_none_is_a_value_like_any_other() -> None:
    assert fl.Chain(fl.Lambda(lambda x: None), fl.Lambda(lambda x: (x, 1)))(1) == (None, 1)


def test_an_empty_chain_returns_none() -> None:
    assert fl.Chain()(1) is None
    assert fl.Chain()() is None
    assert fl.Chain([])(1, 2) is None


def test_a_chain_takes_positional_arguments_only() -> None:
    with pytest.raises(TypeError, match="keyword"):
        fl.Chain(fl.Identity())(x=1)
    with pytest.raises(TypeError, match="keyword"):
        fl.Sum(fl.Identity())(x=1)


def test_plain_torch_modules_are_leaves() -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    x = torch.randn(1, 2)
    assert torch.equal(fl.Chain(plain, nn.Linear(3, 3))[:1](x), plain(x))


def test_a_child_that_was_given_a_forward_of_its_own_runs_it() -> None:
    chain = fl.Chain(fl.Identity())
    chain[0].forward = lambda x: x + 1
    assert chain(1) == 2


class Loud(nn.Module):
    """A module with a `__call__` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 3


def test_a_child_with_a_call_of_its_own_is_called_by_it() -> None:
    one = torch.ones(1)
    chain = fl.Chain(fl.Identity())
    chain.insert(0, Loud())
    replaced = fl.Chain(fl.Identity())
    replaced.replace(replaced[0], Loud())
    for model in (fl.Chain(Loud()), chain, replaced, replaced.structural_copy(), replaced[:1], fl.Sum(Loud())):
        assert model(one).item() == 3


def test_a_chain_may_call_itself() -> None:
    chain = fl.Chain(fl.Lambda(lambda x: chain(x - 1) if x > 0 else x))
    assert chain(3) == 0


def in_a_thread(job: Any) -> Any:
    """The result of a job that has a stack of its own, without the frames of pytest and its plugins."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(job).result()


@pytest.mark.parametrize(
    "cls",
    [fl.Chain, fl.Residual, fl.Sum, fl.Passthrough, fl.Parallel, fl.Distribute, fl.Concatenate],
    ids=lambda cls: cls.__name__,
)
def test_a_tree_of_depth_500_runs_and_is_walked_printed_and_copied(cls: Any) -> None:
    root: Any = nn.Identity()
    for _ in range(500):
        root = cls(root)
    in_a_thread(lambda: root(torch.zeros(1)))
    assert len(list(root.walk(recurse=True))) == 500
    assert len(repr(root).splitlines()) == 8
    assert root.find(nn.Identity) is root.structural_copy().find(nn.Identity)


def test_a_forward_that_is_too_deep_fails_with_one_error_soon() -> None:
    root: Any = fl.Identity()
    for _ in range(1200):
        root = fl.Chain(root)
    with pytest.raises((RecursionError, fl.ChainError)) as error:
        root(torch.zeros(1))
    assert len(str(error.value)) < 20_000


# --- Return ------------------------------------------------------------------------------------------------------


def test_return_ends_the_chain_it_stands_in_with_its_value() -> None:
    assert fl.Chain(plus(1), fl.Return(), plus(100))(1) == 2


def test_return_ends_only_the_innermost_chain() -> None:
    assert fl.Chain(fl.Chain(fl.Return(), plus(100)), plus(1))(1) == 2


def test_return_gives_back_a_tuple_when_it_was_given_several_values() -> None:
    assert fl.Chain(fl.Lambda(lambda x: (x, 2)), fl.Return(), fl.Lambda(lambda a, b: a + b))(1) == (1, 2)


def test_return_works_in_a_residual_and_in_a_passthrough() -> None:
    assert fl.Residual(fl.Return(), plus(100))(1) == 2
    assert fl.Passthrough(fl.Return(), plus(100))(1) == (1,)


# --- relatives ---------------------------------------------------------------------------------------------------


def test_parallel_gives_all_children_the_same_inputs() -> None:
    add, sub = fl.Lambda(lambda a, b: a + b), fl.Lambda(lambda a, b: a - b)
    assert fl.Parallel(add, sub)(5, 3) == (8, 2)
    assert fl.Parallel()(1) == ()
    assert fl.Parallel(plus(1))(1) == (2,)


def test_a_tuple_of_a_branch_of_parallel_stays_one_output() -> None:
    assert fl.Parallel(fl.Lambda(lambda x: (x, x)), plus(0))(1) == ((1, 1), 1)


def test_distribute_gives_each_child_its_input() -> None:
    assert fl.Distribute(plus(1), plus(2))(10, 20) == (11, 22)
    assert fl.Distribute()() == ()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_distribute_refuses_another_number_of_inputs(count: int) -> None:
    with pytest.raises(AssertionError, match=f"2.*{count}") as error:
        fl.Distribute(plus(1), plus(2))(*range(count))
    assert isinstance(error.value, InputError)


def test_passthrough_returns_the_input_tuple() -> None:
    ran: list[Any] = []
    assert fl.Passthrough(fl.Lambda(ran.append))(1) == (1,)
    assert fl.Passthrough(fl.Lambda(lambda a, b: ran.append(a + b)))(1, 2) == (1, 2)
    assert ran == [1, 3]
    assert fl.Passthrough()(1) == (1,)


def test_sum_adds_the_outputs_up_from_left_to_right() -> None:
    assert fl.Sum(fl.Lambda(lambda x: "a"), fl.Lambda(lambda x: "b"), fl.Lambda(lambda x: "c"))(0) == "abc"
    assert fl.Sum()(1) is None


def test_sum_sums_a_tuple_output_first() -> None:
    assert fl.Sum(fl.Lambda(lambda x: (x, x)), plus(0))(2) == 6
    assert fl.Sum(fl.Parallel(plus(1), plus(2)))(1) == 5


def test_residual_adds_its_input() -> None:
    assert fl.Residual(plus(1), fl.Lambda(lambda x: x * 10))(1) == 21


@pytest.mark.parametrize("inputs", [(), (1, 2)])
def test_residual_takes_exactly_one_input(inputs: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="exactly one input") as error:
        fl.Residual(fl.Identity())(*inputs)
    assert isinstance(error.value, InputError)


def test_concatenate_joins_along_its_dim_and_leaves_none_out() -> None:
    x = torch.randn(2, 3)
    chain = fl.Concatenate(fl.Identity(), fl.Lambda(lambda x: None), fl.Identity(), dim=1)
    assert torch.equal(chain(x), torch.cat([x, x], dim=1))
    assert chain.dim == 1
    assert fl.Concatenate(fl.Identity()).dim == 0


def test_matmul_multiplies_the_outputs_of_its_two_children() -> None:
    x = torch.randn(2, 2)
    assert torch.equal(fl.Matmul(fl.Identity(), fl.Transpose(0, 1))(x), x @ x.T)
    with pytest.raises(TypeError):
        fl.Matmul(fl.Identity())  # pyright: ignore[reportCallIssue] (the missing argument is the point)


def test_lambda_shows_its_function_and_its_signature() -> None:
    def scaled(x: int, factor: int = 2) -> int:
        return x * factor

    assert str(fl.Lambda(scaled)) == "Lambda(scaled(x: int, factor: int = 2) -> int)"
    assert fl.Lambda(scaled)(3) == 6
    assert str(fl.Lambda(lambda x: x)) == "Lambda(<lambda>(x))"


def test_lambda_of_a_function_without_a_signature_can_be_printed() -> None:
    assert str(fl.Lambda(torch.sin)).startswith("Lambda(sin")
    assert str(fl.Lambda(Loud())).startswith("Lambda(")


def test_breakpoint_stops_and_passes_its_inputs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[int] = []
    monkeypatch.setattr("sys.breakpointhook", lambda *_, **__: stops.append(1))
    assert fl.Chain(fl.Breakpoint(vscode=False), plus(1))(1) == 2
    assert fl.Chain(fl.Breakpoint())(1, 2) == (1, 2)
    assert len(stops) == 2


def test_device_and_dtype_are_those_of_the_first_weighted_layer() -> None:
    chain = fl.Chain(fl.Identity(), fl.Chain(fl.Linear(1, 1, dtype=torch.float64)), fl.Linear(1, 1))
    assert (chain.device, chain.dtype) == (torch.device("cpu"), torch.float64)
    assert (fl.Chain(fl.ReLU()).device, fl.Chain().dtype) == (None, None)
    assert fl.Chain(fl.Linear(1, 1, device="meta")).device == torch.device("meta")


def test_a_tree_is_built_and_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        chain = fl.Chain(fl.Linear(2, 3), fl.Residual(fl.Linear(3, 3)))
    out = chain(torch.empty(5, 2, device="meta"))
    assert (out.shape, out.device.type) == ((5, 3), "meta")
