"""Defects that the original has and this must not: errors, and what torch does with a tree. See api.md."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts

x = torch.linspace(-1, 1, 6).reshape(3, 2)


def double(x: Any) -> Any:
    return x * 2


class Declares(fl.Chain):
    """Declares a list and an unset value."""

    def init_context(self) -> Contexts:
        return {"own": {"value": None, "list": []}}


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Changes nothing."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


# --- Errors ------------------------------------------------------------------------------------------------------


def fail(x: Any) -> Any:
    raise LookupError("the cause")


def nested(depth: int) -> fl.Chain:
    chain = fl.Chain(fl.Lambda(fail))
    for _ in range(depth):
        chain = fl.Chain(chain)
    return chain


def test_the_cause_of_a_chain_error_is_the_original_exception() -> None:
    """Errors: "`from None` hides the cause"."""
    with pytest.raises(fl.ChainError) as error:
        fl.Chain(fl.Lambda(fail))(x)
    assert isinstance(error.value.__cause__, LookupError)
    assert not error.value.__suppress_context__ or error.value.__cause__ is not None


def test_nested_chains_wrap_an_error_once() -> None:
    """Errors: "each nested Chain wraps again and recomputes statistics (… 16,500 characters at depth 40)"."""
    root = nested(40)
    with pytest.raises(fl.ChainError) as error:
        root(x)
    assert isinstance(error.value.__cause__, LookupError)
    assert error.value.__cause__.__cause__ is None
    assert str(error.value).count("Tensor(shape=(3, 2)") == 1
    assert len(str(error.value)) < 8000


def test_an_error_on_the_meta_device_is_told() -> None:
    """Errors: "on the meta device building the message itself raises"."""
    root = fl.Chain(fl.Linear(2, 2, device="meta"), fl.Lambda(fail))
    with pytest.raises(fl.ChainError, match="meta") as error:
        root(x.to("meta"))
    assert isinstance(error.value.__cause__, LookupError)


def test_the_marker_stays_when_siblings_fold() -> None:
    """Errors: "the marker is lost when siblings fold"."""
    layers = [fl.Chain(fl.Linear(2, 2)) for _ in range(5)]
    layers[3].Linear.register_forward_pre_hook(lambda *_: fail(x))
    root = fl.Chain(layers)
    with pytest.raises(fl.ChainError) as error:
        root(x)
    marked = [line for line in str(error.value).splitlines() if ">>>" in line]
    assert len(marked) == 1
    assert marked[0].endswith("| Chain_4.Linear")


OPTIMISED = """
import torch
import refiners.fluxion.layers as fl
from refiners.errors import *

def refused(error, call):
    try:
        call()
    except error:
        return
    raise SystemExit(f"{error.__name__} expected")

class Wrap(fl.Chain, fl.Adapter[torch.nn.Module]):
    def __init__(self, target):
        with self.setup_adapter(target):
            super().__init__(target)

child = fl.Chain()
parent = fl.Chain(child)
refused(ParentError, lambda: fl.Chain(child))
refused(ParentError, lambda: parent.ensure_parent)
refused(TreeError, lambda: child.append(parent))
refused(TreeTypeError, lambda: fl.Chain(1))
refused(TreeTypeError, lambda: parent.layer(0, fl.Linear))
refused(NotFoundError, lambda: parent.ensure_find(fl.Linear))
refused(NotFoundError, lambda: parent.ensure_find_parent(fl.Linear(1, 1)))
refused(InputError, lambda: fl.Distribute(fl.Identity())(1, 2))
refused(InputError, lambda: fl.Residual(fl.Identity())(1, 2))
refused(ContextError, lambda: fl.UseContext("a", "b")(1))
refused(ContextError, lambda: fl.SetContext("a", "b")(1))
refused(ContextError, lambda: parent.use_context("a"))
refused(AdapterTypeError, lambda: type("X", (fl.Adapter,), {}))
linear = fl.Linear(1, 1)
chain = fl.Chain(linear)
refused(AdapterError, lambda: Wrap(linear).inject())
adapter = Wrap(linear).inject(chain)
refused(AdapterError, lambda: adapter.inject(chain))
adapter.eject()
refused(AdapterError, adapter.eject)
assert False, "asserts are on"
"""


def test_checks_stay_under_python_o() -> None:
    """Errors: "checks vanish under `python -O`"."""
    run = subprocess.run([sys.executable, "-O", "-c", OPTIMISED], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_return_works() -> None:
    """Errors: "`Return` never worked"."""
    assert fl.Chain(fl.Lambda(double), fl.Return(), fl.Lambda(fail))(4) == 8


# --- torch -------------------------------------------------------------------------------------------------------


class WithContext(fl.Chain):
    """A model with a context, and a Chain that may be empty."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(2, 2),
            fl.SetContext("own", "value"),
            fl.Chain(fl.Sin(), fl.Sum(fl.Identity(), fl.UseContext("own", "value"))),
        )

    def init_context(self) -> Contexts:
        return {"own": {"value": None}}


def test_a_model_with_a_context_compiles_to_one_graph() -> None:
    """torch: "`torch.compile(fullgraph=True)` … fail on every model with a context"."""
    torch.compiler.reset()
    model = WithContext()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_model_with_a_context_is_exported_strictly() -> None:
    """torch: "… and strict `torch.export` fail on every model with a context"."""
    model = WithContext()
    assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), model(x))


def test_an_empty_chain_is_found_like_any_other_parent() -> None:
    """torch: "… for one cause: the truth value of a Module that defines `__len__` (`assert self.parent`)"."""
    empty = fl.Chain()
    leaf = fl.UseContext("a", "b")
    with leaf.no_parent_refresh():
        pass
    empty.append(leaf)
    empty.set_context("a", {"b": 1})
    provider = leaf.provider
    empty.pop()
    assert provider is empty.provider
    assert empty.use_context("a") == {"b": 1}
    root = fl.Chain(empty)
    assert empty.parent is root
    assert root.find(fl.Chain) is empty
    assert root.find_parent(empty) is root


def test_a_tensor_may_be_the_output_of_any_chain_without_a_truth_value() -> None:
    """torch: outputs are never asked for their truth value, which has none for tensors of many elements."""
    many: Tensor = torch.ones(2, 2)
    root = Declares(fl.SetContext("own", "value"), fl.Sum(fl.Identity(), fl.UseContext("own", "value")), fl.Return())
    assert torch.equal(root(many), many * 2)
