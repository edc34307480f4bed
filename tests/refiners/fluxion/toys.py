"""A small model, adapters for it, and all that must be the same after they are gone."""

from typing import Any

from torch import nn

import refiners.fluxion.layers as fl


class Plus(fl.Sum, fl.Adapter[fl.Linear]):
    """Adds a second Linear."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(target.in_features, target.out_features))


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Holds its target, and changes nothing."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Identity())


class Deep(fl.Chain, fl.Adapter[nn.Module]):
    """Holds its target two levels down."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Chain(fl.Residual(target)), fl.Identity())


class Instead(fl.Chain, fl.Adapter[nn.Module]):
    """Does not hold its target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Identity())


def state(root: nn.Module) -> Any:
    """All that eject must give back: objects, order, names, parents, bytes, hooks, flags and contexts."""
    nodes: list[Any] = []

    def visit(module: nn.Module, path: str) -> None:
        hooks = [list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks)]
        parent = id(module.parent) if isinstance(module, fl.ContextModule) and module.parent is not None else None
        contexts = None
        if isinstance(module, fl.Chain) and module.own_provider is not None:
            contexts = {name: dict(context) for name, context in module.own_provider.values.items()}
        nodes.append((path, id(module), module.training, parent, hooks, contexts))
        for key, child in module._modules.items():
            visit(child, f"{path}.{key}")

    visit(root, "")
    weights = [
        (name, id(value), value.requires_grad, value.detach().numpy().tobytes())
        for name, value in root.state_dict(keep_vars=True).items()
    ]
    return nodes, weights, repr(root)


def model() -> fl.Chain:
    return fl.Chain(fl.Chain(fl.Linear(2, 2), fl.ReLU()), fl.Linear(2, 2), fl.Residual(fl.Linear(2, 2)))
