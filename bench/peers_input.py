"""Images to views (peers_views.py), views to patches, patches to the sequence of the first block.

Patches: "eager" is the usual chain, floats normalised as torchvision does and then cut; "two-step"
the formula of ours in torch, its constants ready, which `compile` and `compile-max` are given.
Bytes: images read and patches written; of the sequence patches that show read, and it written.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from peers_views import views_cases
from torch import Tensor

from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference
from beit_fast.kernels.input.patches import normalized_patches, normalized_patches_reference
from kernels import Case, compiled, require_close, run_of, try_all

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HIDDEN, L = 75, 196
PASSES = ("forward", "backward", "both")


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Views; patches of 16 and 14 pixels, and the visible ones; the sequence in both streams."""
    is_cuda = device.type == "cuda"
    B = 256 if is_cuda else 8
    yield from views_cases(B, device, only)
    for side, listed in ((16, False), (16, True), (14, False)):
        name = f"patches-B{B}-{side}px{'-visible' * listed}"
        if only in name:
            yield _patches_case(name, B, side, listed, device, dtype)
    for D in (768, 1024):
        for stream in (torch.bfloat16, torch.float32) if is_cuda else (torch.float32,):
            for positions in (False, True):
                suffix = "-positions" * positions
                name = f"mask_embed-B{B}-D{D}-{str(stream).removeprefix('torch.')}{suffix}"
                passes = [part for part in PASSES if only in f"{name}-{part}"]
                if passes:
                    inputs = _inputs(B, D, positions, device, dtype)
                    yield from _sequence_cases(name, passes, inputs, stream, device)


def _patches_case(name, B, side, listed, device, dtype) -> Case:
    images = torch.randint(0, 256, (B, 224, 224, 3), dtype=torch.uint8, device=device)
    index = None
    if listed:
        index = torch.rand(B, L, device=device).argsort(dim=1)[:, HIDDEN:].sort(dim=1).values
        index = (index + L * torch.arange(B, device=device)[:, None]).flatten().int()
    mean, std = (torch.tensor(v, device=device) for v in (MEAN, STD))
    offset, factor = 255 * mean, 1 / (255 * std)

    def cut(pixels: Tensor) -> Tensor:
        blocks = pixels.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        patches = blocks.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2).to(dtype)
        return patches if index is None else patches.flatten(0, 1)[index]

    def two_step() -> Tensor:
        return cut((images.float() - offset) * factor)

    options = {"index": index, "dtype": dtype}
    ours = functools.partial(normalized_patches, images, (side, side), MEAN, STD, **options)
    candidates = {
        "ours": ours,
        "torch": functools.partial(ours, backend="torch"),
        "eager": lambda: cut((images.float() / 255 - mean) / std),
        "two-step": two_step,
    }
    if device.type == "cuda":
        candidates |= compiled(two_step)
    made, failed = try_all({peer: (lambda run=run: run) for peer, run in candidates.items()})

    def check() -> None:
        reference = normalized_patches_reference(images, (side, side), MEAN, STD, **options)
        if not torch.equal(ours(), reference):
            raise AssertionError("ours is not the reference, bit for bit: nothing is timed")

    out = ours()
    num_bytes = out.nbytes + out.numel()
    return Case(name, made, num_bytes, 0.0, failed=failed, check=check)


def _inputs(B, D, positions, device, dtype) -> list[Tensor | None]:
    """patches, [CLS], mask token, mask, positions; all but the mask trained."""
    patches = torch.randn(B, L, D, device=device).to(dtype)
    cls_token, mask_token = torch.randn(2, D, device=device).unbind()
    mask = torch.rand(B, L, device=device).argsort(dim=1) < HIDDEN
    pos = torch.randn(L + 1, D, device=device) if positions else None
    return [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in (patches, cls_token, mask_token, mask, pos)
    ]


def _sequence_cases(name, passes, inputs, stream, device) -> Iterator[Case]:
    peers = {
        "ours": functools.partial(mask_embed, dtype=stream),
        "torch": functools.partial(mask_embed, dtype=stream, backend="torch"),
        "eager": functools.partial(mask_embed_reference, dtype=stream),
    }
    if device.type == "cuda":
        peers |= compiled(peers["eager"])
    patches = inputs[0]
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    dout = torch.randn(len(patches), L + 1, patches.shape[2], device=device).to(stream)
    forward = patches.nbytes * (L - HIDDEN) // L + dout.nbytes
    backward = dout.nbytes + patches.nbytes
    num_bytes = {"forward": forward, "backward": backward, "both": forward + backward}

    def bind(part: str, run: Callable) -> Callable:
        return run_of(part, lambda: run(*inputs), leaves, dout)

    def check() -> None:
        results = []
        for peer in ("ours", "eager"):
            out = peers[peer](*inputs)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
        require_close(*results)

    for part in passes:
        makers = {peer: functools.partial(bind, part, run) for peer, run in peers.items()}
        made, failed = try_all(makers)
        yield Case(f"{name}-{part}", made, num_bytes[part], 0.0, failed=failed, check=check)
