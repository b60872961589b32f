"""Parts of a page that are written from results, each between two comments with its name."""

from __future__ import annotations


def replaced(text: str, name: str, block: str) -> str:
    """The text with another block; the text itself if it has none of the name."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    return f"{before}{start}{block}\n{end}{after}" if found and closed else text
