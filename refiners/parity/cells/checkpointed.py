"""The metamorphic cells of the backward pass: activations that are computed a second time change nothing."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from refiners.fluxion.adapters.checkpointing import CheckpointAdapter
from refiners.fluxion.layers.chain import Chain
from refiners.parity.influence import matches
from refiners.parity.modules import modules
from refiners.parity.pairing import Kind, Pair, pair_gradients, pair_outputs
from refiners.parity.scene import NotApplicable, Outcome, Scene, unequal
from refiners.parity.side import Observed, observe


def checkpointed(scene: Scene) -> tuple[Outcome, str]:
    """Upstream recomputing its activations, against the port, which does so too where it can."""
    case = scene.case
    if not case.gradients:
        raise NotApplicable("the case compares no gradients")
    if _switch(scene.upstream) is None:
        raise NotApplicable("upstream has no gradient checkpointing")
    plain = _calls(scene, scene.upstream)[1]
    ours, recomputed = _calls(scene, _checkpointing(scene.upstream))
    if recomputed <= plain:
        raise NotApplicable("upstream recomputes nothing with its gradient checkpointing on")
    can = _switch(scene.port) is not None
    theirs, _ = _calls(scene, _checkpointing(scene.port) if can else scene.port, is_port=True)
    pairs, faults = pair_outputs(ours, theirs)
    gradients, more = pair_gradients(ours, theirs, (scene.upstream, scene.port), case.key_map)
    pairs += [pair for pair in gradients if not any(matches(noise, pair.name) for noise in case.without_influence)]
    reason = "; ".join([*faults, *more]) or unequal(pairs)
    return (Outcome.BROKEN, reason) if reason else (Outcome.HOLDS, "")


def _checkpointing(model: nn.Module) -> nn.Module:
    """A copy that trains, as recomputing asks for, without dropping anything."""
    made = copy.deepcopy(model).train()
    for module in modules(made):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    switch = _switch(made)
    assert switch is not None  # a copy has the methods of what it was copied from
    switch()
    return made


def _switch(model: nn.Module) -> Callable[[], object] | None:
    """What turns gradient checkpointing on: transformers and diffusers name it differently."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if callable(enable):
        return partial(enable, gradient_checkpointing_kwargs={"use_reentrant": False})
    can = getattr(model, "_supports_gradient_checkpointing", False)
    enable = getattr(model, "enable_gradient_checkpointing", None)
    return enable if can and callable(enable) else None


def _calls(
    scene: Scene, model: nn.Module, *, is_port: bool = False, others: set[nn.Module] | None = None
) -> tuple[Observed, int]:
    """Outputs and gradients of a model, and how many modules were called on the way, the backward pass included.

    Gradients that an earlier cell left are dropped: the backward pass would add to them. Modules that are not the
    model's own are put into `others`.
    """
    case, called = scene.case, [0]
    model.zero_grad(set_to_none=True)
    own = set(modules(model))

    def count(module: nn.Module, _: Any) -> None:
        called[0] += 1
        if others is not None and module not in own:
            others.add(module)

    handle = register_module_forward_pre_hook(count)
    try:
        run = case.run_port if is_port else case.run_upstream
        dtype = scene.lane.dtype
        seen = observe(model, run, scene.inputs, taps={}, gradients=True, seed=case.seed, rounded_to=dtype)
    finally:
        handle.remove()
    return seen, called[0]


def recomputed(scene: Scene) -> tuple[Outcome, str]:
    """The port with a `CheckpointAdapter` around each of its outermost Chains, against itself, bit for bit."""
    if not scene.case.gradients:
        raise NotApplicable("the case compares no gradients")
    port = scene.port
    nodes = [node for node in port.children() if isinstance(node, Chain) and any(True for _ in node.parameters())]
    if not isinstance(port, Chain) or not nodes:
        raise NotApplicable("the port is no Chain of Chains that hold weights")
    names = {id(parameter): name for name, parameter in port.named_parameters()}
    others = set[nn.Module]()
    plain, calls = _calls(scene, port, is_port=True, others=others)
    if others:
        raise NotApplicable("its run edits the tree, or a copy of it, and the backward pass would miss the edits")
    adapters = [CheckpointAdapter(node).inject(port) for node in dict.fromkeys(nodes)]
    try:
        again, more = _calls(scene, port, is_port=True)
        now = {names[id(parameter)]: parameter.grad for parameter in port.parameters()}
    finally:
        for adapter in reversed(adapters):
            adapter.eject()
        port.zero_grad(set_to_none=True)
    if more <= calls + len(adapters):
        raise NotApplicable("it runs other trees than the one that recomputes")
    pairs, faults = pair_outputs(plain, again)
    for name, before in plain.gradients.items():
        after = now.get(name)
        if before is not None and after is not None:
            pairs.append(Pair(name, Kind.GRADIENT, before, after))
        elif name in now and (before is None) != (after is None):
            faults.append(f"`{name}` has a gradient in one of two runs only")
    reason = "; ".join(faults) or unequal(pairs, exact=True)
    return (Outcome.BROKEN, reason) if reason else (Outcome.HOLDS, "")
