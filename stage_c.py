"""Stage C, the prior: turns a caption into small semantic latents. Read this file first.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage C decides what is in the image; Stages B and A add detail. 1024 px become 24 positions per
side (42.67 : 1), so Stage C has only 576 positions, needs no U-Net, and is cheap to train: this is
the whole point of Würstchen. It is a diffusion model: given noisy latents, the noise level and the
text, it predicts the noise. wuerstchen.py starts from pure noise and removes it in about 30 steps.
In   x_t (B,16,h,w) noisy latents of any size; t (B,) noise level, 0 = clean, 1 = noise;
     text (B,77,1280) of CLIP-bigG
Out  eps (B,16,h,w), the noise in x_t. Note: the last layer does not output eps directly, see
     StageC.forward.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and
a convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Weights: python -m tools.weights convert IN OUT --to ours; StageC(**config).load_state_dict(...)
Paper: arXiv:2306.00637 (Stage C).  Needs: torch only. This file works when copied alone.
"""
if __name__ == "__main__":
    raise SystemExit("stage_c.py defines StageC. To generate images: python sample.py --help")

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)


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


def keep_products(context, operation, *inputs, **options) -> CheckpointPolicy:
    """Decides for checkpointing "products" which results to keep for the backward pass: those of
    attention and large matrix products. All others (norms, LoRA, ...) are recomputed."""
    name = operation.__name__
    large = name.startswith(("addmm", "mm", "linear")) and min(inputs[-1].shape) >= 128
    keep = large or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# {name: options of `checkpoint`}. "blocks" keeps only the inputs of blocks and recomputes the rest.
CHECKPOINTING = dict(blocks={}, products=dict(
    context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products)))


class StageC(nn.Module):
    """The prior: `depth` times (ResBlock, TimestepBlock, AttentionBlock).

    Defaults are the official v2 sizes (994 M parameters). v1 differs in c_cond only: 1024, the
    width of CLIP-H."""
    def __init__(self, c_in: int = 16, c: int = 1536, c_cond: int = 1280, c_timestep: int = 64,
                 depth: int = 32, heads: int = 24, dropout: float = 0.1):
        super().__init__()
        self.config = dict(c_in=c_in, c=c, c_cond=c_cond, c_timestep=c_timestep, depth=depth,
                           heads=heads, dropout=dropout)
        self.c_timestep = c_timestep
        self.checkpointing = None              # in training: a name in CHECKPOINTING or None
        self.embed = nn.Linear(c_in, c)
        self.embed_text = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.res_blocks = nn.ModuleList(ResBlock(c, dropout=dropout) for _ in range(depth))
        self.timestep_blocks = nn.ModuleList(TimestepBlock(c, c_timestep) for _ in range(depth))
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(c, c, heads, dropout) for _ in range(depth))
        self.head = nn.Linear(c, 2 * c_in)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets initial values for training from scratch. Loading weights overwrites all of them."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)       # an untrained network then predicts x_t
        for block in self.res_blocks:          # so the blocks' sum does not grow with the depth
            block.contract.weight *= math.sqrt(1 / len(self.res_blocks))
        for block in self.timestep_blocks:     # so that t has no effect at first
            nn.init.zeros_(block.mapper.weight)

    def block(self, i: int, x: Tensor, t_embedding: Tensor, text: Tensor) -> Tensor:
        """Applies the three blocks of index i to x (B,h,w,C). text (B,N,C): from embed_text."""
        x = self.timestep_blocks[i](self.res_blocks[i](x), t_embedding)              # (B, h, w, C)
        return self.attention_blocks[i](x, text)                                     # (B, h, w, C)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predicts the noise eps (B,16,h,w) in x_t (B,16,h,w). t (B,) in [0, 1], text (B,N,c_cond).

        Give x_t in float32 even if weights are in half precision: the last line magnifies rounding
        errors. eps has x_t's dtype. Raises ValueError for a wrong number of channels."""
        if x_t.shape[1] != self.config["c_in"]:
            raise ValueError(
                f"Stage C got latents of shape {tuple(x_t.shape)}, expected {self.config['c_in']} "
                f"channels: 4 channels are Stage A latents, use the image encoder instead.")
        dtype = next(self.parameters()).dtype
        t_embedding = timestep_embedding(t, self.c_timestep).to(dtype)            # (B, c_timestep)
        text = self.embed_text(text)                                                    # (B, N, C)
        x = widen(self.embed(channels_last(x_t).to(dtype)))                          # (B, h, w, C)
        for i in range(len(self.res_blocks)):
            if self.checkpointing and self.training:
                x = checkpoint(self.block, i, x, t_embedding, text, use_reentrant=False,
                               **CHECKPOINTING[self.checkpointing])                  # (B, h, w, C)
            else:
                x = self.block(i, x, t_embedding, text)                              # (B, h, w, C)
        x = channels_first(self.head(layer_norm(x, dtype)))                          # (B, 32, h, w)
        a, b = x.to(x_t.dtype).chunk(2, dim=1)                                   # 2 x (B, 16, h, w)
        # With ab = alphas_cumprod, x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps, and therefore
        # eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab). The head's two outputs stand for the unknowns:
        # a for the signal sqrt(ab) x_0, |1 - b| for the noise scale sqrt(1 - ab). At first
        # a = b = 0, so eps = x_t, a good start at high noise. abs() and 1e-5 avoid division by 0.
        return (x_t - a) / ((1 - b).abs() + 1e-5)                                    # (B, 16, h, w)
