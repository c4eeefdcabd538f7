"""What a step costs: tokens per second and memory against context, tokens per second against batch."""

from pathlib import Path

from .compare import COLOURS, MARKERS, OURS


def draw(result: dict, path: str | Path) -> None:
    """Draws a result of ``trimkv bench`` into a file, whose ending says of what kind it is.

    One panel for each of: tokens/s against context, memory against context, tokens/s against batch. What does not vary
    in the result has no panel; dotted lines are floors.

    Args:
        result: rows with system, context, batch, tokens_per_second, floor_ms, peak_bytes; shape, dtype, device.

    Raises:
        ValueError: nothing to draw.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    rows = [row for row in result["rows"] if row["ms"] is not None]
    panels = [
        (axis, value)
        for axis, value in (("context", "tokens_per_second"), ("context", "peak_bytes"), ("batch", "tokens_per_second"))
        if len({row[axis] for row in rows}) > 1
    ]
    if not panels:
        raise ValueError("nothing to draw: a figure needs results at two contexts or two batches")
    figure = Figure(figsize=(0.8 + 4.2 * len(panels), 4.2), dpi=200, layout="constrained")
    names = list(dict.fromkeys(row["system"] for row in result["rows"]))
    for place, (axis, value) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1, xscale="log", yscale="log")
        floors = value == "tokens_per_second"
        labels = {"tokens_per_second": "tokens per second", "peak_bytes": "peak memory, GB"}
        axes.set(xlabel={"context": "context (tokens)", "batch": "batch (rows)"}[axis], ylabel=labels[value])
        for i, name in enumerate(names):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.2}
            look = OURS if name == "trimkv" else look
            for points, floor in lines(rows, name, axis, value):
                first = name if name not in axes.get_legend_handles_labels()[1] else None
                axes.plot(*zip(*points, strict=True), label=first, **look)
                if floors:
                    axes.plot(*zip(*floor, strict=True), color=look["color"], linestyle=":", linewidth=1)
        ticks = sorted({row[axis] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", linewidth=0.5, color="0.85")
        axes.set_axisbelow(True)
        if not place:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['what']}, {result['shape']} {result['dtype']}, {result['device']}", fontsize=9)
    figure.savefig(path)


def lines(rows: list[dict], system: str, axis: str, value: str) -> list[tuple[list, list]]:
    """A system's lines of at least two points: (points, their floors), one for each number of the other axis."""
    other = "batch" if axis == "context" else "context"
    mine = [row for row in rows if row["system"] == system]
    found = []
    for number in dict.fromkeys(row[other] for row in mine):
        part = sorted((row for row in mine if row[other] == number), key=lambda row: row[axis])
        if len(part) > 1:
            scale = 1e-9 if value == "peak_bytes" else 1
            points = [(row[axis], row[value] * scale) for row in part]
            best = [(row[axis], row["tokens_per_second"] * row["ms"] / row["floor_ms"]) for row in part]
            found.append((points, best))
    return found
