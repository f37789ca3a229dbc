"""Tables of scores as markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence

from issp.sr.tables import Row, ScoreTable, Value, set_order
from issp.utils.text import table as markdown_table

MISSING = "–"


def markdown(tables: Sequence[ScoreTable]) -> str:
    """Headings and tables; the best value is bold, the second underlined."""
    return "\n\n".join(map(_markdown, tables)) + "\n"


def _markdown(table: ScoreTable) -> str:
    header = ["method", "scale", *_seeds(table, "seeds")]
    for name, metrics in _by_set(table):
        header += [f"{name} {metrics[0]}", *metrics[1:]]
    rows = [
        [row.label, f"x{row.scale}", *_seeds(table, str(row.seeds or MISSING))]
        + [_markdown_cell(row, column) for column in table.columns]
        for row in table.rows
    ]
    text = f"### {table.title}\n\n{markdown_table(header, rows)}"
    notes = "\n".join(f"* {note}" for note in table.notes)
    return f"{text}\n\n{notes}" if notes else text


def _markdown_cell(row: Row, column: tuple[str, str]) -> str:
    value = row.cells.get(column)
    if value is None:
        return MISSING
    mean, spread = value.texts(column[1])
    form = {"best": "**{}**", "second": "<u>{}</u>"}.get(row.marks.get(column, ""), "{}")
    return form.format(mean) + (f" ± {spread}" if spread else "")


def latex(tables: Sequence[ScoreTable]) -> str:
    r"""`table` environments that need \usepackage{booktabs} alone."""
    return "\n\n".join(map(_latex, tables)) + "\n"


def _latex(table: ScoreTable) -> str:
    names, metrics = ["", "", *_seeds(table, "")], ["Method", "Scale", *_seeds(table, "Seeds")]
    rules, first = [], len(names) + 1
    for name, of_set in _by_set(table):
        names.append(rf"\multicolumn{{{len(of_set)}}}{{c}}{{{_escaped(name)}}}")
        metrics += of_set
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(of_set) - 1}}}")
        first += len(of_set)
    groups = itertools.groupby(table.rows, key=lambda row: row.scale)
    body = "\n\\midrule\n".join(
        "\n".join(_latex_row(table, row) for row in rows) for _, rows in groups
    )
    caption = " ".join([f"{_escaped(table.title)}.", *map(_escaped, table.notes)])
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(metrics) - 1)}}}",
            r"\toprule",
            rf"{' & '.join(names)} \\",
            "".join(rules),
            rf"{' & '.join(metrics)} \\",
            r"\midrule",
            body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_row(table: ScoreTable, row: Row) -> str:
    cells = [_escaped(row.label), rf"$\times${row.scale}", *_seeds(table, str(row.seeds or "--"))]
    cells += [_latex_cell(row, column) for column in table.columns]
    return rf"{' & '.join(cells)} \\"


def _latex_cell(row: Row, column: tuple[str, str]) -> str:
    value = row.cells.get(column)
    if value is None:
        return "--"
    mean, spread = value.texts(column[1])
    form = {"best": r"\textbf{%s}", "second": r"\underline{%s}"}
    text = form.get(row.marks.get(column, ""), "%s") % mean
    return text + (rf" $\pm$ {spread}" if spread else "")


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {c: rf"\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(c, c) for c in text)


def comma_separated(tables: Sequence[ScoreTable]) -> str:
    """One CSV table of all, with all digits; spread and count of a value beside it."""
    columns = sorted(
        {column for table in tables for column in table.columns},
        key=lambda column: (set_order(column[0]), column[1]),
    )
    fixed = ["arch", "sparsity", "channel", "crop_border", "scale", "method", "source"]
    kinds: dict[str, Callable[[Value], object]] = {
        "": lambda value: value.mean,
        " spread": lambda value: value.spread,
        " seeds": lambda value: value.count,
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*fixed, *(f"{' '.join(c)}{kind}" for c in columns for kind in kinds)])
    for table in tables:
        key = table.key
        shared = [key.arch, key.sparsity, key.channel, key.crop_border]
        for row in table.rows:
            values = [row.cells.get(column) for column in columns]
            cells = [get(v) if v else None for v in values for get in kinds.values()]
            writer.writerow([*shared, row.scale, row.method, row.source, *cells])
    return buffer.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}
ENDINGS = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def _seeds(table: ScoreTable, text: str) -> list[str]:
    """The cell of the column "seeds", where a row has several."""
    return [text] if any(row.seeds > 1 for row in table.rows) else []


def _by_set(table: ScoreTable) -> list[tuple[str, list[str]]]:
    """Each set with its metrics."""
    groups = itertools.groupby(table.columns, key=lambda column: column[0])
    return [(name, [metric for _, metric in columns]) for name, columns in groups]
