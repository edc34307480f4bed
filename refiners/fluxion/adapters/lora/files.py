"""Which tensors of a state dict make up one LoRA.

A LoRA comes as two weights and perhaps an alpha, and the key of each says what it is:

    encoder.Linear.lora_down.weight     down, for encoder.Linear
    encoder.Linear.lora_up.weight       up
    encoder.Linear.alpha                a number
"""

from collections.abc import Mapping

from torch import Tensor

from refiners.errors import ConversionError

DOWN = frozenset({"down", "lora_down", "lora_A"})
UP = frozenset({"up", "lora_up", "lora_B"})
# How many keys an error shows.
SHOWN = 12

Pair = tuple[Tensor, Tensor, float | None]


def pair_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Down, up and alpha of each LoRA, by the key of the layer it is for.

    Raises:
        ConversionError: (a ValueError) Some tensors belong to no LoRA, or one misses a weight. All are listed.
    """
    named: dict[str, dict[str, Tensor]] = {}
    ordered: dict[str, list[Tensor]] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for key, tensor in state_dict.items():
        layer, _, last = key.rpartition(".")
        owner, _, role = layer.rpartition(".")
        if last == "alpha" and tensor.numel() == 1:
            alphas[layer] = float(tensor.detach())
        elif last == "weight" and (role in DOWN or role in UP):
            named.setdefault(owner, {})["down" if role in DOWN else "up"] = tensor
        elif last == "weight":
            ordered.setdefault(owner, []).append(tensor)
        else:
            problems.append(f"{key}: neither a weight nor an alpha of a LoRA")
    pairs: dict[str, Pair] = {}
    for key, tensors in named.items():
        if key in ordered or len(tensors) < 2:
            problems.append(f"{key}: needs one down and one up, has {', '.join(tensors)}")
        else:
            pairs[key] = (tensors["down"], tensors["up"], alphas.get(key))
    for key, weights in ordered.items():
        if key not in named and len(weights) != 2:
            problems.append(f"{key}: needs two weights, has {len(weights)}")
        elif key not in named:
            pairs[key] = (weights[0], weights[1], alphas.get(key))
    problems += [f"{key}.alpha: an alpha without weights" for key in alphas if key not in named and key not in ordered]
    if problems:
        rest = [f"  … and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n".join([f"  {problem}" for problem in problems[:SHOWN]] + rest)
        raise ConversionError(
            f"{len(problems)} keys of the state dict make up no LoRA. Leave out what is for other models.\n{lines}"
        )
    # In the order of the file.
    return {key: pairs[key] for key in dict.fromkeys(_layer_of(key) for key in state_dict) if key in pairs}


def _layer_of(key: str) -> str:
    return ".".join(key.split(".")[: -1 if key.endswith(".alpha") else -2])
