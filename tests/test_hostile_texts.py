"""YAML, JSON and values made to do harm: one line that names them, soon, and nothing happens."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file

from beit_fast.cli import main
from beit_fast.data.token_cache import MANIFEST, TokenCacheError, read_manifest
from beit_fast.tasks.probe.features import _open as open_features
from beit_fast.tokenizer.checkpoint import FORMAT, load_tokenizer
from beit_fast.weights.files import read_weights
from refusals import reading, refused_in, write_good


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(arguments, *names)`: as `refused_in` says, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return refused_in(tmp_path, capsys)


LAUGHS = "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'ha'] * 9)}]\n" for n in range(9)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)
UNBOUNDED = {
    "laughs": LAUGHS,
    "a field": f"{LAUGHS}knn: *a8\n",
    "merges": MERGES,
    "in a text": f"rates: [{json.dumps(LAUGHS)}]\n",
    "in itself": "rates: &a [*a]\n",
    "in itself by name": "rates: &a {b: *a}\n",
    "a chain": "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
    "deep": "rates: " + "[" * 500 + "]" * 500,
    "deeper": "rates: " + "[" * 100_000 + "]" * 100_000,
    "deep maps": "{a: " * 100_000,
    "deep blocks": "- " * 100_000,
    "long": f"rates: [{'1, ' * 20_000}1]",
}


@pytest.mark.promise("S8")
@pytest.mark.parametrize("text", UNBOUNDED.values(), ids=UNBOUNDED)
def test_yaml_that_unfolds_without_end_is_refused_before_it_does(text, refused, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert refused(["probe", "digits", "--config", path], f"--config {path}") < 1
    assert refused(["probe", "digits", "--rates", text], "--rates") < 1
    assert refused(["tokenizer", "demo", "--optim", path], "--optim", path) < 1


def printed(arguments, capsys):
    """The configuration that these make."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.promise("S8")
def test_aliases_that_unfold_to_little_are_what_they_say(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("knn: &k [5, 7]\nrates: [&r 0.1, *r]\nnum_threads: 1\n")
    config = printed(["probe", "digits", "--config", str(path)], capsys)
    assert (config["knn"], config["rates"]) == ([5, 7], [0.1, 0.1])


@pytest.mark.promise("S8")
@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').mkdir('ran')",
        "$HOME",
        "${HOME}",
        "${oc.env:HOME}",
        "~/x",
        "{{7*7}}",
        "`mkdir ran`",
        "$(mkdir ran)",
        "%(asctime)s",
        "!!python/name:os.system",
    ],
)
def test_a_value_is_what_it_says(value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"output: {json.dumps(value)}\n")
    for given in (["--output", value], ["--config", "c.yaml"]):
        assert printed(["probe", "digits", *given], capsys)["output"] == value
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.promise("S8")
@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.mkdir ["ran"]',
        "output: !!python/name:os.system",
        "output: !!python/object/new:os.mkdir [ran]",
        "__class__: {a: 1}",
        "class_path: os.mkdir\ninit_args: {path: ran}",
        "knn: {class_path: os.mkdir, init_args: {path: ran}}",
        "no_such_field: 1",
    ],
)
def test_tags_classes_and_unknown_keys_are_errors(text, refused, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    refused(["probe", "digits", "--config", "c.yaml"])


DEPTHS = (990, 3000, 100_000)


@pytest.mark.promise("S8")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_json_that_is_nested_deep_is_one_line_in_every_file(depth, opened, good, refused, tmp_path):
    deep = opened * depth + "1" + ("]" if opened == "[" else "}") * depth
    hub = tmp_path / "hub"
    for name, content in (
        ("config.json", deep),
        ("config.json", f'{{"hidden_size": {deep}}}'),
        ("preprocessor_config.json", deep),
        ("preprocessor_config.json", f'{{"size": {deep}}}'),
        ("model.safetensors.index.json", f'{{"weight_map": {deep}}}'),
    ):
        shutil.copytree(good / "hub", hub)
        (hub / name).write_text(content)
        if "index" in name:
            (hub / "model.safetensors").unlink()
        refused(["predict", hub, good / "images" / "red", "--device", "cpu"], name)
        shutil.rmtree(hub)
    for name in ("names.json", "names.txt"):
        (tmp_path / name).write_text(deep)
        refused(reading(tmp_path / name, good)["data.classes_file"], tmp_path / name)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for content in (deep, f'{{"format": 1, "made_from": {deep}}}'):
        (tokens / MANIFEST).write_text(content)
        with pytest.raises(TokenCacheError, match=MANIFEST):
            read_manifest(tokens)
    (tmp_path / "manifest.json").write_text(deep)
    with pytest.raises(ValueError, match="are damaged"):
        open_features(tmp_path, {"a": 1}, (6, 1), None)
    (tmp_path / "manifest.json").unlink()
    if depth == DEPTHS[0]:  # which Python reads, and nothing that is read there has
        return
    for key in ("beit_fast.config", "beit_fast.classes", "beit_fast.statistics"):
        save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", metadata={key: deep})
        with pytest.raises(ValueError, match=rf"m\.safetensors: its {key} cannot be read"):
            read_weights(tmp_path / "m.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "t", metadata={"format": FORMAT, "config": deep})
    with pytest.raises(ValueError, match="t: its config cannot be read"):
        load_tokenizer(tmp_path / "t")
