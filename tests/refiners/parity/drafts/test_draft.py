import torch
from torch import nn

from refiners.parity.drafts.draft import class_name, draft_port, known_layer, singular, upstream_tree


class Mixed(nn.Module):
    """Children of every kind that is treated on its own."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.blocks = nn.ModuleList(nn.Linear(4, width) for width in widths)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})
        self.drop = nn.Dropout()


def test_members_of_a_list_become_one_line() -> None:
    draft = draft_port(Mixed(4, 4, 4))
    assert draft.lines["blocks.{i}"] == "Block_{i+1}"
    assert "*(Block(4, 4, **factory) for _ in range(3))," in draft.classes[-1]


def test_members_that_differ_keep_their_numbers() -> None:
    draft = draft_port(Mixed(4, 5))
    assert draft.lines["blocks.{i}"] == "Block_{i+1}"
    assert "Block(4, 4, **factory),\n            Block(4, 5, **factory)," in draft.classes[-1]


def test_what_has_a_number_only_is_called_by_its_kind() -> None:
    lines = draft_port(Mixed(4)).lines
    assert lines["mlp.0"] == "Mlp.Linear_1"
    assert lines["mlp.2"] == "Mlp.Linear_2"
    assert lines["heads.left"] == "HeadsLeft"


def test_parameters_become_leaves_and_buffers_are_listed() -> None:
    draft = draft_port(Mixed(4))
    assert draft.lines["token"] == "Token.weight"
    assert draft.ignored == ("table",)


def test_what_has_no_weights_is_a_note() -> None:
    root = draft_port(Mixed(4)).classes[-1]
    assert "# Not here: `drop`, Dropout, which has no weights." in root


class Twice(nn.Module):
    """Two nodes of one name, which are not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Module()
        self.one.norm = nn.LayerNorm(4)
        self.two = nn.Module()
        self.two.norm = nn.GroupNorm(2, 4)


def test_two_classes_do_not_get_one_name() -> None:
    draft = draft_port(Twice())
    assert draft.lines == {"one.norm": "One.Norm", "two.norm": "Two.TwoNorm"}
    assert sum("class Norm(fl.LayerNorm)" in source for source in draft.classes) == 1


def test_layers_are_built_with_their_numbers() -> None:
    assert known_layer(nn.Linear(2, 3, bias=False)) == "fl.Linear(2, 3, bias=False, **factory)"
    assert known_layer(nn.LayerNorm(4, eps=1e-12)) == "fl.LayerNorm(4, eps=1e-12, **factory)"
    assert known_layer(nn.GroupNorm(2, 8)) == "fl.GroupNorm(8, 2, eps=1e-05, **factory)"
    assert known_layer(nn.Embedding(5, 2)) == "fl.Embedding(5, 2, **factory)"
    assert known_layer(nn.Conv2d(3, 4, 8, stride=8, bias=False)) == (
        "fl.Conv2d(3, 4, (8, 8), stride=(8, 8), use_bias=False, **factory)"
    )
    assert known_layer(nn.LayerNorm(4, bias=False)) is None
    assert known_layer(nn.Bilinear(1, 1, 1)) is None


def test_names_of_attributes_become_names_of_classes() -> None:
    assert [class_name(name) for name in ("q_proj", "layerNorm", "0", "class", "")] == [
        "QProj",
        "LayerNorm",
        "",
        "Class",
        "",
    ]
    assert class_name("None") == "None_"
    assert [singular(name) for name in ("layers", "pass", "h")] == ["layer", "pass", "h"]


def test_the_picture_shows_equal_members_once_and_parameters_with_their_shape() -> None:
    assert upstream_tree(Mixed(4, 4)) == [
        "Mixed",
        "├── token  Parameter(1, 4)",
        "├── blocks  ModuleList",
        "│   └── 0 … 1  Linear(in_features=4, out_features=4, bias=True)",
        "├── mlp  Sequential",
        "│   ├── 0  Linear(in_features=4, out_features=8, bias=True)",
        "│   ├── 1  GELU(approximate='none')",
        "│   └── 2  Linear(in_features=8, out_features=4, bias=False)",
        "├── heads  ModuleDict",
        "│   ├── left  Linear(in_features=4, out_features=2, bias=True)",
        "│   └── right  Linear(in_features=4, out_features=2, bias=True)",
        "└── drop  Dropout(p=0.5, inplace=False)",
    ]
