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
from refiners.cli_parity import parity
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
    mask_crop: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Work on what the mask hides alone, with that many pixels around it, at the model's size. The rest of "
            "the picture keeps its own pixels.",
        ),
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
    count: Annotated[
        int, typer.Option("--count", "-n", help="How many pictures, made at once. Their files are numbered.")
    ] = 1,
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
        [cyan]refiners generate --model sd15/ --prompt "a cat" --count 4 -o cat.png[/]  cat-1.png to cat-4.png
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
        mask_crop=mask_crop,
        strength=strength,
        solver=solver,
        steps=steps,
        seed=seed,
        count=count,
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
app.add_typer(parity, name="parity")


if __name__ == "__main__":
    main()
