"""What a run is made of besides its task: the optimiser with its schedule, and the run itself."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay: BEiT's pre-training recipe (spec 6)."""

    lr: float = 1.5e-3  # peak, absolute: not scaled by the batch
    min_lr: float = 1e-5
    warmup_steps: int | None = None  # optimiser steps; None takes warmup_epochs
    warmup_epochs: float = 10.0
    decay_steps: int | None = None  # optimiser step that reaches min_lr; None takes the last one
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # reached along half a cosine; None: it stays
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = 3.0  # global L2 norm; None leaves gradients as they are
    backend: Literal["torch", "apex"] = "torch"  # whose fused AdamW; apex: NVIDIA's, if installed

    def __post_init__(self) -> None:
        if not 0 < self.min_lr <= self.lr:
            raise ValueError(
                f"min_lr {self.min_lr} and lr {self.lr}: give 0 < min_lr <= lr (min_lr = lr is a "
                "constant rate)"
            )
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"clip_grad is {self.clip_grad}: give a positive norm, or null")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and habits of one run."""

    output: str  # folder of checkpoints, curves and pictures
    steps: int | None = None  # optimiser steps; exactly one of steps and epochs
    epochs: float | None = None
    seed: int = 0
    accumulate: int = 1  # micro-batches per optimiser step
    # bf16 autocasts; fp8 too, with the blocks' large products in fp8 but for the weights' gradients
    # (on a CPU emulated, in fp32, to see what it does to the loss). Weights stay fp32.
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    # torch.compile of forward and backward. auto: on a GPU, default. On a CPU it is off: BEiT-B
    # took 1.11 times as long compiled (batch 4, fp32, torch 2.11), after 48 s of compiling.
    compile: Literal["auto", "off", "default", "reduce-overhead"] = "auto"
    # The whole step as one graph, in one process; the tokenizer as another. Not measured yet.
    cuda_graph: bool = False
    prepare_ahead: bool = False  # the tokenizer works on the next batch while a step runs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # torch's threads on a CPU; None: its own choice. Where images are decoded on the same few
    # cores, fewer are faster: threads that wait for each other spin. A dVAE on 32 px crops, on two
    # busy cores: 290 images/s with one thread, 20 to 35 with two.
    cpu_threads: int | None = None
    ema_decay: float | None = None  # None keeps no averaged weights
    log_every: int = 50  # steps between lines of metrics; the only host syncs
    save_every: int = 1000  # steps between checkpoints; one more at the end
    keep: int = 2  # newest checkpoints that stay
    picture_every: int | None = None  # steps between pictures; one more at the end
    evaluate_every: float | None = None  # epochs between evaluations, the end not counted
    strict: bool = False  # an evaluation, picture or log that fails ends the run
    resume: Literal["auto", "must", "never"] = "auto"  # auto: from the newest checkpoint, if any
    resume_from: int | None = None  # step to go back to; later checkpoints are set aside
    # Settings by name that may differ from the checkpoint's though they make it another run.
    resume_with: tuple[str, ...] = ()
    fallback: bool = False  # resume from an older checkpoint where the newest is damaged

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"run.steps is {self.steps} and run.epochs is {self.epochs}: give exactly one, "
                "and null for the other"
            )
        for name in ("accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}: give at least 1")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"run.cpu_threads is {self.cpu_threads}: give at least 1, or null")
        if self.picture_every is not None and self.picture_every < 1:
            raise ValueError(f"run.picture_every is {self.picture_every}: give at least 1, or null")
        if self.evaluate_every is not None and self.evaluate_every <= 0:
            raise ValueError(
                f"run.evaluate_every is {self.evaluate_every}: give epochs above 0, or null"
            )
        if self.cuda_graph and self.compile == "reduce-overhead":
            raise ValueError(
                "run.cuda_graph captures the whole step, and run.compile reduce-overhead makes "
                "graphs of its parts: choose one (run.compile default goes with run.cuda_graph)"
            )
        if self.accumulate > 1 and self.compile == "reduce-overhead":
            # pytorch issues 96693 and 169545
            raise ValueError(
                "run.compile reduce-overhead keeps gradients where its graphs of the next "
                f"micro-batch write, and run.accumulate is {self.accumulate}: pass --run.compile "
                "default (--run.cuda_graph true goes with it), or --run.accumulate 1"
            )
        if (self.steps if self.steps is not None else self.epochs) <= 0:
            raise ValueError("the run has no step: give run.steps or run.epochs above 0")

    def num_steps(self, batches_per_epoch: int, accumulate: int | None = None) -> int:
        """Optimiser steps of the whole run, given micro-batches per epoch on one rank, and per step
        where that is not `accumulate`."""
        if self.steps is not None:
            return self.steps
        return max(1, int(self.epochs * batches_per_epoch) // (accumulate or self.accumulate))
