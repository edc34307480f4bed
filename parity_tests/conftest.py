"""What holds for the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """Let Python search for garbage less often: it would look through the millions of objects of upstream.

    They are not frozen, since counting what is frozen walks through all of it, and some code asks for that.
    """
    gc.set_threshold(20_000, 20, 50)
