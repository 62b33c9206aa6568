"""What is saved against live transformers models: tensors, logits, and the way back."""

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.weights.convert import convert
from beit_fast.weights.load import from_pretrained
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import push_to_hub, save_pretrained
from damaged import damages, not_refused
from tiny_models import PER_BLOCK, VANILLA, assert_identical


def images():
    return torch.randn(2, 3, 32, 32)


def mask():
    return torch.rand(2, 16) < 0.4


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@pytest.mark.parametrize("overrides", [PER_BLOCK, VANILLA], ids=["plus", "vanilla"])
@torch.no_grad()
def test_transformers_reads_our_classifier_and_we_theirs(
    overrides, global_pool, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitForImageClassification as Theirs

    config = tiny(**overrides, global_pool=global_pool, num_heads=4, drop_path_rate=0.1)
    ours = randomize(BeitForImageClassification(config)).eval()
    labels = [f"kind {i}" for i in range(5)]
    save_pretrained(ours, tmp_path / "ours", labels=labels)
    theirs, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(labels))
    batch = images()
    assert_agree(ours(batch), theirs.eval()(batch).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_pretrained(tmp_path / "theirs")
    assert again.config.num_heads == 4
    assert again.config.norm_eps == config.norm_eps
    assert_identical(again.state_dict(), ours.state_dict())
    assert_agree(again(batch), ours(batch))
    assert read_checkpoint(tmp_path / "theirs").labels == tuple(labels)


@pytest.mark.parametrize("overrides", [{}, VANILLA], ids=["plus", "vanilla"])
@torch.no_grad()
def test_transformers_reads_our_mim_and_we_theirs(
    overrides, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitForMaskedImageModeling as Theirs
    from transformers import BeitModel

    ours = randomize(BeitForMaskedImageModeling(tiny(**overrides))).eval()
    save_pretrained(ours, tmp_path / "ours")
    theirs, info = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch, hidden = images(), mask()
    assert_agree(ours(batch, hidden), theirs.eval()(batch, bool_masked_pos=hidden).logits)
    encoder = BeitModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    assert_agree(ours.forward_features(batch), encoder(batch).last_hidden_state)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    again = from_pretrained(tmp_path / "theirs")
    assert_identical(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@torch.no_grad()
def test_a_model_without_classes_is_transformers_encoder(
    global_pool, tiny, randomize, tmp_path, assert_agree
):
    from transformers import BeitModel

    config = tiny(**PER_BLOCK, num_classes=0, global_pool=global_pool)
    ours = randomize(BeitForImageClassification(config)).eval()
    save_pretrained(ours, tmp_path)
    theirs, info = BeitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = images()
    assert_agree(ours(batch), theirs.eval()(batch).pooler_output)
    assert_identical(from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_what_transformers_cannot_hold_is_refused(tiny, classifier, tmp_path):
    with pytest.raises(ValueError, match="has no such BEiT"):
        save_pretrained(BeitForMaskedImageModeling(tiny(predict="pixels")), tmp_path)
    with pytest.raises(ValueError, match="heads of 16 channels"):
        save_pretrained(Beit(tiny(attn_head_dim=16)), tmp_path)
    with pytest.raises(ValueError, match="2 labels for 5 classes"):
        save_pretrained(classifier, tmp_path, labels=["a", "b"])
    with pytest.raises(ValueError, match="no layout 'keras'"):
        convert(classifier.state_dict(), tmp_path / "x", to="keras")
    with pytest.raises(ValueError, match="is a folder: --to timm writes a file"):
        convert(classifier.state_dict(), tmp_path, to="timm")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: --to hf writes a folder"):
        convert(classifier.state_dict(), tmp_path / "file", to="hf")


def test_push_to_hub_sends_the_folder(classifier, monkeypatch, tmp_path):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            sent.update(private=private, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["state"] = from_pretrained(folder_path).state_dict()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(classifier, "me/beit", private=True) == "https://hub/me/beit"
    assert (sent["private"], sent["exist_ok"]) == (True, True)
    assert_identical(sent["state"], classifier.state_dict())


@pytest.mark.promise("R5")
def test_a_damaged_file_of_what_was_saved_or_converted_is_refused(classifier, tmp_path):
    save_pretrained(classifier, tmp_path / "folder", labels=[f"kind {i}" for i in range(5)])
    convert(tmp_path / "folder", tmp_path / "timm.safetensors", to="timm")
    convert(tmp_path / "folder", tmp_path / "unilm.safetensors", to="unilm")
    convert(tmp_path / "unilm.safetensors", tmp_path / "again", to="hf")
    saved = (tmp_path / "folder" / "model.safetensors", tmp_path / "folder")
    files = [(tmp_path / f"{name}.safetensors",) * 2 for name in ("timm", "unilm")]
    for file, source in (saved, *files):
        flips = damages(file, flips=100, zeroed=20)
        assert not_refused(file, flips, lambda _, source=source: read_checkpoint(source)) == []
        assert_identical(from_pretrained(source).state_dict(), classifier.state_dict())
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()
