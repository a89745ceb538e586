"""Stage B, the latent diffusion decoder: turns small semantic latents into the VQGAN's latents.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage C has decided what is in the image; Stage B generates the detail that 24 x 24 positions cannot
hold. It is also a diffusion model: a U-Net, made of Stage C's three kinds of blocks, that predicts
the noise in the VQGAN's latents. Every level except the finest gets the semantic latents. The rest
of this file is the semantic compressor (EfficientNetV2-S and a 16-channel mapper): it computes
semantic latents from an image. The paper trains it jointly with Stage B. Stage C later learns to
generate the compressor's output from text.
In   x_t (B,4,h,w) noisy latents, h and w multiples of 16; t (B,) noise level, 0 = clean, 1 = noise;
     semantic (B,16,h',w') from the compressor, or zeros for none; text (B,77,1024) of CLIP-H
Out  eps (B,4,h,w), the noise in x_t. Note: the last layer does not output eps directly, see
     StageB.forward.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and
a convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Weights: python -m tools.weights convert IN OUT --to ours; StageB(**config).load_state_dict(...)
Paper: arXiv:2306.00637 (Stage B, semantic compressor).
Needs: torch; torchvision only for EfficientNetEncoder. This file works when copied alone.
"""
if __name__ == "__main__":
    raise SystemExit("stage_b.py defines StageB. To generate images: python sample.py --help")

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def channels_first(x: Tensor) -> Tensor:
    """Returns x (B,H,W,C) as a view (B,C,H,W), the order of dimensions that convolutions expect."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Returns x (B,C,H,W) as a view (B,H,W,C), the order that Linear layers and norms expect."""
    return x.permute(0, 2, 3, 1)


def layer_norm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Normalises x (...,C) to mean 0, variance 1 over C. Casts the result to `dtype` if 16-bit."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x.to(dtype) if dtype in (torch.float16, torch.bfloat16) else x


def widen(x: Tensor) -> Tensor:
    """Casts a float16 x to float32, because sums over blocks can exceed float16's maximum 65504."""
    return x.float() if x.dtype == torch.float16 else x


def narrow(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns x clamped to +-65504 and cast to float16 if `dtype` is float16, else x unchanged."""
    return x.clamp(-65504, 65504).half() if dtype == torch.float16 != x.dtype else x


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Embeds noise levels t (B,) in [0, 1] as (B,width): sines, then cosines, of falling frequency.

    Computed in float32, always in this order of operations. Angles reach 10^4, where float32 has
    steps of 1e-3: another order would change the networks' outputs by 1e-4, and half precision
    would make the first columns noise. The caller casts the result. Source: arXiv:1706.03762."""
    half = width // 2
    k = torch.arange(half, device=t.device).float()
    frequencies = (k * -(math.log(10000) / (half - 1))).exp()                        # (width // 2,)
    angles = (t.float() * 10000)[:, None] * frequencies[None]                     # (B, width // 2)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, width % 2))       # (B, width); pads with 0 if width is odd


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its energy relative to the mean energy, so that channels compete.

    y = gamma * (x * n) + beta + x with n = |x| / mean_channels |x|, |.| the L2 norm over H and W.
    |.| grows with the number of positions, so an image must be neither padded nor cut into tiles.
    Starts as the identity. Source: ConvNeXt V2, arXiv:2301.00808. Its eq. 2 divides by the sum over
    channels. Its code and the released weights divide by the mean, which only scales gamma."""
    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(c))
        self.beta = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (B,H,W,C). The result has x's shape and dtype, even under autocast."""
        dtype = torch.float32 if x.dtype.itemsize == 2 else None      # 16 bits are inexact for sums
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)  # (B,1,1,C)
            n = energy / (energy.mean(-1, keepdim=True) + 1e-6)                      # (B, 1, 1, C)
            # gamma * (x * n) + x is computed as x * (1 + gamma * n), which reads x only once.
            return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * n).to(x.dtype))


class Depthwise(nn.Conv2d):
    """A convolution that casts its weights to x's dtype: with float16 weights, x is float32."""
    def forward(self, x: Tensor) -> Tensor:
        """Convolves x (B,C,H,W). Returns (B,C',H,W)."""
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ResBlock(nn.Module):
    """Computes x + MLP(norm(depthwise(x))): a convolution mixes positions, an MLP mixes channels.

    In Stage B the MLP also gets `extras`: the U-Net's skip connection and the semantic latents.
    Source: the block of ConvNeXt V2, arXiv:2301.00808, with a smaller kernel."""
    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = Depthwise(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.expand = nn.Linear(c + c_skip, 4 * c)
        self.grn = GlobalResponseNorm(4 * c)
        self.dropout = dropout
        self.contract = nn.Linear(4 * c, c)

    def forward(self, x: Tensor, *extras: Tensor) -> Tensor:
        """Applies the block to x (B,H,W,C). extras (B,H,W,C_i): c_skip channels in total."""
        h = channels_last(self.depthwise(channels_first(x)))                         # (B, H, W, C)
        h = layer_norm(h, self.grn.gamma.dtype)
        h = torch.cat([h, *(narrow(e, h.dtype) for e in extras)], dim=-1) if extras else h
        h = self.grn(F.gelu(self.expand(h)))                                        # (B, H, W, 4C)
        return x + self.contract(F.dropout(h, self.dropout, self.training))          # (B, H, W, C)


class TimestepBlock(nn.Module):
    """Conditions x on the noise level t: scales and shifts each channel by functions of t."""
    def __init__(self, c: int, c_timestep: int):
        super().__init__()
        self.mapper = nn.Linear(c_timestep, 2 * c)

    def forward(self, x: Tensor, t_embedding: Tensor) -> Tensor:
        """Scales and shifts x (B,H,W,C). t_embedding (B,c_timestep): from timestep_embedding."""
        scale, shift = self.mapper(t_embedding)[:, None, None].chunk(2, dim=-1)  # 2 x (B, 1, 1, C)
        return torch.addcmul(shift, x, 1 + scale)            # x (1 + scale) + shift: (B, H, W, C)


class AttentionBlock(nn.Module):
    """Self-attention and cross-attention in one: image positions attend to image and text.

    Keys and values come from the normalised image tokens, then from the text tokens. Padding tokens
    of the text are not masked, because the released weights were trained without a mask."""
    def __init__(self, c: int, c_text: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.text_mapper = nn.Linear(c_text, c)
        self.query, self.key, self.value, self.out = (nn.Linear(c, c) for _ in range(4))

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, each (B,N,C), of text (B,N,c_text). They do not depend on x."""
        text = self.text_mapper(F.silu(text))                                           # (B, N, C)
        return self.key(text), self.value(text)

    def attend(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        """Returns x (B,H,W,C) plus attention from x to x and text. kv: the result of text_kv."""
        tokens = layer_norm(x, kv[0].dtype).flatten(1, 2)                             # (B, H*W, C)
        # Image and text are projected separately, not after concatenation. So if the layers that
        # compute the text's keys and values are frozen, no gradient is computed for the text.
        k = torch.cat([self.key(tokens), kv[0]], dim=1)                           # (B, H*W + N, C)
        v = torch.cat([self.value(tokens), kv[1]], dim=1)                         # (B, H*W + N, C)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.query(tokens), k, v))                # (B, heads, n, C / heads)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return x + self.out(h.transpose(1, 2).flatten(2)).view_as(x)                 # (B, H, W, C)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Returns x (B,H,W,C) plus attention from x to x and text (B,N,c_text)."""
        return self.attend(x, self.text_kv(text))


def resize_semantic(semantic: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes semantic latents (B,C,h,w) to size (H,W), bicubic, in float32. Returns (B,H,W,C).

    The result equals F.interpolate's, but is computed by two matrix products, one for rows and one
    for columns, because torch.compile cannot differentiate F.interpolate when sizes vary. The
    matrices are F.interpolate's result for unit vectors: with antialias and align_corners, its
    bicubic follows no textbook formula (end points do not map to end points)."""
    (h, w), (H, W), device = semantic.shape[2:], size, semantic.device

    def weights(n: int, m: int, width: int) -> Tensor:      # matrix (m, n): resizes n rows to m
        units = torch.eye(n, device=device)[None, :, :, None].expand(1, n, n, 2)
        shape = (m, min(width, 2))                 # at width 1, torch uses another formula
        rows = F.interpolate(units, shape, mode="bicubic", antialias=True, align_corners=True)
        return rows[0, :, :, 0].T
    with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
        resized = torch.einsum("Hh,bchw,Ww->bHWc", weights(h, H, W), semantic.float(),
                               weights(w, W, 2))
    return resized.to(semantic.dtype)


class StageB(nn.Module):
    """The diffusion decoder (DiffNeXt). Defaults are the official sizes (1055 M parameters).

    List arguments have one entry per level, a resolution of the U-Net. Level 0 is the finest.
    levels  patterns of blocks: C = ResBlock, T = TimestepBlock, A = AttentionBlock. Level i repeats
            its pattern blocks[i] times.
    inject  whether a level's ResBlocks get the semantic latents. The finest level does not: there
            they would cost the most, and the coarser levels have them already.
    dropout one rate for all levels, or one for each level
    In the up path, a level's first block gets the skip connection if it is a ResBlock."""
    def __init__(self, c_in: int = 4, c_out: int = 4, c_timestep: int = 64, patch_size: int = 2,
                 c_cond: int = 1024, c_hidden=(320, 640, 1280, 1280), heads=(-1, 10, 20, 20),
                 blocks=(4, 4, 14, 4), levels=("CT", "CTA", "CTA", "CTA"),
                 inject=(False, True, True, True), c_semantic: int = 16, c_text: int = 1024,
                 kernel_size: int = 3, dropout: float | list[float] = 0.1):
        super().__init__()
        self.config = dict(
            c_in=c_in, c_out=c_out, c_timestep=c_timestep, patch_size=patch_size, c_cond=c_cond,
            c_hidden=tuple(c_hidden), heads=tuple(heads), blocks=tuple(blocks),
            levels=tuple(levels), inject=tuple(inject), c_semantic=c_semantic, c_text=c_text,
            kernel_size=kernel_size, dropout=dropout)
        rates = dropout if isinstance(dropout, list | tuple) else [dropout] * len(c_hidden)
        self.patch_size, self.c_timestep, depth = patch_size, c_timestep, len(c_hidden)
        self.multiple = patch_size * 2 ** (depth - 1)      # x_t's sides must be multiples of this
        self.checkpointing = False             # True: gradient checkpointing of each block

        def block(letter: str, level: int, c_skip: int) -> nn.Module:
            if letter == "C":
                return ResBlock(c_hidden[level], c_skip, kernel_size, rates[level])
            if letter == "T":
                return TimestepBlock(c_hidden[level], c_timestep)
            if letter == "A":
                return AttentionBlock(c_hidden[level], c_cond, heads[level], rates[level])
            raise ValueError(f"Stage B level pattern {levels[level]!r} has an unknown letter "
                             f"{letter!r}: use C, T and A.")

        def per_level(make) -> nn.ModuleList:              # make(level) returns a module or None
            return nn.ModuleList(make(i) for i in range(depth))

        self.embed = nn.Linear(c_in * patch_size ** 2, c_hidden[0])
        self.embed_text = nn.Linear(c_text, c_cond)
        self.semantic_down, self.semantic_up = (per_level(
            lambda i: nn.Linear(c_semantic, c_cond) if inject[i] else None) for _ in range(2))
        self.downsample = per_level(
            lambda i: nn.Conv2d(c_hidden[i - 1], c_hidden[i], 2, stride=2) if i else None)
        self.upsample = per_level(
            lambda i: nn.ConvTranspose2d(c_hidden[i], c_hidden[i - 1], 2, stride=2) if i else None)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            c_skip = c_cond if inject[i] else 0
            self.down_blocks.append(nn.ModuleList(
                block(letter, i, c_skip) for letter in levels[i] * blocks[i]))
            # Except at the coarsest level, up_blocks' first block also gets the skip connection.
            self.up_blocks.append(nn.ModuleList(
                block(letter, i, c_skip + (c_hidden[i] if k == 0 and i < depth - 1 else 0))
                for k, letter in enumerate(levels[i] * blocks[i])))
        self.head = nn.Linear(c_hidden[0], 2 * c_out * patch_size ** 2)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets initial values for training from scratch. Loading weights overwrites all of them."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mapper in [self.embed_text, *self.semantic_down, *self.semantic_up]:
            if mapper is not None:             # small weights, because semantic latents have std 42
                nn.init.normal_(mapper.weight, std=0.02)
        nn.init.zeros_(self.head.weight)       # then a = 0, b = 1/2, and eps is 2 x_t
        for module in self.modules():
            if isinstance(module, ResBlock):   # so the blocks' sum does not grow with the depth
                module.contract.weight *= math.sqrt(1 / sum(self.config["blocks"]))
            elif isinstance(module, TimestepBlock):    # so that t has no effect at first
                nn.init.zeros_(module.mapper.weight)

    def forward(self, x_t: Tensor, t: Tensor, semantic: Tensor, text: Tensor) -> Tensor:
        """Predicts the noise eps (B,4,h,w) in noisy latents x_t (B,4,h,w) from the noise level t
        (B,) in [0, 1], semantic (B,16,h',w') of any size and text (B,N,c_text). eps has x_t's
        dtype. Give x_t in float32 even if weights are in half precision, because the last line
        magnifies rounding errors. Raises ValueError unless h and w are multiples of `multiple`."""
        # With ab = alphas_cumprod, x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps, and therefore
        # eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab). The head's two outputs stand for the unknowns:
        # a for the signal sqrt(ab) x_0, b in (0.001, 0.999) for the noise scale sqrt(1 - ab).
        a, b = self.signal_and_scale(x_t, t, semantic, text)
        return (x_t - a) / b                                                          # (B, 4, h, w)

    def signal_and_scale(self, x_t: Tensor, t: Tensor, semantic: Tensor,
                         text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a (signal) and b (noise scale), each (B,4,h,w), for `forward` and train_b.py."""
        _, channels, h, w = x_t.shape
        if channels != self.config["c_in"] or h % self.multiple or w % self.multiple:
            raise ValueError(
                f"Stage B got latents of shape {tuple(x_t.shape)}, expected (B, "
                f"{self.config['c_in']}, h, w) with h and w multiples of {self.multiple}: a "
                f"latent is 4 px wide.")
        dtype = next(self.parameters()).dtype
        t_embedding = timestep_embedding(t, self.c_timestep).to(dtype)            # (B, c_timestep)
        text = layer_norm(self.embed_text(text))                                   # (B, N, c_cond)
        x = channels_last(F.pixel_unshuffle(x_t.to(dtype), self.patch_size))    # (B, h/2, w/2, 16)
        x = widen(layer_norm(self.embed(x)))                                    # (B, h/2, w/2, C0)

        skips, depth = [], len(self.down_blocks)
        for i in range(depth):                                  # from finest to coarsest level
            if i > 0:
                x = self.downsample[i](channels_first(layer_norm(x, dtype)))
                x = widen(channels_last(x))
            x = self.run_level(self.down_blocks[i], self.semantic_down[i], x, t_embedding, semantic,
                               text)                                               # (B, H, W, C_i)
            skips.append(x)
        skips[-1] = None         # the coarsest level needs no skip, because the up path starts at x
        for i in reversed(range(depth)):                        # from coarsest to finest level
            x = self.run_level(self.up_blocks[i], self.semantic_up[i], x, t_embedding, semantic,
                               text, skips[i])                                     # (B, H, W, C_i)
            if i > 0:
                x = self.upsample[i](channels_first(layer_norm(x, dtype)))
                x = widen(channels_last(x))

        x = channels_first(self.head(layer_norm(x, dtype))).to(x_t.dtype)       # (B, 32, h/2, w/2)
        a, b = F.pixel_shuffle(x, self.patch_size).chunk(2, dim=1)                # 2 x (B, 4, h, w)
        return a, b.sigmoid() * (1 - 2e-3) + 1e-3

    def run_level(self, blocks: nn.ModuleList, mapper: nn.Linear | None, x: Tensor,
                  t_embedding: Tensor, semantic: Tensor, text: Tensor,
                  skip: Tensor | None = None) -> Tensor:
        """Applies one level's blocks to x (B,H,W,C). mapper: for `semantic`; if None, not used."""
        extras = [] if mapper is None else [mapper(resize_semantic(semantic, x.shape[1:3]))]
        for k, block in enumerate(blocks):
            if isinstance(block, ResBlock):
                inputs = [skip, *extras] if k == 0 and skip is not None else extras
            else:
                inputs = [t_embedding if isinstance(block, TimestepBlock) else text]
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *inputs, use_reentrant=False)               # (B, H, W, C)
            else:
                x = block(x, *inputs)                                                # (B, H, W, C)
        return x


# ----- the semantic compressor: computes the latents that Stage C learns to generate --------------

class EfficientNetEncoder(nn.Module):
    """torchvision's EfficientNetV2-S and a 1x1 mapper to 16 channels, 20.2 M parameters.

    v1 has efficientnet_v2_l (117 M), for images half as wide. The constructor does not download
    ImageNet weights; the released encoder has its own weights. Call eval() before encoding, because
    BatchNorm and stochastic depth behave differently in training mode.
    Source: EfficientNetV2, arXiv:2104.00298."""
    def __init__(self, c_semantic: int = 16, network: str = "efficientnet_v2_s"):
        super().__init__()
        import torchvision                     # imported here, so that StageB needs only torch
        if network not in ("efficientnet_v2_s", "efficientnet_v2_l"):
            raise ValueError(f"the image encoder is {network!r}, expected efficientnet_v2_s or, "
                             f"for v1, efficientnet_v2_l.")
        self.config = dict(c_semantic=c_semantic, network=network)
        backbone = getattr(torchvision.models, network)(weights=None)
        self.backbone = backbone.features                        # outputs (B, 1280, H/32, W/32)
        self.to_semantic = nn.Conv2d(1280, c_semantic, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_semantic)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images (B,3,H,W) from `preprocess` to raw latents (B,16,H/32,W/32)."""
        return self.norm(self.to_semantic(self.backbone(images)))


class TinyImageEncoder(nn.Module):
    """A small image encoder for 128 px: four levels of ResBlocks, 7 % of EfficientNet's compute.

    The last BatchNorm has a fixed weight of 42 and bias of -1. So Stage C's input, (latents + 1) /
    42 as for the released weights, has mean 0 and variance 1, as diffusion expects."""
    def __init__(self, c_semantic: int = 16, c_hidden=(32, 64, 128, 256), blocks=(1, 2, 2, 2)):
        super().__init__()
        self.config = dict(c_semantic=c_semantic, c_hidden=tuple(c_hidden), blocks=tuple(blocks))
        self.downsample = nn.ModuleList([nn.Conv2d(3, c_hidden[0], 4, stride=4)])
        for c_in, c in zip(c_hidden, c_hidden[1:]):
            self.downsample.append(nn.Conv2d(c_in, c, 2, stride=2))
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResBlock(c) for _ in range(n)) for c, n in zip(c_hidden, blocks))
        self.to_semantic = nn.Conv2d(c_hidden[-1], c_semantic, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_semantic)
        nn.init.constant_(self.norm.weight, 42).requires_grad_(False)
        nn.init.constant_(self.norm.bias, -1).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images (B,3,H,W) from `preprocess` to raw latents (B,16,H/32,W/32)."""
        x = channels_last(images)                                                     # (B, H, W, 3)
        for downsample, blocks in zip(self.downsample, self.blocks):
            x = layer_norm(channels_last(downsample(channels_first(x))))          # (B, H', W', C_i)
            for block in blocks:
                x = block(x)
        return self.norm(self.to_semantic(channels_first(x)))                  # (B, 16, H/32, W/32)


def preprocess(images: Tensor, size: int | tuple[int, int] = 768) -> Tensor:
    """Prepares images (B,3,H,W) in [0, 1] for the image encoders: resizes them (bilinear,
    antialiased) and normalises with ImageNet's mean and standard deviation. Returns (B,3,H',W').

    size: the shorter side in px, which keeps the aspect ratio, or (height, width). The encoders
    expect 0.75 of the image's size: official 1024 -> 768, tiny 128 -> 96. A side that is not a
    multiple of 32 is then cropped at both ends."""
    h, w = images.shape[-2:]
    if isinstance(size, int):                            # sides are rounded down, as in torchvision
        size = (size * h // min(h, w), size * w // min(h, w))
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = size[0] % 32 // 2, size[1] % 32 // 2
    images = images[..., top:top + size[0] // 32 * 32, left:left + size[1] // 32 * 32]
    mean, std = (torch.cat([images.new_full((1, 1, 1), v) for v in values])  # made on the device
                 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std                                                   # (B, 3, H', W')
