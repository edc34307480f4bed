"""`refiners parity new`: the files of a port, drafted from the upstream model.

Upstream is named by the user, as `package.Class`, and imported when the command runs: this package knows no model. It
is built on `meta`, in the configuration that is given, and read (see `refiners.parity.drafts.draft`). What is written
runs at once: the weights convert, and the case says where the port differs, which at first is everywhere.
"""

import inspect
import json
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from refiners.conversion import TRANSFORMERS_NEUTRAL, TRANSFORMERS_ONLY
from refiners.errors import ParityError
from refiners.parity.drafts import templates
from refiners.parity.drafts.draft import Draft, draft_port

Config = Mapping[str, Any]
_FAMILY = re.compile(r"[a-z][a-z0-9_]*")
_INPUTS = {
    "input_ids": "torch.randint(0, {vocab_size}, (2, 7), generator=generator)",
    "pixel_values": "torch.randn(2, {num_channels}, {image_size}, {image_size}, generator=generator)",
    "sample": "torch.randn(2, {in_channels}, {sample_size}, {sample_size}, generator=generator)",
    "timestep": "torch.tensor([3, 500])",
    "encoder_hidden_states": "torch.randn(2, 7, {cross_attention_dim}, generator=generator)",
    "hidden_states": "torch.randn(2, 7, {hidden_size}, generator=generator)",
}
_SIZES = {"num_channels": 3, "image_size": 32, "sample_size": 16}
"""What stands for numbers that a configuration does not have: models that take pictures of any size."""


@dataclass(frozen=True)
class Upstream:
    """An upstream class, the class of its configuration if it has one, and what both are called."""

    module: str
    kind: type[nn.Module]
    config_kind: type[Any] | None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.kind.__name__}"

    @property
    def imports(self) -> str:
        """The statement by which a case imports it."""
        names = [self.kind.__name__, *([self.config_kind.__name__] if self.config_kind else [])]
        return f"from {self.module} import {', '.join(sorted(names))}"

    @property
    def call(self) -> str:
        """The expression by which a case builds it from `CONFIG`."""
        if self.config_kind is None:
            return f"{self.kind.__name__}(**CONFIG)"
        kernel = ', attn_implementation="sdpa"' if getattr(self.kind, "_supports_sdpa", False) else ""
        return f"{self.kind.__name__}({self.config_kind.__name__}(**CONFIG{kernel}))"

    def build(self, config: Config) -> tuple[nn.Module, Config]:
        """The model on `meta`, and all attributes of its configuration.

        Raises:
            ParityError: it cannot be built so.
        """
        try:
            with torch.device("meta"):
                if self.config_kind is None:
                    model = self.kind(**config)
                    attributes: Any = getattr(model, "config", None)
                    return model, cast(Config, attributes) if isinstance(attributes, Mapping) else config
                settings: Any = self.config_kind(**config)
                to_dict: Any = getattr(settings, "to_dict", None)
                return self.kind(settings), cast(Config, to_dict() if to_dict else vars(settings))
        except Exception as error:  # whatever a third party's constructor raises
            told = (str(error).splitlines() or [""])[0]
            raise ParityError(
                f"{self.name} cannot be built on meta with the configuration {dict(config)}: {type(error).__name__}: "
                f"{told}. Give another one with --config."
            ) from error


def find_upstream(name: str) -> Upstream:
    """The class of that name, such as `transformers.ViTModel`.

    Raises:
        ParityError: there is no such module or class, or it is no `torch.nn.Module`.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ParityError(f"{name!r} names no class in a package. Write it as in transformers.ViTModel.")
    try:
        kind: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ParityError(f"Upstream {name!r} cannot be imported: {error}. Is its package installed?") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ParityError(f"Upstream {name!r} is no class of torch.nn.Module: {kind!r:.80}.")
    config_kind: Any = getattr(kind, "config_class", None)
    return Upstream(module, kind, config_kind if isinstance(config_kind, type) else None)


def read_option(config: str) -> dict[str, Any]:
    """The configuration in the option `--config`.

    Raises:
        ParityError: it is no JSON object.
    """
    try:
        read: Any = json.loads(config)
    except ValueError as error:
        raise ParityError(f"--config is not JSON: {error}. Write it as in '{{\"hidden_size\": 32}}'.") from error
    if not isinstance(read, dict):
        raise ParityError(f"--config must be a JSON object, not {config}. Write it as in '{{\"hidden_size\": 32}}'.")
    return cast(dict[str, Any], read)


def new_family(family: str, upstream: str, config: str = "{}", *, root: Path | None = None) -> list[Path]:
    """Writes the files of a port, all or none.

    Receives:
        family: the name of its package: lower-case letters, digits and `_`.
        upstream: the class that users of upstream load, as `package.Class`.
        config: the arguments of its configuration (or its own, if it has none) as JSON. Small sizes make a draft that
            runs in no time: the numbers are written into it.
        root: the checkout; by default where the command runs.

    Returns:
        what was written: the package of the port, and its cases.

    Raises:
        ParityError: a name or the configuration cannot be used, or one of the files exists.
    """
    root = root or Path.cwd()
    if not _FAMILY.fullmatch(family) or keyword.iskeyword(family):
        raise ParityError(f"{family!r} is no name of a family: use lower-case letters, digits and _, as in clip.")
    ports, cases = root / "reference_ports", root / "parity_tests" / "cases"
    missing = [str(folder) for folder in (ports, cases) if not folder.is_dir()]
    if missing:
        raise ParityError(f"There is no {' and no '.join(missing)}. Run the command at the root of the checkout.")
    found, given = find_upstream(upstream), read_option(config)
    model, attributes = found.build(given)
    texts = _texts(family, found, given, attributes, model)
    files = {cases / f"{family}.py" if name == "cases" else ports / family / name: text for name, text in texts.items()}
    existing = [str(path.relative_to(root)) for path in files if path.exists()]
    if existing:
        raise ParityError(f"{', '.join(existing)}: already there. Nothing was written. Choose another family name.")
    (ports / family).mkdir(exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


def _texts(family: str, upstream: Upstream, given: Config, attributes: Config, model: nn.Module) -> dict[str, str]:
    draft = draft_port(model)
    values = {
        "family": family,
        "root": draft.root,
        "upstream": upstream.name,
        "kind": upstream.kind.__name__,
        "upstream_module": upstream.module,
        "imports": "\n".join(sorted((upstream.imports, "from torch import Tensor, nn"))),
        "upstream_call": upstream.call,
        "version": _version(upstream.module),
        "tree": "\n".join(f"# {line}".rstrip() for line in draft.tree),
        "classes": "\n\n".join(draft.classes),
        "torch_imports": _torch_imports(draft),
        "lines": "\n".join(_lines(draft)),
        "ignore": _ignore(draft),
        "only": _entries(_only(attributes)),
        "config": f"{{\n{_entries(given)}}}" if given else "{}",
        "library": "TRANSFORMERS" if upstream.config_kind else "DIFFUSERS",
        "base": "    **TRANSFORMERS_ONLY,\n" if upstream.config_kind else "",
        "from_conversion": ", ".join(
            ["TRANSFORMERS_NEUTRAL", "TRANSFORMERS_ONLY"] if upstream.config_kind else ["DIFFUSERS_NEUTRAL"]
        ),
        "inputs": "\n".join(_inputs(model, attributes)),
    }
    texts = {
        "model.py": templates.MODEL,
        "convert.py": templates.CONVERT,
        "__init__.py": templates.INIT,
        "README.md": templates.README,
        "cases": templates.CASES,
    }
    return {name: template.substitute(values) for name, template in texts.items()}


def _version(module: str) -> str:
    version = getattr(import_module(module.partition(".")[0]), "__version__", None)
    return f" {version}" if isinstance(version, str) else ""


def _torch_imports(draft: Draft) -> str:
    """The imports that the leaves of the draft need."""
    text = "".join(draft.classes)
    if "nn.Parameter" in text or "register_buffer" in text:
        return "import torch\nfrom torch import Tensor, nn\n\n"
    return "from torch import nn\n\n" if re.search(r"\bnn\.", text) else ""


def _ignore(draft: Draft) -> str:
    if not draft.ignored:
        return ""
    lines = "\n".join(f'        "{key}": "a buffer: say why the port does not need it",' for key in draft.ignored)
    return f"    ignore={{\n{lines}\n    }},\n"


def _only(attributes: Config) -> dict[str, Any]:
    """The attributes that the numbers of the draft depend on, each with the value that is written into it."""
    known = {*TRANSFORMERS_NEUTRAL, *TRANSFORMERS_ONLY}
    return {name: value for name, value in attributes.items() if name not in known and not name.startswith("_")}


def _entries(values: Config, indent: str = "    ") -> str:
    """The entries of a dict, one a line, with double quotes where nothing speaks against them."""
    texts = {name: repr(value) for name, value in values.items()}
    texts = {name: text if '"' in text else text.replace("'", '"') for name, text in texts.items()}
    return "".join(f'{indent}"{name}": {text},\n' for name, text in texts.items())


def _lines(draft: Draft) -> Iterator[str]:
    """The lines of the key map."""
    for key, port in draft.lines.items():
        line = f'        "{key}": "{port}",'
        yield line if len(line) <= 120 else f'        "{key}": (\n            "{port}"\n        ),'


def _inputs(model: nn.Module, attributes: Config) -> Iterator[str]:
    """A line for each input that the forward of upstream needs."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None)
    known = main if isinstance(main, str) and main in {p.name for p in parameters} else None
    names = needed or [known or next((p.name for p in parameters), "x")]
    sizes = {**_SIZES, **{name: value for name, value in attributes.items() if isinstance(value, int)}}
    for name in names:
        template = _INPUTS.get(name)
        if template is not None and all(number in sizes for number in re.findall(r"{(\w+)}", template)):
            yield f'        "{name}": {template.format(**sizes)},'
        else:
            yield f'        "{name}": {_guess(model)},  # a guess: say which shape it has'


def _guess(model: nn.Module) -> str:
    """What the first layer of a model could be given."""
    for module in model.modules():
        match module:
            case nn.Embedding():
                return f"torch.randint(0, {module.num_embeddings}, (2, 7), generator=generator)"
            case nn.Linear():
                return f"torch.randn(2, 7, {module.in_features}, generator=generator)"
            case nn.Conv1d():
                return f"torch.randn(2, {module.in_channels}, 40, generator=generator)"
            case nn.Conv2d():
                return f"torch.randn(2, {module.in_channels}, 16, 24, generator=generator)"
            case _:
                pass
    return "torch.randn(2, 7, 8, generator=generator)"
