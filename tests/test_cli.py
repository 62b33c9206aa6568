"""The command line: generated flags, one-line errors, exit codes, a run from start to end."""

import contextlib
import errno
import json
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import beit_fast.data
from beit_fast import recipes
from beit_fast.cli import VERBS, WITHOUT_RECIPE, main, parse
from beit_fast.data.bad_samples import BadDataError
from beit_fast.recipes import FINETUNE
from beit_fast.tasks.pretrain.dvae import DvaeTask
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.train.bad_steps import NonFiniteLoss
from beit_fast.train.graph import CaptureError

TINY = [
    *["--run.steps", "2", "--run.log_every", "1", "--optim.warmup_steps", "1"],
    *["--model.embed_dim", "16", "--model.num_heads", "2", "--model.depth", "1"],
    *["--data.batch_size", "4", "--tokenizer_training.data.batch_size", "4"],
    *["--tokenizer_training.run.steps", "2", "--tokenizer_training.optim.warmup_steps", "1"],
]


def test_the_demo_runs_from_start_to_end_and_again(tmp_path, capsys):
    arguments = ["pretrain", "demo", *TINY, "--run.output", str(tmp_path / "demo")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("checkpoint", "curve", "picture", "entropy of the token marginals"):
        assert name in said
    photographs = Path(beit_fast.data.__file__).parent / "photographs"
    for stage in ("images of the tokenizer", "images"):  # each once
        line = f"\n{stage}: {photographs}: 19 images, 1 other file (1 .md) left out\n"
        assert ("\n" + said).count(line) == 1
    assert (tmp_path / "demo" / "tokenizer" / "tokenizer.safetensors").exists()
    assert main(arguments) == 0  # finished: nothing is trained, the results are shown
    assert "resumes from" in capsys.readouterr().out


def test_the_demo_runs_from_a_token_cache_of_its_own_tokenizer(tmp_path, capsys):
    tokens, output = str(tmp_path / "tokens"), tmp_path / "demo"
    arguments = [*TINY, "--run.output", str(output)]
    assert main(["pretokenize", "demo", *arguments, "--output", tokens, "--num_views", "1"]) == 0
    said = capsys.readouterr().out
    assert f"19 images x 1 in {tokens}" in said
    assert sum(line.startswith("images: ") for line in said.splitlines()) == 1
    cached = [*arguments, "--token_cache", tokens]
    assert main(["pretrain", "demo", *cached]) == 1
    assert "--tokenizer_training null" in capsys.readouterr().err
    tokenizer = str(output / "tokenizer" / "tokenizer.safetensors")
    cached = ["--run.steps", "2", "--model.depth", "1", "--optim.warmup_steps", "1"]
    cached += ["--run.output", str(output), "--token_cache", tokens]
    cached += ["--tokenizer_training", "null", "--tokenizer", tokenizer]
    assert main(["pretrain", "demo", *cached]) == 0
    assert "evaluation is on crops and masks never trained on" in capsys.readouterr().out
    assert main(["pretrain", "demo", *cached, "--run.seed", "1"]) == 1
    assert "seed was 0, is 1" in capsys.readouterr().err


def test_flags_change_fields_and_files_change_many(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"depth": 3}, "optim": {"lr": 1e-3}}))
    arguments = ["--config", str(file), "--optim.lr", "5e-4", "--views.scale", "[0.2,1.0]"]
    config = parse("pretrain", "demo", recipes.demo, arguments)
    assert (config.model.depth, config.optim.lr, config.views.scale) == (3, 5e-4, (0.2, 1.0))
    assert config.masking == recipes.demo().masking


@pytest.mark.parametrize("name", recipes.PRETRAIN)
def test_every_recipe_survives_the_parser_unchanged(name):
    assert parse("pretrain", name, recipes.PRETRAIN[name], []) == recipes.PRETRAIN[name]()


@pytest.mark.parametrize("name", recipes.PRETOKENIZE)
def test_every_token_cache_recipe_is_its_pretraining_one_and_survives_the_parser(name):
    recipe = recipes.PRETOKENIZE[name]
    config = parse("pretokenize", name, recipe, ["--num_views", "3"])
    assert config == replace(recipe(), num_views=3)
    pretraining = recipes.PRETRAIN[name]()
    assert vars(pretraining).items() <= vars(config).items()
    assert config.output == f"{pretraining.run.output}_tokens"


@pytest.mark.parametrize("name", recipes.PROBE)
def test_every_probe_recipe_survives_the_parser_unchanged_and_says_its_command(name):
    recipe = recipes.PROBE[name]
    assert parse("probe", name, recipe, []) == recipe()
    assert f"beit-fast probe {name}" in recipe.__doc__


@pytest.mark.parametrize("name", recipes.TOKENIZER)
def test_every_tokenizer_recipe_survives_the_parser_unchanged(name):
    assert parse("tokenizer", name, recipes.TOKENIZER[name], []) == recipes.TOKENIZER[name]()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "small"], 1, "pass --data.path"),
        (["pretrain", "small", "--data.path", "no/such"], 1, "no/such does not exist"),
        (["pretrain", "demo", "--model.img_size", "65"], 1, "do not divide into patches"),
        (["pretrain", "beit_base_in1k", "--data.path", "photographs"], 1, "dalle.safetensors"),
        (["probe", "small"], 1, "pass --checkpoint"),
        (["pretrain", "nonsense"], 2, "no recipe 'nonsense'"),
        (["nonsense"], 2, "no verb 'nonsense'"),
        ([], 2, "usage"),
    ],
)
def test_a_mistake_gets_one_line_and_a_code(
    arguments, code, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    if code == 1:
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [BadDataError, NonFiniteLoss])
def test_an_error_that_ends_a_run_is_one_line(error, capsys, monkeypatch):
    def run(_config):
        raise error("so many are bad: do this")

    monkeypatch.setitem(VERBS, "probe", (VERBS["probe"][0], lambda: run))
    assert main(["probe", "small"]) == 1
    assert capsys.readouterr().err == "beit-fast: so many are bad: do this\n"


def test_a_folder_of_broken_images_gives_one_line(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"no image")
    path = str(tmp_path / "images")
    output = ["--run.output", str(tmp_path / "run")]
    assert main(["tokenizer", "demo", "--data.path", path, *output]) == 1
    said = capsys.readouterr().err
    assert "files are bad" in said
    assert "Traceback" not in said


@pytest.mark.promise("R10", "R11")
def test_a_signal_gives_its_exit_code_and_the_run_goes_on_later(tmp_path, capsys, monkeypatch):
    arguments = ["pretrain", "demo", *TINY, "--run.output", str(tmp_path / "demo")]
    for step, (code, name) in enumerate({143: "TERM", 138: "USR1"}.items(), 1):
        with monkeypatch.context() as patch:
            signum = getattr(signal, f"SIG{name}")
            patch.setattr(PretrainTask, "begin_step", lambda *_, s=signum: os.kill(os.getpid(), s))
            assert main(arguments) == code
        said = f"stopped by SIG{name} after step {step}; the checkpoint is saved"
        assert said in capsys.readouterr().err
    assert main(arguments) == 0
    assert "resumes from" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_gives_one_line(tmp_path, capsys, monkeypatch):
    loss = PretrainTask.loss

    def spoil(self, batch):
        value, metrics = loss(self, batch)
        return value * float("nan"), metrics

    monkeypatch.setattr(PretrainTask, "loss", spoil)
    arguments = ["pretrain", "demo", *TINY, "--run.output", str(tmp_path / "demo")]
    arguments += ["--run.bad_steps", "1"]
    assert main(arguments) == 1
    assert "not finite between steps 1 and 1, first at step 1" in capsys.readouterr().err


@pytest.mark.promise("R21")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "size", "python"],
)
def test_memory_that_runs_out_is_one_line_whose_remedy_does(error, tmp_path, capsys, monkeypatch):
    loss = DvaeTask.loss

    def limited(self, batch):
        if len(batch["images"]) > 4:
            raise error
        return loss(self, batch)

    monkeypatch.setattr(DvaeTask, "loss", limited)
    arguments = ["pretrain", "demo", *TINY, "--tokenizer_training.data.batch_size", "8"]
    arguments += ["--run.output", str(tmp_path / "demo"), "--run.device", "cpu"]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory ran out (" in line
    for flag in ("--tokenizer_training.data.batch_size", "--tokenizer_training.run.accumulate"):
        assert flag in line
    if error.args and "CUDA" in error.args[0]:
        remedy = ["--tokenizer_training.data.batch_size", "4"]
        assert main([*arguments, *remedy, "--tokenizer_training.run.accumulate", "2"]) == 0


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(DvaeTask, "__init__", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["tokenizer", "demo", "--run.device", "cpu"])


def test_a_failed_capture_gives_one_line_whose_remedy_resumes_the_run(
    tmp_path, capsys, monkeypatch
):
    loss, calls = PretrainTask.loss, []

    def fail_in_the_second_step(self, batch):
        calls.append(batch)
        if len(calls) == 3:  # the first is the look at shapes
            raise CaptureError("the step", RuntimeError("CUDA error: not permitted\nmore"))
        return loss(self, batch)

    arguments = ["pretrain", "demo", *TINY, "--run.output", str(tmp_path / "demo")]
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTask, "loss", fail_in_the_second_step)
        assert main([*arguments, "--run.save_every", "1"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = said.strip().splitlines()
    assert "CUDA error: not permitted. " in line
    assert "pass --run.cuda_graph false" in line
    assert main([*arguments, "--run.cuda_graph", "false"]) == 0
    assert "resumes from" in capsys.readouterr().out


def test_null_is_null_below_a_section_that_may_be_null_too(capsys):
    nulls = ["--tokenizer_training.optim.clip_grad", "null", "--tokenizer_training.run.steps=null"]
    nulls += [
        "--tokenizer_training.run.epochs",
        "2",
        "--tokenizer_training.run.cpu_threads",
        "null",
    ]
    stage = parse("pretrain", "demo", recipes.demo, nulls).tokenizer_training
    assert (stage.optim.clip_grad, stage.run.steps, stage.run.cpu_threads) == (None, None, None)
    assert stage.run.epochs == 2.0
    last = [*nulls, "--tokenizer_training.optim.clip_grad", "2"]
    assert parse("pretrain", "demo", recipes.demo, last).tokenizer_training.optim.clip_grad == 2.0
    with pytest.raises(SystemExit):
        parse("pretrain", "demo", recipes.demo, ["--tokenizer_training", "null", *nulls[:2]])
    assert "clip_grad is null and so is tokenizer_training.optim" in capsys.readouterr().err


def test_a_resume_that_is_refused_names_the_flag_that_accepts_it(tmp_path, capsys):
    arguments = ["pretrain", "demo", *TINY, "--run.output", str(tmp_path / "demo")]
    assert main([*arguments, "--run.save_every", "1"]) == 0
    capsys.readouterr()
    changed = [*arguments, "--run.steps", "4", "--run.seed", "3", "--masking.num_masked", "20"]
    assert main(changed) == 1
    (accepts,) = re.findall(r"(--run\.resume_with '.*')", capsys.readouterr().err)
    assert main([*changed, *shlex.split(accepts)]) == 0
    assert "from step 2 on, masking.num_masked was" in capsys.readouterr().out
    assert main([*arguments, "--run.resume_from", "1", *shlex.split(accepts)]) == 1
    said = capsys.readouterr().err
    assert "no checkpoint of step 1: pass --run.resume_from with one of" in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model.depht", "3"], "there is no flag --model.depht, did you mean --model.depth?"),
        (["--run.prec", "fp32"], "there is no flag --run.prec, did you mean --run.precision?"),
        (["--run.precision", "fp99"], "--run.precision is fp99: give fp32, bf16 or fp8"),
        (["--run.seed", "1.5"], "--run.seed is 1.5: give a whole number, at least 0 and at most"),
        (
            ["--tokenizer_training.optim.lr", "fast"],
            "--tokenizer_training.optim.lr is fast: give a finite number, above 0;",
        ),
        (
            ["--tokenizer_training.optim.lrr", "1"],
            "there is no flag --tokenizer_training.optim.lrr, did you mean --tokenizer_training.o",
        ),
        (["--optim", "3"], "--optim is 3: give its fields (OptimConfig)"),
        (["--run.compile"], "--run.compile: expected one argument"),
        (["--data.path", "/", "3"], "'3' is the value of no --flag"),
        (
            ["--data.path", "a-0.tar", "a-1.tar"],
            "'a-1.tar' is the value of no --flag; put a pattern of file names in quotes",
        ),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_is_allowed(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "demo", *arguments])
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"beit-fast: {line}")
    assert said.endswith("; `beit-fast pretrain demo --help` has the flags")


def test_a_wrong_value_in_a_file_is_told_with_the_file(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("optim: {lr: fast}")
    with pytest.raises(SystemExit):
        main(["pretrain", "demo", "--config", str(file)])
    assert f"--config {file}: --optim.lr is fast: give" in capsys.readouterr().err


def test_fields_that_are_gone_may_say_what_holds_now(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    gone = {"fold_layer_scale": False, "fold_norm_affine": False}
    file.write_text(yaml.safe_dump({"model": {"depth": 3, **gone}}))
    config = parse("pretrain", "demo", recipes.demo, ["--config", str(file)])
    assert config.model == replace(recipes.demo().model, depth=3)
    parse("finetune", "small_data", FINETUNE["small_data"], ["--config", str(file)])
    file.write_text(yaml.safe_dump({"model": {"fold_layer_scale": True}}))
    with pytest.raises(SystemExit):
        main(["pretrain", "demo", "--config", str(file)])
    said = capsys.readouterr().err
    assert f"--config {file}: --model.fold_layer_scale is True: give False" in said
    for asked in ("--help", "--print_config"):
        with pytest.raises(SystemExit):
            main(["pretrain", "demo", asked])
        assert "fold_" not in capsys.readouterr().out


def test_help_lists_verbs_recipes_and_fields(capsys):
    assert main(["--help"]) == 0
    assert "convert-dalle" in capsys.readouterr().out
    assert main(["pretrain", "--help"]) == 0
    assert "beit_plus_large_in22k" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pretrain", "small", "--help"])
    said = capsys.readouterr().out
    assert "--masking.num_masked" in said
    assert "Annotated[float, above 0]" in said  # what a field may hold
    assert "\nbeit-fast pretrain small --data.path" in said  # a line of its own, to be pasted


def test_print_config_is_yaml_that_config_reads(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["pretrain", "small", "--print_config"])
    file = tmp_path / "small.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("pretrain", "small", recipes.small, ["--config", str(file)]) == recipes.small()


def test_the_resolved_configuration_is_in_the_checkpoint(tmp_path):
    output = tmp_path / "demo"
    main(["pretrain", "demo", *TINY, "--run.output", str(output)])
    (checkpoint,) = (output / "checkpoints").iterdir()
    settings = json.loads((checkpoint / "manifest.json").read_text())["settings"]
    assert settings["model"]["embed_dim"] == 16
    assert settings["run"]["steps"] == 2
    assert settings["masking"]["strategy"] == "block"


def broken_images(folder):
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"no image")
    return str(folder)


@pytest.mark.parametrize("section", ["", "tokenizer_training."], ids=["alone", "first"])
def test_a_tokenizer_is_told_its_flags_as_they_are_typed(section, tmp_path, capsys, monkeypatch):
    verb = "pretrain" if section else "tokenizer"
    tiny = TINY if section else ["--run.steps", "2", "--optim.warmup_steps", "1"]
    arguments = [verb, "demo", *tiny, "--run.output", str(tmp_path / "demo"), "--run.device", "cpu"]
    broken = broken_images(tmp_path / "broken")

    def refused(flag, value, remedy):
        assert main([*arguments, f"--{section}{flag}", value]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--{section}{remedy}" in said
        assert section or "--tokenizer_training" not in said

    refused("run.cuda_graph", "true", "run.cuda_graph false")
    refused(
        "data.path", broken, "data.max_bad_share 0.001 allows 0; repair or remove them or raise"
    )
    refused("optim.warmup_steps", "2", "optim.warmup_steps or")
    refused("run.resume", "must", "run.resume is must")
    refused("temperature.end", "0", "temperature.end is 0.0")
    with monkeypatch.context() as patch:
        loss = DvaeTask.loss
        patch.setattr(DvaeTask, "loss", lambda *a: (loss(*a)[0] * float("nan"), loss(*a)[1]))
        refused("run.bad_steps", "1", "optim.lr, lengthen the warm-up")
    assert main([*arguments, f"--{section}run.cuda_graph", "false"]) == 0


def test_paths_are_printed_as_they_are(tmp_path, capsys):
    """Not as rich's markup or emoji codes: the second of these closes what nothing opened."""
    for name in ("[bold] run :smile:", "[/b] run"):
        output = tmp_path / name
        assert main(["pretrain", "demo", *TINY, "--run.output", str(output)]) == 0
        said = capsys.readouterr().out
        for file in ("checkpoints/step_00000002", "curve.png", "tokenizer/tokenizer.safetensors"):
            assert f"{output}/{file}" in said
    assert main(["pretrain", "demo", *TINY, "--run.output", str(output)]) == 0
    assert f"resumes from {output}/checkpoints" in capsys.readouterr().out


def test_paths_that_are_not_utf8_are_taken(tmp_path, capfdbinary):
    name = tmp_path / os.fsdecode(b"caf\xe9")
    name.mkdir()
    config = parse("probe", "digits", recipes.PROBE["digits"], ["--train", str(name)])
    assert config.train == str(name)
    assert main(["pretrain", "demo", *TINY, "--data.path", str(name / "none")]) == 1
    assert b"caf\xe9/none does not exist" in capfdbinary.readouterr().err
    assert main(["pretrain", "demo", *TINY, "--run.output", str(name)]) == 1
    assert b"caf\xe9 is not UTF-8" in capfdbinary.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--num_heads", "0"], "--num_heads is 0: give a whole number, at least 1, or null"),
        (["--img_size", "x"], "--img_size is x: give a whole number, at least 1, or [a, b]"),
        (["--key", ""], "--key is '': give text"),
    ],
)
def test_a_conversion_checks_its_flags_first(arguments, problem, capsys):
    with contextlib.suppress(SystemExit):
        assert main(["convert", "nowhere", "target", "--to", "timm", *arguments]) == 1
    assert f"beit-fast: {problem}" in capsys.readouterr().err
    assert main(["convert", "nowhere", "", "--to", "timm"]) == 1
    assert "TARGET is ''" in capsys.readouterr().err


def test_a_configuration_that_cannot_be_printed_is_told_of_the_output(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.stdout, "write", full)
    assert main(["pretrain", "demo", "--print_config"]) == 1
    assert capsys.readouterr().err == "beit-fast: standard output: No space left on device\n"


def test_a_command_whose_output_is_closed_does_its_work(monkeypatch):
    done = []
    monkeypatch.setitem(WITHOUT_RECIPE, "convert", (list, lambda: done.append))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["convert", "this"]) == 0
    assert done == [["this"]]
