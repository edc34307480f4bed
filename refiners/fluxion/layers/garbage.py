"""Building many modules at once, without Python's search for garbage among them."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def nothing_is_garbage() -> Generator[None]:
    """Keep Python from searching for garbage while many modules are built: that takes longer than building them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():
                # What was built counts as old at once; otherwise the next allocation would search all of it.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
