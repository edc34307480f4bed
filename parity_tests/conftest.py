"""What holds for the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """Keep what was imported from the garbage collector, which would look all of it through every few cases.

    Upstream's libraries are millions of objects: a quarter of the suite's time went into that.
    """
    gc.collect()
    gc.freeze()
