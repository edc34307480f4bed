"""The relatives of Chain: what is done with the outputs of the children.

`Residual` and `Passthrough` run their children in order, as a Chain does. `Parallel`, `Sum`, `Concatenate` and
`Matmul` give all children the same inputs; `Distribute` gives each its own.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from refiners.errors import InputError
from refiners.fluxion.layers.chain import Chain, Returned
from refiners.fluxion.layers.failure import chain_error
from refiners.fluxion.layers.observation import PASS_THROUGH, calls_are_observed


class Residual(Chain):
    """Adds its input to what its children make of it.

    Receives:
        One tensor.

    Returns:
        `children(x) + x`.

    Raises:
        InputError: (an AssertionError) There is not exactly one input.
    """

    _tag = "RES"
    _takes_one_input = True

    def _finish(self, inputs: tuple[Any], output: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] (see Chain)
        return output + inputs[0]


class Passthrough(Chain):
    """Runs its children for what they do to contexts, and returns its own inputs, as a tuple."""

    _tag = "PASS"

    def _finish(self, inputs: tuple[Any, ...], output: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] (see Chain)
        return inputs


class _Branches(Chain):
    """A Chain whose children do not feed one another. Their outputs are gathered, or folded together one by one."""

    _explains_failures = True
    # Whether all outputs live until the last child has run.
    _gathers: ClassVar[bool] = False

    def _share(self, args: tuple[Any, ...]) -> Iterable[tuple[Any, ...]]:
        """The inputs of each child."""
        return [args] * len(self.__dict__["_modules"])

    def _fold(self, folded: Any, output: Any) -> Any:
        """Take in the output of one child. `folded` is None before the first."""
        raise NotImplementedError

    def _result(self, folded: Any) -> Any:
        """What is returned, given what the outputs were folded to, or the list of them."""
        return folded

    def forward(self, *args: Any) -> Any:
        shares = self._share(args)
        if is_dynamo_compiling():
            return self._forward_traced(*args)
        provider = self._provider
        outer = provider.enter() if provider is not None else None
        direct = self._children_are_plain and not calls_are_observed()
        gathered: list[Any] | None = [] if self._gathers else None
        folded: Any = None
        share: tuple[Any, ...] = args
        layer: Any = None
        try:
            for layer, share in zip(tuple(self.__dict__["_modules"].values()), shares, strict=True):
                if (
                    direct
                    and not layer._forward_hooks
                    and not layer._forward_pre_hooks
                    and not layer._backward_hooks
                    and not layer._backward_pre_hooks
                    and layer._compiled_call_impl is None
                ):
                    call = layer.forward
                else:
                    call = layer
                output = call(*share)
                if type(output) is Returned:
                    output = output.value
                if gathered is not None:
                    gathered.append(output)
                else:
                    folded = self._fold(folded, output)
                output = None  # or it would live for as long as the next child runs
            layer = None
            return self._result(folded if gathered is None else gathered)
        except PASS_THROUGH:
            raise
        except Exception as error:
            if is_compiling():
                raise
            raise chain_error(self, layer, share, error) from error
        finally:
            if provider is not None:
                provider.leave(outer)

    def _run_traced(self, args: tuple[Any, ...]) -> Any:
        gathered: list[Any] = []
        folded: Any = None
        for layer, share in zip(self.__dict__["_modules"].values(), self._share(args), strict=True):
            output = layer(*share)
            if isinstance(output, Returned):
                output = output.value
            if self._gathers:
                gathered.append(output)
            else:
                folded = self._fold(folded, output)
        return self._result(gathered if self._gathers else folded)


class Parallel(_Branches):
    """Gives all children the same inputs, and returns their outputs as a tuple."""

    _tag = "PAR"
    _gathers = True

    def _result(self, folded: list[Any]) -> Any:
        return tuple(folded)


class Distribute(Parallel):
    """Gives its i-th input to its i-th child, and returns their outputs as a tuple.

    Raises:
        InputError: (an AssertionError) There are not as many inputs as children.
    """

    _tag = "DISTR"
    _explains_failures = False  # of a wrong number of inputs

    def _share(self, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(args) != len(self):
            raise InputError(
                f"{self.get_path()} has {len(self)} children, so it takes {len(self)} inputs; got {len(args)}."
            )
        return [(arg,) for arg in args]


class Sum(_Branches):
    """Gives all children the same inputs, and adds their outputs up; a tuple is added up first.

    Returns:
        The sum, from left to right; None without children.
    """

    _tag = "SUM"

    def _fold(self, folded: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            first, *rest = cast(tuple[Any, ...], output)
            for term in rest:
                first = first + term
            output = first
        return output if folded is None else folded + output


class Concatenate(_Branches):
    """Gives all children the same inputs, and concatenates their outputs; None is left out.

    Args:
        *modules: The children.
        dim: The dimension along which to concatenate.
    """

    _tag = "CAT"
    _gathers = True

    def __init__(self, *modules: Any, dim: int = 0) -> None:
        super().__init__(*modules)
        self.dim = dim

    def _result(self, folded: list[Any]) -> Tensor:
        return torch.cat([output for output in folded if output is not None], dim=self.dim)


class Matmul(_Branches):
    """Gives both children the same inputs, and multiplies their outputs: `first(x) @ second(x)`."""

    _tag = "MATMUL"

    def __init__(self, input: Any, other: Any) -> None:
        super().__init__(input, other)

    def _fold(self, folded: Any, output: Any) -> Any:
        return output if folded is None else torch.matmul(folded, output)
