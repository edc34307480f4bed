"""The command line: `refiners tree`, `refiners ports`, `refiners convert`, `refiners loras`, `refiners parity`.

Each command imports what it needs when it runs, so that `refiners --help` answers without waiting for torch. What a
user can cause is a typed error of refiners.errors, printed as one message: exit code 1, no traceback. A wrong option or
argument is exit code 2.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import refiners
from refiners.cli_bench import bench
from refiners.cli_loras import loras
from refiners.errors import RefinersError

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
        [cyan]refiners convert sd15 stable-diffusion-v1-5/ out/[/]
        [cyan]refiners generate --model sd15/ --prompt "a photo of a cat" -o cat.png[/]
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


@app.command("ports")
def list_ports() -> None:
    """List what can be converted: models of several parts, and single ports.

    [cyan]refiners ports[/]
    """
    from refiners.conversion.commands import list_all
    from refiners.ports import find_bundles, find_ports

    list_all(find_ports(), find_bundles())


@app.command()
def convert(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] IN OUT",
            help="KIND: a model or a port of [cyan]refiners ports[/]. IN: a folder or a file as published. "
            "OUT: what is written.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="The published configuration, when IN holds none and its sizes are unusual: a config.json "
            "for a port, a folder with unet/config.json and so on for a model."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer's files, for a single file, which holds none.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Which of several sets of weights in a folder to take, such as fp16.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights in OUT: float32, float16, bfloat16. As in IN by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a converted model again and compare it with its digests.")
    ] = False,
) -> None:
    """Turn a published checkpoint into the weights of a port, or of all ports of a model.

    A model is a folder in the layout of diffusers or a single file; what it is is
    recognised, or said. A port is one safetensors file. Every tensor of IN is used
    once and every weight of the port filled once; otherwise nothing is written, and
    one error lists all that is missing, unexpected or of another shape. OUT appears
    whole or not at all; a conversion that was interrupted goes on where it was.

        [cyan]refiners convert sd15 stable-diffusion-v1-5/ out/[/]
        [cyan]refiners convert sd_xl_base_1.0.safetensors out/ --tokenizer clip/[/]
        [cyan]refiners convert --verify out/[/]
        [cyan]refiners convert clip-text-l model.safetensors clip.safetensors[/]
        [cyan]refiners convert bert-base model.safetensors bert.safetensors --config config.json[/]
    """
    from refiners.conversion import commands
    from refiners.conversion.port import Port
    from refiners.ports import find_bundles, find_convertible

    if len(names) not in ((1,) if verify else (2, 3)):
        usage = "--verify DIR" if verify else "[KIND] IN OUT"
        raise typer.BadParameter(f"expected {usage}, got {len(names)} names: {' '.join(names)}")
    if verify:
        commands.verify(Path(names[0]))
        return
    source, target = map(Path, names[-2:])
    found = find_convertible(names[0]) if len(names) == 3 else None
    options = commands.Options(config=config, tokenizer=tokenizer, variant=variant, dtype=dtype, force=force)
    if isinstance(found, Port):
        commands.convert_port(found, source, target, options)
    else:
        commands.convert_bundle(find_bundles(), None if found is None else found.name, source, target, options)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A model: as diffusers publishes it, or converted.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the picture shall show.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where it goes: .png, .jpg or .webp.")],
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What it shall not show.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture to begin with.")] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White where the picture shall be made anew: inpainting.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of the picture to change, 0 to 1: 0.8 unless given, 1 for inpainting."),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as ddim, euler or dpm++2m. The model's own by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="More take longer and err less.")] = 30,
    seed: Annotated[
        int | None, typer.Option(help="The same seed, the same picture. Drawn and told by default.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt; 1 or less: no guidance.  [default: the model's own]"),
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8. The model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8. The model's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, …")] = "cpu",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="A LoRA file, and how strong it is. May be given several times."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Make a picture of a text, with a Stable Diffusion model on disk.

    What the model is (1, 2, XL, refiner, for inpainting, for editing) is recognised. With
    [cyan]--image[/] it begins with a picture; with [cyan]--mask[/] as well, it makes a part of it anew.

        [cyan]refiners generate --model sd15/ --prompt "a photo of a cat" -o cat.png[/]
        [cyan]refiners generate --model sd15/ --prompt "a dog" --image cat.png --strength 0.6 -o dog.png[/]
        [cyan]refiners generate --model sdxl/ --prompt "a cat" --solver euler-a --seed 1 -o cat.png[/]
        [cyan]refiners generate --model sd15/ --prompt "a cat" --lora style.safetensors:0.8 -o cat.png[/]
    """
    from refiners.ports import find_command

    told = find_command("generate")(
        model=model,
        prompt=prompt,
        output=output,
        negative_prompt=negative_prompt,
        image=image,
        mask=mask,
        strength=strength,
        solver=solver,
        steps=steps,
        seed=seed,
        guidance=guidance,
        height=height,
        width=width,
        dtype=dtype,
        device=device,
        loras=tuple(lora or ()),
        overwrite=force,
    )
    typer.echo(told)


app.add_typer(loras, name="loras")
app.add_typer(bench, name="bench")
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

    code = run_mutants(
        cases,
        keyword=only or keyword,
        budget=budget,
        seed=seed,
        every_case=every_case,
        json_path=json,
        equivalents_path=equivalents or _beside(cases, "equivalent.toml"),
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
    from refiners.parity.cell_report import run_cells

    raise typer.Exit(run_cells(cases, keyword=only, cells=cells))


if __name__ == "__main__":
    main()
