"""The curves as a picture: PGR against charged budget, one panel a family."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.quality.measure import BAR_CHUNKS, BARS_AT_20, COMPARED, FREE, Rows

STYLES = {  # the colours of Okabe and Ito, and a mark for those who cannot tell them apart
    "staleness": ("#009e73", "o"), "staleness-query": ("#56b4e9", "s"),
    "deviation": ("#d55e00", "^"), "query": ("#0072b2", "v"), "first": ("#e69f00", "D"),
    "random": ("#888888", "x"), "oracle": ("#000000", "+"),
}  # fmt: skip


def plot(rows: Rows, path: Path) -> None:
    """Write the mean over the models as a picture (SVG or PNG by the name's ending).

    Dotted: the choice is not charged. A point is drawn where every model has a value, since else a
    curve would jump where one model alone can pay for the choice.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same rows, the same file
    figure, panels = pyplot.subplots(1, len(BARS_AT_20), figsize=(11, 4.4), sharey=True)
    for panel, family in zip(panels, BARS_AT_20, strict=True):
        here = [row for row in rows if row["family"] == family and row["chunks"] == BAR_CHUNKS]
        models = len({row["model"] for row in here})
        for name in COMPARED:
            colour, mark = STYLES[name]
            for label, style in ((name, "-"), (FREE.format(name), ":")):
                points = _curve([row for row in here if row["selector"] == label], models)
                if points:
                    panel.plot(
                        [100 * x for x, _ in points], [y for _, y in points], style,
                        color=colour, marker=mark, markersize=4, linewidth=1.4, label=label,
                        zorder=3 if name == "staleness" else 2, clip_on=False,
                    )  # fmt: skip
        panel.set_title(f"family {family}, {BAR_CHUNKS} chunks")
        panel.set_xlabel("charged budget, % of the reused tokens' work")
        panel.set_xlim(0, 52)
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PGR: 0 position only, 1 full prefill")
    lines, labels = panels[-1].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=5, fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _curve(rows: Iterable[dict[str, object]], models: int) -> list[tuple[float, float]]:
    groups: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        charged, pgr, budget = row["charged"], row["pgr"], row["budget"]
        if isinstance(charged, float) and isinstance(pgr, float) and isinstance(budget, float):
            groups.setdefault(budget, []).append((charged, pgr))
    return [
        (fmean(x for x, _ in group), fmean(y for _, y in group))
        for _, group in sorted(groups.items())
        if len(group) == models
    ]
