"""The kernels' roofline: bytes, FLOPs and floors of every kernel as the tables of docs/model.md, and as a picture.

    PYTHONPATH=kernels python tests/bench/roofline.py                          # the three tables
    PYTHONPATH=kernels python tests/bench/roofline.py --format json
    PYTHONPATH=kernels python tests/bench/roofline.py --plot docs/roofline.svg [--measured rows.json]

The arithmetic is `foedus_kernels.roofline`. The picture needs matplotlib. Its points are rows that `make bench-gpu`
measured and wrote with ``--out rows.json``; without them it shows floors only, and says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from foedus_kernels.roofline import (
    CARDS,
    KERNELS,
    MOE_16E_32K,
    RECORD_KERNELS,
    RECORDS,
    ROWS,
    SHAPES,
    Card,
    Kernel,
    Shape,
    Work,
)

NOT_MEASURED = "not measured"
_LETTERS = {"bytes": "b", "FLOPs": "f", "link": "l"}
_MARKERS = "osD^v<>pPX*hd"  # Of the kernels but the link, which has no FLOPs.


def cells(kernel: Kernel) -> list[tuple[Shape, int | None, int, Work]]:
    """Every (shape, rows an expert, tokens) of a kernel with its work; a record's kernels have no rows an expert."""
    if kernel in RECORD_KERNELS:
        return [(MOE_16E_32K, None, tokens, kernel.work(MOE_16E_32K, tokens)) for tokens in RECORDS]
    places = [(shape, rows, shape.tokens(rows)) for shape in SHAPES for rows in ROWS]
    return [(shape, rows, tokens, kernel.work(shape, tokens)) for shape, rows, tokens in places]


def rows() -> list[dict[str, Any]]:
    """The arithmetic as JSON: one object for each kernel and shape."""
    return [
        {
            "kernel": kernel.name,
            "model": shape.name,
            "rows_an_expert": count,
            "tokens": tokens,
            "bytes": work.bytes,
            "flops": work.flops,
            "link_bytes": work.link_bytes,
            "bound": {card.name: work.bound(card) for card in CARDS},
            "floor_us": {card.name: round(work.seconds(card) * 1e6, 1) for card in CARDS},
        }
        for kernel in (*KERNELS, *RECORD_KERNELS)
        for shape, count, tokens, work in cells(kernel)
    ]


def tables() -> str:
    """The three tables of docs/model.md."""
    names = [f"{shape.name.removeprefix('gpt-oss-')}, {count}" for shape in SHAPES for count in ROWS]
    head = "| | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names)
    work = [f"| MB and GFLOP{head[1:]}"]
    floors = [f"| floor in µs, {' / '.join(card.name for card in CARDS)}{head[1:]}"]
    for kernel in KERNELS:
        found = [one for *_, one in cells(kernel)]
        work.append(f"| {kernel.name} | " + " | ".join(map(_work, found)) + " |")
        floors.append(f"| {kernel.name} | " + " | ".join(map(_floors, found)) + " |")
    records = [
        "| MB and GFLOP; floor in µs | " + " | ".join(f"{tokens:,} tokens" for tokens in RECORDS) + " |",
        "| --- |" + " ---: |" * len(RECORDS),
    ]
    for kernel in RECORD_KERNELS:
        found = [f"{_work(one)}; {_floors(one)}" for *_, one in cells(kernel)]
        records.append(f"| {kernel.name} | " + " | ".join(found) + " |")
    return "\n\n".join("\n".join(lines) for lines in (work, floors, records)) + "\n"


def _work(work: Work) -> str:
    return f"{_digits(work.bytes / 1e6)}, {_digits(work.flops / 1e9)}"


def _floors(work: Work) -> str:
    letters = {_LETTERS[work.bound(card)] for card in CARDS}
    if len(letters) == 1:
        return " / ".join(_digits(work.seconds(card) * 1e6) for card in CARDS) + f" {letters.pop()}"
    return " / ".join(f"{_digits(work.seconds(card) * 1e6)} {_LETTERS[work.bound(card)]}" for card in CARDS)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or not value else f"{value:.2f}"


def draw(path: Path, measured: list[dict[str, Any]]) -> None:
    """The roofs of the cards, each kernel's place under them, and the measured rows.

    Args:
        path: An .svg or .png file.
        measured: Rows of `tests/bench/gpu.py` with ``kernel``, ``model``, ``rows_an_expert``, ``way`` and
            ``seconds``; those of ``ours`` become points.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "foedus"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for card, colour in zip(CARDS, ("tab:orange", "tab:blue"), strict=True):
        _draw_roof(axes, card, colour)
    drawn = 0
    shown = [one for one in (*KERNELS, *RECORD_KERNELS) if not one.name.startswith("K4")]
    for kernel, marker in zip(shown, _MARKERS, strict=True):
        for place, (shape, count, tokens, work) in enumerate(cells(kernel)):
            label = kernel.name if place == 0 else None
            floor = work.flops / work.seconds(CARDS[-1]) / 1e12
            axes.plot(
                work.intensity, floor, marker, color="black", fillstyle="none", markersize=5, alpha=0.6, label=label
            )
            for row in measured:
                same = (row["kernel"], row["model"], row["rows_an_expert"]) == (kernel.name, shape.name, count)
                if same and (count is not None or row["tokens"] == tokens) and row["way"] == "ours" and row["seconds"]:
                    drawn += 1
                    axes.plot(work.intensity, work.flops / row["seconds"] / 1e12, marker, color="tab:red")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    said = f"{drawn} measured points, red" if drawn else f"points: {NOT_MEASURED}"
    axes.set_title(
        f"Floors at 16 and 256 rows an expert, 20b and 120b; records of {RECORDS[0]:,} to {RECORDS[-1]:,} tokens\n"
        f"(hollow: floor on an {CARDS[-1].name}; {said})"
    )
    axes.title.set_fontsize(9)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw_roof(axes: Any, card: Card, colour: str) -> None:
    ridge = card.flops / card.bandwidth
    edges = [0.1, ridge, 1e5]
    axes.plot(
        edges,
        [min(card.flops, edge * card.bandwidth) / 1e12 for edge in edges],
        color=colour,
        label=f"{card.name}: {card.flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e12:.1f} TB/s",
    )


def main() -> None:
    """Print the tables or the JSON, and draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--plot", type=Path, help="where the picture goes, .svg or .png")
    parser.add_argument("--measured", type=Path, help="rows that tests/bench/gpu.py wrote with --out")
    arguments = parser.parse_args()
    if arguments.measured and not arguments.plot:
        parser.error("expected --plot beside --measured: measured rows are points of the picture")
    measured = [] if arguments.measured is None else json.loads(arguments.measured.read_text(encoding="utf-8"))["rows"]
    if arguments.plot is not None:
        draw(arguments.plot, measured)
    if arguments.format == "json":
        cards = [{field: getattr(card, field) for field in card.__dataclass_fields__} for card in CARDS]
        print(json.dumps({"roofline": rows(), "cards": cards}))
    else:
        sys.stdout.write(tables())


if __name__ == "__main__":
    main()
