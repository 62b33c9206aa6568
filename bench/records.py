"""Results that outlive an interruption: a file is written after each case, and grows over runs.

The rule, for all benches: a row has a name (the case and the candidate, say). A run replaces the
rows of the names that it measured and leaves the others, so that a table may be measured in parts,
by `--only` and the like, and a run that is cut short keeps what it had. That holds within the same
conditions: machine, threads, settings, versions, commit, all but the ceilings of machines, which
every run measures anew. Under other conditions a file is begun anew, and the old one is kept beside
it, named for its commit, as *.old. A ratio is always of the run that measured its row.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from timing import write_results

# Conditions that no two runs have in common.
MEASURED = ("copy_GB_per_s", "product_TFLOP_per_s")


class Records:
    """Rows of a CSV, with their conditions in each; `names` are the columns that name a row."""

    def __init__(self, path: Path, values: dict, names: Sequence[str]) -> None:
        self.path, self.values, self.names = path, values, tuple(names)
        self._rows: dict[tuple[str, ...], dict[str, str]] | None = None

    def add(self, rows: list[dict]) -> None:
        """Write the rows, in the places of those that have their names, or after the rest."""
        if self._rows is None:
            self._rows = self._kept([*rows[0], *self.values])
        for row in rows:
            written = _as_text({**row, **self.values})
            self._rows[tuple(written[name] for name in self.names)] = written
        write_results(self.path, list(self._rows.values()), {})

    def _kept(self, columns: list[str]) -> dict[tuple[str, ...], dict[str, str]]:
        """The rows of the file by name, where its columns and conditions are these."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if all(list(row) == columns and same_conditions(row, self.values) for row in rows):
            return {tuple(row[name] for name in self.names): row for row in rows}
        set_aside(self.path, rows[0].get("commit"))
        return {}


def same_conditions(known: dict, values: dict) -> bool:
    """Whether what was measured under `known`, which may hold more, may stand beside `values`."""
    wanted = _as_text({n: value for n, value in values.items() if n not in MEASURED})
    return wanted == {n: text for n, text in _as_text(known).items() if n in wanted}


def kept_results(path: Path, values: dict) -> list[dict]:
    """Results of a JSON file of {"conditions", "results"}, where its conditions are these."""
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    if same_conditions(known["conditions"], values):
        return known["results"]
    set_aside(path, known["conditions"].get("commit"))
    return []


def set_aside(path: Path, commit: str | None) -> None:
    """Rename a file that was measured under other conditions."""
    kept = path.with_name(f"{path.name}.{commit or 'unknown'}.old")
    path.replace(kept)
    print(f"{path} was measured under other conditions: it is now {kept}")


def _as_text(values: dict) -> dict[str, str]:
    """As a CSV gives them back."""
    return {name: "" if value is None else str(value) for name, value in values.items()}
