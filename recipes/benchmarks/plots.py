"""A table of results as a picture: one panel per figure, one bar per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
OURS = "#c4551b"
OTHERS = "#8a94a0"
_ROW_HEIGHT = 0.27
_PANEL_WIDTH = 3.1


def bars(
    path: Path,
    rows: Rows,
    keys: Sequence[str],
    title: str,
    ours: Sequence[str] = ("concept_trak", "concept_trak_given"),
) -> None:
    """Draws the mean and interval of every figure, and where its best damping by the metric itself would be (an oracle).

    Args:
        path: of the PNG.
        rows: by method and figure, with ``mean``, ``low`` and ``high`` (None where there is no interval) and, where known,
            ``oracle``.
        keys: which figures, one panel each.
        title: of the picture.
        ours: methods drawn in another colour.

    Raises:
        ValueError: no method or no figure, or a method lacks a figure; the message names it.
    """
    import matplotlib.pyplot as plt  # slow to import, and only the benchmarks draw

    if not rows or not keys:
        raise ValueError(
            f"bars({path.name}): {len(rows)} methods, {len(keys)} figures; expected one of each or more."
        )
    if missing := [f"{name}: {key}" for name, row in rows.items() for key in keys if key not in row]:
        raise ValueError(f"bars({path.name}): no such figures: {missing}.")
    names = list(rows)[::-1]
    figure, panels = plt.subplots(
        1,
        len(keys),
        figsize=(1.8 + _PANEL_WIDTH * len(keys), 1.3 + _ROW_HEIGHT * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, key in zip(panels[0], keys, strict=True):
        cells = [rows[name][key] for name in names]
        means = [cell["mean"] for cell in cells]
        panel.barh(names, means, color=[OURS if name in ours else OTHERS for name in names], height=0.72)
        for i, cell in enumerate(cells):
            if cell.get("low") is not None:
                panel.plot([cell["low"], cell["high"]], [i, i], color="black", linewidth=1.2)
            if cell.get("oracle") is not None:
                panel.plot(cell["oracle"], i, marker="|", markersize=9, color="#2b6cb0")
        panel.axvline(0, color="black", linewidth=0.6)
        panel.set_title(key, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
