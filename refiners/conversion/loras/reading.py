"""Reading LoRA files: from keys and tensors to one entry for each layer, whoever wrote them.

Nothing is computed: tensors are mapped from the file, and read when they are used. All that cannot be understood is
told at once: keys of no known kind, half a pair, a layer that is there twice, tensors that are no pair.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from refiners.conversion.config import read_config
from refiners.conversion.files import read_header
from refiners.conversion.header import Header
from refiners.conversion.loras.file import METHODS, LoraEntry, LoraFile
from refiners.conversion.loras.peft_config import PeftConfig
from refiners.conversion.loras.roles import ALPHA, PEFT_PREFIX, Key, layouts_of, read_keys, split_end, strange_end
from refiners.conversion.problems import Kind, Problems
from refiners.errors import ConversionError, FileFormatError
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.utils import load_from_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"
"""Under which name diffusers keeps the configurations of peft in the metadata of a file."""
_FOLDERS = (WEIGHTS, "pytorch_lora_weights.safetensors")
_ADVICE = "Nothing was loaded."


def read_loras(
    source: Path | str | Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, strict: bool = True
) -> LoraFile:
    """The adapters of a LoRA file, in the layout of diffusers, peft or kohya's scripts, which its keys tell.

    Receives:
        source: a safetensors file, a folder that peft or diffusers has written, or a state dict.
        config: the attributes of peft's adapter_config.json; by default those of the file beside the weights.
        strict: False leaves out keys that are unknown, incomplete or given twice, and layers whose tensors are no pair.
            They are told in `problems` of the file, and `specs_for` counts them among those that it finds itself.

    Raises:
        FileFormatError: the file is truncated, corrupted, a pickle or of another format.
        ConversionError: keys are unknown, incomplete or given twice, tensors are no pair, or the configuration cannot
            be honoured. Lists all.
        FileNotFoundError: there is no such file.

    Example:
        >>> import torch
        >>> file = read_loras({"fc.lora_A.weight": torch.ones(2, 4), "fc.lora_B.weight": torch.ones(3, 2)})
        >>> file.layout, list(file.specs), file.specs["fc"].rank
        ('diffusers', ['fc'], 2)
    """
    if isinstance(source, Mapping):
        _check_types(source)
        return _Reader(source, {}, None, None, config).read(strict)
    path = _find(Path(source))
    header = read_header(path)
    tensors = load_from_safetensors(path)
    beside = path.parent / CONFIG
    if config is None and beside.is_file() and any(key.startswith(PEFT_PREFIX) for key in tensors):
        config = read_config(beside)
    # In the order of the header, which is the order of the bytes.
    return _Reader({key: tensors[key] for key in header.places}, header.metadata, path, header, config).read(strict)


def _check_types(source: Mapping[Any, Any]) -> None:
    wrong = [key for key, tensor in source.items() if not isinstance(key, str) or not isinstance(tensor, Tensor)]
    if wrong:
        raise FileFormatError(
            f"The state dict holds {len(wrong)} entries that are no name and tensor, as {wrong[0]!r}."
        )


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FOLDERS if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found)
    what = f"several LoRA files: {names}" if found else f"no LoRA file: neither {' nor '.join(_FOLDERS)}"
    raise FileFormatError(f"{path} holds {what}. Give the path of one safetensors file.")


class _Reader:
    """Reads one state dict."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        path: Path | None,
        header: Header | None,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.tensors = tensors
        self.metadata = dict(metadata)
        self.path = path
        self.header = header
        self.config = config
        self.problems = Problems()
        # Names of layers of which something cannot be understood.
        self.doubtful: set[str] = set()
        self.title = "The state dict" if path is None else str(path)

    def read(self, strict: bool) -> LoraFile:
        layout = self._layout()
        keys = read_keys(self.tensors, layout)
        configs = self._configs()
        groups: dict[tuple[str, str], dict[str, Key]] = {}
        for key in keys:
            self._place(key, groups)
        entries: dict[str, LoraEntry] = {}
        for (prefix, module), roles in groups.items():
            before = len(self.problems)
            entry = self._entry(prefix, module, roles, configs, layout)
            if len(self.problems) == before and entry.name not in self.doubtful:
                entries[entry.name] = entry
        if strict:
            self.problems.raise_if_any(f"{self.title} cannot be read as LoRAs", _ADVICE)
        return LoraFile(layout, entries, self.metadata, self.config, configs, self.path, self.header, self.problems)

    def _layout(self) -> str:
        layouts = layouts_of(self.tensors)
        if len(layouts) == 1:
            return layouts[0]
        some = ", ".join(list(self.tensors)[:3])
        if not layouts:
            raise ConversionError(
                f"{self.title} holds no LoRA: none of its {len(self.tensors)} tensors has the key of one ({some}, …). "
                "A whole model is read with `refiners convert`."
            )
        raise ConversionError(
            f"{self.title} mixes the layouts {' and '.join(layouts)} ({some}, …). Write one file for each of them."
        )

    def _configs(self) -> dict[str, PeftConfig]:
        if self.config is not None:
            return {"": PeftConfig.read(self.config, f"{self.title}'s {CONFIG}")}
        text = self.metadata.get(METADATA)
        if not text:
            return {}
        try:
            flat: dict[str, Any] = json.loads(text)
            parts: dict[str, dict[str, Any]] = {}
            for name, value in flat.items():
                part, _, attribute = name.partition(".")
                parts.setdefault(part, {})[attribute] = value
        except (ValueError, AttributeError) as error:
            raise FileFormatError(f"{self.title}: its metadata {METADATA!r} is no JSON object ({error}).") from error
        return {part: PeftConfig.read(config, f"{self.title}'s {part}") for part, config in parts.items()}

    def _place(self, key: Key, groups: dict[tuple[str, str], dict[str, Key]]) -> None:
        if not key.role:
            what = strange_end(key.text) or "no tensor of a LoRA ends like this"
            self.problems.add("unexpected", key.text, what)
            segments = key.text.split(".")
            self.doubtful.update(".".join(segments[:count]) for count in range(1, len(segments)))
            return
        roles = groups.setdefault((key.prefix, key.module), {})
        if key.role in roles:
            self.problems.add("twice", key.text, f"is another spelling of {roles[key.role].text!r}, which is there too")
            self.doubtful.add(key.prefix + key.module)
            return
        roles[key.role] = key

    def _entry(
        self, prefix: str, module: str, roles: dict[str, Key], configs: Mapping[str, PeftConfig], layout: str
    ) -> LoraEntry:
        part = next(iter(roles.values())).part
        config = configs.get(part)
        tensors = {role: self.tensors[key.text] for role, key in roles.items() if role != ALPHA}
        stored = {ALPHA: self.tensors[roles[ALPHA].text]} if ALPHA in roles else {}
        method = _method_of(roles)
        if "magnitude" in tensors:
            magnitude = tensors["magnitude"]
            shaped = self._magnitude(roles["magnitude"].text, magnitude, tensors.get("up"))
            if shaped is not magnitude:
                tensors["magnitude"], stored["magnitude"] = shaped, magnitude
        alpha = self._alpha(prefix + module, stored.get(ALPHA), config, module)
        if layout == "kohya" and method == "lokr" and {"w1", "w2"} <= tensors.keys():
            alpha = None  # LyCORIS sets the factor of two full matrices to 1, whatever alpha it notes
        declared = config.rank_of(module) if config is not None and method == "lokr" else None
        stabilized = config is not None and config.rank_stabilized
        spec = DeltaSpec(method, tensors, alpha, stabilized, declared)
        entry = LoraEntry(prefix, part, module, spec, {role: key.text for role, key in roles.items()}, stored)
        self._check(entry, config)
        return entry

    def _alpha(self, name: str, tensor: Tensor | None, config: PeftConfig | None, module: str) -> float | None:
        if tensor is None:
            return None if config is None else config.alpha_of(module)
        if tensor.numel() != 1:
            self.problems.add("shape", f"{name}.alpha", f"is {list(tensor.shape)}, an alpha is one number")
            return None
        return float(tensor.detach())

    def _magnitude(self, key: str, magnitude: Tensor, up: Tensor | None) -> Tensor:
        """In peft's shape: one number for each output, or (1, out, 1, 1) for a convolution."""
        if up is None or magnitude.ndim < 2 or magnitude.ndim != up.ndim:
            return magnitude
        wanted = (up.shape[0],) if up.ndim == 2 else (1, up.shape[0], *([1] * (up.ndim - 2)))
        if magnitude.shape[0] == up.shape[0] and magnitude.numel() == up.shape[0]:
            return magnitude.reshape(wanted)
        if tuple(magnitude.shape) != wanted:
            text = f"is {list(magnitude.shape)}: a DoRA that rescales the inputs of its layer, which is not read"
            self.problems.add("shape", key, text)
        return magnitude

    def _check(self, entry: LoraEntry, config: PeftConfig | None) -> None:
        roles = set(entry.keys) - {ALPHA}
        if not roles:
            self.problems.add("incomplete", entry.keys[ALPHA], "is the alpha of a layer without weights")
            return
        for text in entry.problems(with_values=False):
            kind: Kind = "incomplete" if text.startswith("misses") else "shape"
            self.problems.add(kind, entry.name, text)
        if config is None:
            return
        method, rank = entry.spec.method, config.rank_of(entry.module)
        if (method == "dora") != config.has_dora and method in ("lora", "dora"):
            says = "" if config.has_dora else "not "
            self.problems.add("incomplete", entry.name, f"the configuration says that it is {says}a DoRA")
        elif method not in ("dora", config.method):
            self.problems.add("unexpected", entry.name, f"is {method}, the configuration says {config.method}")
        elif rank is not None and method in METHODS and entry.spec.rank not in (None, rank):
            self.problems.add("shape", entry.name, f"has rank {entry.spec.rank}, the configuration says {rank}")


def _method_of(roles: Mapping[str, Key]) -> str:
    ends = {split_end(key.text)[1].partition("_")[0] for role, key in roles.items() if role != ALPHA}
    if "hada" in ends:
        return "loha"
    if "lokr" in ends:
        return "lokr"
    if "ia3" in roles:
        return "ia3"
    if "norm_weight" in roles or "norm_bias" in roles:
        return "norm"
    if "mid" in roles:
        return "locon"
    return "dora" if "magnitude" in roles else "lora"
