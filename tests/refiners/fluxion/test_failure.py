"""What a failing forward says: api.md §5, design.md §4 "one error per failing forward"."""

import io
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import ChainError


def fail(*_: Any) -> Any:
    raise KeyError("the original text")


def error_of(chain: nn.Module, *inputs: Any) -> ChainError:
    with pytest.raises(ChainError) as error:
        chain(*inputs)
    return error.value


class Top(fl.Chain):
    """A root with a name."""


def test_a_chain_error_is_a_runtime_error_of_ours_with_the_original_as_its_cause() -> None:
    error = error_of(Top(fl.Lambda(fail)), 1)
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, KeyError)
    assert fl.ChainError is ChainError


def test_the_message_holds_type_and_text_of_the_original() -> None:
    message = str(error_of(Top(fl.Lambda(fail)), 1))
    assert "KeyError" in message
    assert "the original text" in message


def test_the_message_holds_the_path_of_the_failing_leaf() -> None:
    root = Top(fl.Identity(), fl.Chain(fl.Sum(fl.Identity(), fl.Lambda(fail))))
    assert "Top.Chain.Sum.Lambda" in str(error_of(root, torch.ones(1)))


def test_the_message_holds_the_users_frames_and_none_of_the_frameworks() -> None:
    message = str(error_of(Top(fl.Chain(fl.Residual(fl.Lambda(fail)))), 1))
    assert "in fail" in message
    for framework_file in ("chain.py", "combinators.py", "torch/nn/modules/module.py"):
        assert framework_file not in message


def test_the_failing_leaf_is_marked_with_its_key() -> None:
    root = Top(fl.Linear(1, 1), fl.Chain(fl.Linear(1, 1), fl.Linear(2, 1)))
    message = str(error_of(root, torch.ones(1, 1)))
    marked = [line for line in message.splitlines() if ">>>" in line]
    assert len(marked) == 1
    assert marked[0].strip(" │├└─") == (
        ">>> Linear(in_features=2, out_features=1, device=cpu, dtype=float32) | Chain.Linear_2"
    )


def test_the_marker_is_not_lost_when_siblings_would_fold() -> None:
    root = Top(fl.Linear(2, 2), fl.Linear(2, 2), fl.Lambda(lambda x: x[:, :1]), fl.Linear(2, 2), fl.Linear(2, 2))
    marked = [line for line in str(error_of(root, torch.ones(1, 2))).splitlines() if ">>>" in line]
    assert len(marked) == 1
    assert marked[0].endswith("| Linear_3")


def test_equal_subtrees_do_not_hide_the_failing_one() -> None:
    calls: list[int] = []

    def fail_third(x: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError
        return x

    root = Top(fl.Chain(fl.Lambda(fail_third)) for _ in range(5))
    marked = [line for line in str(error_of(root, 1)).splitlines() if ">>>" in line]
    assert len(marked) == 1
    assert marked[0].endswith("| Chain_3.Lambda")


def test_each_flattened_argument_has_its_line() -> None:
    root = Top(fl.Lambda(lambda x: (x, [x, 3], "text")), fl.Lambda(fail))
    message = str(error_of(root, torch.zeros(1, 2)))
    assert "0: Tensor(shape=(1, 2), dtype=float32, device=cpu" in message
    assert "1: Tensor(shape=(1, 2), dtype=float32, device=cpu" in message
    assert "\n2: " in message
    assert "3" in message.split("\n2: ")[1].splitlines()[0]
    assert "text" in message.split("\n3: ")[1].splitlines()[0]


@pytest.mark.parametrize(
    "argument",
    [
        torch.zeros(0),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.complex64),
        torch.full((2,), float("nan")),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.zeros(2, 2).to_sparse(),
        None,
        {"a": torch.zeros(1)},
        object(),
    ],
    ids=["empty", "int", "bool", "complex", "nan", "meta", "float8", "sparse", "None", "dict", "object"],
)
def test_any_argument_can_be_described(argument: Any) -> None:
    assert isinstance(error_of(Top(fl.Lambda(fail)), argument).__cause__, KeyError)


def test_an_argument_whose_repr_fails_does_not_hide_the_error() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    assert isinstance(error_of(Top(fl.Lambda(fail)), Mute()).__cause__, KeyError)


def test_a_long_tree_is_cut_to_twenty_lines_around_the_failing_leaf() -> None:
    layers = [fl.Linear(1 + i, 1) for i in range(60)]
    root = Top(*[fl.Lambda(lambda x: x) for _ in range(30)], *layers)
    message = str(error_of(root, torch.ones(1, 1)))
    tree = [line for line in message.splitlines() if "──" in line or "CHAIN" in line or line == "..."]
    assert len(tree) <= 20
    assert sum(">>>" in line for line in tree) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        fl.Chain,
        fl.Residual,
        fl.Passthrough,
        fl.Sum,
        fl.Parallel,
        fl.Distribute,
        fl.Concatenate,
        lambda m: fl.Matmul(m, m),
    ],
    ids=["Chain", "Residual", "Passthrough", "Sum", "Parallel", "Distribute", "Concatenate", "Matmul"],
)
def test_each_kind_of_chain_raises_one_error(wrap: Any) -> None:
    root = Top(wrap(fl.Chain(fl.Lambda(fail))))
    error = error_of(root, torch.ones(1))
    assert isinstance(error.__cause__, KeyError)
    assert error.__cause__.__cause__ is None
    assert str(error).count("KeyError: 'the original text'") == 1
    assert sum(">>>" in line for line in str(error).splitlines()) == 1


def test_at_depth_40_there_is_one_error_and_a_short_message() -> None:
    root: Any = fl.Lambda(fail)
    for _ in range(40):
        root = fl.Chain(root)
    error = error_of(root, torch.ones(1))
    assert isinstance(error.__cause__, KeyError)
    assert len(str(error)) < 8000


def test_the_argument_is_the_one_the_failing_child_was_given() -> None:
    root = Top(fl.Lambda(lambda x: torch.zeros(7)), fl.Lambda(fail))
    assert "0: Tensor(shape=(7" in str(error_of(root, torch.ones(1)))


def test_a_residual_whose_shapes_do_not_add_up_says_so() -> None:
    error = error_of(Top(fl.Residual(fl.Linear(2, 3))), torch.ones(1, 2))
    assert isinstance(error.__cause__, RuntimeError)
    assert "size" in str(error.__cause__)
    assert "Top.Residual" in str(error)


@pytest.mark.parametrize(
    "build",
    [
        lambda: fl.Residual(fl.Linear(2, 3)),
        lambda: fl.Sum(fl.Linear(2, 3), fl.Linear(2, 2)),
        lambda: fl.Matmul(fl.Identity(), fl.Identity()),
        lambda: fl.Concatenate(fl.Linear(2, 3), fl.Linear(2, 2), dim=0),
        lambda: fl.Concatenate(fl.Identity(), dim=7),
        lambda: fl.Concatenate(fl.Lambda(lambda x: None)),
        lambda: fl.Residual(),
    ],
    ids=["Residual", "Sum", "Matmul", "Concatenate", "dim", "nothing to concatenate", "empty Residual"],
)
def test_outputs_that_do_not_fit_together_are_an_error_that_names_the_chain(build: Any) -> None:
    chain = build()
    error = error_of(chain, torch.ones(1, 2))
    assert error.__cause__ is not None
    assert type(chain).__name__ in str(error)
    assert "is not in" not in str(error)
    nested = error_of(Top(fl.Chain(build())), torch.ones(1, 2))
    assert f"Top.Chain.{type(chain).__name__}" in str(nested)


def test_an_error_on_the_meta_device_keeps_its_cause() -> None:
    root = Top(fl.Linear(2, 2, device="meta"), fl.Linear(3, 1, device="meta"))
    error = error_of(root, torch.ones(1, 2, device="meta"))
    assert isinstance(error.__cause__, RuntimeError)
    assert "device=meta" in str(error)


def test_an_exception_inside_a_chain_inside_a_plain_module_is_one_error() -> None:
    inner = fl.Chain(fl.Lambda(fail))
    error = error_of(Top(nn.Sequential(nn.Identity(), inner)), torch.ones(1))
    assert isinstance(error.__cause__, KeyError)
    assert "Lambda" in str(error)
    assert str(error).count("KeyError: 'the original text'") == 1


def test_an_exception_of_a_plain_module_is_explained_like_any_other() -> None:
    error = error_of(Top(fl.Chain(nn.Linear(3, 1))), torch.ones(1, 2))
    assert "Top.Chain.Linear" in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_a_chain_inside_a_plain_sequential_raises_a_chain_error() -> None:
    assert isinstance(error_of(nn.Sequential(fl.Chain(fl.Lambda(fail))), 1).__cause__, KeyError)


def test_a_leaf_that_occurs_twice_is_marked_once() -> None:
    leaf = fl.Linear(2, 1)
    root = Top(leaf, leaf)
    assert sum(">>>" in line for line in str(error_of(root, torch.ones(1, 2))).splitlines()) == 1


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_passes_through_untouched(interrupt: type[BaseException]) -> None:
    def stop(_: Any) -> None:
        raise interrupt

    with pytest.raises(interrupt):
        Top(fl.Chain(fl.Sum(fl.Lambda(stop))))(1)


def test_stop_iteration_of_a_layer_is_an_error_like_any_other() -> None:
    def stop(_: Any) -> None:
        raise StopIteration

    assert isinstance(error_of(Top(fl.Lambda(stop)), 1).__cause__, StopIteration)


def test_a_model_runs_again_after_an_error() -> None:
    root = Top(fl.Linear(2, 2), fl.Residual(fl.Linear(2, 2)))
    x = torch.ones(1, 2)
    before = root(x)
    error_of(root, torch.ones(1, 3))
    assert torch.equal(root(x), before)


def test_a_wrong_number_of_inputs_says_what_was_called() -> None:
    error = error_of(Top(fl.Linear(1, 1)), torch.ones(1, 1), torch.ones(1, 1))
    assert isinstance(error.__cause__, TypeError)
    assert "Top.Linear" in str(error)


def test_a_dirty_tree_names_the_failing_leaf_by_its_new_key() -> None:
    root = Top(fl.Lambda(lambda x: x))
    root.append(fl.Lambda(fail))
    root.insert(0, fl.Lambda(lambda x: x))
    assert "Top.Lambda_3" in str(error_of(root, 1))


def test_a_chain_error_can_be_pickled() -> None:
    import pickle

    error = error_of(Top(fl.Lambda(fail)), 1)
    copied = pickle.load(io.BytesIO(pickle.dumps(error)))
    assert (type(copied), str(copied)) == (ChainError, str(error))
