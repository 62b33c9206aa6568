"""Look at everything once: `beit-fast check IMAGES`."""

import functools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from beit_fast.data.in_order import each_in_order, name_unusable
from beit_fast.data.sources.decode import decode_fast
from beit_fast.data.sources.folder import ImageSource, damage_of
from beit_fast.data.sources.opening import labelled_images
from beit_fast.files import replace_text
from beit_fast.tasks.check.complaints import Complaints
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.check.findings import Findings, Look, look_at
from beit_fast.tasks.check.table import lines_of
from beit_fast.tasks.long_work import alone, progress_bar, threads
from beit_fast.tasks.sources import describe_source, indexing, open_source
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_output_file
from beit_fast.train.stop import Interrupted, heeded, stop_signals

logger = logging.getLogger("beit_fast.data")

_NAMED = 20  # images in the log while it goes on; the report has them all
_PLACE = "while checking"


def run_check(config: CheckConfig) -> dict[str, Any]:
    """Look at every image; print what was found, and write it as JSON. Returns the report.

    Raises ValueError, when all is told and written, where images cannot be used or a shard is
    damaged; at once where there is nothing to look at. Raises OSError, SourceHangsError,
    Interrupted.
    """
    alone("check")
    with stop_signals():
        output, console = Path(config.output), plain_console()
        check_output_file(output)
        source, labels, classes, why_none = _open(config)
        described = describe_source(source, classes)
        console.print(f"images: {described}")
        findings = Findings(source, labels, classes)
        start, num_threads = time.perf_counter(), threads(config.num_threads)
        _look_at_all(config, findings, source, num_threads, console)
        seconds = time.perf_counter() - start
    report = {"source": described, **findings.report(config), "no_classes": why_none}
    report |= {"seconds": seconds, "num_threads": num_threads}
    for line in lines_of(report):
        console.print(line)
    rate = len(source) / seconds
    console.print(f"checked {rate:.0f} images/s with {num_threads} threads; the report is {output}")
    replace_text(output, json.dumps(report, indent=1))
    _judge(report, source, findings, output)
    return report


def _look_at_all(
    config: CheckConfig,
    findings: Findings,
    source: ImageSource,
    num_threads: int,
    console: Console,
) -> None:
    """Every image into the findings. Raises Interrupted."""
    each, done = functools.partial(each_in_order, source, reads=config), 0
    try:
        with (
            Complaints() as complaints,
            progress_bar(console, "check", "images", len(source)) as tick,
        ):
            look = functools.partial(_look, config.max_pixels, complaints)
            looks = each(range(len(source)), look, num_threads=num_threads)
            for index, found in heeded(looks, _PLACE):
                findings.add(index, found)
                if isinstance(found, Exception):
                    _tell(findings, source.name(index), findings.unusable[index])
                complaints.pass_on()
                done += 1
                tick(1)
            said = functools.partial(_said, config.max_pixels, complaints)
            for index, found in heeded(each(findings.suspects, said, num_threads=1), _PLACE):
                if isinstance(found, str) and found:
                    findings.complaints[index] = found
    except Interrupted as stop:
        seen = f"{done} of {len(source)} images were looked at"
        saved = f"{seen} and nothing is written: the same command begins anew"
        raise Interrupted(stop.signum, _PLACE, saved) from None


def _look(max_pixels: int, complaints: Complaints, index: int, data: bytes) -> Look:
    return look_at(data, max_pixels, complaints)


def _said(max_pixels: int, complaints: Complaints, index: int, data: bytes) -> str:
    """What the library complains of, while no other image is decoded."""
    before = complaints.place()
    decode_fast(data, max_pixels)
    return complaints.since(before)


def _open(
    config: CheckConfig,
) -> tuple[ImageSource, Sequence[int] | None, list[str] | None, str | None]:
    """Images, labels, classes, and why there are none of these."""
    options: dict[str, Any] = {"follow_links": config.follow_links, "reads": config}
    try:
        source, labels, classes = labelled_images(
            config.images, fewest=1, progress=indexing(), **options
        )
    except ValueError as error:  # of no classes; if of no images, it comes again
        return open_source(config.images, **options), None, None, str(error)
    return source, labels.numpy(), classes, None


def _tell(findings: Findings, name: str, why: str) -> None:
    count = len(findings.unusable)
    if count <= _NAMED:
        logger.warning("cannot use %s (%s)", name, why)
    if count == _NAMED:
        logger.warning("further ones are counted, and named in the report")


def _judge(report: dict[str, Any], source: ImageSource, findings: Findings, output: Path) -> None:
    """Raise ValueError that says what training would make of what cannot be used."""
    count, borne = len(findings.unusable) + len(damage_of(source)), report["borne_by_training"]
    if not count:
        return
    does = "bears them and replaces each" if count <= borne else "would stop"
    remedy = (
        f"Training, which bears {borne}, {does}; as test images none is borne. Repair or remove "
        f"them: {output} names them all"
    )
    bad = {source.name(index): why for index, why in findings.unusable.items()} | damage_of(source)
    raise ValueError(name_unusable(bad, len(source), "images", remedy))
