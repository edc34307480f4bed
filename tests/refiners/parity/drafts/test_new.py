"""`refiners parity new`, on an upstream that this test writes: its drafts are files, which are imported and run."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import reference_ports
import refiners.fluxion.layers as fl
from refiners import cli
from refiners.errors import ConversionError, ParityError
from refiners.parity import CaseRunner, Lane, Verdict
from refiners.parity.drafts.new import find_upstream, new_family

UPSTREAM = """
import torch
from torch import nn

__version__ = "1.2.3"


class Config:
    def __init__(self, hidden_size=8, num_layers=2, broken=False, **rest):
        if broken:
            raise ValueError("this one does not work")
        self.hidden_size, self.num_layers, self.broken = hidden_size, num_layers, broken

    def to_dict(self):
        return {**vars(self), "transformers_version": "1"}


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(x)))) + x


class Model(nn.Module):
    config_class = Config

    def __init__(self, config):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_buffer("position_ids", torch.arange(5))
        self.layers = nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_layers))

    def forward(self, hidden_states, flag=False):
        x = torch.cat((self.class_token.expand(len(hidden_states), -1, -1), hidden_states), dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return (self.fc(x), None)


class Pictures(Plain):
    config_class = Config

    def __init__(self, config):
        super().__init__(config.hidden_size)
        self.patch = nn.Conv2d(5, config.hidden_size, 4, 4)

    def forward(self, pixels):
        return self.fc(self.patch(pixels).flatten(2).mT)


class Attending(Pictures):
    _supports_sdpa = True


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(3, 4, 2, groups=1, bias=False), nn.BatchNorm1d(4, eps=1e-3)

    def forward(self, x):
        return self.norm(self.convolution(x))


def not_a_class():
    pass
"""
FILES = ["__init__.py", "README.md", "convert.py", "model.py"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty checkout, whose families stand among those of this one, and beside it the upstream package."""
    (tmp_path / "reference_ports").mkdir()
    (tmp_path / "parity_tests" / "cases").mkdir(parents=True)
    (tmp_path / "drafted_upstream.py").write_text(UPSTREAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reference_ports, "__path__", [*reference_ports.__path__, str(tmp_path / "reference_ports")])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("drafted_upstream", "reference_ports.drafted")):
            del sys.modules[name]
    vars(reference_ports).pop("drafted", None)


def cases_of(root: Path, family: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"cases_of_{family}", root / "parity_tests" / "cases" / f"{family}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(root: Path) -> str:
    """The text of the drafted cases."""
    return (root / "parity_tests" / "cases" / "drafted.py").read_text()


def drafted(family: str = "drafted") -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(f"reference_ports.{family}")


def test_it_writes_the_files_of_a_family(root: Path) -> None:
    written = new_family("drafted", "drafted_upstream.Model")
    package, cases = root / "reference_ports" / "drafted", root / "parity_tests" / "cases" / "drafted.py"
    assert sorted(written) == sorted([*(package / name for name in FILES), cases])
    assert all(path.read_text().endswith("\n") for path in written)


def test_the_upstream_tree_stands_in_the_model_as_comments(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Model")
    text = (root / "reference_ports" / "drafted" / "model.py").read_text()
    assert "`drafted_upstream.Model` 1.2.3." in text
    assert "# │   └── 0 … 1  Layer\n" in text or "#     └── 0 … 1  Layer\n" in text


def test_the_key_map_holds_every_key_and_converts(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Model", '{"num_layers": 3}')
    family = drafted()
    assert family.KEYS.lines["layers.{i}.fc1"] == "Layer_{i+1}.Fc1"
    assert list(family.KEYS.ignore) == ["position_ids"]
    upstream, port = find_upstream("drafted_upstream.Model").build({"num_layers": 3})[0], family.Model()
    converted = family.KEYS.convert(upstream.state_dict(), port)
    assert list(converted) == list(port.state_dict())
    assert isinstance(port.Layer_3.Fc1, fl.Linear)


def test_the_configuration_of_the_draft_is_read_and_no_other(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Model", '{"num_layers": 1}')
    family = drafted()
    assert len(family.from_config({"hidden_size": 8, "num_layers": 1, "broken": False})) == 2
    with pytest.raises(ConversionError, match="num_layers: is 2"):
        family.from_config({"num_layers": 2})


def test_the_case_runs_at_once_and_says_what_is_missing(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Model", '{"hidden_size": 4}')
    [case, other] = cases_of(root, "drafted").CASES
    assert (case.id, other.id) == ("drafted/tiny", "drafted/tiny.upstream-init")
    assert case.inputs(torch.Generator())["hidden_states"].shape == (2, 7, 4)
    result = CaseRunner(case).run(Lane("float32"))
    assert result.verdict is Verdict.DIFFERENT
    assert "ClassToken has no forward yet" in result.reasons[0]


def test_a_draft_of_what_needs_nothing_more_is_bitwise(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Plain", '{"width": 8}')
    assert drafted().KEYS.lines == {"fc": "Fc"}
    runner = CaseRunner(cases_of(root, "drafted").CASES[0])
    assert {runner.run(Lane(lane)).verdict for lane in ("float64", "bfloat16")} == {Verdict.BITWISE}


def test_the_first_layer_tells_what_an_unknown_input_could_be(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Plain", '{"width": 6}')
    assert "torch.randn(2, 7, 6, generator=generator),  # a guess" in written(root)


def test_layers_that_torch_alone_has_are_bitwise_as_well(root: Path) -> None:
    new_family("drafted", "drafted_upstream.Statistics")
    assert CaseRunner(cases_of(root, "drafted").CASES[0]).run(Lane("float32")).verdict is Verdict.BITWISE


@pytest.mark.parametrize(("kind", "kernel"), [("Pictures", ""), ("Attending", ', attn_implementation="sdpa"')])
def test_a_kernel_is_chosen_for_models_that_have_several(kind: str, kernel: str, root: Path) -> None:
    new_family("drafted", f"drafted_upstream.{kind}")
    assert f"{kind}(Config(**CONFIG{kernel}))" in written(root)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_written_where_one_file_exists(name: str, root: Path) -> None:
    path = root / "reference_ports" / "drafted" / name
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(ParityError, match=f"{name}: already there. Nothing was written"):
        new_family("drafted", "drafted_upstream.Model")
    assert [file for file in root.rglob("*drafted*/*") if file.is_file() and file != path] == []
    assert list((root / "parity_tests" / "cases").iterdir()) == []
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("family", "upstream", "config", "message"),
    [
        ("Drafted", "drafted_upstream.Model", "{}", "no name of a family"),
        ("../drafted", "drafted_upstream.Model", "{}", "no name of a family"),
        ("class", "drafted_upstream.Model", "{}", "no name of a family"),
        ("drafted", "Model", "{}", "names no class in a package"),
        ("drafted", "nowhere.Model", "{}", "cannot be imported"),
        ("drafted", "drafted_upstream.Nope", "{}", "cannot be imported"),
        ("drafted", "drafted_upstream.not_a_class", "{}", r"no class of torch\.nn\.Module"),
        ("drafted", "drafted_upstream.Model", "{", "is not JSON"),
        ("drafted", "drafted_upstream.Model", "[1]", "must be a JSON object"),
        ("drafted", "drafted_upstream.Model", '{"broken": true}', "ValueError: this one does not work"),
    ],
)
def test_what_cannot_be_used_is_one_message(family: str, upstream: str, config: str, message: str, root: Path) -> None:
    with pytest.raises(ParityError, match=message):
        new_family(family, upstream, config)
    assert list((root / "reference_ports").iterdir()) == []


def test_it_runs_at_the_root_of_a_checkout_only(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="at the root of the checkout"):
        new_family("drafted", "drafted_upstream.Model", root=tmp_path / "elsewhere")


def test_what_is_written_is_python_that_fits_its_lines(root: Path) -> None:
    for path in new_family("drafted", "drafted_upstream.Model"):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 120
        assert "$" not in text
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(text))


def test_the_command_says_what_it_wrote_and_what_comes_next(root: Path) -> None:
    result = CliRunner().invoke(cli.app, ["parity", "new", "drafted", "--upstream", "drafted_upstream.Model"])
    assert result.exit_code == 0, result.output
    assert "reference_ports/drafted/model.py\n" in result.output
    assert "parity_tests/cases/drafted.py\n" in result.output
    assert 'Add "drafted" to FAMILIES' in result.output
    assert "refiners parity show drafted/tiny" in result.output
