"""Which bundle some weights are: told from their keys and shapes, never guessed."""

from collections.abc import Mapping
from pathlib import Path

import torch

from refiners.conversion.bundle import Bundle
from refiners.conversion.problems import nearest
from refiners.errors import ConversionError

Bundles = Mapping[str, Bundle]


def find_bundle(bundles: Bundles, kind: str) -> Bundle:
    """The bundle of that name.

    Raises:
        ConversionError: there is none, or it is known by sight only.
    """
    names = [name for name, bundle in bundles.items() if bundle.parts]
    if kind not in names:
        near = nearest(kind, names, 3)
        advice = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConversionError(f'No model is called "{kind}". {advice}The models are: {", ".join(names)}.')
    return bundles[kind]


def recognise(
    bundles: Bundles,
    shapes: Mapping[str, torch.Size],
    path: Path,
    kind: str | None = None,
    prediction_type: str | None = None,
) -> Bundle:
    """The bundle that weights belong to.

    Receives:
        bundles: what there is.
        shapes: keys and shapes, as `Bundle.recognises` takes them.
        path: where the weights are, for messages.
        kind: what they are said to be.
        prediction_type: what the scheduler beside the weights says, to tell bundles with the same keys apart.

    Raises:
        ConversionError: they look like another model than they are said to be; nothing is said and they look like
            none, or like several; they look like one that cannot be converted.
    """
    fitting = [bundle for bundle in bundles.values() if bundle.recognises(shapes)]
    looks = " or ".join(bundle.title for bundle in fitting)
    if kind is not None:
        wanted = find_bundle(bundles, kind)
        if fitting and wanted not in fitting:
            raise ConversionError(f"{path} looks like {looks}, not {wanted.title}. {_advice(fitting)}")
        return wanted
    narrowed = [bundle for bundle in fitting if bundle.prediction_type == prediction_type] or fitting
    if len(narrowed) > 1:
        names = " or ".join(bundle.name for bundle in narrowed)
        raise ConversionError(f"{path} looks like {looks}, which have the same weights. Say which it is: {names}.")
    if not narrowed:
        known = ", ".join(bundle.title for bundle in bundles.values() if bundle.parts)
        seen = _what_is_there(bundles, shapes)
        raise ConversionError(
            f"{path} looks like no model that can be converted ({known}); {seen} To see what does not fit, say what it "
            f"is: refiners convert KIND {path} OUT."
        )
    if not narrowed[0].parts:
        raise ConversionError(f"{path} looks like {looks}. {_advice(narrowed)}")
    return narrowed[0]


def _what_is_there(bundles: Bundles, shapes: Mapping[str, torch.Size]) -> str:
    """What the folders look like, and which of those that all models have is absent; or the first keys."""
    folders = {key.partition("/")[0] for key in shapes if "/" in key}
    sights = {folder: looks_alone(bundles, below(shapes, folder)) for folder in sorted(folders)}
    seen = [f"{folder} looks like {sight}" for folder, sight in sights.items() if sight]
    if not seen:
        return f"it holds {len(shapes)} tensors: {', '.join(list(shapes)[:3])}, …"
    needed = [{part.folder for part in bundle.parts} for bundle in bundles.values() if bundle.parts]
    absent = sorted(needed[0].intersection(*needed) - folders) if needed else []
    lacking = f"; it lacks the folder {' and '.join(absent)}" if absent else ""
    return f"in it, {', '.join(seen)}{lacking}."


def looks_alone(bundles: Bundles, shapes: Mapping[str, torch.Size]) -> str:
    """What the weights of one part look like, such as `an autoencoder`; the empty text if they look like nothing."""
    fitting = [bundle.title for bundle in bundles.values() if not bundle.parts and bundle.recognises(shapes)]
    return " or ".join(title.removesuffix(" alone") for title in fitting)


def below(shapes: Mapping[str, torch.Size], folder: str) -> dict[str, torch.Size]:
    """The keys and shapes of one folder, without its name."""
    return {key.removeprefix(f"{folder}/"): shape for key, shape in shapes.items() if key.startswith(f"{folder}/")}


def _advice(fitting: list[Bundle]) -> str:
    names = [bundle.name for bundle in fitting if bundle.parts]
    if not names and all(bundle.title.endswith(" alone") for bundle in fitting):
        return "Nothing was converted: that is one part of a model. `refiners ports` lists the ports, which read parts."
    if not names:
        return "Nothing was converted: no port reads that."
    return f"Nothing was converted. Convert it as {' or '.join(names)}."
