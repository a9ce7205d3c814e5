"""Tables as plain text, for stdout."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """The table with a line under its head. `text_columns` are set flush left, all others flush right. Every row as long as `headers`."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(width) if i in text_columns else cell.rjust(width) for i, (cell, width) in enumerate(aligned)).rstrip()

    return "\n".join([line(cells[0]), "  ".join("─" * width for width in widths), *(line(row) for row in cells[1:])])


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", text_columns: Sequence[int] = (0,)) -> None:
    """Prints the table on stdout, with a title above and an empty line below."""
    if title:
        print(title)
    print(format_table(headers, rows, text_columns=text_columns), end="\n\n")
