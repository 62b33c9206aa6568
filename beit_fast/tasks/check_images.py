"""Test images are looked at before training starts: at its end it is late to find one broken."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beit_fast.data.datasets import ImageSource
from beit_fast.data.decode import BadImageError, decode_fast
from beit_fast.train.parallel import World
from beit_fast.train.stop import Interrupted, heed_stop

REMEMBERED = "test_images.json"
NUM_NAMED = 10
CHUNK = 256  # images between two looks at the stop flag


def check_test_images(source: ImageSource, *, num_threads: int, world: World, folder: Path) -> None:
    """Decode every image once, each rank its part; called on every rank.

    `folder` remembers which images were whole, so that a resume does not look again. Raises
    ValueError that names those that cannot be used, and Interrupted.
    """
    remembered, digest = folder / REMEMBERED, source.digest()
    if any(world.gather(_remembers(remembered, digest))):
        return
    first, last = (len(source) * rank // world.size for rank in (world.rank, world.rank + 1))
    found: dict[str, str] | int = {}
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            for begin in range(first, last, CHUNK):
                heed_stop("while looking at the test images")
                part = range(begin, min(begin + CHUNK, last))
                reasons = pool.map(lambda index: _reason(source, index), part)
                found |= {source.name(i): why for i, why in zip(part, reasons, strict=True) if why}
    except Interrupted as stop:
        found = stop.signum
    parts = world.gather(found)
    if signum := max((part for part in parts if isinstance(part, int)), default=0):
        raise Interrupted(signum, "while looking at the test images")
    bad = {name: why for part in parts for name, why in part.items()}
    if bad:
        named = "; ".join(f"{name} ({why})" for name, why in list(bad.items())[:NUM_NAMED])
        more = f" and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
        raise ValueError(
            f"{len(bad)} of {len(source)} test images cannot be used: {named}{more}. Repair or "
            "remove them: every test image counts, so none is left out"
        )
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        remembered.write_text(json.dumps({"images": digest}), encoding="utf-8")


def _remembers(path: Path, digest: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"images": digest}
    except (OSError, ValueError):
        return False


def _reason(source: ImageSource, index: int) -> str:
    """Why an image cannot be used, or ""."""
    try:
        decode_fast(source.read(index))
    except (BadImageError, OSError) as error:
        return " ".join(str(error).split())
    return ""
