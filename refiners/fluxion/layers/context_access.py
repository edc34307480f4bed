"""The two leaves that read and write contexts.

UseContext("diffusion", "timestep")      returns the value, whatever its inputs
SetContext("unet", "residuals")          stores its input, and returns it
"""

from collections.abc import Callable
from typing import Any, Self

from refiners.errors import ContextError
from refiners.fluxion.context import Context, ContextProvider, find_place
from refiners.fluxion.layers.module import ContextModule, FunctionModule


class _ContextAccess(FunctionModule, ContextModule):
    def __init__(self, context: str, key: str) -> None:
        super().__init__()
        self.context = context
        self.key = key

    def _place(self) -> tuple[ContextProvider, Context]:
        """Who holds the value, and the live context that it is in."""
        link = self._parent
        place = None if link is None else find_place(link(), self.context, self.key)
        if place is None:
            raise ContextError(self._explain_missing_context(self.context))
        return place

    def __repr__(self) -> str:
        return f"{type(self).__name__}(context={self.context!r}, key={self.key!r})"


class UseContext(_ContextAccess):
    """Returns a value of a context.

    Receives:
        Anything; it is ignored.

    Returns:
        The value, passed through the functions given to `compose`.

    Raises:
        ContextError: (an AssertionError) The context does not exist, or the value is unset or None.
    """

    def __init__(self, context: str, key: str) -> None:
        super().__init__(context, key)
        self.func: Callable[[Any], Any] | None = None

    def compose(self, func: Callable[[Any], Any]) -> Self:
        """Pass the value through a function first; after the one given before, if any. Returns this layer."""
        self.func = func if self.func is None else Composed(self.func, func)
        return self

    def forward(self, *args: Any) -> Any:
        _, context = self._place()
        value = context.get(self.key)
        if value is None:
            raise ContextError(self._explain_unset())
        return value if self.func is None else self.func(value)

    def _explain_unset(self) -> str:
        return f'Context "{self.context}.{self.key}" is unset, read at {self.get_path()}. {self._how_to_set()}'

    def _how_to_set(self) -> str:
        chains = [] if self.parent is None else [self.parent, *self.parent.get_parents()]
        for chain in chains:
            if hasattr(type(chain), f"set_{self.key}"):
                return f"Call {type(chain).__name__}.set_{self.key}() first."
        if chains:
            for setter in chains[-1].layers(SetContext, recurse=True):
                if (setter.context, setter.key) == (self.context, self.key):
                    return f"It is written by {setter.get_path()}, which has not run before in this forward."
        return f'Call set_context("{self.context}", {{"{self.key}": …}}) on a Chain above first.'


class SetContext(_ContextAccess):
    """Stores its input in a context, and returns it.

    Args:
        context: The name of the context, which must exist.
        key: Where to store.
        callback: Called instead with the current value and the input, to change the value in place.

    Raises:
        ContextError: (an AssertionError) The context does not exist, or a callback is given and the value is unset.
    """

    def __init__(self, context: str, key: str, callback: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__(context, key)
        self.callback = callback

    def forward(self, x: Any) -> Any:
        provider, context = self._place()
        if self.callback is None:
            provider.write_from_below(self.context, self.key, x)
            return x
        if self.key not in context:
            raise ContextError(
                f'Context "{self.context}.{self.key}" is unset, so {self.get_path()} has no value to change. '
                "Declare the key in init_context()."
            )
        self.callback(context[self.key], x)
        return x


class Composed:
    """Two functions, one after the other."""

    def __init__(self, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> None:
        self.first = first
        self.second = second

    def __call__(self, value: Any) -> Any:
        return self.second(self.first(value))
