"""DALI's CPU pipeline as a peer, in a Python of its own: it brings 200 MB of libraries.

    python bench/peer_dali.py FOLDER WHAT BATCH_SIZE

WHAT is `one` view of 224 pixels, with only the crop decoded; `two` views of one crop in the
official order, jittered; or `two-plain`, with only the crop decoded and no jitter. Prints its
version, then for every line that it reads the CPU seconds that a batch took. One thread.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("one", "two", "two-plain"))
    parser.add_argument("batch_size", type=int)
    args = parser.parse_args()

    from nvidia import dali
    from nvidia.dali import fn, pipeline_def, types

    files = [np.fromfile(path, np.uint8) for path in sorted(args.folder.iterdir())]
    order, what = itertools.count(), args.what

    @pipeline_def(
        batch_size=args.batch_size, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1
    )
    def pipeline():
        data = fn.external_source(
            source=lambda _: files[next(order) % len(files)], batch=False, dtype=types.UINT8
        )
        if what == "two":
            image = fn.decoders.image(data, device="cpu")
            factors = {
                name: fn.random.uniform(range=[0.6, 1.4])
                for name in ("brightness", "contrast", "saturation")
            }
            image = fn.color_twist(image, **factors)
            start, shape = fn.random_crop_generator(
                image.shape(), random_area=AREA, random_aspect_ratio=RATIO
            )
            image = fn.slice(image, start, shape, axes=[0, 1])
        else:
            image = fn.decoders.image_random_crop(
                data, device="cpu", random_area=AREA, random_aspect_ratio=RATIO
            )
        image = fn.flip(image, horizontal=fn.random.coin_flip())
        views = [fn.resize(image, size=[224, 224], interp_type=types.INTERP_CUBIC, antialias=True)]
        if what != "one":
            lanczos = types.INTERP_LANCZOS3
            views.append(fn.resize(image, size=[112, 112], interp_type=lanczos, antialias=True))
        return tuple(views)

    batches = pipeline()
    batches.build()
    batches.run()
    print(dali.__version__, flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        batches.run()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
