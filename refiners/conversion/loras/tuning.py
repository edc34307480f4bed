"""Files of peft's IA3 and LN tuning, which are no LoRAs: injected and filled in one call."""

from torch import Tensor, nn

from refiners.conversion.key_map import KeyMap
from refiners.conversion.loras.file import LoraFile
from refiners.conversion.loras.matching import LoraSpecs, specs_for
from refiners.conversion.loras.names import names_of
from refiners.conversion.loras.peft_config import is_among
from refiners.errors import ConversionError
from refiners.fluxion.adapters.ia3 import inject_ia3
from refiners.fluxion.adapters.sets import AdapterSet
from refiners.fluxion.adapters.tuning import inject_norm_tuning
from refiners.fluxion.layers.journal import all_or_nothing
from refiners.fluxion.selectors import Selection, select


@all_or_nothing
def inject_tuning(model: nn.Module, file: LoraFile, key_map: KeyMap | None = None) -> AdapterSet:
    """Injects the IA3 or the tuned norms of a file into a model, or changes nothing if anything fails.

    Receives:
        model: the tree.
        file: what `read_loras` has read of a folder that peft has written.
        key_map: from the published keys to those of the tree; not needed for a tree of a registered family.

    Raises:
        ConversionError: the file holds LoRAs, or does not fit the model. Lists all.
        AdapterError: a layer can take no such adapter.
    """
    methods = set(file.methods)
    if len(methods) != 1 or not methods <= {"ia3", "norm"}:
        raise ConversionError(
            f"{file.title} holds {' and '.join(sorted(methods))}. Inject LoRAs with inject_loras(model, file, name=…)."
        )
    names = names_of(model, key_map)
    specs = specs_for(file, names, methods=methods)
    chosen = {id(names.layers[path]): path for path in specs}
    layers = select(model).where(lambda layer: id(layer) in chosen)
    adapters = _inject(layers, specs, chosen) if "ia3" in methods else inject_norm_tuning(layers)
    adapters.load_state_dict({key: tensor for path in specs for key, tensor in _state(path, specs).items()})
    return adapters


def _inject(layers: Selection[nn.Module], specs: LoraSpecs, chosen: dict[int, str]) -> AdapterSet:
    config = next(iter(specs.configs.values()), None)
    names = {path: entry.module for path, entry in specs.entries.items()}

    def scales_inputs(layer: nn.Module) -> bool:
        path = chosen.get(id(layer))
        if path is None:
            return False
        if config is not None:
            return is_among(names[path], config.feedforward)
        # Of a Linear peft keeps (1, in) or (out, 1); of a convolution nothing but the configuration tells.
        return specs[path].tensors["ia3"].shape[0] == 1

    return inject_ia3(layers, feedforward=layers.where(scales_inputs))


def _state(path: str, specs: LoraSpecs) -> dict[str, Tensor]:
    tensors = specs[path].tensors
    if "ia3" in tensors:
        return {f"{path}.weight": tensors["ia3"].reshape(-1)}
    return {f"{path}.{role.removeprefix('norm_')}": tensor for role, tensor in tensors.items()}
