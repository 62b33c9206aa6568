"""Accuracy over the blocks of an encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from beit_fast.files import replace_file


def draw_layers(
    curves: Mapping[str, Sequence[float]], path: Path, *, chance: float | None = None
) -> Path:
    """Draw name -> accuracy in [0, 1] after block 1, 2, ... as a PNG at `path`."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), [100 * v for v in values], marker="o", label=name)
    if chance is not None:
        axes.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axes.set_xlabel("block")
    axes.set_ylabel("test accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path
