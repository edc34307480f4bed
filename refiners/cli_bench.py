"""`refiners bench`: what benchmarks have measured, as a page or as tables."""

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Figures = Annotated[
    list[Path], typer.Argument(metavar="FIGURES…", help="Files of figures, or folders of them. The latest is shown.")
]


@bench.callback()
def bench_command() -> None:
    """Look at what benchmarks have measured: `nox -s benchmarks -- --figures FILE` writes the files.

    [cyan]refiners bench report figures.json[/]
    [cyan]refiners bench table figures.json[/]
    """


@bench.command("report")
def report(
    figures: Figures,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the page goes.")] = Path("bench"),
) -> None:
    """Write one page that needs no other file: DIR/index.html.

    Ratios with their intervals, overhead against the size of the model, cost against
    the number of adapters, memory, and, of several runs, how figures went.

        [cyan]refiners bench report figures.json[/]
        [cyan]refiners bench report runs/ --output page[/]
    """
    from refiners.bench.figures import read_runs
    from refiners.bench.page import write_page

    typer.echo(f"Written: {write_page(output, read_runs(figures))}")


@bench.command("table")
def table(figures: Figures) -> None:
    """Print the figures as tables of markdown, with device, versions and commit.

    [cyan]refiners bench table figures.json[/]
    """
    from refiners.bench.figures import read_runs
    from refiners.bench.table import render_tables

    typer.echo(render_tables(read_runs(figures)[0]))
