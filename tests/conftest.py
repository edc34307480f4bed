"""What holds for every unit test: upstream is not there, random numbers start from one seed, shapes are checked.

The shapes in the annotations of every `forward` are compared with the tensors of every call, and axes of one name with
one another. Users do not pay for this: the checks are put around the leaves here, once all tests are collected.
"""

import functools
import gc
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import nn

# The environment that all sessions share has upstream in it; a user's has not. None makes an import fail, and lets
# `find_spec` find nothing, as if it were not installed.
for name in ("accelerate", "diffusers", "lycoris", "open_clip", "peft", "tokenizers", "torchvision", "transformers"):
    sys.modules[name] = None  # type: ignore[assignment]  typeshed has no name for this documented use

SHAPED = ("refiners.fluxion.layers.", "reference_ports.")
TYPES = beartype(conf=BeartypeConf(is_pep484_tower=True))


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of pytest-xdist its share of the cores: threads that outnumber them spin for one another."""
    processes: int = getattr(config, "workerinput", {}).get("workercount", 1)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_finish() -> None:
    """Let Python search for garbage less often; what was imported is most of what it would look through."""
    gc.set_threshold(20_000, 20, 50)


def has_shape(annotation: object) -> bool:
    """Whether an annotation names axes, itself or within a union or a tuple."""
    return hasattr(annotation, "dim_str") or any(has_shape(part) for part in get_args(annotation))


def leaves() -> Iterator[type[nn.Module]]:
    """Every class of ours that has been imported and has a forward of its own whose annotations name axes."""
    for name in [name for name in sys.modules if name.startswith(SHAPED)]:
        for value in list(vars(sys.modules[name]).values()):
            ours = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name
            own = inspect.get_annotations(value.forward) if ours and "forward" in vars(value) else {}
            if any(has_shape(annotation) for annotation in own.values()):
                yield value


def with_shapes_checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose calls are checked, except where torch traces it."""
    checked = jaxtyped(forward, typechecker=TYPES)

    @functools.wraps(forward)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*arguments, **options)
        try:
            return checked(*arguments, **options)
        except TypeCheckError:
            forward(*arguments, **options)  # an error of its own says more to whoever tests it
            raise

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def shapes() -> Iterator[None]:
    """Checks the shapes of all calls of all leaves that the collected tests have imported."""
    originals = {leaf: leaf.forward for leaf in leaves()}
    for leaf, forward in originals.items():
        leaf.forward = with_shapes_checked(forward)
    yield
    for leaf, forward in originals.items():
        leaf.forward = forward


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    random.seed(0)
    torch.manual_seed(0)


def settings_of_torch() -> dict[str, object]:
    """What a test could leave behind for all tests after it."""
    return {
        "grad": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes a setting of torch and does not change it back fails by itself, not those after it."""
    before = settings_of_torch()
    yield
    after = settings_of_torch()
    torch.set_grad_enabled(bool(before["grad"]))
    assert after == before
