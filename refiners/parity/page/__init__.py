"""One self-contained page about a run: `write_page(folder, report, cases)` writes `folder/index.html`.

    trees.py     the tree of a side, its nodes coloured by what was found there
    plot.py      the error along the forward, as SVG
    content.py   what the page says, as data
    write.py     the template filled with it

The page loads nothing: styles and the little script it has stand in it. It can be read, opened and folded without the
script, which filters and copies.
"""

from refiners.parity.page.write import render_page, write_page

__all__ = ["render_page", "write_page"]
