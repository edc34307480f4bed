"""Selections: what they find, in which order, what they replace, and what they say when they find nothing."""

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import SelectionError, TreeError, TreeTypeError
from refiners.fluxion.selectors import select


class Attention(fl.Chain):
    pass


class FeedForward(fl.Chain):
    pass


class Block(fl.Chain):
    def __init__(self) -> None:
        super().__init__(Attention(fl.Linear(4, 4), fl.Linear(4, 4)), FeedForward(fl.Linear(4, 8), fl.ReLU()))


@pytest.fixture
def model() -> fl.Chain:
    return fl.Chain(fl.Linear(4, 4), Block(), Block())


def test_of_finds_all_modules_of_a_class_in_the_order_of_the_tree(model: fl.Chain) -> None:
    assert list(select(model).of(fl.Linear)) == list(model.layers(fl.Linear))
    assert select(model).of(fl.Linear, fl.ReLU).count == 9


def test_paths_are_prefixes_of_the_keys_of_the_state_dict(model: fl.Chain) -> None:
    keys = {key.rpartition(".")[0] for key in model.state_dict()}
    assert set(select(model).of(fl.Linear).paths) == keys


def test_inside_and_outside_look_at_all_modules_above(model: fl.Chain) -> None:
    linears = select(model).of(fl.Linear)
    assert linears.inside(Attention).count == 4
    assert linears.outside(Attention).count == 3
    assert linears.inside(Block).outside(Attention).count == 2
    assert linears.outside(Block).one() is model[0]
    assert select(Block()).of(fl.Linear).inside(Block).count == 3


def test_a_module_is_not_inside_of_itself(model: fl.Chain) -> None:
    assert select(model).of(Attention).inside(Attention).count == 0


def test_where_asks_a_function_about_each_module(model: fl.Chain) -> None:
    wide = select(model).of(fl.Linear).where(lambda layer: layer.out_features == 8)
    assert wide.paths == ("Block_1.FeedForward.Linear", "Block_2.FeedForward.Linear")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("Linear", 1),
        ("*", 3),
        ("Block_*", 2),
        ("Block_1.Attention.Linear_2", 1),
        ("Block_*.*.Linear_2", 2),
        ("*.Attention.*", 4),
        ("**.Linear*", 7),
        ("**.ReLU", 2),
        ("Block_1.**", 6),
        ("Block_1.**.Linear_1", 1),
        ("**", 15),
        ("Block", 0),
        ("block_1", 0),
        ("Block_1.Attention", 1),
        ("Attention", 0),
    ],
)
def test_at_matches_dotted_paths_key_by_key(model: fl.Chain, pattern: str, count: int) -> None:
    assert select(model).at(pattern).count == count


def test_a_selection_is_not_changed_by_narrowing_it_down(model: fl.Chain) -> None:
    linears = select(model).of(fl.Linear)
    linears.inside(Attention)
    assert linears.count == 7


def test_a_selection_reads_the_tree_when_it_is_asked(model: fl.Chain) -> None:
    linears = select(model).of(fl.Linear)
    model.append(fl.Linear(1, 1))
    assert linears.count == 8


def test_expect_returns_the_selection_or_names_what_was_found(model: fl.Chain) -> None:
    linears = select(model).of(fl.Linear)
    assert linears.expect(7) is linears
    assert select(model).of(fl.Conv2d).expect(0).count == 0
    with pytest.raises(SelectionError, match=r"found 7 modules, expected 6\.") as error:
        linears.expect(6)
    assert "Block_1.Attention.Linear_1" in str(error.value)


def test_an_empty_selection_is_an_error_that_shows_the_nearest_class(model: fl.Chain) -> None:
    class Attentions(fl.Chain):
        pass

    for ask in (select(model).of(Attentions).one, lambda: list(select(model).of(Attentions))):
        with pytest.raises(SelectionError, match=r"'Attentions' is not there. Nearest: Attention\."):
            ask()
    with pytest.raises(SelectionError, match=r"inside\(Attentions\): no modules left of 7\n.*Nearest: Attention"):
        _ = select(model).of(fl.Linear).inside(Attentions).pairs
    with pytest.raises(LookupError, match="There are: "):
        select(model).of(nn.Transformer).one()


def test_an_empty_selection_is_an_error_that_shows_the_nearest_path(model: fl.Chain) -> None:
    with pytest.raises(SelectionError, match=r"Nearest: Block_\d\.Attention\.Linear_1"):
        select(model).at("Block.Attention.Linear_1").one()


def test_an_empty_selection_is_an_error_that_shows_what_the_last_condition_removed(model: fl.Chain) -> None:
    def is_wide(layer: fl.Linear) -> bool:
        return layer.out_features > 100

    with pytest.raises(SelectionError, match=r"where\(is_wide\): no modules left of 4\nIt removed: Block_1"):
        select(model).of(fl.Linear).inside(Attention).where(is_wide).one()


def test_one_refuses_several(model: fl.Chain) -> None:
    with pytest.raises(SelectionError, match="expected 1"):
        select(model).of(fl.Linear).one()


def test_a_class_is_wanted_not_a_name(model: fl.Chain) -> None:
    with pytest.raises(TreeTypeError, match=r"of\(…\) takes classes, got 'Linear'"):
        select(model).of("Linear")
    with pytest.raises(TreeTypeError, match="takes classes, got nothing"):
        select(model).inside()


def test_a_module_held_twice_is_one_module_with_two_paths() -> None:
    shared = fl.Linear(4, 4)
    model = fl.Chain(shared, fl.Chain(fl.ReLU(), shared))
    linears = select(model).of(fl.Linear)
    assert linears.count == 1
    assert linears.one() is shared
    assert linears.paths == ("Linear", "Chain.Linear")
    assert linears.pairs == ((shared, model), (shared, model[1]))
    assert linears.inside(fl.Chain).parents == (model, model[1])


def test_selections_see_through_plain_torch_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), fl.Chain(nn.Sequential(fl.Linear(4, 4))))
    assert select(model).of(nn.Linear).paths == ("0", "1.Sequential.0")


def test_replace_puts_new_modules_in_all_places(model: fl.Chain) -> None:
    x = torch.randn(2, 4)
    made = select(model).of(fl.Linear).inside(Attention).replace(lambda layer: fl.Chain(layer, fl.Identity()))
    assert len(made) == 4
    assert model.layer(("Block_1", "Attention", "Chain_2", "Linear"), fl.Linear) is made[1][0]
    assert made[0].parent is model.layer(("Block_1", "Attention"))
    assert model[1][0](x).shape == (2, 4)


def test_replace_in_several_places_shares_the_weights() -> None:
    shared = fl.Linear(4, 4)
    model = fl.Chain(shared, shared, fl.Chain(shared), nn.Sequential(shared))
    (made,) = select(model).of(fl.Linear).replace(lambda layer: fl.Residual(layer))
    chains = [model[0], model[1], model[2][0], model[3][0]]
    assert all(isinstance(chain, fl.Residual) and chain[0] is shared for chain in chains)
    assert len({id(chain) for chain in chains}) == 4
    assert any(chain is made for chain in chains)
    assert [chain.parent for chain in chains] == [model, model, model[2], None]


def test_replace_keeps_a_module_that_is_returned_as_it_is(model: fl.Chain) -> None:
    keys = list(model.state_dict())
    select(model).of(fl.Linear).replace(lambda layer: layer)
    assert list(model.state_dict()) == keys


def test_replace_works_on_modules_inside_of_one_another() -> None:
    model = fl.Chain(fl.Residual(fl.Residual(fl.Linear(4, 4))))
    select(model).of(fl.Residual).replace(lambda residual: fl.Chain(fl.Identity()))
    assert list(select(model).paths) == ["Chain", "Chain.Identity"]


def test_replace_changes_nothing_when_one_call_fails(model: fl.Chain) -> None:
    before = str(model), [id(module) for module in model.modules()], list(model.state_dict())
    calls = 0

    def fail_at_last(layer: fl.Linear) -> nn.Module:
        nonlocal calls
        calls += 1
        layer_or_none = None if calls == 7 else fl.Identity()
        return layer_or_none

    with pytest.raises(TreeTypeError, match="make has to return a module, got NoneType"):
        select(model).of(fl.Linear).replace(fail_at_last)
    one = fl.Chain(fl.Identity())
    with pytest.raises(SelectionError, match="Build a new one in each call"):
        select(model).of(fl.Linear).replace(lambda _: one)
    with pytest.raises(TreeError, match="cycle"):
        select(model).at("Block_2.Attention.Linear_2").replace(lambda _: model)
    assert (str(model), [id(module) for module in model.modules()], list(model.state_dict())) == before


def test_a_selection_prints_as_the_code_that_makes_it(model: fl.Chain) -> None:
    selection = select(model).of(fl.Linear).inside(Attention).at("**.Linear_1")
    assert repr(selection) == "select(Chain).of(Linear).inside(Attention).at('**.Linear_1')"


def test_asking_takes_a_number_of_steps_linear_in_the_size_of_the_tree() -> None:
    def steps(blocks: int) -> int:
        asked = 0

        def ask(_: nn.Module) -> bool:
            nonlocal asked
            asked += 1
            return True

        model = fl.Chain(Block() for _ in range(blocks))
        assert select(model).where(ask).inside(fl.Chain).count == 7 * blocks
        return asked

    assert steps(200) == 2 * steps(100) == 1400


def test_a_tree_deeper_than_the_stack_of_python_can_be_searched() -> None:
    chains = [fl.Chain(fl.Linear(1, 1))]
    for _ in range(3000):
        chains.append(fl.Chain(chains[-1]))
    assert select(chains[-1]).of(fl.Linear).one() is chains[0][0]
