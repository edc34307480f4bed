"""Where the original falls short, ours must not: one test for each clause of api.md §8, whose words open its docstring.

LoRA files and layers of §8 have their tests beside LoRA and the layers; speed has its own in benchmarks/.
"""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, ContextError
from refiners.fluxion.context import Contexts

x = torch.linspace(-1, 1, 6).reshape(3, 2)


def push(values: list[Any], value: Any) -> None:
    values.append(value)


def double(x: Any) -> Any:
    return x * 2


class Declares(fl.Chain):
    """Declares a list and an unset value."""

    def init_context(self) -> Contexts:
        return {"own": {"value": None, "list": []}}


class Plus(fl.Sum, fl.Adapter[nn.Module]):
    """Adds a second Linear."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(2, 2))


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Changes nothing."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


def picture(root: fl.Chain) -> Any:
    parents = [
        (id(m), None if m.parent is None else id(m.parent)) for m in root.modules() if isinstance(m, fl.ContextModule)
    ]
    return [(name, id(m)) for name, m in root.named_modules(remove_duplicate=False)], parents


# --- Contexts ----------------------------------------------------------------------------------------------------


def test_set_context_on_a_registered_name_forks_nothing() -> None:
    """Contexts: "set_context on a registered name forks the dicts of root and children"."""
    leaf = fl.UseContext("a", "key")
    root = fl.Chain(fl.Chain(leaf))
    root.set_context("a", {"key": 1})
    root.set_context("a", {"key": 2})
    assert root() == 2
    assert leaf.use_context("a") is root.Chain.use_context("a") is root.use_context("a")
    root.Chain.set_context("a", {"key": 3})
    assert root.use_context("a") == {"key": 3}
    assert root() == 3


def test_no_key_of_a_replaced_dict_is_readable_below_only() -> None:
    """Contexts: "keys of the replaced dict stay readable below" (§9.2: they stay readable everywhere alike)."""
    root = fl.Chain(fl.Chain(fl.UseContext("a", "old")))
    root.set_context("a", {"old": 1})
    root.set_context("a", {"new": 2})
    assert root.use_context("a") == root.Chain.use_context("a") == root.Chain.UseContext.use_context("a")


def test_a_forward_that_raises_leaves_no_dirty_context() -> None:
    """Contexts: "A forward that raises leaves contexts dirty: the next good forward is silently wrong"."""
    root = Declares(
        fl.SetContext("own", "list", callback=push),
        fl.Lambda(lambda x: 1 / 0 if x == 1 else x),
        fl.UseContext("own", "list"),
    )
    with pytest.raises(fl.ChainError):
        root(1)
    assert root(2) == [2]


def test_threads_on_one_model_get_their_own_outputs() -> None:
    """Contexts: "Two threads on one model: 397 of 600 outputs wrong"."""
    model = Declares(
        fl.SetContext("own", "value"),
        fl.Chain(fl.Lambda(lambda x: x + 1), fl.SetContext("own", "list", callback=push)),
        fl.Sum(
            fl.UseContext("outside", "number"),
            fl.UseContext("own", "value"),
            fl.UseContext("own", "list").compose(lambda values: sum(values)),
        ),
    )

    def run(number: int) -> int:
        with model.context_scope():
            model.set_context("outside", {"number": number})
            return model(1000 * number)

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2, initializer=barrier.wait) as pool:
        found = list(pool.map(run, range(600)))
    assert sum(value == 2001 * i + 1 for i, value in enumerate(found)) == 600


@pytest.mark.parametrize("place", ["Lambda", "callback"])
def test_bound_methods_are_bound_to_the_structural_copy(place: str) -> None:
    """Contexts: "Bound methods in Lambda / SetContext callbacks stay bound to the original after a structural copy"."""

    class Model(Declares):
        def __init__(self) -> None:
            layer = fl.Lambda(self.note) if place == "Lambda" else fl.SetContext("own", "list", callback=self.note_both)
            super().__init__(layer)
            self.noted: list[Any] = []

        def note(self, x: Any) -> Any:
            self.noted.append(x)
            return x

        def note_both(self, values: list[Any], x: Any) -> None:
            self.note(x)

    model = Model()
    copies = [model.structural_copy() for _ in range(8)]
    for copied in copies:
        copied.noted = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: copies[i % 8](i), range(800)))
    assert model.noted == []
    assert sum(value % 8 == i for i, copied in enumerate(copies) for value in copied.noted) == 800


def test_values_set_by_a_forward_die_with_their_graph_and_deepcopy_works() -> None:
    """Contexts: "Values set stay alive after forward with their autograd graph; deepcopy then fails"."""
    model = Declares(fl.Linear(2, 2), fl.SetContext("own", "value"))
    model(x)
    assert model.use_context("own") == {"value": None, "list": []}
    model.set_context("own", {"value": model(x)})
    model.set_context("outside", {"value": model(x)})
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("base", [fl.Sum, fl.Parallel, fl.Concatenate, fl.Matmul, fl.Distribute])
def test_subclasses_of_every_kind_reset_their_contexts(base: Any) -> None:
    """Contexts: "Sum/Parallel/Concatenate/Matmul/Distribute subclasses with init_context are never reset"."""

    class Model(base):
        def init_context(self) -> Contexts:
            return {"own": {"list": []}}

    model = Model(fl.SetContext("own", "list", callback=push), fl.Lambda(lambda x: x))
    for _ in range(2):
        model(*[torch.eye(2)] * (2 if base is fl.Distribute else 1))
        assert model.use_context("own") == {"list": []}


def test_set_context_into_an_existing_but_empty_context_is_not_skipped() -> None:
    """Contexts: "SetContext into an existing but empty context is silently skipped"."""
    model = fl.Chain(fl.SetContext("a", "b"), fl.UseContext("a", "b"))
    model.set_context("a", {})
    assert model(5) == 5


def test_forward_hooks_on_use_context_and_set_context_fire() -> None:
    """Contexts: "forward hooks on UseContext/SetContext never fire"."""
    fired: list[nn.Module] = []
    model = Declares(fl.SetContext("own", "value"), fl.UseContext("own", "value"))
    for layer in model:
        layer.register_forward_hook(lambda module, *_: fired.append(module))
        layer.register_forward_pre_hook(lambda module, *_: fired.append(module))
    model(1)
    assert fired == [model[0], model[0], model[1], model[1]]


def test_an_ejected_chain_has_none_of_its_old_parents_contexts() -> None:
    """Contexts: "an ejected chain keeps its old parent's contexts"."""

    class Reads(fl.Chain, fl.Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.UseContext("a", "b"))

    root = fl.Chain(fl.Chain(fl.Lambda(double)))
    root.set_context("a", {"b": 1})
    adapter = Reads(root.Chain).inject()
    assert root(1) == 1
    adapter.eject()
    assert adapter.provider.contexts == {}
    with pytest.raises(fl.ChainError) as error:
        adapter(1)
    assert isinstance(error.value.__cause__, ContextError)


# --- Adapters and copies -----------------------------------------------------------------------------------------


def test_ejecting_the_inner_of_two_nested_adapters_first_does_not_bring_it_back() -> None:
    """Adapters: "Adapter of an adapter ejected inner first re-inserts the ejected one"."""
    root = fl.Chain(fl.Linear(2, 2))
    before = picture(root)
    inner = Plus(root[0]).inject(root)
    outer = Wrap(inner).inject(root)
    inner.eject()
    assert not any(module is inner for module in root.modules())
    outer.eject()
    assert picture(root) == before


def test_a_double_injection_is_an_error_and_makes_no_cycle() -> None:
    """Adapters: "Double inject: cycle, RecursionError"."""
    root = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.Linear(2, 2)))
    for adapter, parent in ((Plus(root[0]), root), (Wrap(root[1]), None)):
        adapter.inject(parent)
        before = picture(root)
        with pytest.raises(AdapterError, match="injected already"):
            adapter.inject(parent)
        assert picture(root) == before
        root(x)


def test_injecting_on_a_leaf_without_a_parent_is_an_error() -> None:
    """Adapters: "inject() of a leaf without parent: silent no-op"."""
    root = fl.Chain(fl.Linear(2, 2))
    with pytest.raises(AdapterError, match="parent"):
        Plus(root[0]).inject()


def test_adapting_a_target_that_another_adapter_replaced_is_an_error() -> None:
    """Adapters: "Second adapter on a target that another has replaced: silent no-op"."""

    class Instead(fl.Chain, fl.Adapter[fl.Linear]):
        def __init__(self, target: fl.Linear) -> None:
            with self.setup_adapter(target):
                super().__init__(fl.Identity())

    root = fl.Chain(fl.Linear(2, 2))
    linear = root[0]
    Instead(linear).inject(root)
    before = picture(root)
    with pytest.raises(AdapterError, match="Instead"):
        Plus(linear).inject(root)
    assert picture(root) == before


def test_a_second_ejection_is_an_error_and_leaves_the_tree() -> None:
    """Adapters: "Second eject: tree corrupt"."""
    root = fl.Chain(fl.Linear(2, 2), fl.Linear(2, 2))
    before = picture(root)
    adapter = Plus(root[0]).inject(root)
    adapter.eject()
    with pytest.raises(ValueError, match="not in"):
        adapter.eject()
    assert picture(root) == before


def test_an_exception_inside_setup_adapter_leaves_the_target_free() -> None:
    """Adapters: "An exception inside setup_adapter leaves the target unable to be re-parented"."""

    class Broken(fl.Chain, fl.Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain) -> None:
            with self.setup_adapter(target):
                raise KeyError

    target = fl.Chain()
    with pytest.raises(KeyError):
        Broken(target)
    parent = fl.Chain(target)
    assert target.parent is parent


def test_a_module_that_is_inserted_elsewhere_leaves_its_old_parent() -> None:
    """Adapters: "insert/append accept a module that already has a parent" (§9.1: it moves)."""
    child = fl.Chain()
    first, second = fl.Chain(child), fl.Chain()
    second.append(child)
    assert (len(first), list(second), child.parent) == (0, [child], second)
    first.insert(0, child)
    assert (list(first), len(second), child.parent) == ([child], 0, first)


def test_appending_a_chain_to_itself_is_refused() -> None:
    """Adapters: "appending a chain to itself makes a cycle"."""
    chain = fl.Chain(fl.Chain())
    for edit in (lambda: chain.append(chain), lambda: chain[0].append(chain), lambda: chain.replace(chain[0], chain)):
        with pytest.raises(ValueError, match="cycle"):
            edit()
    assert len(chain) == 1


def test_an_adapter_injected_in_an_eval_model_is_in_eval_mode() -> None:
    """Adapters: "An adapter injected in an eval() model is in training mode"."""
    root = fl.Chain(fl.Linear(2, 2)).eval()
    adapter = Plus(root[0])
    assert adapter.training
    adapter.inject(root)
    assert not any(module.training for module in root.modules())


def test_a_leaf_shared_twice_is_adapted_in_both_places() -> None:
    """Adapters: "A leaf shared twice: only the first occurrence is adapted"."""
    leaf = fl.Linear(2, 2)
    root = fl.Chain(leaf, fl.Chain(leaf))
    before = picture(root)
    adapter = Plus(leaf).inject(root)
    assert [type(root[0]), type(root[1][0])] == [Plus, Plus]
    adapter.eject()
    assert picture(root) == before


def test_a_model_with_lambdas_can_be_deepcopied_and_pickle_says_what_to_do() -> None:
    """Adapters: "Pickle and deepcopy fail on models with lambdas"."""
    root = fl.Chain(fl.Linear(2, 2), fl.Lambda(lambda x: x + 1))
    assert torch.equal(copy.deepcopy(root)(x), root(x))
    with pytest.raises(pickle.PicklingError, match="lambda"):
        pickle.dumps(root)
    root.replace(root[1], fl.Lambda(double))
    assert torch.equal(pickle.loads(pickle.dumps(root))(x), root(x))


def test_a_copy_of_a_child_does_not_drag_its_parents_along() -> None:
    """Adapters: "[pickle and deepcopy] drag the parents along"."""
    root = fl.Chain(fl.Chain(fl.ReLU()), fl.Linear(500, 500))
    assert len(pickle.dumps(root[0])) < 20_000
    assert copy.deepcopy(root[0]).parent is None


def test_a_structural_copy_keeps_training_flag_and_hooks() -> None:
    """Adapters: "structural_copy drops training flag and hooks"."""
    fired: list[int] = []
    root = fl.Chain(fl.Chain(fl.Linear(2, 2))).eval()
    for chain in (root, root.Chain):
        chain.register_forward_hook(lambda *_: fired.append(1))
    copied = root.structural_copy()
    assert not any(module.training for module in copied.modules())
    copied(x)
    assert fired == [1, 1]
