"""The command line: `refiners tree`, `refiners convert`, `refiners parity`.

Each command imports what it needs when it runs, so that `refiners --help` answers without waiting for torch. What a
user can cause is a typed error of refiners.errors, printed as one message: exit code 1, no traceback. A wrong option or
argument is exit code 2.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import refiners
from refiners.errors import FileFormatError, RefinersError

if TYPE_CHECKING:
    from torch.nn import Module

    from refiners.conversion.port import Port

app = typer.Typer(
    name="refiners",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PortName = Annotated[str, typer.Argument(metavar="PORT", help="Name of a port, such as [cyan]clip-text-l[/].")]


def main() -> None:
    """Run the command line; what a user caused is printed as one message, without a traceback."""
    try:
        app()
    except (RefinersError, OSError) as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), _message(error)), soft_wrap=True)
        sys.exit(1)


def _message(error: RefinersError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, RefinersError):
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"refiners {refiners.__version__}")
        raise typer.Exit


@app.callback()
def refiners_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Models as trees of layers, and the proof that each port equals its upstream.

    A [bold]port[/] is a published model written as a tree. Look at one, turn a
    published checkpoint into its weights, and see the proof that it computes
    what its upstream computes, tensor for tensor:

        [cyan]refiners tree clip-text-l[/]
        [cyan]refiners convert clip-text-l published.safetensors ours.safetensors[/]
        [cyan]refiners parity list[/]
        [cyan]refiners parity run clip[/]
    """


@app.command()
def tree(
    port: Annotated[
        str | None, typer.Argument(metavar="[PORT]", help="Name of a port. Without it, all names are listed.")
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="Levels to show; 0 shows all.")] = 7,
    plain: Annotated[bool, typer.Option("--plain", help="Text only, no colours: for files and reviews.")] = False,
) -> None:
    """Print the tree of a port. It is built on the [italic]meta[/] device: no weights, no memory.

    The tree is the program: read it from top to bottom. [cyan](SUM)[/] adds what its
    children return, [cyan](RES)[/] adds the input, [cyan](x12)[/] stands for twelve equal
    siblings.

        [cyan]refiners tree[/]                        the names of all ports
        [cyan]refiners tree clip-text-l --depth 3[/]  the first three levels
        [cyan]refiners tree clip-text-l --plain > tree.txt[/]
    """
    from refiners.fluxion.layers.picture import print_tree
    from refiners.fluxion.layers.tree import ModuleTree
    from refiners.ports import find_port

    if port is None:
        _list_ports()
        return
    model = _build_on_meta(find_port(port))
    if plain:
        picture = ModuleTree(model)
        typer.echo(picture.generate_tree_repr(picture.root, depth=depth or -1))
    else:
        print_tree(model, depth=depth or -1)


def _list_ports() -> None:
    from rich.console import Console
    from rich.table import Table

    from refiners.ports import find_ports

    table = Table("port", "what it is", box=None, header_style="bold")
    for name, port in find_ports().items():
        table.add_row(name, port.summary)
    Console().print(table)


def _build_on_meta(port: "Port") -> "Module":
    import torch

    with torch.device("meta"):
        return port.build()


@app.command()
def convert(
    port: PortName,
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Published weights: a safetensors file, or the index of a sharded one.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the port's weights are written (safetensors).")],
    config: Annotated[
        Path | None,
        typer.Option(help="The published config.json, when it is not the configuration that the port is named after."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Turn a published checkpoint into the weights of a port.

    Every tensor of IN is used once and every weight of the port filled once;
    otherwise nothing is written, and one error lists all that is missing,
    unexpected or of another shape. OUT appears whole or not at all.

        [cyan]refiners convert clip-text-l model.safetensors clip.safetensors[/]
        [cyan]refiners convert bert-base model.safetensors bert.safetensors --config config.json[/]
    """
    from refiners.conversion import convert_file
    from refiners.ports import find_port

    found = find_port(port)
    if target.is_file() and not force:
        raise FileFormatError(f"{target} exists. Nothing was written. Choose another path, or replace it with --force.")
    count = convert_file(found, source, target, config=config, overwrite=force)
    typer.echo(f"{target}: {count} tensors of {port}, from {source}.")


parity = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(parity, name="parity")

Cases = Annotated[
    str, typer.Option(metavar="MODULES", help="Modules or packages that hold cases, separated by commas.")
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|all", help="Where both sides run.")]
Lanes = Annotated[
    str, typer.Option(metavar="DTYPES", help="Only these, separated by commas: [cyan]float64,bfloat16[/].")
]
CASES_OF_THIS_REPOSITORY = "parity_tests.cases"


@parity.callback()
def parity_command() -> None:
    """Run ports and their upstreams side by side, and compare bit by bit.

    A [bold]case[/] is one configuration of a port and its upstream: both get the same
    weights and inputs, outputs and gradients are compared, once per dtype.

    [green]BITWISE[/]    every bit is equal
    [yellow]ROUNDING[/]   another rounding, explained in the ledger
    [red]DIFFERENT[/]  anything else

    Cases come from the modules of [cyan]--cases[/], this repository's or your own:

        [cyan]refiners parity list[/]
        [cyan]refiners parity run clip --lanes float32[/]
        [cyan]refiners parity show bert/tiny --cases my_package.cases[/]
    """


@parity.command("list")
def list_cases(cases: Cases = CASES_OF_THIS_REPOSITORY) -> None:
    """List the cases that are registered.

    Each has an id, the dtypes it runs in, and the published sizes whose keys and
    shapes are compared without computing.

    [cyan]refiners parity list[/]
    [cyan]refiners parity list --cases my_package.cases[/]
    """
    from refiners.parity import commands

    raise typer.Exit(commands.list_cases(cases))


@parity.command("run")
def run_cases(
    only: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only the cases whose id contains this text.")] = "",
    keyword: Annotated[str, typer.Option("-k", metavar="TEXT", help="The same, as pytest spells it.")] = "",
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    device: Device = "cpu",
    lanes: Lanes = "",
    json: Annotated[Path | None, typer.Option(help="Write all results to this file.")] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Explains what is not bitwise. By default ledger.toml in the first folder of MODULES."),
    ] = None,
) -> None:
    """Run cases and print their verdicts while they run. Exit code 1 if one may not stand.

    A verdict may stand when it is [green]BITWISE[/], or when the ledger explains it.

    [cyan]refiners parity run[/]                           all cases, all dtypes
    [cyan]refiners parity run clip --lanes float32[/]      the quick look
    [cyan]refiners parity run --device cuda --json out.json[/]
    """
    from refiners.parity import commands

    beside = Path(cases.partition(",")[0].partition(".")[0]) / "ledger.toml"
    ledger = ledger or (beside if beside.is_file() else None)
    code = commands.run_cases(
        cases, keyword=only or keyword, lanes=lanes, device=device, json_path=json, ledger_path=ledger
    )
    raise typer.Exit(code)


@parity.command("show")
def show_case(
    case: Annotated[
        str, typer.Argument(metavar="CASE", help="The id of a case, as [cyan]refiners parity list[/] prints it.")
    ],
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    device: Device = "cpu",
    lanes: Lanes = "",
) -> None:
    """Run one case and print all that is known about it.

    What was compared, the element that differs most, and how far both sides are from
    the float64 truth.

    [cyan]refiners parity show bert/tiny[/]
    [cyan]refiners parity show bert/tiny --lanes float32[/]
    """
    from refiners.parity import commands

    raise typer.Exit(commands.show_case(case, cases, lanes=lanes, device=device))


@parity.command("new")
def new_family(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Name of the package, such as [cyan]vit[/].")],
    upstream: Annotated[
        str, typer.Option(metavar="CLASS", help="What it is a port of, such as [cyan]transformers.ViTModel[/].")
    ],
    config: Annotated[
        str, typer.Option(metavar="JSON", help="Arguments of upstream's configuration. Small sizes make a quick draft.")
    ] = "{}",
) -> None:
    """Write the files of a port, drafted from the upstream model. Run it at the root of the checkout.

    The tree has upstream's modules, the key map all of its weights, the case both
    models: it runs at once, and says where the port differs. No file is replaced.

    [cyan]refiners parity new vit --upstream transformers.ViTModel[/]
    [cyan]refiners parity new vit --upstream transformers.ViTModel --config '{"hidden_size": 32}'[/]
    """
    from refiners.parity.new import new_family

    for path in new_family(family, upstream, config):
        typer.echo(path.relative_to(Path.cwd()))
    typer.echo(
        f'\nAdd "{family}" to FAMILIES in reference_ports/__init__.py, and to the contract "ports" in pyproject.toml.\n'
        f"Then: refiners parity show {family}/tiny\ndocs/porting.md leads on from there."
    )


@parity.command("mutants")
def mutants(
    only: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Only the cases whose id contains this text, or one mutant's id.")
    ] = "",
    keyword: Annotated[str, typer.Option("-k", metavar="TEXT", help="The same, as pytest spells it.")] = "",
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop there. By default all are tried.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which mutants are tried.")] = 0,
    every_case: Annotated[
        bool, typer.Option("--every-case", help="Plant each fault in every case, and tell what each case earns.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all results to this file.")] = None,
    equivalents: Annotated[
        Path | None,
        typer.Option(help="Mutants that are no faults. By default equivalent.toml in the first folder of MODULES."),
    ] = None,
) -> None:
    """Plant faults in ports that are right, and count those that the cases tell.

    Each fault is one small mistake, made after both sides share their weights: a mask
    dropped, two norms swapped, an eps ten times too large. Exit code 1 if fewer than
    99 % of a family are told.

    [cyan]refiners parity mutants bert --budget 60[/]
    [cyan]refiners parity mutants "bert/tiny::eps::Embeddings.LayerNorm"[/]
    """
    from refiners.parity.kill_report import run_mutants

    beside = Path(cases.partition(",")[0].partition(".")[0]) / "equivalent.toml"
    equivalents = equivalents or (beside if beside.is_file() else None)
    code = run_mutants(
        cases,
        keyword=only or keyword,
        budget=budget,
        seed=seed,
        every_case=every_case,
        json_path=json,
        equivalents_path=equivalents,
    )
    raise typer.Exit(code)


@parity.command("explain")
def explain_case(
    case: Annotated[
        str, typer.Argument(metavar="CASE", help="The id of a case, as [cyan]refiners parity list[/] prints it.")
    ],
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    device: Device = "cpu",
    lanes: Lanes = "",
    seconds: Annotated[float, typer.Option(help="When to stop trying what would make both sides equal.")] = 60.0,
) -> None:
    """Find out where a port differs from its upstream, and why.

    Names the first nodes that compute something else from the same values, with the
    operation and the line of both sides, and what would make them equal.

    [cyan]refiners parity explain bert/tiny --lanes float32[/]
    """
    from refiners.parity import commands

    raise typer.Exit(commands.explain_case(case, cases, lanes=lanes, device=device, seconds=seconds))


@parity.command("cells")
def run_cells(
    only: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only the cases whose id contains this text.")] = "",
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    cells: Annotated[str, typer.Option(metavar="CELLS", help="Only these, separated by commas.")] = "",
) -> None:
    """Change what changes nothing, and see that nothing changes.

    The items of a batch one by one, padding, other strides, a copy, a saved and loaded
    model, a compiled one: each has to give the results it gave before.

    [cyan]refiners parity cells bert[/]
    [cyan]refiners parity cells clip --cells batch,padded[/]
    """
    from refiners.parity.cell_report import run_cells

    raise typer.Exit(run_cells(cases, keyword=only, cells=cells))


if __name__ == "__main__":
    main()
