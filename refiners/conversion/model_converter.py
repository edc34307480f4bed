"""A first draft of a key map, found by running both models.

Two models that compute the same thing run their layers in the same order. So the n-th layer with weights of some shapes
in one is likely the n-th with those shapes in the other. That is a guess: it fails where two layers run in another
order, and cannot tell two equal runs apart. It serves to write a `KeyMap`, which says by name what is meant; a port
relies on the key map alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from refiners.conversion.files import write_state_dict
from refiners.conversion.key_map import KeyMap
from refiners.conversion.proposal import format_lines, propose_lines
from refiners.conversion.weights import same_bits
from refiners.errors import ConversionError

ModelArgs = tuple[Any, ...] | Mapping[str, Any] | Tensor

_NUMBERS = (
    "eps",
    "stride",
    "padding",
    "dilation",
    "groups",
    "num_groups",
    "kernel_size",
    "padding_mode",
    "padding_idx",
)


class ModelConverter:
    """Runs two models, pairs their layers, and proposes the key map between them. A draft, not a proof.

    Receives:
        source_model: the upstream model.
        target_model: the port.
        source_keys_to_skip: paths of source layers to leave out, with all below them.
        target_keys_to_skip: paths of target layers to leave out, with all below them.
        skip_init_check: do not compare the numbers of paired layers, such as eps and stride.
        skip_output_check: do not compare the outputs after conversion.
        threshold: the largest difference of outputs to accept. By default they have to be equal to the last bit.
        verbose: print what does not fit, and the proposed key map.

    Example:
        >>> source, target = nn.ModuleDict({"fc": nn.Linear(2, 2)}), nn.Sequential(nn.Linear(2, 2))
        >>> source.forward = lambda x: source["fc"](x)
        >>> converter = ModelConverter(source, target, verbose=False)
        >>> converter.run(torch.ones(1, 2))
        True
        >>> converter.key_map.lines
        {'fc': '0'}
    """

    def __init__(
        self,
        source_model: nn.Module,
        target_model: nn.Module,
        source_keys_to_skip: Sequence[str] = (),
        target_keys_to_skip: Sequence[str] = (),
        skip_init_check: bool = False,
        skip_output_check: bool = False,
        threshold: float = 0.0,
        verbose: bool = True,
    ) -> None:
        self.source_model = source_model
        self.target_model = target_model
        self.source_keys_to_skip = tuple(source_keys_to_skip)
        self.target_keys_to_skip = tuple(target_keys_to_skip)
        self.skip_init_check = skip_init_check
        self.skip_output_check = skip_output_check
        self.threshold = threshold
        self.verbose = verbose
        self.problems: list[str] = []
        self._pairs: list[tuple[str, str]] = []
        self._converted: dict[str, Tensor] | None = None

    def run(self, source_args: ModelArgs, target_args: ModelArgs | None = None) -> bool:
        """Pairs the layers, loads the source's weights into the target, and compares the outputs.

        Receives:
            source_args: what to call the source with: a tuple of arguments, a dict of keywords, or one tensor.
            target_args: what to call the target with; the same by default.

        Returns:
            whether all fits. When it does not, `problems` says why and the target has its own weights again.
        """
        self._converted = None
        if self.map_state_dicts(source_args, target_args) is None:
            return False
        before = {key: value.detach().clone() for key, value in self.target_model.state_dict().items()}
        try:
            converted = self.get_state_dict()
            self.target_model.load_state_dict(converted)
            if not self.skip_output_check:
                self._compare_outputs(source_args, source_args if target_args is None else target_args)
        except ConversionError as error:
            self._report(str(error))
            self.target_model.load_state_dict(before)
            return False
        if self.problems:
            self.target_model.load_state_dict(before)
            return False
        self._converted = converted
        if self.verbose:
            print(f"The outputs agree. A draft of the key map, to be checked by name:\n{self.key_map_text}")
        return True

    def map_state_dicts(self, source_args: ModelArgs, target_args: ModelArgs | None = None) -> dict[str, str] | None:
        """Pairs the layers by running both models.

        Returns:
            target path to source path of each layer; None when they do not pair, with the reasons in `problems`.
        """
        self.problems = []
        self._pairs = []
        source = _layers(self.source_model, source_args, self.source_keys_to_skip)
        target = _layers(
            self.target_model, source_args if target_args is None else target_args, self.target_keys_to_skip
        )
        pairs = self._pair(source, target)
        if not self.skip_init_check:
            for source_path, target_path in pairs:
                self._compare_numbers(source_path, source[source_path], target_path, target[target_path])
        if self.problems:
            return None
        self._pairs = pairs
        return {target_path: source_path for source_path, target_path in pairs}

    @property
    def key_map(self) -> KeyMap:
        """The proposed key map.

        Raises:
            ConversionError: the layers were not paired yet, or do not pair.
        """
        if not self._pairs:
            reasons = "\n".join(self.problems) or "Call run() or map_state_dicts() first."
            raise ConversionError(f"There is no key map to propose: the layers are not paired. {reasons}")
        ignore = dict.fromkeys(self.source_keys_to_skip, "source_keys_to_skip")
        return KeyMap(propose_lines(self._pairs), ignore=ignore, name="the source model")

    @property
    def key_map_text(self) -> str:
        """The proposed key map as Python source."""
        return format_lines(propose_lines(self._pairs))

    def get_state_dict(self) -> dict[str, Tensor]:
        """The source's weights under the target's keys; what is skipped keeps the target's own.

        Raises:
            ConversionError: the proposed key map does not fill the target.
        """
        own = self.target_model.state_dict()
        skipped = [key for key in own if _below(key, self.target_keys_to_skip)]
        wanted = {key: value for key, value in own.items() if key not in skipped}
        converted = self.key_map.convert(self.source_model.state_dict(), wanted)
        return {**own, **converted}

    def save_to_safetensors(self, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the converted weights, after a successful `run`, to a file that does not exist yet.

        Raises:
            ConversionError: `run` did not succeed.
            FileFormatError: the path exists or cannot be written.
        """
        if self._converted is None:
            raise ConversionError("There is nothing to save: run() was not called, or found that the models differ.")
        write_state_dict(path, self._converted, metadata)

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
        if self.verbose:
            print(problem)

    def _pair(self, source: Mapping[str, nn.Module], target: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
        """Pairs in the order of the target: the n-th of some shapes with the n-th of the same shapes."""
        waiting: dict[object, list[str]] = {}
        for path, layer in source.items():
            waiting.setdefault(_shapes(layer), []).append(path)
        pairs: list[tuple[str, str]] = []
        for path, layer in target.items():
            if waiting.get(_shapes(layer)):
                pairs.append((waiting[_shapes(layer)].pop(0), path))
            else:
                self._report(f"{path} of the target, {_describe(layer)}, has no layer of its shapes in the source.")
        for path in (path for paths in waiting.values() for path in paths):
            self._report(f"{path} of the source, {_describe(source[path])}, has no layer of its shapes in the target.")
        return pairs

    def _compare_numbers(self, source_path: str, source: nn.Module, target_path: str, target: nn.Module) -> None:
        for name in _NUMBERS:
            one, other = getattr(source, name, None), getattr(target, name, None)
            if one != other and hasattr(source, name) and hasattr(target, name):
                self._report(f"{name} of {source_path} is {one}, of {target_path} {other}.")

    def _compare_outputs(self, source_args: ModelArgs, target_args: ModelArgs) -> None:
        source = list(_tensors(_call(self.source_model, source_args)))
        target = list(_tensors(_call(self.target_model, target_args)))
        if not source or len(source) != len(target):
            self._report(f"The source returns {len(source)} tensors, the target {len(target)}.")
            return
        for index, (one, other) in enumerate(zip(source, target, strict=True)):
            if one.shape != other.shape:
                self._report(f"Output {index} has the shape {tuple(one.shape)}, the target's {tuple(other.shape)}.")
            elif not same_bits(one, other):
                difference = (one.double() - other.double()).abs().max().item()
                if not difference <= self.threshold:
                    self._report(f"Output {index} differs by up to {difference:.3g}; threshold={self.threshold}.")


def _layers(model: nn.Module, args: ModelArgs, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that hold parameters of their own, in the order in which they first run."""
    seen: dict[str, nn.Module] = {}
    handles: list[RemovableHandle] = []

    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}  # pyright: ignore[reportUnknownVariableType]: torch leaves it open

    def record(module: nn.Module, _inputs: object) -> None:
        seen.setdefault(paths[module], module)

    for module, path in paths.items():
        if next(module.parameters(recurse=False), None) is not None and not _below(path, skip):
            handles.append(module.register_forward_pre_hook(record))
    try:
        _call(model, args)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _call(model: nn.Module, args: ModelArgs) -> Any:
    """One run without dropout and with the same random numbers each time; the model and the inputs stay as they are."""
    training = [module for module in model.modules() if module.training]
    given = copy.deepcopy(args)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        model.eval()
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)
    finally:
        torch.set_rng_state(state)
        for module in training:
            module.training = True


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():  # pyright: ignore[reportUnknownVariableType]: a model may return anything
            yield from _tensors(value)  # pyright: ignore[reportUnknownArgumentType]: the same
    elif isinstance(output, list | tuple):
        for value in output:  # pyright: ignore[reportUnknownVariableType]: the same
            yield from _tensors(value)  # pyright: ignore[reportUnknownArgumentType]: the same


def _shapes(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple(sorted((name, parameter.shape) for name, parameter in layer.named_parameters(recurse=False)))


def _describe(layer: nn.Module) -> str:
    return f"{type(layer).__name__} with " + ", ".join(f"{name} {tuple(shape)}" for name, shape in _shapes(layer))


def _below(key: str, paths: Sequence[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)
