"""Loss and accuracy over the steps of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from beit_fast.files import replace_file
from beit_fast.flags import flag


def draw_curves(
    records: Sequence[Mapping[str, float]], path: Path, *, vocab_size: int | None = None
) -> Path:
    """Draw the lines of a run's `metrics.jsonl` as a PNG at `path`.

    With `vocab_size`, lines mark chance (ln V and 1/V). Raises ValueError if nothing was logged.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    if not records:
        raise ValueError(f"no metrics were logged: train first, or lower {flag('run.log_every')}")
    panels = [
        name
        for name in ("loss", "accuracy", "test_top1", "test_miou", "lr")
        if any(name in record for record in records)
    ]
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines = [record for record in records if name in record]  # not every one is of the test
        steps = [line["step"] for line in lines]
        axes.plot(steps, [line[name] for line in lines], label=name)
        lines = [line for line in lines if "marginal_entropy" in line]
        if name == "loss" and lines:
            axes.plot(
                [line["step"] for line in lines],
                [line["marginal_entropy"] for line in lines],
                linestyle="--",
                label="entropy of the token marginals",
            )
        if vocab_size and name in ("loss", "accuracy"):
            chance = math.log(vocab_size) if name == "loss" else 1 / vocab_size
            axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set_xlabel("step")
        axes.set_title(name)
        if len(axes.get_lines()) > 1:
            axes.legend()
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path
