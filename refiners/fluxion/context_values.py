"""The values of contexts: those that were set from outside of any forward, and those that several places hold.

`refiners.fluxion.context` says who reads them, and when.
"""

from typing import Any

Context = dict[str, Any]
Contexts = dict[str, Context]

_ABSENT: Any = object()


class Store:
    """Values set from outside of any forward."""

    def __init__(self, values: Contexts) -> None:
        self.values = values
        # The objects that `init_context()` gave last: a value that still is one of them was not set by anybody.
        self.initial: Contexts = {}
        # What a forward of a descendant wrote while the owner was not running hides what was here before.
        self.hidden: dict[tuple[str, str], Any] = {}

    def write_from_below(self, name: str, key: str, value: Any) -> None:
        context = self.values[name]
        self.hidden.setdefault((name, key), context.get(key, _ABSENT))
        context[key] = value

    def take(self, initial: Contexts) -> Contexts:
        """Hand all values over to one call, and put the initial values of declared keys back in their place."""
        frame = {name: dict(context) for name, context in self.values.items()}
        if self.hidden:
            for (name, key), value in self.hidden.items():
                if value is _ABSENT:
                    self.values[name].pop(key, None)
                else:
                    self.values[name][key] = value
            self.hidden.clear()
        self.declare(initial)
        return frame

    def declare(self, initial: Contexts) -> None:
        # What need not be written is not: torch.compile replays each write after each call.
        for name, context in initial.items():
            known = self.values.get(name)
            if known is None:
                known = self.values[name] = {}
            for key, value in context.items():
                if known.get(key, _ABSENT) is not value:
                    known[key] = value
                    self.initial = initial

    def snapshot(self, initial: Contexts) -> "Store":
        """A store with the same values, but with initial values of its own where nobody has set any."""
        store = Store({name: dict(context) for name, context in self.values.items()})
        store.initial = initial
        for name, context in self.initial.items():
            for key, value in context.items():
                if self.values[name].get(key, _ABSENT) is value and key in initial.get(name, {}):
                    store.values[name][key] = initial[name][key]
        return store


class SplitContext(dict[str, Any]):
    """A context whose keys live in several providers: each is written where it lives, a new one in the topmost."""

    def __init__(self, holders: list[Context]) -> None:
        super().__init__({key: value for context in holders for key, value in context.items()})
        self._holders = holders

    def __setitem__(self, key: str, value: Any) -> None:
        holder = next((context for context in reversed(self._holders) if key in context), self._holders[-1])
        holder[key] = value
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]
