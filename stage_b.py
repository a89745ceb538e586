"""Stage B, the latent diffusion decoder: turns a small semantic latent into the VQGAN's latents.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage C has decided what is in the picture; Stage B invents the detail that 24 x 24 positions cannot
hold. It is a diffusion model: a U-Net of ConvNeXt-like blocks that predicts the noise in the VQGAN's
latents, guided at every level by the semantic latent. The other half of this file makes that latent
from a picture: the semantic compressor (EfficientNetV2-S and a 16-channel mapper), which the paper
trains jointly with Stage B; Stage C later learns to produce its output from text.
In   x_t (B,4,h,w) noisy latents, h and w multiples of 16; t (B,) noise level, 0 = clean, 1 = noise;
     semantic (B,16,h',w') in raw units (zeros = no guidance); text (B,77,1024) of CLIP-H
Out  eps (B,4,h,w), the noise in x_t. Surprise: the last layer does not output it directly, see
     StageB.forward.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and a
convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Paper: arXiv:2306.00637 (Stage B, semantic compressor).
Needs: torch; torchvision only for EfficientNetEncoder. This file works when copied alone.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OFFICIAL = dict(c_in=4, c_out=4, c_timestep=64, patch_size=2, c_cond=1024, c_hidden=(320, 640, 1280, 1280),
                heads=(-1, 10, 20, 20), blocks=(4, 4, 14, 4), levels=("CT", "CTA", "CTA", "CTA"),
                inject=(False, True, True, True), c_semantic=16, c_text=1024, kernel_size=3, dropout=0.1)


def channels_first(x: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,C,H,W), a view. Convolutions want this order of dimensions."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H,W,C), a view. Linear layers and norms want this order of dimensions."""
    return x.permute(0, 2, 3, 1)


def layer_norm(x: Tensor) -> Tensor:
    """(..., C) -> (..., C) with mean 0 and variance 1 over C, and nothing learned."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Noise levels t (B,) in [0, 1] -> (B, width): sines, then cosines, of t at falling frequencies.

    Always float32 and always in this order of operations: the angle reaches 10^4, where float32 has
    steps of 1e-3, so any other rounding moves the networks' outputs by 1e-4, and half precision
    would make the leading columns noise. The caller casts the result. Source: arXiv:1706.03762, sec. 3.5.
    """
    half = width // 2
    frequencies = (torch.arange(half, device=t.device).float() * -(math.log(10000) / (half - 1))).exp()
    angles = (t.float() * 10000)[:, None] * frequencies[None]                            # (B, width // 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))         # (B, width); odd: a 0 at the end


class GlobalResponseNorm(nn.Module):
    """Lets the channels compete: each is scaled by its energy over the picture, relative to the mean channel.

    y = gamma * (x * n) + beta + x with n = |x| / mean_channels |x|, |.| the L2 norm over H and W.
    Since |.| grows with the number of positions, a tile is not treated as the whole: no padding, no
    tiling. Starts as the identity. Source: ConvNeXt V2, arXiv:2301.00808, sec. 3.1.
    """
    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(c))
        self.beta = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        return self.scale(x, torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True))

    def scale(self, x: Tensor, energy: Tensor, out: Tensor | None = None) -> Tensor:
        """x (B,H,W,C), its energy (B,1,1,C) -> (B,H,W,C)."""
        n = energy / (energy.mean(-1, keepdim=True) + 1e-6)                              # (B, 1, 1, C)
        # gamma * (x * n) + x = x * (1 + gamma * n): the small factor first, so that x is read only once.
        return torch.addcmul(self.beta, x, 1 + self.gamma * n, out=out)

    def after_gelu(self, x: Tensor) -> Tensor:
        """forward(gelu(x)) for x (B,H,W,C); in sampling on a CPU in x's own memory.

        There new memory costs time, and so does reading x again once it has left the cache: so some rows at a time.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
            return self(F.gelu(x))
        energy = x.new_zeros(len(x), 1, 1, x.shape[-1])                                  # (B, 1, 1, C)
        for picture, squares in zip(x, energy):
            for rows in picture.view(-1, x.shape[-1]).split(512):
                F.gelu(rows, out=rows)
                squares += rows.square().sum(0)
        return self.scale(x, energy.sqrt(), out=x)


class LinearInParts(nn.Linear):
    """A Linear whose input may come in parts, since W [x; y] = W_x x + W_y y: a part is multiplied with its columns of W."""
    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (...,C'), all of the input or the part that begins at `start` -> its share of the output. The first has the bias."""
        return F.linear(x, self.weight[:, start:start + x.shape[-1]], None if start else self.bias)


class ResBlock(nn.Module):
    """x + MLP(norm(depthwise(x))): a convolution mixes positions, then a wide MLP mixes channels.

    Extra inputs (a U-Net skip, the semantic features) join behind the norm, in front of the MLP. In sampling each is multiplied by
    itself, W [x; y] = W_x x + W_y y, and one that is the same at every step only once. In training they are concatenated: a
    product for each of them takes a third longer (measured at the small size), since each passes over 4C numbers per position.
    """
    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.expand = LinearInParts(c + c_skip, 4 * c)
        self.grn = GlobalResponseNorm(4 * c)
        self.dropout = dropout
        self.contract = nn.Linear(4 * c, c)

    def forward(self, x: Tensor, *extras: Tensor | tuple[Tensor]) -> Tensor:
        """x (B,H,W,C), extras (B,H,W,C_i) with sum C_i = c_skip, the last perhaps as (its share of `expand`,) -> (B,H,W,C)."""
        h = layer_norm(channels_last(self.depthwise(channels_first(x))))                 # (B, H, W, C)
        if torch.is_grad_enabled():
            raw = [extra for extra in extras if not isinstance(extra, tuple)]
            h, extras = torch.cat([h, *raw], dim=-1) if raw else h, extras[len(raw):]    # (B, H, W, C + ...)
        start = h.shape[-1]
        h = self.expand(h)                                                               # (B, H, W, 4C)
        for extra in extras:
            if isinstance(extra, tuple):
                h += extra[0]
            else:
                h += self.expand(extra, start)
                start += extra.shape[-1]
        h = self.grn.after_gelu(h)                                                       # (B, H, W, 4C)
        return x + self.contract(F.dropout(h, self.dropout, self.training))              # (B, H, W, C)


class TimestepBlock(nn.Module):
    """Tells the network how noisy its input is: a scale and a shift per channel, computed from t."""
    def __init__(self, c: int, c_timestep: int):
        super().__init__()
        self.mapper = nn.Linear(c_timestep, 2 * c)

    def forward(self, x: Tensor, t_embedding: Tensor) -> Tensor:
        """x (B,H,W,C), t_embedding (B,c_timestep) -> (B,H,W,C)."""
        scale, shift = self.mapper(t_embedding)[:, None, None].chunk(2, dim=-1)          # 2 x (B, 1, 1, C)
        return torch.addcmul(shift, x, 1 + scale)


class AttentionBlock(nn.Module):
    """Every position looks at all positions and at the text, in one attention.

    Keys and values are the normalised picture tokens, then the text tokens. Padding tokens of the
    text are not masked: the released weights were trained with them in view.
    """
    def __init__(self, c: int, c_text: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.text_mapper = nn.Linear(c_text, c)
        self.query, self.key, self.value, self.out = (nn.Linear(c, c) for _ in range(4))

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text (B,N,c_text) -> its keys and values, 2 x (B,N,C), the same at every step."""
        text = self.text_mapper(F.silu(text))                                            # (B, N, C)
        return self.key(text), self.value(text)

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x (B,H,W,C), text (B,N,c_text), or what read() has made of it -> (B,H,W,C)."""
        tokens = layer_norm(x).flatten(1, 2)                                             # (B, H*W, C)
        # Tokens and text go through `key` and `value` apart: into a text that does not learn, nothing need flow back.
        told = text if isinstance(text, tuple) else self.read(text)                      # 2 x (B, N, C)
        k, v = (torch.cat([f(tokens), y], dim=1) for f, y in zip((self.key, self.value), told))          # 2 x (B, H*W + N, C)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(tokens), k, v))    # (B, heads, ..., C / heads)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return x + self.out(h.transpose(1, 2).flatten(2)).view_as(x)                     # (B, H, W, C)


def pixel_unshuffle(x: Tensor, p: int) -> Tensor:
    """(B,H,W,C) -> (B,H/p,W/p,C*p*p): every p x p patch becomes one position. Channel order: c, row, column."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 5, 2, 4).reshape(b, h // p, w // p, c * p * p)


def pixel_shuffle(x: Tensor, p: int) -> Tensor:
    """(B,H,W,C*p*p) -> (B,H*p,W*p,C), the inverse of pixel_unshuffle."""
    b, h, w, c = x.shape
    c //= p * p
    return x.reshape(b, h, w, c, p, p).permute(0, 1, 4, 2, 5, 3).reshape(b, h * p, w * p, c)


def resize_weights(n: int, m: int, width: int, device=None) -> Tensor:
    """(m, n): what each of m rows takes of n rows in the interpolation of resize_semantic, found by interpolating unit vectors.

    In torch bicubic, antialiased, with align_corners follows neither of the two usual conventions (end points do not map to end
    points), so no formula from a textbook gives what the released weights were trained on. Float32, because that is what it was run in.
    width: of the result, as torch does something else again where that is 1.
    """
    units = torch.eye(n, device=device)[None, :, :, None].expand(1, n, n, 2)         # channel i is 1 in row i
    return F.interpolate(units, size=(m, min(width, 2)), mode="bicubic", antialias=True, align_corners=True)[0, :, :, 0].T


def resize_semantic(semantic: Tensor, size: tuple[int, int]) -> Tensor:
    """semantic (B,C,h,w) -> (B,*size,C), bicubic. Interpolation is linear in rows and in columns: two matrix products.

    At the official sizes they take less time than F.interpolate, and they can be differentiated under torch.compile, where it fails.
    """
    (h, w), (H, W), device = semantic.shape[2:], size, semantic.device
    rows, columns = resize_weights(h, H, W, device), resize_weights(w, W, 2, device)
    with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):     # float32; meta has no autocast
        resized = torch.einsum("Hh,bchw,Ww->bHWc", rows, semantic.float(), columns)
    return resized.to(semantic.dtype)


class StageB(nn.Module):
    """The diffusion decoder (DiffNeXt). Defaults are the official sizes (1055 M parameters).

    levels  one pattern per resolution, finest first, repeated blocks[i] times: C = ResBlock,
            T = TimestepBlock, A = AttentionBlock.
    inject  whether a level's ResBlocks get the semantic latent (the finest does not: it would cost
            the most there and adds only what the level below already knows).
    """
    def __init__(self, c_in: int = 4, c_out: int = 4, c_timestep: int = 64, patch_size: int = 2, c_cond: int = 1024,
                 c_hidden=(320, 640, 1280, 1280), heads=(-1, 10, 20, 20), blocks=(4, 4, 14, 4),
                 levels=("CT", "CTA", "CTA", "CTA"), inject=(False, True, True, True), c_semantic: int = 16,
                 c_text: int = 1024, kernel_size: int = 3, dropout: float = 0.1):
        super().__init__()
        self.config = dict(c_in=c_in, c_out=c_out, c_timestep=c_timestep, patch_size=patch_size, c_cond=c_cond,
                           c_hidden=tuple(c_hidden), heads=tuple(heads), blocks=tuple(blocks), levels=tuple(levels),
                           inject=tuple(inject), c_semantic=c_semantic, c_text=c_text, kernel_size=kernel_size,
                           dropout=dropout)
        self.checkpointing = False             # while training: keep only what stands between blocks, compute the inside again
        depth = len(c_hidden)
        self.patch_size, self.c_timestep = patch_size, c_timestep
        self.multiple = patch_size * 2 ** (depth - 1)      # x_t's sides must be multiples of this

        def block(letter: str, level: int, c_skip: int) -> nn.Module:
            if letter == "C":
                return ResBlock(c_hidden[level], c_skip, kernel_size, dropout)
            if letter == "T":
                return TimestepBlock(c_hidden[level], c_timestep)
            if letter == "A":
                return AttentionBlock(c_hidden[level], c_cond, heads[level], dropout)
            raise ValueError(f"Stage B level pattern {levels[level]!r} has an unknown letter {letter!r}: use C, T and A.")

        self.embed = nn.Linear(c_in * patch_size ** 2, c_hidden[0])
        self.embed_text = nn.Linear(c_text, c_cond)
        # Every list below is indexed by level, 0 = finest; None where a level has no such part.
        self.semantic_down, self.semantic_up = (nn.ModuleList(
            nn.Linear(c_semantic, c_cond) if inject[i] else None for i in range(depth)) for _ in range(2))
        self.downsample = nn.ModuleList(
            nn.Conv2d(c_hidden[i - 1], c_hidden[i], 2, stride=2) if i > 0 else None for i in range(depth))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(c_hidden[i], c_hidden[i - 1], 2, stride=2) if i > 0 else None for i in range(depth))
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            c_skip = c_cond if inject[i] else 0
            self.down_blocks.append(nn.ModuleList(block(letter, i, c_skip) for letter in levels[i] * blocks[i]))
            # On the way up, the first block of a level also gets what the way down left there.
            self.up_blocks.append(nn.ModuleList(
                block(letter, i, c_skip + (c_hidden[i] if k == 0 and i < depth - 1 else 0))
                for k, letter in enumerate(levels[i] * blocks[i])))
        self.head = nn.Linear(c_hidden[0], 2 * c_out * patch_size ** 2)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting point for training from scratch; loading weights overwrites all of it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mapper in [self.embed_text, *self.semantic_down, *self.semantic_up]:
            if mapper is not None:
                # Semantic latents have a standard deviation of about 42 (wuerstchen.LATENT_SCALE), hence small.
                nn.init.normal_(mapper.weight, std=0.02)
        nn.init.zeros_(self.head.weight)       # the first prediction is then 2 x_t, whatever the condition
        n = sum(self.config["blocks"])
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.contract.weight *= math.sqrt(1 / n)   # n residual branches add up to a variance of 1
            elif isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)         # every noise level starts alike

    def in_order(self) -> list[tuple[int, nn.ModuleList, nn.Linear | None]]:
        """(level, its blocks, its mapper of the semantic latent), in the order in which they run: down to the coarsest, and up."""
        down, up = ([*zip(range(len(blocks)), blocks, mappers)] for blocks, mappers in
                    ((self.down_blocks, self.semantic_down), (self.up_blocks, self.semantic_up)))
        return down + up[::-1]

    def conditions(self, size: tuple[int, int], semantic: Tensor, text: Tensor) -> list[list]:
        """x_t's (h, w), semantic (B,16,h',w'), text (B,N,c_text) -> for each of in_order(), what each block is to take into account: the
        text (B,N,c_cond) for an AttentionBlock, (B,H,W,c_cond) of the semantic latent, or None, for a ResBlock."""
        text = layer_norm(self.embed_text(text))                                         # (B, N, c_cond)
        result = []
        for level, blocks, mapper in self.in_order():
            H, W = (side // self.patch_size // 2 ** level for side in size)
            condition = None if mapper is None else mapper(resize_semantic(semantic, (H, W)))            # (B, H, W, c_cond)
            result.append([text if isinstance(block, AttentionBlock) else condition for block in blocks])
        return result

    def prepare(self, size: tuple[int, int], semantic: Tensor, text: Tensor, shares: bool = True) -> list[list]:
        """The same, read by the blocks: keys and values, and shares of the first products, 18 % of what a step multiplies.

        It is the same at all noise levels: computed once, given to forward in place of the semantic latent. shares: False
        leaves these to the steps; at 1024 px they take 0.7 GB in float32.
        """
        return [[block.read(told) if isinstance(block, AttentionBlock) else
                 (block.expand(told, block.expand.in_features - told.shape[-1]),) if shares and told is not None and isinstance(block, ResBlock) else told
                 for block, told in zip(blocks, conditions)]
                for (_, blocks, _), conditions in zip(self.in_order(), self.conditions(size, semantic, text))]

    def forward(self, x_t: Tensor, t: Tensor, semantic: Tensor | list, text: Tensor | None = None) -> Tensor:
        """x_t (B,4,h,w), t (B,) in [0, 1], semantic (B,16,h',w') of any size, text (B,N,c_text) -> eps (B,4,h,w).

        In place of semantic and text: prepare((h, w), semantic, text).
        Raises ValueError if the sides of x_t are not multiples of `multiple` (official: 16).
        """
        # From x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps follows eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab),
        # ab = alphas_cumprod. The head has that form: a is the signal, b in (0.001, 0.999) the noise's scale.
        a, b = self.signal_and_scale(x_t, t, semantic, text)
        return (x_t - a) / b                                                             # (B, 4, h, w)

    def signal_and_scale(self, x_t: Tensor, t: Tensor, semantic: Tensor | list, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes and raises what forward does -> its a and b, both (B,4,h,w), for a training that teaches them one by one."""
        if x_t.shape[1] != self.config["c_in"] or x_t.shape[2] % self.multiple or x_t.shape[3] % self.multiple:
            raise ValueError(f"Stage B got latents of shape {tuple(x_t.shape)}, expected (B, {self.config['c_in']}, h, w) "
                             f"with h and w multiples of {self.multiple}: pictures need sides that are multiples of 128.")
        t_embedding = timestep_embedding(t, self.c_timestep).to(x_t.dtype)               # (B, c_timestep)
        told = semantic if isinstance(semantic, list) else self.conditions(x_t.shape[2:], semantic, text)
        x = layer_norm(self.embed(pixel_unshuffle(channels_last(x_t), self.patch_size))) # (B, h/2, w/2, C0)

        skips, depth = [], len(self.down_blocks)
        for i, blocks in enumerate(self.down_blocks):
            if i > 0:
                x = channels_last(self.downsample[i](channels_first(layer_norm(x))))     # (B, H/2, W/2, C_i)
            x = self.run_level(blocks, x, t_embedding, told[i])
            skips.append(x)                                                              # (B, H, W, C_i)
        for i in reversed(range(depth)):
            # The deepest level starts from its own output, so it gets no skip.
            x = self.run_level(self.up_blocks[i], x, t_embedding, told[2 * depth - 1 - i], skips[i] if i < depth - 1 else None)
            if i > 0:
                x = channels_last(self.upsample[i](channels_first(layer_norm(x))))       # (B, 2H, 2W, C_(i-1))

        a, b = pixel_shuffle(self.head(layer_norm(x)), self.patch_size).chunk(2, dim=-1) # 2 x (B, h, w, 4)
        return channels_first(a), channels_first(b.sigmoid() * (1 - 2e-3) + 1e-3)        # 2 x (B, 4, h, w)

    def run_level(self, blocks: nn.ModuleList, x: Tensor, t_embedding: Tensor, told: list, skip: Tensor | None = None) -> Tensor:
        """All blocks of one resolution, x (B,H,W,C) -> (B,H,W,C). told: for each block, see conditions and prepare. `skip` joins the first."""
        def run(block: nn.Module, x: Tensor, told, skip: Tensor | None) -> Tensor:
            if isinstance(block, TimestepBlock):
                return block(x, t_embedding)
            return block(x, *(extra for extra in (skip, told) if extra is not None))

        for k, block in enumerate(blocks):
            inputs = (block, x, told[k], skip if k == 0 else None)
            x = checkpoint(run, *inputs, use_reentrant=False) if self.checkpointing and self.training else run(*inputs)  # (B, H, W, C)
        return x


# --- the semantic compressor: a picture -> the latent that Stage C will learn to produce -------------

class EfficientNetEncoder(nn.Module):
    """EfficientNetV2-S features and a 1x1 mapper to 16 channels (20.2 M parameters). Needs torchvision.

    v1 has the large one, efficientnet_v2_l (117 M), for pictures half as wide. Built without ImageNet weights: the released encoder was trained on, and the constructor must not
    download. Encode in eval() mode: BatchNorm and stochastic depth behave differently in training.
    """
    def __init__(self, c_semantic: int = 16, network: str = "efficientnet_v2_s"):
        super().__init__()
        import torchvision     # only here, so that StageB needs torch alone
        if network not in ("efficientnet_v2_s", "efficientnet_v2_l"):
            raise ValueError(f"the image encoder is to be a {network!r}, expected efficientnet_v2_s or, of v1, efficientnet_v2_l.")
        self.config = dict(c_semantic=c_semantic, network=network)
        self.backbone = getattr(torchvision.models, network)(weights=None).features      # 32 times fewer positions
        self.to_semantic = nn.Conv2d(1280, c_semantic, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_semantic)

    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) from `preprocess` -> raw semantic latents (B,16,H/32,W/32)."""
        return self.norm(self.to_semantic(self.backbone(images)))


class TinyImageEncoder(nn.Module):
    """The same job for 128 px pictures in 7 % of the work: four levels of ResBlocks instead of EfficientNet.

    BatchNorm has a fixed weight of 42 and bias of -1, so that Stage C, which is given (raw + 1) / 42 as
    the released one is, sees numbers of mean 0 and variance 1: what diffusion is made for.
    """
    def __init__(self, c_semantic: int = 16, c_hidden=(32, 64, 128, 256), blocks=(1, 2, 2, 2)):
        super().__init__()
        self.config = dict(c_semantic=c_semantic, c_hidden=tuple(c_hidden), blocks=tuple(blocks))
        self.downsample = nn.ModuleList(
            [nn.Conv2d(3, c_hidden[0], 4, stride=4)]
            + [nn.Conv2d(c_hidden[i - 1], c_hidden[i], 2, stride=2) for i in range(1, len(c_hidden))])
        self.blocks = nn.ModuleList(nn.ModuleList(ResBlock(c) for _ in range(n)) for c, n in zip(c_hidden, blocks))
        self.to_semantic = nn.Conv2d(c_hidden[-1], c_semantic, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_semantic)
        nn.init.constant_(self.norm.weight, 42).requires_grad_(False)
        nn.init.constant_(self.norm.bias, -1).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) from `preprocess` -> raw semantic latents (B,16,H/32,W/32)."""
        x = channels_last(images)                                                        # (B, H, W, 3)
        for downsample, blocks in zip(self.downsample, self.blocks):
            x = layer_norm(channels_last(downsample(channels_first(x))))                 # (B, H', W', C_i)
            for block in blocks:
                x = block(x)
        return self.norm(self.to_semantic(channels_first(x)))                            # (B, 16, H/32, W/32)


def preprocess(images: Tensor, size: int | tuple[int, int] = 768) -> Tensor:
    """images (B,3,H,W) in [0, 1] -> what the image encoders expect: resized (bilinear, antialiased), ImageNet's mean and std.

    size in px: of the shorter side, 0.75 of the picture's, a multiple of 32 (official 1024 -> 768, tiny 128 -> 96);
    the longer side keeps the picture's shape and is cropped in its middle to a multiple of 32. Or (height, width).
    """
    h, w = images.shape[-2:]
    if isinstance(size, int):
        size = (size * h // min(h, w), size * w // min(h, w))                  # rounded down, as in torchvision's Resize
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = size[0] % 32 // 2, size[1] % 32 // 2
    images = images[..., top:top + size[0] // 32 * 32, left:left + size[1] // 32 * 32]
    mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device).view(3, 1, 1)
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std                                                         # (B, 3, H', W')
