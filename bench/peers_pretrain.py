"""What else a user could pre-train a BEiT with: whole steps, from uint8 batches to new weights.

timm           its encoder with what it lacks: a mask token, a norm and a head over the hidden
               patches alone, with shapes that do not depend on the data
transformers   its BeitForMaskedImageModeling, whose head scores every patch
official       what unilm's recipe does, written with timm's modules, which descend from unilm's:
               attention with its scores in memory, hidden patches picked by boolean masks, fp16
               with a scaler on a GPU (fp32 on a CPU), tokens of all patches from fp32 scores,
               the host waiting for loss, accuracy and norm in each step

timm and transformers get what a careful user of today's torch adds: bf16 autocast, fused AdamW, no
waiting, views that travel as channels-last uint8; "-compiled" is model and tokenizer under
torch.compile. The official batch is normalised fp32, made by the loader. `check` holds
losses and gradients of all of them against ours, on small models.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.data.config import MaskingConfig
from beit_fast.data.samples import PretrainSample
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.statistics import HALF_MEAN, HALF_STD
from beit_fast.data.views.two_views import normalize
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tokenizer.dvae import Dvae, map_pixels
from beit_fast.train.config import OptimConfig

Batch = dict[str, Tensor]
PEERS = ("timm", "transformers", "official", "timm-compiled", "transformers-compiled")
COMPILE_MODE = "max-autotune"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that pre-trains. `prepare` makes its batch from one of the loader's, on a CPU;
    `ready` does on the device what comes before the step."""

    model: nn.Module
    step: Callable[[Batch], Tensor]  # one step of training on a batch on the device; its loss
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    ready: Callable[[Batch], Batch] = lambda batch: batch
    views: str = "fast"  # the transform of its loader


# --- models: (images, mask, masked_index, visual_tokens) -> loss ----------------------------------


class TimmForMaskedImageModeling(nn.Module):
    """timm's encoder, and the rest of the model around it."""

    def __init__(self, config: BeitConfig, fused_attention: bool = True) -> None:
        super().__init__()
        from timm.models.beit import Beit

        self.encoder = Beit(
            img_size=config.img_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            init_values=config.init_values,
            drop_path_rate=config.drop_path_rate,
            use_abs_pos_emb=config.use_abs_pos_emb,
            use_shared_rel_pos_bias=config.use_shared_rel_pos_bias,
            num_classes=0,
        )
        self.encoder.fc_norm = nn.Identity()
        # The mask token comes between the patches and the rest of `forward_features`.
        self.patch_embed, self.encoder.patch_embed = self.encoder.patch_embed, nn.Identity()
        for block in self.encoder.blocks:
            block.attn.fused_attn = fused_attention
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size)

    def forward(self, images: Tensor, mask: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.where(mask[:, :, None], self.mask_token.to(patches.dtype), patches)
        x = self.encoder.forward_features(x)
        rows = x[:, 1:].flatten(0, 1).index_select(0, index)
        return F.cross_entropy(
            self.lm_head(self.norm(rows)), tokens.flatten().index_select(0, index)
        )

    def load_ours(self, tensors: dict[str, Tensor]) -> None:
        outside = ("patch_embed.", "mask_token", "norm.", "lm_head.")
        self.load_state_dict(
            {n if n.startswith(outside) else f"encoder.{n}": t for n, t in tensors.items()}
        )


class OfficialForMaskedImageModeling(TimmForMaskedImageModeling):
    """Scores in memory, the mask token mixed in by arithmetic, rows picked by a boolean mask."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config, fused_attention=False)

    def logits(self, images: Tensor, mask: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        hidden = mask[:, :, None].type_as(self.mask_token)
        tokens = self.mask_token.expand(*patches.shape[:2], -1)
        x = self.encoder.forward_features(patches * (1 - hidden) + tokens * hidden)
        return self.lm_head(self.norm(x)[:, 1:][mask])

    def forward(self, images: Tensor, mask: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
        del index
        return F.cross_entropy(self.logits(images, mask), tokens[mask])


class TransformersForMaskedImageModeling(nn.Module):
    """transformers' model as it is."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        import transformers

        self.model = transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(
                image_size=config.img_size,
                patch_size=config.patch_size,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=int(config.embed_dim * config.mlp_ratio),
                layer_norm_eps=config.norm_eps,
                layer_scale_init_value=config.init_values or 0.0,
                use_absolute_position_embeddings=config.use_abs_pos_emb,
                use_relative_position_bias=False,
                use_shared_relative_position_bias=config.use_shared_rel_pos_bias,
                use_mask_token=True,
                vocab_size=config.vocab_size,
                drop_path_rate=config.drop_path_rate,
            )
        )

    def forward(self, images: Tensor, mask: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
        del index
        return self.model(images, bool_masked_pos=mask, labels=tokens[mask]).loss

    def load_ours(self, tensors: dict[str, Tensor]) -> None:
        renamed = {}
        for name, tensor in tensors.items():
            if name.endswith("attn.qkv.weight"):
                parts = zip("qkv", tensor.chunk(3), strict=True)
                renamed |= {name.replace("qkv", f"{part}_proj"): rows for part, rows in parts}
            else:
                renamed[name] = tensor
        self.model.load_state_dict({_their_name(name): t for name, t in renamed.items()})


def _their_name(name: str) -> str:
    """A name of ours as transformers 5 has it; q, k and v are split already."""
    for pattern, replacement in (
        (r"^(cls|mask)_token", r"beit.embeddings.\1_token"),
        (r"^pos_embed", "beit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "beit.embeddings.patch_embeddings.projection"),
        (r"^rel_pos_bias", "beit.shared_position_bias"),
        (r"^norm\.", "layernorm."),
        (r"attn\.([qv])_bias", r"attn.\1_proj.bias"),
        (r"attn\.proj", "attn.o_proj"),
        (r"\.attn\.", ".attention."),
        (r"gamma_", "lambda_"),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"^blocks", "beit.layers"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


# --- steps ----------------------------------------------------------------------------------------


def build_peer(
    name: str,
    config: BeitConfig,
    tokenize: Callable[[Tensor], Tensor],
    optim: OptimConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Candidate:
    """One of PEERS. `tokenize` maps token views as its batch has them to ids (B, L)."""
    library, _, compiled = name.partition("-")
    with device:
        model = MODELS[library](config)
    if library == "official":
        return _official(model, tokenize, optim, device)
    return _today(model, tokenize, optim, device, dtype, compiled=bool(compiled))


MODELS = {
    "timm": TimmForMaskedImageModeling,
    "transformers": TransformersForMaskedImageModeling,
    "official": OfficialForMaskedImageModeling,
}


def _today(model, tokenize, optim, device, dtype, *, compiled: bool) -> Candidate:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.lr, optim.betas, optim.eps, optim.weight_decay, fused=True
    )
    loss_of = model
    if compiled:
        loss_of = torch.compile(model, mode=COMPILE_MODE, dynamic=False)
        tokenize = torch.compile(tokenize, mode=COMPILE_MODE, dynamic=False)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def step(batch: Batch) -> Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        tokens = tokenize(batch["token_images"].permute(0, 3, 1, 2)).clone()
        with autocast():
            images = normalize(batch["images"], HALF_MEAN, HALF_STD)
            loss = loss_of(images, batch["mask"], batch["masked_index"], tokens)
        loss.backward()
        if optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Candidate(model=model, step=step)


def _official(model, tokenize, optim, device) -> Candidate:
    model.train()
    half = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.lr, optim.betas, optim.eps, optim.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=half)

    def step(batch: Batch) -> Tensor:
        with torch.no_grad():
            tokens, mask = tokenize(batch["token_images"]), batch["mask"]
            labels = tokens[mask]
        with torch.autocast(device.type, torch.float16, enabled=half):
            logits = model.logits(batch["images"], mask)
            loss = F.cross_entropy(logits, labels)
        value = loss.item()
        if not np.isfinite(value):
            raise RuntimeError(f"the official step's loss is {value}: there is nothing to time")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if half:
            torch.cuda.synchronize()
        (logits.argmax(dim=-1) == labels).float().mean().item()
        norm.item()
        return loss.detach()

    return Candidate(model=model, step=step, prepare=official_batch, views="reference")


def official_batch(batch: Batch) -> Batch:
    """Floats, as the official loader makes them: normalised, and mapped for the tokenizer."""
    images = normalize(batch["images"], HALF_MEAN, HALF_STD).contiguous()
    views = map_pixels(batch["token_images"].permute(0, 3, 1, 2)).contiguous()
    return batch | {"images": images, "token_images": views}


class PreparedSample(PretrainSample):
    """PretrainSample whose batches are `prepare`d by the loader's threads."""

    def __init__(
        self,
        views: ViewConfig,
        masking: MaskingConfig,
        grid: tuple[int, int],
        prepare: Callable[[Batch], Batch],
    ) -> None:
        super().__init__(views, masking, grid)
        self.prepare = prepare

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        tensors = {n: torch.from_numpy(array) for n, array in super().collate(samples).items()}
        return {name: tensor.numpy() for name, tensor in self.prepare(tensors).items()}


@torch.no_grad()
def eager_tokens(dvae: Dvae, views: Tensor, half: bool) -> Tensor:
    """Ids (B, L) as the published tokenizer finds them: all scores, in fp32, then their arg-max.

    views (B, 3, height, width), uint8 or mapped floats; `half` runs all before the scores in fp16.
    """
    mapped = map_pixels(views) if views.dtype == torch.uint8 else views
    with torch.autocast(views.device.type, torch.float16, enabled=half):
        return dvae.encoder(mapped).argmax(dim=1).flatten(1)


# --- red means no numbers -------------------------------------------------------------------------


def check(device: torch.device) -> None:
    """Raise SystemExit unless loss and gradients of every model are ours, for the same weights."""
    torch.manual_seed(0)
    config = BeitConfig(img_size=64, embed_dim=128, depth=2, num_heads=2, vocab_size=256)
    L = config.num_patches
    images = torch.randn(3, 3, 64, 64, device=device)
    mask = torch.rand(3, L, device=device).argsort(dim=1) < 6
    index = mask.flatten().nonzero().flatten().int()
    tokens = torch.randint(config.vocab_size, (3, L), device=device)
    with device:
        ours = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.1)
    state, results = ours.state_dict(), {}
    with exact_fp32():
        loss = ours.loss(images, mask, index, tokens)[0]
        results["ours"] = (loss, _gradient_norm(ours, loss))
        for name, build in MODELS.items():
            with device:
                model = build(config)
            model.load_ours(state)
            loss = model.eval()(images, mask, index, tokens)
            results[name] = (loss, _gradient_norm(model, loss))
    for name, values in results.items():
        for what, theirs, ours_ in zip(("loss", "gradient"), values, results["ours"], strict=True):
            if not abs(theirs.item() / ours_.item() - 1) <= 1e-4:
                raise SystemExit(
                    f"{name}'s {what} is {theirs.item():.6g} and ours {ours_.item():.6g} for the "
                    "same weights: nothing is timed"
                )


def _gradient_norm(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return nn.utils.get_total_norm(gradients)
