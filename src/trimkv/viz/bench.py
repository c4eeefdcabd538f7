"""What a step costs: tokens per second and memory against context, tokens per second against batch."""

from pathlib import Path

from .compare import COLOURS, MARKERS, OURS


def draw(result: dict, path: str | Path, mark: str = "") -> None:
    """Draws a result of ``trimkv bench`` into a file, whose ending says of what kind it is.

    One panel for each of: tokens/s against context, memory against context, tokens/s against batch. What does not vary
    in the result has no panel. The other of context and batch is the largest at which most systems have a number.
    Dotted lines are floors.

    Args:
        result: rows with system, context, batch, tokens_per_second, floor_ms, peak_bytes; shape, dtype, device.
        mark: what the file says of itself, in its metadata.

    Raises:
        ValueError: nothing to draw.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

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
        other, number = common(rows, axis)
        words = {"context": "context (tokens)", "batch": "batch (rows)"}
        axes.set(xlabel=words[axis], ylabel=labels[value], title=f"{other} {number:,}")
        for i, name in enumerate(names):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.2}
            look = OURS if name == "trimkv" else look
            mine = [row for row in rows if (row["system"], row[other]) == (name, number)]
            mine.sort(key=lambda row: row[axis])
            x = [row[axis] for row in mine]
            axes.plot(x, [row[value] * (1 if floors else 1e-9) for row in mine], label=name, **look)
            if floors:
                best = [row["tokens_per_second"] / row["fraction_of_floor"] for row in mine]
                axes.plot(x, best, color=look["color"], linestyle=":", linewidth=1)
        ticks = sorted({row[axis] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        if not floors:
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.grid(which="major", linewidth=0.5, color="0.85")
        axes.set_axisbelow(True)
        if not place:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['what']}, {result['shape']} {result['dtype']}, {result['device']}", fontsize=9)
    figure.savefig(path, metadata={"Title": mark} if mark else None)


def common(rows: list[dict], axis: str) -> tuple[str, int]:
    """The other axis, and its largest value at which most systems have numbers."""
    other = "batch" if axis == "context" else "context"
    systems = {number: {row["system"] for row in rows if row[other] == number} for number in {r[other] for r in rows}}
    return other, max(systems, key=lambda number: (len(systems[number]), number))
