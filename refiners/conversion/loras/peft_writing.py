"""The configuration under which peft builds the adapters that a file holds: the inverse of `peft_config`.

peft builds all adapters of a file from a few numbers, and loads the tensors into them. What cannot be built like that
is refused, since peft would load it as something else.
"""

from collections.abc import Mapping
from math import isqrt, prod
from typing import Any, cast

from torch import Tensor, nn

from refiners.conversion.loras.peft_config import PEFT_TYPES, exact_targets, summarise, whole
from refiners.conversion.problems import Problems
from refiners.errors import ConversionError
from refiners.fluxion.adapters.lora.spec import DeltaSpec

Specs = Mapping[str, DeltaSpec]


def config_of(specs: Specs, layers: Mapping[str, nn.Module], title: str) -> dict[str, Any]:
    """The attributes of an adapter_config.json.

    Receives:
        specs: the adapters by the name of their layer.
        layers: all layers that have a name, those without an adapter too.
        title: what is written, for messages.

    Raises:
        ConversionError: peft cannot build these adapters from one configuration.
    """
    kinds = {"lora" if spec.method == "dora" else spec.method for spec in specs.values()}
    _only_one(kinds, title, "methods")
    kind = kinds.pop() if kinds else "lora"
    ranks = {name: _rank(spec) for name, spec in specs.items()}
    alphas = {name: whole(float(ranks[name]) if s.alpha is None else s.alpha) for name, s in specs.items()}
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": PEFT_TYPES[kind],
        "target_modules": exact_targets(specs, layers),
        "task_type": None,
    }
    config["r"], config["rank_pattern"] = summarise(ranks, 8)
    alpha, config["alpha_pattern"] = summarise(alphas, 8)
    config["lora_alpha" if kind == "lora" else "alpha"] = alpha
    made_by = {"lora": _for_lora, "loha": _for_loha, "lokr": _for_lokr}[kind]
    return config | made_by(specs, layers, ranks, title)


def _only_one(values: set[Any], title: str, what: str) -> None:
    if len(values) > 1:
        names = " and ".join(sorted(map(str, values)))
        raise ConversionError(
            f"{title} cannot be written for peft: its layers have several {what} ({names}), a file of peft has one. "
            "Nothing was written. Write one file for each."
        )


def _rank(spec: DeltaSpec) -> int:
    if spec.rank is not None:
        return spec.rank
    # Two full matrices have no rank; peft keeps them full from half their length on.
    return max(spec.tensors["w2"].shape[:2])


def _for_lora(specs: Specs, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], title: str) -> dict[str, Any]:
    flags = {
        "use_dora": {spec.method == "dora" for spec in specs.values()},
        "use_rslora": {spec.rank_stabilized for spec in specs.values()},
        "lora_bias": {"up_bias" in spec.tensors for spec in specs.values()},
    }
    for name, values in flags.items():
        _only_one(values, title, f"values of {name}")
    found: dict[str, Any] = {name: bool(values and values.pop()) for name, values in flags.items()}
    return {**found, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0}


def _for_loha(specs: Specs, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], title: str) -> dict[str, Any]:
    _refuse_stabilized(specs, title)
    return {"use_effective_conv2d": _has_cores(specs, layers, "t1", title)}


def _for_lokr(specs: Specs, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], title: str) -> dict[str, Any]:
    _refuse_stabilized(specs, title)
    both = any("w1_a" in spec.tensors for spec in specs.values())
    factor = _factor(specs, layers, title)
    problems = Problems()
    for name, spec in specs.items():
        (out_l, out_k), (in_m, in_n) = _factors(spec, layers[name])
        full_1 = not (both and ranks[name] < max(out_l, in_m) / 2)
        full_2 = ranks[name] >= max(out_k, in_n) / 2
        for number, full in (("w1", full_1), ("w2", full_2)):
            if full != (number in spec.tensors):
                made = "as one matrix" if full else "as a product"
                problems.add("shape", name, f"peft would build {number} of rank {ranks[name]} {made}")
    problems.raise_if_any(f"{title} cannot be written for peft", "Nothing was written. kohya's layout holds it.")
    products = {name: spec for name, spec in specs.items() if "w2" not in spec.tensors}
    cores = _has_cores(products, layers, "t2", title)
    return {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": cores}


def _refuse_stabilized(specs: Specs, title: str) -> None:
    if any(spec.rank_stabilized for spec in specs.values()):
        raise ConversionError(f"{title} cannot be written for peft, which stabilises the rank of LoRAs only.")


def _has_cores(specs: Specs, layers: Mapping[str, nn.Module], role: str, title: str) -> bool:
    """Whether convolutions have a core, which all of a file have, or none. Those of 1x1 have none in any case."""
    kernels = {name: prod(tuple(getattr(layers[name], "kernel_size", (1,)))) for name in specs}
    cores = {role in spec.tensors for name, spec in specs.items() if kernels[name] > 1}
    _only_one(cores, title, "forms, with and without a core")
    return any(cores)


def _factors(spec: DeltaSpec, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a Kronecker product: how the outputs and the inputs are factorised."""
    tensors, weight = spec.tensors, cast(Tensor, layer.weight).shape
    first = tensors["w1"].shape if "w1" in tensors else (tensors["w1_a"].shape[0], tensors["w1_b"].shape[1])
    return (first[0], weight[0] // first[0]), (first[1], weight[1] // first[1])


def _factor(specs: Specs, layers: Mapping[str, nn.Module], title: str) -> int:
    factors = [_factors(spec, layers[name]) for name, spec in specs.items()]
    for candidate in (-1, *sorted({pair[0] for both in factors for pair in both})):
        if all(factorise(pair[0] * pair[1], candidate) == pair for both in factors for pair in both):
            return candidate
    raise ConversionError(
        f"{title} cannot be written for peft: no decompose_factor gives the sizes of its matrices. Nothing was "
        "written. kohya's layout holds it."
    )


def factorise(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, as peft and LyCORIS choose them for a LoKr.

    The first is `factor` where that divides; otherwise the two are as near to each other as possible, the first being
    at most `factor`.

    Example:
        >>> factorise(256), factorise(128), factorise(127), factorise(128, 4)
        ((16, 16), (8, 16), (1, 127), (4, 32))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = isqrt(dimension) if factor == -1 else min(factor, isqrt(dimension))
    small = max(divisor for divisor in range(1, limit + 1) if dimension % divisor == 0)
    return small, dimension // small
