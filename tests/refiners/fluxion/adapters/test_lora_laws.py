"""Sets of LoRAs are exact inverses, on real trees: random walks of all that can be done with them.

A walk draws its steps from a seed. In between, outputs equal, bit for bit, those of a fresh model with the same weights
and the same sets; a refused step changes nothing; base weights keep their names and their bytes. Once all sets are out,
everything that can be seen of the model is what it was at first.

    REFINERS_LORA_STEPS=5000 REFINERS_LORA_SEED=7 pytest tests/refiners/fluxion/adapters/test_lora_laws.py
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports import clip, unet
from reference_ports.clip.text import CLIPTextNumbers
from refiners.errors import AdapterError
from refiners.fluxion.adapters import (
    CheckpointAdapter,
    Delta,
    DeltaSpec,
    LoraAdapter,
    LoraSet,
    adapter_state_dict,
    base_state_dict,
    fuse,
    inject_loras,
    load_base_state_dict,
    unfuse,
)
from refiners.fluxion.adapters.weights import named_base_modules
from refiners.fluxion.selectors import select

STEPS = int(os.environ.get("REFINERS_LORA_STEPS", "1000"))
SEED = int(os.environ.get("REFINERS_LORA_SEED", "0"))
# What an adapter leaves on a module as long as it is in.
MARKS = {"_root_adapter", "_replaced_by", "_is_injected", "_merge", "is_fused"}
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)

TEXT: CLIPTextNumbers = {
    "vocabulary_size": 50,
    "embedding_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "feedforward_dim": 24,
    "num_positions": 12,
}
UNET = {
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 10,
    "attention_head_dim": (2, 3),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def run_clip(model: Any) -> Tensor:
    tokens = torch.tensor([[40, 7, 9, 49, 49], [40, 8, 49, 0, 0]])
    words, pooled = model(tokens)
    return torch.cat([words.flatten(), pooled.flatten()])


def run_unet(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    model.set_timestep(torch.tensor([3, 700]))
    model.set_clip_text_embedding(torch.randn(2, 3, 10, generator=generator))
    return model(torch.randn(2, 4, 4, 6, generator=generator))


TREES: dict[str, tuple[Callable[[], fl.Chain], Callable[[Any], Tensor]]] = {
    "clip": (lambda: clip.CLIPTextModel(**TEXT), run_clip),
    "unet": (lambda: unet.from_config(UNET), run_unet),
}


class Around(fl.Chain, fl.Adapter[nn.Module]):
    """Changes no output, and stands between a layer and whoever adapts it."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Identity())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def picture(model: nn.Module) -> list[Any]:
    """Everything of a model that can be seen."""
    seen: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        seen.append((name, id(module), type(module), module.training, list(own["_modules"]), MARKS & own.keys()))
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            seen.append((key, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.stride(), tensor.shape))
            seen.append(tensor.detach().numpy().tobytes())
        seen.append({key: list(value) for key, value in own.items() if "hooks" in key and value is not None})
        if isinstance(module, fl.ContextModule):
            seen.append(id(module.parent) if module.parent is not None else None)
        if isinstance(module, fl.Chain) and module.own_provider is not None:
            seen.append(repr(module.own_provider.contexts))
    return seen


def state(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(key, tensor.detach().numpy().tobytes()) for key, tensor in base_state_dict(model).items()]


class Walk:
    """One model, the sets on it, and random steps."""

    def __init__(self, tree: str, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        build, self.run = TREES[tree]
        self.model = build().eval()
        for module in self.model.modules():
            module.training = self.rng.random() < 0.5
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad = self.rng.random() < 0.5
        next(iter(select(self.model).of(nn.Linear))).register_forward_hook(lambda *_: None)
        self.pristine = deepcopy(self.model)
        self.layers = {path: m for path, m in named_base_modules(self.model) if isinstance(m, LAYERS)}
        self.sets: list[LoraSet] = []
        self.merged: list[LoraSet] = []
        self.others: list[Any] = []
        self.is_fused = False
        self.count = self.checks = 0
        self.base = {key: tensor.clone() for key, tensor in base_state_dict(self.model).items()}
        self.first_base = self.base
        self.output = self.output_of(self.model)
        self.before = picture(self.model)

    def output_of(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.run(model)

    # --- steps ---------------------------------------------------------------------------------------------------

    def take(self, steps: int, every: int) -> None:
        names = [name for name in dir(self) if name.startswith("do_")]
        done: set[str] = set()
        for i in range(steps):
            name = self.rng.choice(names)
            getattr(self, name)()
            done.add(name)
            if i % 5 == 0:
                self.check_state()
            if i % every == 0:
                self.check_output()
        assert self.checks > steps // every // 3
        assert steps < 300 or done == set(names)

    def random_specs(self, paths: list[str], like: Mapping[str, DeltaSpec] | None = None) -> dict[str, DeltaSpec]:
        """Specs of random methods and ranks; or of the methods and at most the ranks of others."""
        specs: dict[str, DeltaSpec] = {}
        for path in paths:
            old = like[path] if like else None
            rank = self.rng.randint(1, (old.rank or 1) if old else 3)
            layer = self.layers[path]
            methods = ["lora", "lora", "dora", "loha", "lokr"] if isinstance(layer, nn.Linear) else ["lora"]
            method = old.method if old else self.rng.choice(methods)
            groups = 1 if not isinstance(layer, nn.Conv2d) else layer.groups
            # Which tensors a LoKr consists of depends on its rank.
            rank = old.rank if old and method == "lokr" else rank
            alpha = self.rng.choice([None, 1.0, 3.0])
            delta = Delta.of_method(method).for_target("x", layer, rank=(rank or 1) * groups, alpha=alpha)
            for parameter in delta.parameters():
                nn.init.normal_(parameter, std=0.3)
            specs[path] = delta.spec()
        return specs

    def random_paths(self) -> list[str]:
        return self.rng.sample(list(self.layers), self.rng.randint(1, 5))

    def do_inject(self) -> None:
        if len(self.sets) < 4:
            specs, scale = self.random_specs(self.random_paths()), self.rng.choice([1.0, -0.5, 0.0])
            self.count += 1
            loras = inject_loras(self.model, specs, name=f"set {self.count}", scale=scale, fused=self.is_fused)
            assert set(loras.paths) == set(specs)
            self.sets.append(loras)

    def do_eject(self) -> None:
        if self.sets:
            loras = self.rng.choice(self.sets)
            loras.eject()
            self.sets.remove(loras)
            self.merged = [other for other in self.merged if other is not loras]

    def do_scale(self) -> None:
        for loras in self.rng.sample(self.sets, min(1, len(self.sets))):
            loras.scale = self.rng.choice([0.0, 1.0, 0.7, -1.3])

    def do_scale_one_layer(self) -> None:
        for loras in self.rng.sample(self.sets, min(1, len(self.sets))):
            scales = loras.scales
            scales[self.rng.choice(list(scales))] = self.rng.choice([0.0, 0.4])

    def do_enable_or_disable(self) -> None:
        for loras in self.rng.sample(self.sets, min(1, len(self.sets))):
            loras.enabled = not loras.enabled

    def do_merge(self) -> None:
        loras = self.rng.choice(self.sets) if self.sets else None
        if loras is None or loras in self.merged:
            return
        before = self.everything()
        try:
            loras.merge()
        except AdapterError:
            assert self.everything() == before
        else:
            self.merged.append(loras)

    def do_unmerge(self) -> None:
        if self.merged:
            loras = self.rng.choice(self.merged)
            loras.unmerge()
            self.merged.remove(loras)

    def do_swap(self) -> None:
        for loras in self.rng.sample(self.sets, min(1, len(self.sets))):
            loras.swap(self.random_specs(list(loras.paths), like=loras.specs()))

    def do_fuse_or_unfuse(self) -> None:
        if self.is_fused:
            unfuse(self.model)
            self.is_fused = False
            return
        with suppress(AdapterError):  # there is nothing to fuse
            fuse(self.model)
            self.is_fused = True

    def do_load_base_weights(self) -> None:
        keys = self.rng.sample(list(self.base), 3)
        new = {key: torch.randn_like(self.base[key]) * 0.3 for key in keys}
        load_base_state_dict(self.model, new, strict=False)
        self.base = {**self.base, **new}

    def do_copy(self) -> None:
        before, output = self.everything(), self.output_of(self.model)
        for copied in (deepcopy(self.model), *self.structural_copies()):
            assert same_bits(self.output_of(copied), output)
        assert self.everything() == before

    def structural_copies(self) -> list[nn.Module]:
        try:
            return [self.model.structural_copy()]
        except AdapterError:
            return []  # an adapter of a Chain is in

    def do_train_or_eval(self) -> None:
        flags = {id(module): module.training for module in self.model.modules()}
        self.model.train(self.rng.random() < 0.5)
        for module in self.model.modules():
            module.training = flags[id(module)]

    def do_forward_and_backward(self) -> None:
        output = self.run(self.model)
        if output.requires_grad:
            output.square().sum().backward()
        for loras in self.sets:
            for delta in loras.loras:
                is_run = delta.switch.enabled and not delta.switch.merged and delta.scaling
                assert not is_run or any(parameter.grad is not None for parameter in delta.parameters())
        for parameter in (*self.model.parameters(), *base_state_dict(self.model, keep_vars=True).values()):
            parameter.grad = None

    def do_inject_another_adapter(self) -> None:
        if len(self.others) < 4:
            kind = self.rng.choice([Around, CheckpointAdapter])
            layer = self.rng.choice(list(self.layers.values()))
            if not hasattr(layer, "_merge"):
                self.others.append(kind(layer).inject(self.model))

    def do_eject_another_adapter(self) -> None:
        if self.others:
            self.others.pop(self.rng.randrange(len(self.others))).eject()

    def do_fail(self) -> None:
        before = self.everything()
        specs = self.random_specs(self.random_paths())
        path = self.rng.choice(list(specs))
        wrong: list[tuple[dict[str, DeltaSpec], str]] = [
            ({**specs, "Nowhere.Linear": specs[path]}, "new"),
            ({**specs, path: lora(torch.ones(2, 3), torch.ones(4, 5))}, "new"),
            ({**specs, path: lora(torch.full((1, 3), torch.nan), torch.ones(4, 1))}, "new"),
            ({}, "new"),
        ]
        if self.sets:
            loras = self.rng.choice(self.sets)
            wrong.append((specs | self.random_specs([loras.paths[0]]), loras.name))
        given, name = self.rng.choice(wrong)
        with pytest.raises(AdapterError):
            inject_loras(self.model, given, name=name)
        assert self.everything() == before

    # --- laws ----------------------------------------------------------------------------------------------------

    def everything(self) -> list[Any]:
        sets = [[(delta.scale, delta.switch.is_on) for delta in loras.loras] for loras in self.sets]
        return [picture(self.model), sets]

    def check_state(self) -> None:
        assert state(self.model) == [(key, tensor.numpy().tobytes()) for key, tensor in self.base.items()]
        brought = {id(p) for loras in self.sets for delta in loras.loras for p in delta.parameters()}
        assert {id(p) for p in adapter_state_dict(self.model, keep_vars=True).values()} == brought

    def check_output(self) -> None:
        if any(module.find(LoraAdapter) for module in self.model.modules() if isinstance(module, LoraAdapter)):
            return  # a later set stands inside of an earlier one, and sums of another order round in other ways
        self.checks += 1
        fresh = deepcopy(self.pristine)
        fresh.load_state_dict(self.base)
        sets: dict[str, LoraSet] = {}
        for loras in self.sets:
            sets[loras.name] = inject_loras(fresh, as_large(loras), name=loras.name, allow_no_change=True)
            sets[loras.name].swap(loras.specs())
            sets[loras.name].scales.update(loras.scales)
            sets[loras.name].enabled = loras.enabled
        if self.is_fused:
            with suppress(AdapterError):
                fuse(fresh)
        for loras in self.merged:
            sets[loras.name].merge()
        assert same_bits(self.output_of(self.model), self.output_of(fresh))

    def finish(self) -> None:
        self.rng.shuffle(self.sets)
        for leaving in self.rng.sample([*self.sets, *self.others], len(self.sets) + len(self.others)):
            leaving.eject()
        load_base_state_dict(self.model, self.first_base)
        assert picture(self.model) == self.before
        assert same_bits(self.output_of(self.model), self.output)


def lora(down: Tensor, up: Tensor) -> DeltaSpec:
    return DeltaSpec("lora", {"down": down, "up": up})


def as_large(loras: LoraSet) -> dict[str, DeltaSpec]:
    """Specs of the sizes that the tensors of a set have.

    What was swapped in may be of a smaller rank, and products of other sizes round in other ways.
    """
    deltas = loras.by_path()
    return {
        path: DeltaSpec(
            delta.method,
            {role: weight.tensor.detach().clone() for role, weight in delta.weights().items()},
            declared_rank=delta.rank,
        )
        for path, delta in deltas.items()
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("tree", "steps", "every"), [("clip", STEPS, 20), ("unet", STEPS // 3, 20)])
def test_a_walk_leaves_no_trace_and_each_step_is_what_a_fresh_model_does(tree: str, steps: int, every: int) -> None:
    walk = Walk(tree, seed=SEED)
    walk.take(steps, every)
    walk.finish()


@pytest.mark.parametrize("seed", range(SEED + 1, SEED + 5))
def test_short_walks_leave_no_trace_from_any_seed(seed: int) -> None:
    walk = Walk("clip", seed)
    walk.take(steps=40, every=10)
    walk.finish()
