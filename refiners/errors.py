"""The exceptions Refiners raises, and the builtin each one also is.

Every error a user can cause is one of these. Each inherits the builtin that Python code would expect in its
place, so `except ValueError` keeps working, and `except RefinersError` catches them all.

    RefinersError (Exception)
    ├── TreeError (ValueError)            an edit, a name or a path that the tree cannot take
    │   ├── TreeKeyError (KeyError)       no child of that name
    │   ├── TreeIndexError (IndexError)   no child at that position
    │   ├── TreeTypeError (AssertionError, TypeError)   a node of another type than asked for
    │   ├── ParentError (AssertionError)  a parent is missing, or there is one already
    │   └── NotFoundError (AssertionError)   a search that had to find something found nothing
    ├── ContextError (AssertionError)     a context or a value in it that is not there
    ├── InputError (AssertionError, TypeError, ValueError)   a layer called with the wrong number or kind of inputs
    ├── ChainError (RuntimeError)         a forward that failed, with the tree marked at the failing leaf
    ├── AdapterError (ValueError, RuntimeError)   an injection or ejection that cannot be done
    │   ├── AdapterTypeError (AssertionError, TypeError)   an adapter class or target of the wrong type
    │   └── LoraNameError (KeyError, AssertionError)   a LoRA of that name is missing, or is there already
    ├── SerializationError (pickle.PicklingError, TypeError)   a tree that holds what cannot be pickled
    ├── SelectionError (LookupError)      a selection whose count is not the expected one
    ├── FileFormatError (ValueError)      a file that is not what it should be
    │   ├── NotTensorsError (AssertionError)    it holds something else than tensors
    │   │   └── PickledModelError (pickle.UnpicklingError)   it holds Python objects
    │   └── UnwritableFileError (OSError)       a path that cannot be written to
    ├── ConversionError (ValueError, RuntimeError)   weights or a configuration that do not fit the port
    │   └── WeightsError                  the weights of a file do not fit a module
    └── ParityError (RuntimeError)        a parity case or run that cannot be judged
"""

from pickle import PicklingError, UnpicklingError


class RefinersError(Exception):
    """The root of all errors raised on purpose by Refiners."""

    def __str__(self) -> str:
        # KeyError.__str__ shows the repr of its argument, which would fold a multi-line message into one line.
        return Exception.__str__(self)


class TreeError(RefinersError, ValueError):
    """An edit, a name or a path that the tree cannot take."""


class TreeKeyError(TreeError, KeyError):
    """No child of that name."""


class TreeIndexError(TreeError, IndexError):
    """No child at that position."""


class TreeTypeError(TreeError, AssertionError, TypeError):
    """A node of another type than the one asked for."""


class ParentError(TreeError, AssertionError):
    """A parent is missing, or the node has another one already."""


class NotFoundError(TreeError, AssertionError):
    """A search that had to find something found nothing."""


class ContextError(RefinersError, AssertionError):
    """A context, or a value in it, that is not there."""


class InputError(RefinersError, AssertionError, TypeError, ValueError):
    """A layer called with the wrong number or kind of inputs."""


class ChainError(RefinersError, RuntimeError):
    """A forward that failed. The message shows the path, the tree marked at the failing leaf, and its arguments."""


class AdapterError(RefinersError, ValueError, RuntimeError):
    """An injection or an ejection that cannot be done; the tree is as it was before."""


class AdapterTypeError(AdapterError, AssertionError, TypeError):
    """An adapter class, or a target, of the wrong type."""


class LoraNameError(AdapterError, KeyError, AssertionError):
    """A LoRA of that name is missing, or is there already."""


class SerializationError(RefinersError, PicklingError, TypeError):
    """A tree that holds what cannot be pickled, such as a lambda."""


class SelectionError(RefinersError, LookupError):
    """A selection whose count is not the expected one."""


class FileFormatError(RefinersError, ValueError):
    """A file that is not what it should be: truncated, corrupted or of another format."""


class NotTensorsError(FileFormatError, AssertionError):
    """A file that can be read, but holds something else than tensors by name."""


class PickledModelError(NotTensorsError, UnpicklingError):
    """A file that holds Python objects, which could run code when loaded."""


class UnwritableFileError(FileFormatError, OSError):
    """A path that cannot be written to. What was there is untouched."""


class ConversionError(RefinersError, ValueError, RuntimeError):
    """Weights or a configuration that do not fit the port. Lists everything that does not fit, not the first only."""


class WeightsError(ConversionError):
    """The weights of a file do not fit a module, which is as it was before."""


class ParityError(RefinersError, RuntimeError):
    """A parity case or a parity run that cannot be judged."""
