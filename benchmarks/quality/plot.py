"""The curves as a picture: PGR against charged budget, one panel a family."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.quality.measure import BAR_CHUNKS, BARS_AT_20, COMPARED, FREE, Rows

COLOURS = {
    "staleness": "#0b6e4f", "staleness-query": "#6abf69", "deviation": "#c44536",
    "query": "#3a6ea5", "first": "#e09f3e", "random": "#888888", "oracle": "#000000",
}  # fmt: skip


def plot(rows: Rows, path: Path) -> None:
    """Write the mean over the models as a picture (SVG or PNG by the name's ending).

    Dotted: the choice is not charged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BARS_AT_20), figsize=(11, 3.6), sharey=True)
    for panel, family in zip(panels, BARS_AT_20, strict=True):
        here = [row for row in rows if row["family"] == family and row["chunks"] == BAR_CHUNKS]
        for name in COMPARED:
            for label, style in ((name, "-"), (FREE.format(name), ":")):
                points = _curve([row for row in here if row["selector"] == label])
                if points:
                    panel.plot(
                        [100 * x for x, _ in points], [y for _, y in points], style,
                        color=COLOURS[name], marker="o", markersize=3,
                        label=label if style == "-" else None,
                    )  # fmt: skip
        panel.set_title(f"family {family}, {BAR_CHUNKS} chunks")
        panel.set_xlabel("charged budget, % of the reused tokens' work")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PGR: 0 position only, 1 full prefill")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _curve(rows: Iterable[dict[str, object]]) -> list[tuple[float, float]]:
    groups: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        charged, pgr, budget = row["charged"], row["pgr"], row["budget"]
        if isinstance(charged, float) and isinstance(pgr, float) and isinstance(budget, float):
            groups.setdefault(budget, []).append((charged, pgr))
    return [
        (fmean(x for x, _ in group), fmean(y for _, y in group))
        for _, group in sorted(groups.items())
    ]
