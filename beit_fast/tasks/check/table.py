"""A report of `check` as lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 5  # examples
_WIDTH = 18


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """What was found, a line each; examples are indented, and at most five."""
    bad, damage, count = report["cannot_be_used"], report["damage"], report["images"]
    lines = [_row("decoded", f"{report['usable']} of {count}, {_size(report['bytes'])}")]
    said = str(len(bad))
    if report["unread"]:
        said += f", of which {report['unread']} could not be read"
    lines += [_row("cannot be used", said), *_some([_why(e["image"], e["why"]) for e in bad])]
    if warned := report["decoded_with_a_warning"]:
        lines.append(_row("with a warning", f"{len(warned)}, damaged and used all the same"))
        lines += _some([_why(entry["image"], entry["why"]) for entry in warned])
    if damage:
        lines.append(_row("damaged", f"{len(damage)}, of which what is left is used"))
        lines += _some([_why(name, why) for name, why in damage.items()])
    lines += [_row(name, _counts(report[name])) for name in ("formats", "modes") if report[name]]
    for name, unit in (("width", "px"), ("height", "px"), ("short side", "px")):
        lines += _spread(name, report[name.replace(" ", "_")], unit)
    lines += _spread("file", report["file_bytes"], "bytes")
    small = report["small"]
    lines += _named(f"below {small['below']} px", small["images"], "enlarged by training")
    lines += _named("of one colour", report["blank"])
    lines += _named("turned by EXIF", report["turned_by_exif"], "used as they are stored")
    lines += _named("other format", report["named_as_another_format"], "than the name says")
    lines += _duplicates(report["duplicates"])
    if report["classes"] is None:
        lines.append(_row("classes", f"none: {report['no_classes']}"))
    else:
        lines += _classes(report["classes"])
    return [_printable(line) for line in lines]


def _row(name: str, said: str) -> str:
    return f"  {name:{_WIDTH}} {said}"


def _printable(line: str) -> str:
    """What a name has of line ends, codes of a terminal and bytes that are no text, escaped."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(shown)


def _size(num_bytes: int) -> str:
    unit, power = ("GB", 9) if num_bytes >= 1e9 else ("MB", 6) if num_bytes >= 1e6 else ("kB", 3)
    return f"{num_bytes / 10**power:.1f} {unit}"


def _some(examples: Sequence[str]) -> list[str]:
    more = [f"... {len(examples) - _SHOWN} more"] if len(examples) > _SHOWN else []
    return [f"  {'':{_WIDTH}}   {line}" for line in [*examples[:_SHOWN], *more]]


def _why(name: str, why: str) -> str:
    return f"{name} ({why if len(why) <= 120 else why[:117] + '...'})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _spread(name: str, values: Mapping[str, int], unit: str) -> list[str]:
    said = ", ".join(f"{which} {value}" for which, value in values.items())
    return [_row(name, f"{said} {unit}")] if values else []


def _named(name: str, images: Sequence[str], means: str = "") -> list[str]:
    said = f"{len(images)}{', ' if images and means else ''}{means if images else ''}"
    return [_row(name, said), *_some(images)]


def _duplicates(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    across = [one for one in sets if one["in_several_classes"]]
    said = f"{sum(len(one['images']) - 1 for one in sets)}, equal to another file to the last byte"
    if across:
        said += f"; files with several classes: {len(across)}"
    shown = [*across, *(one for one in sets if not one["in_several_classes"])]
    return [
        _row("duplicates", said if sets else "0"),
        *_some([" = ".join(_few(one["images"])) for one in shown]),
    ]


def _few(names: Sequence[str]) -> list[str]:
    return [*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]


def _classes(classes: Mapping[str, Any]) -> list[str]:
    by_size = sorted(classes["images"].items(), key=lambda item: (item[1], item[0]))
    sizes = [number for _, number in by_size]
    said = f"{classes['count']}; images of each: min {sizes[0]} ({by_size[0][0]}), "
    said += f"median {sizes[len(sizes) // 2]}, max {sizes[-1]} ({by_size[-1][0]})"
    lines = [_row("classes", said)]
    if without := classes["without_a_usable_image"]:
        lines += [_row("classes without", f"{len(without)} have no usable image"), *_some(without)]
    return lines
