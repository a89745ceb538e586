"""Stage C, the prior: turns a caption into a small semantic latent.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage C decides what is in the picture; B and A add detail. 1024 px become 24 positions per side
(42.67 : 1), so it works on 576 positions, needs no U-shape, and is cheap to train: this is the whole
point of Würstchen. It is a diffusion model: given a noisy latent, the noise level and the text, it
predicts the noise; wuerstchen.py starts from pure noise and removes it in some 30 steps.
In   x_t (B,16,24,24) noisy latent; t (B,) noise level, 0 = clean, 1 = noise; text (B,77,1280) of CLIP-bigG
Out  eps (B,16,24,24), the noise in x_t. Surprise: the last layer does not output it directly, see
     StageC.forward.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and a
convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Paper: arXiv:2306.00637 (Stage C).  Needs: torch only. This file works when copied alone.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

OFFICIAL = dict(c_in=16, c=1536, c_cond=1280, c_timestep=64, depth=32, heads=24, dropout=0.1)


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


def keep_products(context, operation, *inputs, **options) -> CheckpointPolicy:
    """For checkpointing "products": keep what is dear to compute again, the large matrix products and attention itself, but
    no norm, activation or convolution: half of what a block would keep. The products of a LoRA are small, too."""
    name = operation.__name__
    large = "scaled_dot_product" in name or name.startswith(("addmm", "mm", "linear")) and min(inputs[-1].shape) >= 128
    return CheckpointPolicy.MUST_SAVE if large else CheckpointPolicy.PREFER_RECOMPUTE


class StageC(nn.Module):
    """The prior: `depth` times (ResBlock, TimestepBlock, AttentionBlock). Defaults are the official v2 sizes (994 M parameters).

    v1 differs in c_cond alone: 1024, the width of CLIP-H.
    """
    int8_fine = ("expand",)                    # see int8.py: over 32 blocks rounding adds up to 1.2 % in 8 bits, 0.9 % with these in 16

    def __init__(self, c_in: int = 16, c: int = 1536, c_cond: int = 1280, c_timestep: int = 64, depth: int = 32,
                 heads: int = 24, dropout: float = 0.1):
        super().__init__()
        self.config = dict(c_in=c_in, c=c, c_cond=c_cond, c_timestep=c_timestep, depth=depth, heads=heads, dropout=dropout)
        self.c_timestep = c_timestep
        self.checkpointing = None              # while training, compute again in the backward pass, in place of keeping it:
                                               # "blocks" all inside of blocks, "products" all but matrix products
        self.embed = nn.Linear(c_in, c)
        self.embed_text = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.res_blocks = nn.ModuleList(ResBlock(c, dropout=dropout) for _ in range(depth))
        self.timestep_blocks = nn.ModuleList(TimestepBlock(c, c_timestep) for _ in range(depth))
        self.attention_blocks = nn.ModuleList(AttentionBlock(c, c, heads, dropout) for _ in range(depth))
        self.head = nn.Linear(c, 2 * c_in)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting point for training from scratch; loading weights overwrites all of it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)       # the first prediction is then x_t, see forward
        for block in self.res_blocks:
            block.contract.weight *= math.sqrt(1 / len(self.res_blocks))   # depth branches add up to a variance of 1
        for block in self.timestep_blocks:
            nn.init.zeros_(block.mapper.weight)                            # every noise level starts alike

    def prepare(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """text (B,N,c_cond) -> for each attention block its keys and values, 2 x (B,N,C): all of the text that a step needs.

        It is the same at all noise levels: computed once, given to forward in place of the text.
        """
        text = self.embed_text(text)                                                     # (B, N, C)
        return [block.read(text) for block in self.attention_blocks]

    def three_blocks(self, i: int, x: Tensor, t_embedding: Tensor, text: Tensor | tuple) -> Tensor:
        """x (B,h,w,C) -> (B,h,w,C)."""
        return self.attention_blocks[i](self.timestep_blocks[i](self.res_blocks[i](x), t_embedding), text)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor | list) -> Tensor:
        """x_t (B,16,h,w) of any size, t (B,) in [0, 1], text (B,N,c_cond), or prepare(text) -> eps (B,16,h,w).

        Raises ValueError for a wrong number of channels.
        """
        if x_t.shape[1] != self.config["c_in"]:
            raise ValueError(f"Stage C got latents of shape {tuple(x_t.shape)}, expected {self.config['c_in']} channels: "
                             f"4 channels are Stage A latents, encode pictures with the image encoder instead.")
        t_embedding = timestep_embedding(t, self.c_timestep).to(x_t.dtype)               # (B, c_timestep)
        # While training each block reads the text itself, so that with checkpointing none of it need be kept.
        told = text if isinstance(text, list) else [self.embed_text(text)] * len(self.res_blocks)        # each (B, N, C), or keys and values
        x = self.embed(channels_last(x_t))                                               # (B, h, w, C)
        for i in range(len(self.res_blocks)):
            if self.checkpointing and self.training:
                kept = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products)) if self.checkpointing == "products" else {}
                x = checkpoint(self.three_blocks, i, x, t_embedding, told[i], use_reentrant=False, **kept)   # (B, h, w, C)
            else:
                x = self.three_blocks(i, x, t_embedding, told[i])                        # (B, h, w, C)
        a, b = channels_first(self.head(layer_norm(x))).chunk(2, dim=1)                  # 2 x (B, 16, h, w)
        # From x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps follows eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab),
        # ab = alphas_cumprod. The head has that form: a is the signal, |1 - b| the noise's scale. It starts
        # at a = b = 0 and returns x_t, which at high noise is nearly the answer. abs() and 1e-5 keep
        # the divisor positive; a sign of 1 - b cannot be learned.
        return (x_t - a) / ((1 - b).abs() + 1e-5)                                        # (B, 16, h, w)
