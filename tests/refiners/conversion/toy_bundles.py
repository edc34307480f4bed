"""A model of two parts that is small enough to read, as it would be published in a folder and in a single file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refiners.conversion import Bundle, ConfigReader, KeyMap, Part, Split, read_state_dict, write_state_dict


class Net(nn.Module):
    """Three linear layers of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Query = nn.Linear(width, width)
        self.Key = nn.Linear(width, width)
        self.Out = nn.Linear(width, 1)


class Head(nn.Module):
    """One linear layer without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Linear = nn.Linear(width, 2, bias=False)


def width_of(config: Mapping[str, Any]) -> int:
    with ConfigReader(config, "the toy") as read:
        return read.integer("width")


NET = Part(
    name="net",
    folder="net",
    config={"width": 4},
    build=lambda config: Net(width_of(config)),
    keys=lambda config: KeyMap({"attn.q": "Query", "attn.k": "Key", "out": "Out"}, name="the net"),
    prefixes=("model.net.",),
    single_file=lambda config: KeyMap(
        {"qk_{p}": Split("attn.q.{p}", "attn.k.{p}"), "last": "out"}, name="the one file"
    ),
)
HEAD = Part(
    name="head",
    folder="the_head",
    config={"width": 4},
    build=lambda config: Head(width_of(config)),
    keys=lambda config: KeyMap({"fc": "Linear"}, name="the head"),
    prefixes=("head.", "old_head."),
    single_file=lambda config: KeyMap({"fc": "fc"}, name="the one file"),
)


def holds(*keys: str) -> Any:
    return lambda shapes: all(key in shapes for key in keys)


def of_net(shapes: Mapping[str, torch.Size]) -> bool:
    return "net/out.weight" in shapes or "model.net.last.weight" in shapes


TOY = Bundle(
    name="toy",
    title="Toy 1",
    summary="a toy",
    recognises=lambda shapes: of_net(shapes) and not holds("extra")(shapes),
    parts=(NET, HEAD),
    scheduler={"_class_name": "Published"},
    pipeline={"safe": True},
    tokenizers=("tokenizer",),
    ignore={"betas": "a table", "ema": "a copy"},
)
TWIN = Bundle(name="twin", title="Twin", recognises=holds("twin"), parts=(NET,), scheduler={"prediction_type": "v"})
TWIN_BASE = Bundle(name="twin-base", title="Twin base", recognises=holds("twin"), parts=(NET,))
STRANGER = Bundle(name="stranger", title="a stranger", recognises=holds("strange"))
BUNDLES = {bundle.name: bundle for bundle in (TOY, TWIN, TWIN_BASE, STRANGER)}


def net_weights(width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    names = {"attn.q": width, "attn.k": width, "out": 1}
    weights = {f"{name}.weight": torch.randn(rows, width, generator=generator) for name, rows in names.items()}
    return weights | {f"{name}.bias": torch.randn(rows, generator=generator) for name, rows in names.items()}


def head_weights(width: int = 4) -> dict[str, Tensor]:
    return {"fc.weight": torch.randn(2, width, generator=torch.Generator().manual_seed(7))}


def expected(width: int = 4) -> dict[str, dict[str, Tensor]]:
    """The weights of both ports."""
    net, head = net_weights(width), head_weights(width)
    names = {"attn.q": "Query", "attn.k": "Key", "out": "Out"}
    return {
        "net": {f"{new}.{p}": net[f"{old}.{p}"] for old, new in names.items() for p in ("weight", "bias")},
        "head": {"Linear.weight": head["fc.weight"]},
    }


def single_weights(width: int = 4) -> dict[str, Tensor]:
    net, head = net_weights(width), head_weights(width)
    return {
        **{f"model.net.qk_{p}": torch.cat([net[f"attn.q.{p}"], net[f"attn.k.{p}"]]) for p in ("weight", "bias")},
        **{f"model.net.last.{p}": net[f"out.{p}"] for p in ("weight", "bias")},
        "head.fc.weight": head["fc.weight"],
        "betas": torch.ones(3),
        "ema.net": torch.ones(3),
    }


def write_folder(folder: Path, width: int = 4) -> Path:
    """The toy as a folder."""
    folder.mkdir()
    index = {
        "_class_name": "Toy",
        "net": ["toys", "Net"],
        "checker": ["toys", "Checker"],
        "safe": False,
        "no": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, weights in {"net": net_weights(width), "the_head": head_weights(width)}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"width": width}))
        write_state_dict(folder / name / "diffusion_pytorch_model.safetensors", weights)
    for name, text in {
        "scheduler/scheduler_config.json": '{"_class_name": "Own"}',
        "tokenizer/vocab.json": "{}",
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return folder


def write_single_file(path: Path, width: int = 4) -> Path:
    """The toy as a single file."""
    write_state_dict(path, single_weights(width))
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_converted(folder: Path, width: int = 4) -> None:
    for name, weights in expected(width).items():
        assert same(read_state_dict(folder / f"{name}.safetensors"), weights)
