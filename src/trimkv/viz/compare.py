"""What a policy costs in quality: KL against budget, one line a policy."""

from pathlib import Path

# Okabe and Ito (2008): told apart with every kind of colour vision. Their yellow is too light for paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "p", "h")
ROUNDING = 1e-6  # what a KL of 0 may come out as
OURS = {"color": "black", "marker": "o", "linewidth": 2.4, "zorder": 3}


def draw(result: dict, path: str | Path, mark: str = "") -> None:
    """Draws a result of ``trimkv compare`` into a file, whose ending says of what kind it is.

    The full cache is not among the lines: its KL is 0. Policies that keep all tokens are dashed, with hollow markers.

    Args:
        result: rows with policy, budget and kl; full_perplexity, model, context, sequences; keep_all_tokens if known.
        mark: what the file says of itself, in its metadata.

    Raises:
        ValueError: no line to draw.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    lines = curves(result)
    if not lines:
        raise ValueError("nothing to draw: no policy but the full cache has a KL above 0 (or of rounding)")
    figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set(xlabel="budget (tokens per head)", ylabel="KL(full || policy), nats")
    keep_all = result.get("keep_all_tokens", ())
    looks = list(dict.fromkeys(row["policy"] for row in result["rows"]))  # the same in figures of the same policies
    for name, points in lines.items():
        look = OURS if name == "trimkv" else _look(looks.index(name))
        if name in keep_all:
            look = {**look, "linestyle": "--", "markerfacecolor": "white"}
        axes.plot(*zip(*points, strict=True), label=f"{name} (keeps all)" if name in keep_all else name, **look)
    budgets = sorted({budget for points in lines.values() for budget, _ in points})
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", linewidth=0.5, color="0.85")
    axes.set_axisbelow(True)
    axes.set_title(title(result), fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Title": mark} if mark else None)


def curves(result: dict) -> dict[str, list[tuple[int, float]]]:
    """Policy -> (budget, KL) in the order of budgets; policies from the largest KL to the smallest, as their lines
    lie at the smallest budget. A KL of 0 has no place on a log scale."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        if row["policy"] != "full" and row["kl"] > ROUNDING:
            lines.setdefault(row["policy"], []).append((row["budget"], row["kl"]))
    lines = {name: sorted(points) for name, points in lines.items()}
    return dict(sorted(lines.items(), key=lambda line: (line[1][0][0], -line[1][0][1])))


def title(result: dict) -> str:
    """What was measured: "smollm2, 4 sequences of 2,048 tokens; perplexity with the full cache 39.68"."""
    name = result["model"].rstrip("/").rsplit("/", 1)[-1]
    count = result["sequences"]
    texts = f"{count:,} sequence{'s' * (count != 1)} of {result['context']:,} tokens"
    return f"{name}, {texts}; perplexity with the full cache {result['full_perplexity']:.2f}"


def _look(i: int) -> dict:
    """Colour and marker repeat at different lengths, so that no two lines look alike."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.2, "markersize": 5}
