"""The Python of every page runs, block after block as it is pasted, and gives what it says."""

import ast
import importlib.util
import itertools
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pages import Block, blocks_of, name_of, pages, text_of

Names = dict[str, Any]
# A block that has the word is left out, and the test is skipped at its end, with this reason.
NEEDS: dict[str, Callable[[], str]] = {
    "aoti_compile_and_package": lambda: "" if shutil.which("g++") else "AOTInductor needs g++",
    "torch.onnx.export": lambda: "" if importlib.util.find_spec("onnxscript") else "no onnxscript",
}


def check_loss(names: Names) -> None:
    assert 8.9 < float(names["loss"].detach()) < 9.3


def check_gradients(names: Names) -> None:
    assert names["qkv"].grad.shape == (8, 197, 3, 12, 64)
    assert names["bias"].grad.shape == (12, 197, 197)


def check_checkpoints(names: Names) -> None:
    assert names["tuned"].config.grid == (24, 24)
    assert names["tuned"].head.out_features == 10
    assert len(names["report"].expanded) == len(names["model"].blocks)


def check_accelerate(names: Names) -> None:
    assert not names["report"].left
    assert not any(hasattr(module, "_bias_cache") for module in names["model"].modules())
    assert names["difference"] < 1e-4


def check_pyramid(names: Names) -> None:
    assert [tuple(size) for size in names["sizes"]] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    assert names["shapes"]["p4"].stride == 16


def check_onnx(names: Names) -> None:
    from onnx.reference import ReferenceEvaluator

    images = torch.randn(3, 3, 32, 32)
    expected = names["tiny"](images).detach()
    torch.testing.assert_close(names["program"].module()(images), expected)
    (logits,) = ReferenceEvaluator("beit.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected)


def check_aoti(names: Names) -> None:
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(names["compiled"](images), names["tiny"](images).detach())


def check_swin(names: Names) -> None:
    from timm.models.swin_transformer import WindowAttention

    module, x = WindowAttention(32, num_heads=4, window_size=4), torch.randn(6, 16, 32)
    mask = torch.randn(3, 16, 16)
    expected = module(x, mask=mask)
    torch.testing.assert_close(names["swin_attention"](module, x, mask), expected)


# What a block with the word leaves behind, beside the shapes in its remarks.
CHECKS: dict[str, Callable[[Names], None]] = {
    "mim.loss(": check_loss,
    "bias = torch.randn(12, 197, 197": check_gradients,
    "save_pretrained(model": check_checkpoints,
    "beit_fast.restore(model)": check_accelerate,
    "BeitFeaturePyramid(config)": check_pyramid,
    "torch.onnx.export": check_onnx,
    "aoti_load_package": check_aoti,
    "def swin_attention": check_swin,
}


def python_blocks() -> dict[str, list[Block]]:
    found = {
        name_of(page): [b for b in blocks_of(text_of(page)) if b.language == "python"]
        for page in pages()
    }
    return {page: blocks for page, blocks in found.items() if blocks}


def printed_after(text: str) -> dict[int, str]:
    """Of blocks that are followed by "prints" and a block of text: their line, and that text."""
    lines, blocks, found = text.splitlines(), blocks_of(text), {}
    for block, after in itertools.pairwise(blocks):
        end = block.line + block.text.count("\n")  # the line of the closing fence
        between = " ".join(lines[end : after.line - 2]).strip()
        if re.fullmatch(r"(?:It |This |which )?prints:?", between) and not after.is_commands:
            found[block.line] = after.text
    return found


def shapes_in_remarks(code: str) -> dict[str, tuple[int, ...]]:
    """`name = ...  # (2, 197, 768)` for the last assignment of each name at the left margin."""
    found = {}
    for line in code.splitlines():
        if match := re.match(r"(\w+)(?:, \w+)* = ", line):
            found.pop(match[1], None)
            if remark := re.search(r"#\s*(\(\d+,(?: \d+,?)*\))", line):
                found[match[1]] = ast.literal_eval(remark[1])
    return found


@pytest.mark.parametrize("page", python_blocks())
# torch's own, at the first import of its compiler and at export.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (path,) = (p for p in pages() if name_of(p) == page)
    printed = printed_after(text_of(path))
    names: Names = {}
    left_out = []
    for block in python_blocks()[page]:
        missing = [lacks for word, why in NEEDS.items() if word in block.text and (lacks := why())]
        if missing:
            left_out.append(f"line {block.line}: {', '.join(missing)}")
            continue
        torch.manual_seed(0)
        capsys.readouterr()
        # Moved down, so that an error names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
        if block.line in printed:
            assert capsys.readouterr().out == printed[block.line]
        for name, shape in shapes_in_remarks(block.text).items():
            assert tuple(names[name].shape) == shape, f"{name}, in the block at line {block.line}"
        for check in (check for word, check in CHECKS.items() if word in block.text):
            check(names)
    if left_out:
        pytest.skip(f"all ran, but {'; '.join(left_out)}")


def test_every_check_is_of_a_block():
    code = "\n".join(block.text for blocks in python_blocks().values() for block in blocks)
    assert [word for word in (*CHECKS, *NEEDS) if word not in code] == []


def test_remarks_and_prints_are_found():
    assert shapes_in_remarks("x = f()  # (2, 3), and so on\ny = g()  # 2\n") == {"x": (2, 3)}
    assert shapes_in_remarks("x = f()  # (2, 3)\nx = h()\n") == {}
    page = "```python\nprint(1)\n```\n\nprints\n\n```\n1\n```\nand\n```text\n2\n```\n"
    assert printed_after(page) == {2: "1\n"}
