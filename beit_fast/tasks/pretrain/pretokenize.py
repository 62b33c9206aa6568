"""The tokenizer over K views of every image, once: writes the token cache that runs read.

It makes the second views and tokens of passes 0 .. K - 1 of the run of the same configuration, but
in the order of the data set, and of all patches, not only of hidden ones. On a CPU that gives the
live run's tokens to the last bit: neither features nor ids depend on the other images of a batch,
their number or the patches asked for. Eight images at once, permuted, singly, 3 + 5 and 4 + 4 had
equal features and 0 of 1568 other ids (8192 codes, encoders of width 256 and 64 in fp32, with two
threads the latter, of width 32 in fp16); test_pretokenize asserts it for a small tokenizer.
On a GPU libraries choose the order of sums by shape. So `data.batch_size` images always go through
the tokenizer at once, the last ones filled up, and the shape is the run's; that this gives the same
bits there is not measured. Another batch size, GPU or library may turn a token whose two best
scores differ by rounding alone.

Each of the ranks makes every so many files. Killed, it goes on where it was: finished files are
checked and kept.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.loader import Loader
from beit_fast.data.samples import TokenViewSample
from beit_fast.data.token_cache import (
    MANIFEST,
    Manifest,
    Shard,
    TokenCacheError,
    check_made_from,
    damage,
    read_manifest,
    remove_leftovers,
    write_manifest,
    write_shard,
)
from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.tasks.long_work import progress_bar
from beit_fast.tasks.pretrain.config import PretokenizeConfig
from beit_fast.tasks.pretrain.pipeline import open_tokenizer
from beit_fast.tasks.pretrain.task import (
    TokensToCome,
    check_tokenizer,
    frozen,
    token_source,
    visual_tokens,
)
from beit_fast.tasks.sources import describe_source, open_loader, say
from beit_fast.tokenizer.checkpoint import tokenizer_digest
from beit_fast.tokenizer.protocol import Tokenizer
from beit_fast.train.agreement import flat
from beit_fast.train.lock import sole_user
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_writable
from beit_fast.train.start import open_run
from beit_fast.train.state import environment
from beit_fast.train.stop import Interrupted, StopFlag, stop_signals
from beit_fast.train.world import World

logger = logging.getLogger("beit_fast.data")


def run_pretokenize(config: PretokenizeConfig) -> Path:
    """Write the token cache of `config`, or the rest of it. Returns its folder.

    Raises TokenCacheError for a folder with other tokens, ValueError, OSError, Interrupted.
    """
    folder = Path(config.output)
    with open_run(config, config.output, named="output") as world, stop_signals() as stop:
        check_writable(folder, "output")
        loader = open_loader(
            config.data, TokenViewSample(config.views), seed=config.run.seed, world=world
        )
        say(f"images: {describe_source(loader.source)}", world)
        if config.tokenizer_training is not None:  # before it is trained
            check_tokenizer(TokensToCome(config.tokenizer_training.dvae.vocab_size), config)
            if (folder / MANIFEST).exists():
                theirs = read_manifest(folder).made_from
                ours = token_source(config, loader, theirs["tokenizer"]["weights"])
                check_made_from(folder, theirs, ours)
        tokenizer = open_tokenizer(config, world)
        check_tokenizer(tokenizer, config)
        made_from = token_source(config, loader, tokenizer_digest(tokenizer))
        world.agree(flat(made_from))
        lock = sole_user(folder, "output") if world.is_main else nullcontext()
        with lock:
            world.barrier()  # nobody reads or writes before the lock is held
            manifest = _begin(config, made_from, world)
            tokenizer = frozen(tokenizer, config).to(world.device)
            _Writer(folder, loader, tokenizer, world, stop).write(manifest)
    return folder


def _begin(config: PretokenizeConfig, made_from: dict, world: World) -> Manifest:
    """The manifest to go on from, on every rank: of checked files. The main rank writes it."""
    folder = Path(config.output)
    # What may move a token whose two best scores are equal but for rounding: noted, not compared.
    conditions = {"batch_size": config.data.batch_size, "tokenizer_device": world.device.type}
    manifest = Manifest(
        made_from, config.num_views, config.images_per_shard, {}, environment() | conditions
    )
    if (folder / MANIFEST).exists():
        old = read_manifest(folder)
        check_made_from(
            folder,
            old.made_from | {"images_per_shard": old.images_per_shard},
            made_from | {"images_per_shard": config.images_per_shard},
        )
        if old.num_views > config.num_views:
            raise TokenCacheError(
                f"{folder} is to hold {old.num_views} views of every image: pass --num_views "
                f"{old.num_views} or more, or another --output"
            )
        manifest = replace(manifest, files=_whole_files(folder, old.files, world))
    world.barrier()  # all have read it
    if world.is_main:
        remove_leftovers(folder)
        write_manifest(folder, manifest)
    return manifest


def _whole_files(folder: Path, files: dict[str, str], world: World) -> dict[str, str]:
    """Those that are as they were written; each rank reads its part."""
    mine = list(files.items())[world.rank :: world.size]
    damaged = {name: wrong for name, digest in mine if (wrong := damage(folder, name, digest))}
    for wrong in damaged.values():
        logger.warning("%s; it is made anew", wrong)
    all_damaged = set().union(*world.gather(list(damaged)))
    return {name: digest for name, digest in files.items() if name not in all_damaged}


class _Writer:
    """Makes the files that are missing, in rounds of one a rank."""

    def __init__(
        self,
        folder: Path,
        loader: Loader,
        tokenizer: Tokenizer,
        world: World,
        stop: StopFlag,
    ) -> None:
        self.folder, self.loader, self.tokenizer = folder, loader, tokenizer
        self.world, self.stop = world, stop
        self.num_files = 0

    def write(self, manifest: Manifest) -> None:
        world, files = self.world, dict(manifest.files)
        self.dtype, self.num_files = manifest.dtype, len(files)
        console = plain_console(quiet=not world.is_main)
        missing = [shard for shard in manifest.shards() if shard.name not in files]
        num_images, num_views = len(self.loader.source), manifest.num_views
        if files:
            console.print(f"tokens: {len(files)} finished files are whole and kept", style="green")
        start, todo = time.perf_counter(), sum(shard.last - shard.first for shard in missing)
        total = num_views * num_images
        with progress_bar(console, "pretokenize", "views", total, done=total - todo) as tick:
            for first in range(0, len(missing), world.size):
                part = missing[first : first + world.size]
                # All take as many turns as the largest file has batches: they stop together.
                turns = -(-max(s.last - s.first for s in part) // self.loader.batch_size)
                shard = part[world.rank] if world.rank < len(part) else Shard(0, 0, 0)
                entry = self._file(shard, turns, tick)
                files |= dict(filter(None, world.gather(entry)))
                self.num_files = len(files)
                if world.is_main:
                    write_manifest(self.folder, replace(manifest, files=files))
        world.barrier()
        seconds = time.perf_counter() - start
        bad = sorted(set().union(*world.gather(list(self.loader.bad_samples))))
        console.print(
            f"tokens: {num_images} images x {num_views} in {self.folder}"
            + (f", {todo / seconds:.0f} views/s" if todo else "")
        )
        if bad:
            console.print(
                f"  {len(bad)} images could not be used and were replaced: {', '.join(bad)}"
            )
        if said := str(self.loader.decode_counts):
            console.print(f"  {said}")

    def _file(
        self, shard: Shard, turns: int, tick: Callable[[int], None]
    ) -> tuple[str, str] | None:
        """Makes one file: its name and SHA-256. All ranks take part in as many turns; one without
        a file (an empty shard) has none to give."""
        records = np.zeros(shard.last - shard.first, self.dtype)
        ids, done = [], 0
        told = self.stop.until_told(self.loader.batches_in_order(*shard))
        with closing(told) as batches:
            for _ in range(turns):
                batch = next(batches, None) if done < len(records) else None
                if signum := self.world.any_of(self.stop.received):
                    raise Interrupted(signum, f"after file {self.num_files}")
                if batch is None:
                    continue
                part = records[done : done + len(batch["seed"])]
                for name in ("box", "flip", "seed", "num_bytes"):
                    part[name] = batch[name].numpy()
                part["image"] = batch["sample_index"].numpy()
                ids.append(self._tokens(batch))  # read at the end: nothing waits for the device
                done += len(part)
                tick(len(part) * self.world.size)
        if shard.first == shard.last:
            return None
        records["ids"] = torch.cat(ids).cpu().numpy()
        return shard.name, write_shard(self.folder, shard, records)

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """int32 (B, L) on the device, by way of a batch filled up to the loader's size."""
        views = {name: batch[name] for name in ("token_images", "jitter") if name in batch}
        views = jitter_views({k: v.to(self.world.device) for k, v in views.items()})["token_images"]
        rest = views[:1].expand(self.loader.batch_size - len(views), -1, -1, -1)
        tokens = visual_tokens(self.tokenizer, torch.cat([views, rest]))
        return tokens[: len(views)].flatten(1).int()
