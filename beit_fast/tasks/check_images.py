"""Test images are looked at before training starts: at its end it is late to find one broken."""

import json
from pathlib import Path

from beit_fast.data.in_order import name_unusable, unusable_images
from beit_fast.data.sources.folder import ImageSource
from beit_fast.files import naming
from beit_fast.train.parallel import World
from beit_fast.train.stop import Interrupted, heed_stop

REMEMBERED = "test_images.json"
PLACE = "while looking at the test images"


def check_test_images(source: ImageSource, *, num_threads: int, world: World, folder: Path) -> None:
    """Decode every image once, each rank its part; called on every rank.

    `folder` remembers which images were whole, so that a resume does not look again. Raises
    ValueError that names those that cannot be used, and Interrupted.
    """
    remembered, digest = folder / REMEMBERED, source.digest()
    if any(world.gather(_remembers(remembered, digest))):
        return
    first, last = (len(source) * rank // world.size for rank in (world.rank, world.rank + 1))
    found: dict[str, str] | int
    try:
        found = unusable_images(
            source, range(first, last), num_threads=num_threads, between=lambda: heed_stop(PLACE)
        )
    except Interrupted as stop:
        found = stop.signum
    parts = world.gather(found)
    if signum := max((part for part in parts if isinstance(part, int)), default=0):
        raise Interrupted(signum, PLACE)
    bad = {name: why for part in parts for name, why in part.items()}
    if bad:
        raise ValueError(name_unusable(bad, len(source), "test images"))
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        with naming(remembered):
            remembered.write_text(json.dumps({"images": digest}), encoding="utf-8")


def _remembers(path: Path, digest: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"images": digest}
    except (OSError, ValueError):
        return False
