"""`refiners loras`: what a LoRA file holds, and the same in another layout."""

from pathlib import Path
from typing import Annotated

import typer

loras = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@loras.callback()
def loras_command() -> None:
    """Look at LoRA files, and convert them between the layouts of diffusers, peft and kohya.

    [cyan]refiners loras show style.safetensors[/]
    [cyan]refiners loras convert style.safetensors --to diffusers --out style-diffusers.safetensors[/]
    """


@loras.command("show")
def show_loras(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, or a folder of peft or diffusers.")],
) -> None:
    """Print what a LoRA file holds: layout, parts, the model it is made for, methods, ranks, alphas, metadata.

    Only the header is read, whatever the size of the file.

        [cyan]refiners loras show style.safetensors[/]
    """
    from refiners.conversion.loras import commands
    from refiners.ports import find_ports

    find_ports()  # so that all models are known
    commands.show(file)


@loras.command("convert")
def convert_loras(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, or a folder of peft or diffusers.")],
    to: Annotated[str, typer.Option(metavar="LAYOUT", help="diffusers, peft or kohya.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="What is written: a file, for peft a folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a LoRA file in another layout. What the file is made for is recognised; its metadata is kept.

    Values are copied bit by bit. What the other layout has no place for is an error,
    and nothing is written.

        [cyan]refiners loras convert style.safetensors --to peft --out style/[/]
    """
    from refiners.conversion.loras import commands
    from refiners.ports import find_ports

    find_ports()  # so that all models are known
    commands.convert(file, to, out, force)
