"""Adapters are exact inverses: random sequences of injections and ejections leave no trace once all are out.

Trees, adapters and orders are drawn from a seed. After every step the base still has the state it had at first; after
every refused step nothing at all has changed; in the end everything that can be seen of the model is as it was.
"""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import CheckpointAdapter, LinearLora, LoraAdapter, base_state_dict, inject_loras
from refiners.fluxion.selectors import select

DIM = 3


class Block(fl.Chain):
    """Declares a context, as models do."""

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {"block": {"seen": 0}}


class Around(fl.Chain, fl.Adapter[nn.Module]):
    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Identity(), target)


class Deep(fl.Residual, fl.Adapter[nn.Module]):
    """Holds its target two levels below itself, and brings a weight."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Sum(target, fl.Linear(DIM, DIM)))


class Instead(fl.Chain, fl.Adapter[nn.Module]):
    """Does not hold its target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Linear(DIM, DIM))


def lora_adapter(target: nn.Module) -> fl.Chain:
    return LoraAdapter(target, LinearLora("own", DIM, DIM, rank=2))


def random_tree(rng: random.Random, depth: int = 3) -> fl.Chain:
    shared = fl.Linear(DIM, DIM)
    children: list[nn.Module] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if depth > 0 and kind < 0.45:
            children.append(random_tree(rng, depth - 1))
        elif kind < 0.55:
            children.append(shared)
        elif kind < 0.7:
            children.append(fl.ReLU())
        elif kind < 0.8:
            children.append(nn.Sequential(nn.Linear(DIM, DIM)))
        else:
            children.append(fl.Linear(DIM, DIM, bias=rng.random() < 0.5))
    return rng.choice([fl.Chain, Block, fl.Residual, fl.Sum])(*children)


def picture(model: nn.Module) -> list[Any]:
    """Everything of a model that an injection could have changed."""
    seen: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        seen.append((name, id(module), type(module), module.training, list(own["_modules"])))
        seen.append([(key, id(p), p.requires_grad, p.tolist()) for key, p in module.named_parameters(recurse=False)])
        seen.append({key: list(value) for key, value in own.items() if "hooks" in key and value is not None})
        seen.append({key for key in own if key in ("_root_adapter", "_replaced_by", "_is_injected")})
        if isinstance(module, fl.ContextModule):
            seen.append(id(module.parent) if module.parent is not None else None)
        if isinstance(module, fl.Chain):
            provider = module.own_provider
            seen.append(None if provider is None or not provider.contexts else dict(provider.contexts))
    return seen


def state(model: nn.Module) -> list[tuple[str, Any]]:
    return [(key, tensor.tolist()) for key, tensor in base_state_dict(model).items()]


class Sequence:
    """One tree and the random steps that are taken on it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.model = random_tree(self.rng)
        for module in self.model.modules():
            module.training = self.rng.random() < 0.5
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = self.rng.random() < 0.5
        for linear in select(self.model).of(nn.Linear) if select(self.model).of(nn.Linear).count else ():
            if self.rng.random() < 0.2:
                linear.register_forward_hook(lambda *_: None)
        self.injected: list[Any] = []
        # A set may stand on the layers of an adapter that is out meanwhile: then it is ejected there.
        self.ejected: list[Any] = []
        self.before = picture(self.model)
        self.state = state(self.model)
        self.x = torch.randn(2, DIM)
        self.output = self.model(self.x)
        # What an adapter may be put on: any module the tree had at first, or an adapter.
        self.targets = [(m, p) for m, p in self.model.walk(recurse=True)]

    @property
    def top(self) -> fl.Chain:
        return self.model.get_parents()[-1] if self.model.parent else self.model

    def take(self, steps: int) -> None:
        for _ in range(steps):
            step = self.rng.choice([self.inject, self.inject, self.inject_set, self.eject, self.misuse])
            before = picture(self.top)
            try:
                step()
            except AdapterError:
                assert picture(self.top) == before, f"{step.__name__} was refused and changed the model"
            assert state(self.model) == self.state

    def inject(self) -> None:
        kind: Callable[[nn.Module], Any] = self.rng.choice([Around, Deep, Instead, lora_adapter, CheckpointAdapter])
        choice = self.rng.random()
        if choice < 0.15:
            adapter = kind(self.model).inject() if kind is not lora_adapter else Around(self.model).inject()
        elif choice < 0.3 and any(isinstance(adapter, fl.Chain) for adapter in self.injected):
            adapter = Around(self.rng.choice([a for a in self.injected if isinstance(a, fl.Chain)])).inject()
        else:
            target, parent = self.rng.choice(self.targets)
            if kind is lora_adapter and not isinstance(target, nn.Linear):
                kind = Around
            if isinstance(target, fl.ContextModule):
                adapter = kind(target).inject()
            else:
                above = target_parents(target, parent)
                adapter = kind(target).inject(self.rng.choice(above))
        self.injected.append(adapter)

    def inject_set(self) -> None:
        loras = select(self.top).of(fl.Linear).outside(nn.Sequential)
        if loras.count:
            self.injected.append(inject_loras(loras, name=f"set {len(self.injected)}", rank=1))

    def eject(self) -> None:
        if self.injected:
            adapter = self.rng.choice(self.injected)
            adapter.eject()
            self.injected.remove(adapter)
            self.ejected.append(adapter)

    def misuse(self) -> None:
        adapters = [adapter for adapter in self.injected if isinstance(adapter, fl.Chain)]
        wrong: list[Callable[[], Any]] = [
            lambda: Around(fl.Linear(DIM, DIM)).inject(self.model),
            lambda: Around(fl.Linear(DIM, DIM)).inject(),
            lambda: Around(self.model).eject(),
            lambda: self.rng.choice(adapters).inject(self.model) if adapters else Around(self.model).eject(),
        ]
        with pytest.raises(AdapterError):
            self.rng.choice(wrong)()
        raise AdapterError("as expected")

    def check_copies(self) -> None:
        before = picture(self.top)
        copied = deepcopy(self.model)
        assert [key for key, _ in state(copied)] == [key for key, _ in self.state]
        eject_all_in(copied)
        assert state(copied) == self.state
        assert torch.equal(copied(self.x), self.output)
        try:
            structural = self.model.structural_copy()
        except AdapterError:
            structural = None
        if structural is not None:
            eject_all_in(structural)
            assert state(structural) == self.state
            assert torch.equal(structural(self.x), self.output)
        assert picture(self.top) == before

    def eject_all(self) -> None:
        self.rng.shuffle(self.injected)
        for adapter in self.injected:
            adapter.eject()


def eject_all_in(model: nn.Module) -> None:
    """Until none is left: what an adapter had replaced may hold others."""
    while adapters := [m for m in model.modules() if isinstance(m, fl.Adapter) and m.is_injected]:
        adapters[0].eject()


def target_parents(target: nn.Module, parent: fl.Chain) -> list[fl.Chain]:
    return [parent, *parent.get_parents()]


@pytest.mark.parametrize("seed", range(60))
def test_what_was_injected_and_ejected_in_any_order_leaves_no_trace(seed: int) -> None:
    sequence = Sequence(seed)
    sequence.take(steps=25)
    sequence.eject_all()
    assert picture(sequence.model) == sequence.before
    assert torch.equal(sequence.model(sequence.x), sequence.output)


@pytest.mark.parametrize("seed", range(100, 130))
def test_copies_keep_their_adapters_and_share_no_structure(seed: int) -> None:
    sequence = Sequence(seed)
    sequence.take(steps=6)
    sequence.check_copies()
    sequence.eject_all()
    assert picture(sequence.model) == sequence.before
