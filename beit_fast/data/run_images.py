"""The images of a run over its whole length: those of its source, and those it had before.

A run keeps the list of its images (listing.py) and the parts of its stream (passes.py). Where it
goes on over another list, the pass that it was left in goes on over the old one. Numbers of images
are always those of the source of now: what an old list has and the source has not is gone, and the
next image of that list takes its place.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from beit_fast.data.image_list import ImageList
from beit_fast.data.listing import Difference, Listing, ListingError
from beit_fast.data.passes import Part, Passes, SampleOf, part_of, with_list
from beit_fast.data.sources.folder import Source, read_shards_ahead, shard_sizes_of

_LEFT = 0.5  # share of an old list with which its pass goes on


class RunImages:
    """What `train/images.py` asks of a task's images; one for all loaders of a source.

    window: shards that a pass reads at a time, None: all images. fixed: why this run cannot go on
    over another list, and what to do; "" where it can. caution: what to say besides where it would.
    """

    def __init__(self, source: Source, window: int | None = None) -> None:
        self._source, self._window = source, window
        self.now = ImageList(range(len(source)), shard_sizes_of(source))
        self._parts = [Part(0, 0, len(source), "")]
        self._lists = [self.now]
        self._differences: dict[str, Difference] = {}
        self.fixed, self.caution, self.note = "", "", ""

    def __len__(self) -> int:
        return len(self._source)

    @cached_property
    def _listing(self) -> Listing:
        return Listing.of(self._source)

    @property
    def digest(self) -> str:
        """Of names and sizes, see listing.py."""
        return self._listing.digest

    def keep(self, folder: Path) -> None:
        """Write the list into `folder`. Raises OSError with the path."""
        self._listing.keep(folder)

    def difference(self, folder: Path, digest: str, count: int) -> Difference:
        """From the list of that digest, kept in `folder`, to that of now. Raises ListingError."""
        if digest not in self._differences:
            listing = Listing.kept(folder, digest, count)
            self._differences[digest] = listing.difference(self._source, self._listing)
        return self._differences[digest]

    def passes(self, seed: int, *, ahead: bool = False) -> Passes:
        """Which image is which sample; `ahead`: the source is told which shards are next."""
        told = (self._read_ahead,) if ahead else ()
        return Passes(seed, self._parts, self._lists, self._window, *told)

    def in_order(self, epoch: int, place: int) -> SampleOf:
        """The image at a place of the list of now, as those are that are read one after another."""
        if self._window is not None:
            shard = self.now.shard_of(place)
            if place == self.now.places_of(shard).start:
                following = range(shard, min(shard + self._window, len(self.now.shard_sizes)))
                read_shards_ahead(self._source, following)
        return epoch, place, self.now

    def epochs(self, sample: int, every: float = 1.0) -> float:
        """How many times `every` passes are over before this sample."""
        return self._parts[part_of(self._parts, sample)].epochs(sample, every)

    def begin(self) -> list[dict[str, Any]]:
        """The parts of a run from the start, as a manifest holds them."""
        return self._take([Part(0, 0, len(self), self.digest)], [self.now])

    def go_on(
        self, before: Sequence[dict[str, Any]], sample: int, folder: Path
    ) -> list[dict[str, Any]]:
        """The parts of a run whose next sample is `sample`, as a manifest holds them, where it had
        the parts `before` until now, "" being the digest of a list that is not known.

        `note` says what becomes of the pass that the run is in. Raises ListingError for parts that
        are none.
        """
        parts, self.note = _read(before), ""
        last = parts[-1]
        if last.images != self.digest and self._is_same(last, folder):
            parts[-1] = last._replace(images=self.digest)
        elif last.images != self.digest:
            parts = with_list(parts, self.digest, len(self), sample)
        now = part_of(parts, sample)
        # Of what is over nobody reads more than the k-means of a tokenizer that is then loaded.
        lists = [self.now for _ in parts]
        if parts[now].images != self.digest:
            old, why = self._list_of(parts[now], folder)
            if old is not None:
                lists[now] = old
                gone = int((old.numbers < 0).sum())
                verb = "is" if gone == 1 else "are"
                said = f", {gone} of which {verb} gone and replaced by the next" if gone else ""
                self.note = (
                    f"pass {parts[now].epoch + (sample - parts[now].first) // parts[now].count} "
                    f"goes on over the {len(old)} images of before{said}; pass {parts[-1].epoch} "
                    f"and all later ones are over the {len(self)} of now"
                )
            else:
                parts = with_list(parts[: now + 1], self.digest, len(self), sample, at_once=True)
                lists = [*lists[: len(parts) - 1], self.now]
                self.note = (
                    f"{why}: pass {parts[-1].epoch}, over the {len(self)} images of now, begins at "
                    "once"
                )
        return self._take(parts, lists)

    def _read_ahead(self, images: ImageList, shards: Sequence[int]) -> None:
        """Of a list; of an old one, those of the source that have what is left of its."""
        read_shards_ahead(self._source, images.shards_in(self.now, shards))

    def _take(self, parts: list[Part], lists: list[ImageList]) -> list[dict[str, Any]]:
        self._parts, self._lists = parts, lists
        return [part._asdict() for part in parts]

    def _is_same(self, part: Part, folder: Path) -> bool:
        """Whether a list is that of now, but for sizes that could not be had."""
        if not part.images:
            return part.count == len(self)
        try:
            return not self.difference(folder, part.images, part.count)
        except ListingError:
            return False

    def _list_of(self, part: Part, folder: Path) -> tuple[ImageList | None, str]:
        """An old list; None, and why, where its pass cannot go on."""
        if not part.images:
            return None, f"which {part.count} images the run had is not known"
        try:
            difference = self.difference(folder, part.images, part.count)
        except ListingError as error:
            return None, f"which {part.count} images the run had is not known ({error})"
        left = int((difference.numbers >= 0).sum())
        if left < _LEFT * part.count:
            return None, f"{left} of the {part.count} images that the run had are left"
        if self._window is not None and difference.shards_were is None:
            return None, f"in which shards the {part.count} images of the run were is not known"
        return ImageList(difference.numbers, difference.shards_were), ""


def _read(parts: Sequence[dict[str, Any]]) -> list[Part]:
    """Raises ListingError for what no run can have written."""
    try:
        read = [Part(**part) for part in parts]
        counts = [number for part in read for number in (part.first, part.epoch, part.count)]
        ordered = all(a.first < b.first for a, b in itertools.pairwise(read))
        whole = all(type(number) is int and number >= 0 for number in counts)
        named = all(isinstance(part.images, str) for part in read)
        if not (read and ordered and whole and named and all(part.count for part in read)):
            raise ValueError("they are no parts of a run")
    except (TypeError, ValueError) as error:
        raise ListingError(f"its images by pass are damaged: {error}") from error
    return read
