"""Commands of runs small enough to test, which draw all random numbers they can."""

from pathlib import Path

MODEL = [
    *("--model.embed_dim", "16", "--model.num_heads", "2", "--model.depth", "2"),
    *("--model.img_size", "32", "--model.patch_size", "8", "--model.drop_path_rate", "0.3"),
]
RUN = [
    *("--run.steps", "4", "--run.epochs", "null", "--run.log_every", "1", "--run.save_every", "2"),
    *("--run.device", "cpu", "--run.cpu_threads", "1", "--run.evaluate_every", "null"),
    *("--run.accumulate", "2", "--optim.warmup_steps", "2", "--data.num_threads", "1"),
]
DVAE = ("vocab_size", "encoder_width", "decoder_width", "decoder_input_width")
VERBS = ("pretrain", "tokenizer", "finetune", "segment")


def tiny_command(
    verb: str,
    output: Path,
    *,
    images: Path,
    pairs: tuple[Path, Path],
    tokenizer: Path,
    batch_size: int = 4,
    precision: str = "fp32",
) -> list[str]:
    """Four steps of two micro-batches. images: of two classes; pairs: images and masks; tokenizer:
    of 32 codes."""
    of_verb = {
        "pretrain": [
            *("small", "--tokenizer", str(tokenizer), "--tokenizer_training", "null"),
            *("--model.vocab_size", "32", "--views.size", "32", "--views.token_size", "32"),
            *("--masking.num_masked", "7", "--masking.min_block", "3"),
            *("--data.path", str(images), *MODEL),
        ],
        "tokenizer": [
            *("demo", "--data.path", str(images), "--view.size", "32"),
            *(word for name in DVAE for word in (f"--dvae.{name}", "16")),
        ],
        "finetune": [
            *("small_data", "--init", "null", "--data.path", str(images), *MODEL),
            *("--model.drop_rate", "0.2"),
        ],
        "segment": [
            *("small_data", "--init", "null", *MODEL, "--model.head_channels", "8"),
            *("--model.auxiliary_channels", "8", "--augment.scale", "[64,32]"),
            *("--data.path", str(pairs[0]), "--data.masks", str(pairs[1])),
        ],
    }
    changed = ["--data.batch_size", str(batch_size), "--run.precision", precision]
    return [verb, *of_verb[verb], *RUN, *changed, "--run.output", str(output)]
