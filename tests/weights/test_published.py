"""The published checkpoints: the table against timm's, and where files are looked for."""

import socket
from pathlib import Path

import pytest
import timm
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.weights import published as module
from beit_fast.weights.load import from_pretrained
from beit_fast.weights.published import PUBLISHED, find_published, published
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import save_pretrained


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty caches and no network; counts the connections that were tried."""
    import huggingface_hub.constants

    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError("no network")

    def resolve(*_, **__):
        tried.append("name")
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tried


def test_the_table_agrees_with_timm():
    entries = [entry for entry in PUBLISHED.values() if entry.timm_id]
    assert len(entries) == 7
    for entry in entries:
        theirs = timm.get_pretrained_cfg(entry.timm_id)
        assert theirs.num_classes == entry.num_classes == entry.config.num_classes
        assert theirs.input_size == (3, *entry.config.image_pixels)
        assert (theirs.mean, theirs.std) == (entry.mean, entry.std)
        assert theirs.crop_pct == entry.crop_pct
        assert theirs.interpolation == entry.interpolation
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in timm.create_model(entry.timm_id).state_dict().items()}
            ours = BeitForImageClassification(entry.config).state_dict()
        assert shapes == {n: t.shape for n, t in ours.items()}


def test_what_only_unilm_published_is_there():
    assert len(PUBLISHED) == 14
    vanilla = published("beit_base_patch16_224_pt1k_800ep")
    assert vanilla.config.use_abs_pos_emb
    assert not vanilla.config.use_shared_rel_pos_bias
    assert vanilla.mean == (0.485, 0.456, 0.406)
    shared = published("microsoft/beit-large-patch16-224-pt22k")
    assert (shared.task, shared.config.depth, shared.config.init_values) == ("mim", 24, 1e-5)
    assert shared.config.use_shared_rel_pos_bias
    assert published("beit_large_patch16_640_pt22k_ft22ktoade20k").config.grid == (40, 40)
    with pytest.raises(ValueError, match="no published checkpoint 'beit_huge': pass one of"):
        published("beit_huge")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("microsoft/beit-base-patch16-224", "hf download microsoft/beit-base-patch16-224"),
        ("beit_base_patch16_224_pt22k", "hf download microsoft/beit-base-patch16-224-pt22k"),
        ("beit_base_patch16_224_pt1k_800ep", r"github.*800ep\.pth cannot be had .*elsewhere to"),
    ],
)
def test_offline_the_error_says_what_to_download(name, message, offline):
    with pytest.raises(OSError, match=message):
        from_pretrained(name)
    assert offline  # it was tried


def cached(tmp_path, repository: str) -> Path:
    """The folder of a snapshot as huggingface_hub keeps it."""
    home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    return home / "snapshots" / ("0" * 40)


def test_a_cached_file_is_taken_and_the_trained_epsilon_with_unilms_name(
    offline, tiny, randomize, tmp_path
):
    config = tiny(use_rel_pos_bias=True, use_shared_rel_pos_bias=False, norm_eps=1e-12)
    model = randomize(BeitForImageClassification(config))
    save_pretrained(model, cached(tmp_path, "microsoft/beit-base-patch16-224"))
    by_hub = from_pretrained("microsoft/beit-base-patch16-224")
    assert torch.equal(by_hub.head.weight, model.head.weight)
    assert by_hub.config.norm_eps == 1e-12
    assert from_pretrained("beit_base_patch16_224_pt22k_ft22kto1k").config.norm_eps == 1e-6


def test_unilms_file_in_torchs_cache_is_taken_first(offline, tiny, tmp_path):
    folder = tmp_path / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"model": Beit(tiny()).state_dict()}, folder / "beit_base_patch16_224_pt22k.pth")
    assert read_checkpoint("beit_base_patch16_224_pt22k").layout == "house"
    assert not offline


def test_unilms_file_is_downloaded_into_torchs_cache(offline, tiny, tmp_path, monkeypatch):
    def download(url, path, progress):
        assert url == f"{module.BASE_URL}/beit_base_patch16_224_pt1k_800ep.pth"
        torch.save({"model": Beit(tiny()).state_dict()}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path, entry = find_published("beit_base_patch16_224_pt1k_800ep")
    assert path == tmp_path / "torch" / "checkpoints" / f"{entry.name}.pth"
    assert read_checkpoint(path).task == "encoder"
