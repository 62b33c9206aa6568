"""The demo trained from shards by the command, killed on two ranks and gone on with by one:
`shard_ranks.py FOLDER TOKENIZER`.

Every process is a fork of this one, which has imported all and computed nothing. In FOLDER are
SHARDS, and written are the runs ORDER and ORDER_whole. Beside each, its ranks note of each
micro-batch its number and which images, in which crops, it has: a line of JSON.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import beit_fast_main
from beit_fast.tasks.pretrain import pipeline
from beit_fast.tasks.pretrain.task import PretrainTask

SHARDS, STEPS, BATCH, KILLED = "shards", 8, 16, 6  # the step in which both ranks are killed
ORDERS = {"window": ["--data.shuffle", "window", "--data.window", "3"], "full": []}


def notes_of(output: Path) -> list[dict]:
    """Of all processes of a run, in the order of the stream; a resumed one has some again."""
    texts = (path.read_text() for path in output.parent.glob(f"{output.name}.*"))
    notes = [json.loads(line) for text in texts for line in text.splitlines()]
    return sorted(notes, key=lambda note: note["first"])


def watched(output: Path, rank: int, world_size: int, killed: int | None) -> None:
    """This process notes what it reads, and waits to be killed in that step."""
    batches, begin_step = PretrainTask.batches, PretrainTask.begin_step
    file = output.with_name(f"{output.name}.{os.getpid()}").open("a")

    def note(self: PretrainTask, start: int):
        for number, batch in enumerate(batches(self, start), start):
            images = [self.sample_name(int(index)) for index in batch["sample_index"]]
            first = (number * world_size + rank) * len(images)
            pixels = [int(image.sum()) for image in batch["images"]]
            print(json.dumps({"first": first, "images": images, "pixels": pixels}), file=file)
            file.flush()
            yield batch

    def begin(self: PretrainTask, step: int) -> None:
        if step + 1 == killed:
            signal.pause() if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)
        begin_step(self, step)

    def no_picture(self: PretrainTask, model: object, path: Path) -> None:
        path.touch()

    PretrainTask.batches, PretrainTask.begin_step = note, begin
    PretrainTask.picture, pipeline._summarise = no_picture, lambda *_: None


def start(order: str, output: Path, tokenizer: str, rank: int, ranks: int, port: int) -> int:
    """The process of a rank."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    said = os.open(output.with_name(f"said_{output.name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if ranks > 1:
        launch = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in launch.items()} | {"MASTER_ADDR": "localhost"}
    watched(output, rank, ranks, KILLED if ranks > 1 else None)
    sys.argv[1:] = [
        *("pretrain", "demo", "--data.path", str(output.parent / SHARDS), *ORDERS[order]),
        *("--tokenizer", tokenizer, "--tokenizer_training", "null", "--model.vocab_size", "32"),
        *("--data.batch_size", str(BATCH // ranks), "--run.output", str(output)),
        *("--run.steps", str(STEPS), "--run.log_every", "1", "--run.save_every", "2"),
        *("--optim.warmup_steps", "2", "--run.device", "cpu"),
    ]
    try:
        os._exit(beit_fast_main.main())
    finally:
        os._exit(99)  # it did not come here


def run(order: str, output: Path, tokenizer: str, ranks: int) -> list[int]:
    """The codes of the ranks; the last is killed by itself, the others then by us."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [start(order, output, tokenizer, rank, ranks, port) for rank in range(ranks)]
    codes = []
    for pid in reversed(pids):
        if codes:
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def main(folder: Path, tokenizer: str) -> int:
    codes = {}
    for order in ORDERS:
        output = folder / order
        codes[order] = [run(order, output, tokenizer, ranks) for ranks in (2, 1)]
        codes[order].append(run(order, folder / f"{order}_whole", tokenizer, 1))
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
