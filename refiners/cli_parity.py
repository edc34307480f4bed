"""`refiners parity`: ports beside their upstreams, what differs and why, and whether the checks can be fooled."""

from pathlib import Path
from typing import Annotated

import typer

parity = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

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
    html: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page to look at: DIR/index.html.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all results to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML: a testcase for each case and lane.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Write a short summary as markdown. In a GitHub job it is appended by itself.")
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="2/5", help="Run this share of the cases; all take about as long.")
    ] = "",
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what changed since it passed: port, case, engine, upstream.")
    ] = False,
    explain: Annotated[
        bool | None, typer.Option(help="Find out why cases differ. By default if there is a page, or few differ.")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Explains what is not bitwise. By default ledger.toml in the first folder of MODULES."),
    ] = None,
) -> None:
    """Run cases and print their verdicts while they run. Exit code 1 if one may not stand.

    A verdict may stand when it is [green]BITWISE[/], or when the ledger explains it.
    Ctrl-C ends the run; what was measured is reported and written.

    [cyan]refiners parity run[/]                           all cases, all dtypes
    [cyan]refiners parity run clip --lanes float32[/]      the quick look
    [cyan]refiners parity run --html out/[/]               a page: trees, errors, why
    [cyan]refiners parity run --device cuda --json out.json[/]
    """
    from refiners.parity import commands

    code = commands.run_cases(
        cases,
        keyword=only or keyword,
        lanes=lanes,
        device=device,
        outputs=commands.Outputs(json=json, junit=junit, html=html, summary=summary),
        ledger_path=ledger or _beside(cases, "ledger.toml"),
        baseline_path=_beside(cases, "parity.json"),
        shard=shard,
        changed=changed,
        explain=explain,
    )
    raise typer.Exit(code)


def _beside(cases: str, name: str) -> Path | None:
    """A file in the first folder of the modules that hold cases, if it is there."""
    path = _folder(cases) / name
    return path if path.is_file() else None


def _folder(cases: str) -> Path:
    return Path(cases.partition(",")[0].partition(".")[0])


@parity.command("show")
def show_case(
    case: Annotated[
        str, typer.Argument(metavar="CASE", help="The id of a case, as [cyan]refiners parity list[/] prints it.")
    ],
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    device: Device = "cpu",
    lanes: Lanes = "",
    seconds: Annotated[
        float, typer.Option(min=0, help="For finding out why it differs, where it does; 0 leaves that out.")
    ] = 60.0,
) -> None:
    """Run one case and print all that is known about it.

    What was compared, the element that differs most, and how far both sides are from
    the float64 truth; where it differs, also the node that does, and why.

    [cyan]refiners parity show bert/tiny[/]
    [cyan]refiners parity show bert/tiny --lanes float32[/]
    """
    from refiners.parity import commands

    ledger = _beside(cases, "ledger.toml")
    code = commands.show_case(case, cases, lanes=lanes, device=device, seconds=seconds, ledger_path=ledger)
    raise typer.Exit(code)


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
    from refiners.parity.drafts.new import new_family

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
    from refiners.parity.mutants.kill_report import run_mutants

    code = run_mutants(
        cases,
        keyword=only or keyword,
        budget=budget,
        seed=seed,
        every_case=every_case,
        json_path=json,
        equivalents_path=equivalents or _beside(cases, "equivalent.toml"),
        ledger_path=_beside(cases, "ledger.toml"),
    )
    raise typer.Exit(code)


@parity.command("drift")
def drift(
    only: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]",
            help="Only the cases whose id contains this text. A version, as transformers==5.17.0, has to be installed.",
        ),
    ] = None,
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    lanes: Lanes = "",
    ledger: Annotated[
        Path | None,
        typer.Option(help="What may not be bitwise. By default ledger.toml in the first folder of MODULES."),
    ] = None,
    summaries: Annotated[
        Path | None,
        typer.Option(help="What upstream computed. By default upstream.json in the first folder of MODULES."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the summaries under the installed versions.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all results to this file.")] = None,
) -> None:
    """Run the cases under the installed versions of upstream, and say which side has changed.

    What upstream computed at the pinned versions is kept as a few numbers a case. Where a
    port is not equal any more, they tell whether upstream has moved, or the port.

    [cyan]refiners parity drift bert --lanes float64,float32[/]
    """
    from refiners.parity.drift_report import require_versions, run_drift, write_summaries

    path = summaries or _folder(cases) / "upstream.json"
    if write:
        raise typer.Exit(write_summaries(path, cases))
    ledger = ledger or _beside(cases, "ledger.toml")
    texts = [text for text in only or () if "==" not in text]
    require_versions([text for text in only or () if "==" in text])
    if len(texts) > 1:
        raise typer.BadParameter(f"one text at most, got {', '.join(texts)}")
    raise typer.Exit(run_drift(path, cases, keyword="".join(texts), lanes=lanes, ledger_path=ledger, json_path=json))


@parity.command("explain")
def explain_case(
    case: Annotated[
        str, typer.Argument(metavar="CASE", help="The id of a case, as [cyan]refiners parity list[/] prints it.")
    ],
    cases: Cases = CASES_OF_THIS_REPOSITORY,
    device: Device = "cpu",
    lanes: Lanes = "",
    seconds: Annotated[float, typer.Option(help="When to stop trying what would make both sides equal.")] = 60.0,
    leaf: Annotated[
        str, typer.Option(metavar="PATH", help="Feed this leaf of the port upstream's inputs and show both outputs.")
    ] = "",
) -> None:
    """Find out where a port differs from its upstream, and why.

    Names the first nodes that compute something else from the same values, with the
    operation and the line of both sides, and what would make them equal.

    [cyan]refiners parity explain bert/tiny --lanes float32[/]
    [cyan]refiners parity explain bert/tiny --lanes float32 --leaf Embeddings.LayerNorm[/]
    """
    from refiners.parity import commands

    raise typer.Exit(commands.explain_case(case, cases, lanes=lanes, device=device, seconds=seconds, leaf=leaf))


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
    from refiners.parity.cells.cell_report import run_cells

    raise typer.Exit(run_cells(cases, keyword=only, cells=cells))
