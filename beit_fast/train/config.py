"""What a run is made of besides its task: the optimiser with its schedule, and the run itself."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit_fast.checks import (
    Count,
    FieldError,
    Filled,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    Seconds,
    Seed,
    Threads,
    check_fields,
)
from beit_fast.flags import flag

MAX_STEPS = 99_999_999  # a checkpoint's folder has eight digits
Steps = Annotated[int, Range(1, MAX_STEPS)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay: BEiT's pre-training recipe (spec 6)."""

    lr: Positive = 1.5e-3  # peak, absolute: not scaled by the batch
    min_lr: NonNegative = 1e-5
    schedule: Literal["cosine", "poly"] = "cosine"  # poly: mmcv's, with its warm-up (optim.py)
    poly_power: Positive = 1.0  # of poly; 1: a straight line down to min_lr
    warmup_steps: Natural | None = None  # optimiser steps; None takes warmup_epochs
    warmup_epochs: NonNegative = 10.0
    decay_steps: Count | None = None  # optimiser step that reaches min_lr; None takes the last one
    weight_decay: NonNegative = 0.05
    weight_decay_end: NonNegative | None = None  # reached along half a cosine; None: it stays
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = 3.0  # global L2 norm; None leaves gradients as they are
    backend: Literal["torch", "apex"] = "torch"  # whose fused AdamW; apex: NVIDIA's, if installed

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_lr > self.lr:
            raise FieldError(
                "min_lr",
                f"is {self.min_lr} and lr is {self.lr}: give min_lr <= lr (min_lr = lr is a "
                "constant rate)",
            )
        if self.schedule == "cosine" and self.poly_power != 1.0:
            raise FieldError(
                "poly_power",
                f"is {self.poly_power} and the schedule is cosine, which has no power: pass "
                f"{flag('optim.schedule')} poly, or leave {flag('optim.poly_power')} out",
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and habits of one run."""

    output: Filled  # folder of checkpoints, curves and pictures
    steps: Steps | None = None  # optimiser steps; exactly one of steps and epochs
    epochs: Positive | None = None
    seed: Seed = 0
    accumulate: Count = 1  # micro-batches per optimiser step
    # What a loss of listed patches is a mean over. global: all of the step, on all ranks, however
    # they are split. rank: those of each micro-batch, and then the mean of the means, as in the
    # authors' code, where a patch weighs more beside fewer others.
    loss_mean: Literal["global", "rank"] = "global"
    # bf16 autocasts; fp8 too, with the blocks' large products in fp8 but for the weights' gradients
    # (on a CPU emulated, in fp32, to see what it does to the loss). Weights stay fp32.
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    # torch.compile of forward and backward. auto: on a GPU, default. On a CPU it is off: BEiT-B
    # took 1.11 times as long compiled (batch 4, fp32, torch 2.11), after 48 s of compiling.
    compile: Literal["auto", "off", "default", "reduce-overhead"] = "auto"
    # The whole step as one graph, in one process; the tokenizer as another. Not measured yet.
    cuda_graph: bool = False
    # How several processes share one model; one alone shares with nobody. ddp: each keeps all of
    # it. fsdp: each keeps a part of weights and moments, blocks are gathered as they are computed.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"  # in which processes exchange gradients
    prepare_ahead: bool = False  # the tokenizer works on the next batch while a step runs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Seconds without progress, until the first step is done (connecting, compiling) and later, that
    # end the run with who and where.
    startup_timeout: Seconds = 1800.0
    timeout: Seconds = 300.0
    # torch's threads on a CPU; None: its own choice. Where images are decoded on the same few
    # cores, fewer are faster: threads that wait for each other spin. A dVAE on 32 px crops, on two
    # busy cores: 290 images/s with one thread, 20 to 35 with two.
    cpu_threads: Threads | None = None
    ema_decay: Fraction | None = None  # None keeps no averaged weights
    log_every: Count = 50  # steps between lines of metrics; the only host syncs
    save_every: Count = 1000  # steps between checkpoints; one more at the end
    keep: Count = 2  # newest checkpoints that stay
    # A step whose loss or gradients are not finite is skipped, on all ranks; so many in a row end
    # the run. 1: the first does.
    bad_steps: Count = 3
    # A loss so many deviations above its mean over the last `spike_window` good steps is such a
    # step too, once there were as many; None: none is.
    spike: Positive | None = None
    spike_window: Count = 100
    # Training goes on while one is written, from a copy in host memory. False: it waits.
    save_async: bool = True
    failed_saves: Natural = 0  # so many in a row may fail, each with a warning; the last may not
    picture_every: Count | None = None  # steps between pictures; one more at the end
    evaluate_every: Positive | None = None  # epochs between evaluations, the end not counted
    strict: bool = False  # an evaluation, picture, log or kernel that fails ends the run
    resume: Literal["auto", "must", "never"] = "auto"  # auto: from the newest checkpoint, if any
    resume_from: Steps | None = None  # step to go back to; later checkpoints are set aside
    # Settings by name that may differ from the checkpoint's though they make it another run.
    resume_with: tuple[Filled, ...] = ()
    fallback: bool = False  # resume from an older checkpoint where the newest is damaged
    requeue: bool = False  # after SIGUSR1 and the save, `scontrol requeue` this job of SLURM's

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"{flag('run.steps')} is {self.steps} and {flag('run.epochs')} is {self.epochs}: "
                "give exactly one, and null for the other"
            )
        if self.cuda_graph and self.compile == "reduce-overhead":
            raise ValueError(
                f"{flag('run.cuda_graph')} captures the whole step, and {flag('run.compile')} "
                "reduce-overhead makes graphs of its parts: choose one (with the first goes "
                f"{flag('run.compile')} default)"
            )
        if self.accumulate > 1 and self.compile == "reduce-overhead":
            # pytorch issues 96693 and 169545
            raise ValueError(
                f"{flag('run.compile')} reduce-overhead keeps gradients where its graphs of the "
                f"next micro-batch write, and run.accumulate is {self.accumulate}: pass "
                f"{flag('run.compile')} default ({flag('run.cuda_graph')} true goes with it), or "
                f"{flag('run.accumulate')} 1"
            )

    def num_steps(self, batches_per_epoch: int, accumulate: int | None = None) -> int:
        """Optimiser steps of the whole run, given micro-batches per epoch on one rank, and per step
        where that is not `accumulate`.

        Raises ValueError for epochs of more steps than a run may have.
        """
        if self.steps is not None:
            return self.steps
        steps = max(1, int(self.epochs * batches_per_epoch) // (accumulate or self.accumulate))
        if steps > MAX_STEPS:
            raise ValueError(
                f"{flag('run.epochs')} {self.epochs:g} are {steps} steps: at most {MAX_STEPS} have "
                "a name for their checkpoint"
            )
        return steps
