"""Stage B of Würstchen v1, Paella: turns a small semantic latent into the VQGAN's tokens.

  caption -CLIP-> (B,77,1024) -[C]-> (B,16,12,12) -[B]-> (B,128,128) tokens -[A]-> (B,3,512,512)

The same task as stage_b.py's, as diffusion over something discrete: a picture is a grid of tokens, each one of the
8192 vectors in Stage A's codebook. There is no "a little noise" on a token. Instead noise level t is the share of
tokens that were replaced by random ones, all of them at t = 1, and nothing marks which. The network does not predict
noise either, but for every position the probability of each token in the clean picture: it is a classifier, trained
with cross-entropy, and so there is no step formula. The sampler draws all tokens at once from these
probabilities, which fit each place but not yet each other; replaces a share of them, the next lower t, by random
ones; and asks again. 8 steps do: see `sample`, at the bottom. The whole difference, side by side:

              v2, continuous                                v1, discrete
  noise       sqrt(ab) x_0 + sqrt(1 - ab) eps               each token random with probability t
  network     predicts eps, (B,4,h,w)                       predicts logits, (B,8192,h,w)
  loss        squared error                                 cross-entropy
  step        a little of the way to the predicted x_0      all of the way, then part of the way back
  guidance    on eps                                        on logits

In   tokens (B,h,w) int64, h and w multiples of 8; t (B,) noise level, 0 = clean, 1 = noise; semantic
     (B,16,h',w') (zeros = no guidance); text (B,77,1024) of CLIP-H, or None
Out  logits (B,8192,h,w). Surprise: the semantic latent is not laid over the picture as in v2; its positions are
     words before the words of the text, and each place in the picture finds by attention what concerns it.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and a
convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Papers: arXiv:2306.00637v1 (Stage B), arXiv:2211.07292 (Paella).  Needs: torch only. This file works when copied alone.
"""
import itertools
import math
from typing import Callable, Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OFFICIAL = dict(codebook_size=8192, c_token=256, c_timestep=64, patch_size=2, c_cond=1024, c_hidden=(640, 1280, 1280), heads=(-1, 16, 16),
                blocks=(4, 12, 4), levels=("CT", "CTA", "CTA"), c_semantic=16, c_text=1024, kernel_size=3, dropout=0.1)
MODES = ("multinomial", "argmax", "quant")


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


class SkipResBlock(ResBlock):
    """A ResBlock whose depthwise convolution also reads a U-Net skip of the same width.

    Its groups are neighbours in (x, skip): output channel g sees channels 2g and 2g + 1 of the 2C, not x_g and skip_g.
    """
    def __init__(self, c: int, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__(c, 0, kernel_size, dropout)
        self.depthwise = nn.Conv2d(2 * c, c, kernel_size, padding=kernel_size // 2, groups=c)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x, skip (B,H,W,C) -> (B,H,W,C)."""
        h = layer_norm(channels_last(self.depthwise(channels_first(torch.cat([x, skip], dim=-1)))))      # (B, H, W, C)
        h = self.grn.after_gelu(self.expand(h))                                          # (B, H, W, 4C)
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


class StageBV1(nn.Module):
    """The token model (Paella). Defaults are the official sizes (731 M parameters).

    levels  one pattern per resolution, finest first, repeated blocks[i] times: C = ResBlock,
            T = TimestepBlock, A = AttentionBlock.
    """
    def __init__(self, codebook_size: int = 8192, c_token: int = 256, c_timestep: int = 64, patch_size: int = 2, c_cond: int = 1024,
                 c_hidden=(640, 1280, 1280), heads=(-1, 16, 16), blocks=(4, 12, 4), levels=("CT", "CTA", "CTA"), c_semantic: int = 16,
                 c_text: int = 1024, kernel_size: int = 3, dropout: float = 0.1):
        super().__init__()
        self.config = dict(codebook_size=codebook_size, c_token=c_token, c_timestep=c_timestep, patch_size=patch_size, c_cond=c_cond,
                           c_hidden=tuple(c_hidden), heads=tuple(heads), blocks=tuple(blocks), levels=tuple(levels),
                           c_semantic=c_semantic, c_text=c_text, kernel_size=kernel_size, dropout=dropout)
        self.checkpointing = False             # while training: keep only what stands between blocks, compute the inside again
        depth = len(c_hidden)
        self.patch_size, self.c_timestep, self.codebook_size = patch_size, c_timestep, codebook_size
        self.multiple = patch_size * 2 ** (depth - 1)      # the sides of the token grid must be multiples of this

        def block(letter: str, level: int, skip: bool) -> nn.Module:
            if letter == "C":
                return SkipResBlock(c_hidden[level], kernel_size, dropout) if skip else ResBlock(c_hidden[level], 0, kernel_size, dropout)
            if letter == "T":
                return TimestepBlock(c_hidden[level], c_timestep)
            if letter == "A":
                return AttentionBlock(c_hidden[level], c_cond, heads[level], dropout)
            raise ValueError(f"Stage B level pattern {levels[level]!r} has an unknown letter {letter!r}: use C, T and A.")

        self.embed_token = nn.Embedding(codebook_size, c_token)
        self.embed = nn.Linear(c_token * patch_size ** 2, c_hidden[0])
        self.embed_semantic = nn.Linear(c_semantic, c_cond)
        self.embed_text = nn.Linear(c_text, c_cond)
        # Every list below is indexed by level, 0 = finest; None where a level has no such part.
        self.downsample = nn.ModuleList(
            nn.Conv2d(c_hidden[i - 1], c_hidden[i], 2, stride=2) if i > 0 else None for i in range(depth))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(c_hidden[i], c_hidden[i - 1], 2, stride=2) if i > 0 else None for i in range(depth))
        self.down_blocks = nn.ModuleList(nn.ModuleList(
            block(letter, i, skip=False) for letter in levels[i] * blocks[i]) for i in range(depth))
        # On the way up, the first block of a level also gets what the way down left there; the deepest starts from it.
        self.up_blocks = nn.ModuleList(nn.ModuleList(
            block(letter, i, skip=k == 0 and i < depth - 1) for k, letter in enumerate(levels[i] * blocks[i])) for i in range(depth))
        self.head = nn.Linear(c_hidden[0], c_token * patch_size ** 2)
        self.classify = nn.Linear(c_token, codebook_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting point for training from scratch; loading weights overwrites all of it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)       # the first prediction is then that all tokens are alike
        nn.init.normal_(self.embed_token.weight, std=math.sqrt(1 / self.codebook_size))
        self.classify.weight.copy_(self.embed_token.weight)      # a token's score begins as the likeness to its own embedding
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.contract.weight *= math.sqrt(1 / sum(self.config["blocks"]))      # the branches add up to a variance of 1
            elif isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)             # every noise level starts alike

    @torch.no_grad()
    def init_tokens(self, codes: Tensor) -> None:
        """For training from scratch: embeddings that know which tokens look alike. codes (codebook_size,c): Stage A's codebook.

        Otherwise all tokens are equally strange to each other, and a colour that has 50 tokens must be learned 50 times. A token's
        features are its code z, all products of two of its numbers, and cosines of random projections of z. With z and the products
        a linear layer can say "near m, give or take s" in any direction, as -|z - m|^2 / (2 s^2) is linear in them; the cosines are for what has
        several likely places (random Fourier features, Rahimi and Recht 2007).
        """
        codes = codes.float().cpu()                                                      # so that every device draws the same
        z = (codes - codes.mean(0)) / codes.std(0)                                       # (K, c)
        rows, columns = torch.triu_indices(z.shape[1], z.shape[1])
        exact = torch.cat([z, z[:, rows] * z[:, columns]], dim=1)[:, :self.config["c_token"]]        # (K, c + c (c + 1) / 2)
        n = self.config["c_token"] - exact.shape[1]
        generator = torch.Generator().manual_seed(0)
        directions, phases = torch.randn(z.shape[1], n, generator=generator) * 2, torch.rand(n, generator=generator) * 2 * math.pi
        features = torch.cat([exact, (z @ directions + phases).cos()], dim=1)                        # (K, c_token)
        features = (features - features.mean(0)) / features.std(0) / math.sqrt(features.shape[1])
        self.embed_token.weight.copy_(features)
        self.classify.weight.copy_(features)

    def condition(self, semantic: Tensor, text: Tensor | None = None) -> Tensor:
        """semantic (B,16,h',w'), text (B,N,c_text) -> the sequence (B,h'*w' + N,c_cond) that all attention blocks look at, semantic latent first."""
        sequence = self.embed_semantic(channels_last(semantic).flatten(1, 2))            # (B, h'*w', c_cond)
        return layer_norm(sequence if text is None else torch.cat([sequence, self.embed_text(text)], dim=1))

    def prepare(self, semantic: Tensor, text: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of that for each attention block, in the order in which they run, the same at all noise levels: computed
        once, given to forward in place of the semantic latent."""
        sequence = self.condition(semantic, text)
        return [block.read(sequence) for blocks in (*self.down_blocks, *reversed(self.up_blocks)) for block in blocks if isinstance(block, AttentionBlock)]

    def forward(self, tokens: Tensor, t: Tensor, semantic: Tensor | list, text: Tensor | None = None) -> Tensor:
        """tokens (B,h,w), t (B,) in [0, 1], semantic (B,16,h',w') of any size, text (B,N,c_text) -> logits (B,8192,h,w).

        In place of semantic and text: prepare(semantic, text).
        Raises ValueError if h and w are not multiples of `multiple` (official: 8).
        """
        if tokens.ndim != 3 or tokens.shape[1] % self.multiple or tokens.shape[2] % self.multiple:
            raise ValueError(f"Stage B of v1 got tokens of shape {tuple(tokens.shape)}, expected (B, h, w) with h and w multiples of "
                             f"{self.multiple}: pictures need sides that are multiples of {4 * self.multiple}.")
        told = iter(semantic if isinstance(semantic, list) else itertools.repeat(self.condition(semantic, text)))
        t_embedding = timestep_embedding(t, self.c_timestep).to(self.embed.weight.dtype)     # (B, c_timestep)
        x = pixel_unshuffle(layer_norm(self.embed_token(tokens)), self.patch_size)       # (B, h/2, w/2, 4 * c_token)
        x = layer_norm(self.embed(x))                                                    # (B, h/2, w/2, C0)

        def run(blocks: nn.ModuleList, x: Tensor, skip: Tensor | None = None) -> Tensor:
            for block in blocks:
                more = ([skip] if isinstance(block, SkipResBlock) else [] if isinstance(block, ResBlock) else
                        [t_embedding if isinstance(block, TimestepBlock) else next(told)])
                x = checkpoint(block, x, *more, use_reentrant=False) if self.checkpointing and self.training else block(x, *more)
            return x                                                                     # (B, H, W, C_i)

        skips = []
        for i, blocks in enumerate(self.down_blocks):
            if i > 0:
                x = channels_last(self.downsample[i](channels_first(layer_norm(x))))     # (B, H/2, W/2, C_i)
            x = run(blocks, x)
            skips.append(x)
        for i in reversed(range(len(self.up_blocks))):
            x = run(self.up_blocks[i], x, skips[i])
            if i > 0:
                x = channels_last(self.upsample[i](channels_first(layer_norm(x))))       # (B, 2H, 2W, C_(i-1))
        x = layer_norm(pixel_shuffle(self.head(layer_norm(x)), self.patch_size))         # (B, h, w, c_token)
        return channels_first(self.classify(x))                                          # (B, 8192, h, w)


# ----- training -------------------------------------------------------------------------------------

def training_levels(u: Tensor) -> Tensor:
    """Uniform u in [0, 1) -> noise levels to train at: nearly even, and 7.5 % at t = 1 exactly, where sampling starts."""
    return ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)


def add_noise(tokens: Tensor, t: Tensor, random_tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces each token with probability t: tokens, random_tokens (B,h,w), t (B,), uniform u (B,h,w) in [0, 1] -> noised (B,h,w), mask.

    The mask, True where a token was replaced, is for the loss; the network never sees it.
    """
    mask = u <= t[:, None, None]
    return torch.where(mask, random_tokens, tokens), mask


def loss_weight(t: Tensor, mask: Tensor, least: float = 0.3) -> Tensor:
    """t (B,), mask (B,h,w) -> (B,h,w): 1 for tokens that were replaced; for those that were not, from 1 at t = 1 down to
    `least` at t = 0, since to repeat what is there is easily learned."""
    return 1 - ~mask * ((1 - t) * (1 - least))[:, None, None]


def training_errors(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """logits (B,K,h,w) for noised tokens, the clean tokens (B,h,w), t (B,), the mask of add_noise -> the error of each picture (B,).

    Cross-entropy against 0.9 of the true token and 0.1 of all alike (arXiv:1512.00567, sec. 7): many of 8192 codes look
    the same, and to be sure of one would be wrong. Weighted mean over each picture, so that pictures count alike.
    """
    weight = loss_weight(t, mask)                                                        # (B, h, w)
    # With the tokens' scores side by side, as they are in memory: a quarter of the time that (B,K,h,w) would take.
    scores = channels_last(logits).flatten(0, 2).float()                                 # (B*h*w, K)
    errors = F.cross_entropy(scores, tokens.flatten(), reduction="none", label_smoothing=smoothing).view_as(weight)      # (B, h, w)
    return (errors * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def training_loss(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """The mean of training_errors over the pictures: a scalar."""
    return training_errors(logits, tokens, t, mask, smoothing).mean()


# ----- sampling -------------------------------------------------------------------------------------

def choose(logits: Tensor, mode: str, temperature: float, u: Tensor, codes: Tensor | None = None) -> Tensor:
    """logits (B,K,h,w) -> tokens (B,h,w).

    multinomial  draws each by its probability, softmax(logits / temperature): low temperatures keep to what is likely.
    argmax       takes the likeliest.
    quant        takes the code nearest to the expected one, the mean of all codes (K,c) by probability: smooth, a little blurred.
    u (B,h,w) uniform in [0, 1], for multinomial.
    """
    logits = channels_last(logits)                                                       # (B, h, w, K)
    if mode == "argmax":
        return logits.argmax(-1)
    scores = (logits.float() / temperature).softmax(-1)                                  # (B, h, w, K)
    if mode == "quant":
        mean, codes = scores @ codes.float(), codes.float()                              # (B, h, w, c)
        return (codes.square().sum(1) - 2 * mean @ codes.T).argmin(-1)                   # |mean - code|^2, less what all share
    # One uniform number per position picks the token where the cumulated probability passes it: unlike
    # torch.multinomial, this asks no generator, so that each picture of a batch can have its own.
    heights = scores.cumsum(-1)                                                          # (B, h, w, K)
    return torch.searchsorted(heights, u[..., None] * heights[..., -1:])[..., 0]         # (B, h, w)


def per_step(name: str, value, steps: int) -> list:
    """One for all, a pair for the first and the last step with a straight line between, or a list -> a list, one for each step."""
    if isinstance(value, (str, float, int)):
        return [value] * steps
    if len(value) == 2 and not isinstance(value[0], str):
        return torch.linspace(*value, steps).tolist()
    if len(value) != steps:
        raise ValueError(f"{name} has {len(value)} values for {steps} steps: give one, one for each step, or the first and the last.")
    return list(value)


def temperatures(value, steps: int) -> list[float]:
    """What `sample` takes as temperature -> one for each step. Raises ValueError for what is not above 0."""
    values = per_step("temperature", value, steps)
    if not all(value > 0 for value in values):
        raise ValueError(f"the temperature is {min(values):g}, expected more than 0; mode argmax is what 0 would mean.")
    return values


@torch.no_grad()
def sample(predict: Callable[[Tensor, Tensor, bool], Tensor], noise: Tensor, uniform: Callable[[], Tensor], levels: Tensor,
           temperature: float | Sequence[float] = (1.0, 0.6), guidance: float | Sequence[float] = 2.0,
           mode: str | Sequence[str] = "multinomial", renoise_steps: int | None = None, codes: Tensor | None = None,
           start: Tensor | None = None, watch: Callable | None = None, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Random tokens (B,h,w) -> tokens (B,h,w) of pictures.

    predict(tokens, t, both) -> logits (B,K,h,w) with condition; if `both`, and below them those without: (2B,K,h,w).
    uniform() -> random numbers (B,h,w) in [0, 1]; asked twice in every step, whether they are used or not.
    levels            (n + 1,) falling noise levels, the first at most 1: linspace(1, 0, 9) are the original's 8 steps.
    temperature, guidance, mode   see choose; each may change from step to step, see per_step. Guidance acts on logits; a
                      scale of 1 is none, in half the time.
    renoise_steps     after so many steps tokens are replaced at random again; default all but the last.
    codes             Stage A's codebook (K,c), for mode quant.
    start             tokens to start from, in place of the noise, when levels[0] < 1.
    watch(i, t, tokens) -> None or other tokens: called after step i with what it chose, and the level it is noised to next.
    Raises ValueError for settings that make no sense, FloatingPointError as soon as logits are not finite, on a GPU in the end.
    """
    steps = len(levels) - 1
    if steps < 1 or not (levels[1:] < levels[:-1]).all() or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"levels must be at least two strictly falling numbers in [0, 1], got {levels.tolist()}.")
    temperature, guidance, mode = temperatures(temperature, steps), per_step("guidance", guidance, steps), per_step("mode", mode, steps)
    if not set(mode) <= set(MODES):
        raise ValueError(f"the mode is {(set(mode) - set(MODES)).pop()!r}, expected one of {', '.join(MODES)}.")
    if "quant" in mode and codes is None:
        raise ValueError("mode quant needs Stage A's codebook: give its vectors as codes.")
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    tokens, on_device, finite = noise if start is None else start, levels.to(noise.device), []
    for i in progress(range(steps)):
        t, t_next = (on_device[k].expand(len(tokens)) for k in (i, i + 1))               # (B,), (B,)
        logits = predict(tokens, t, guidance[i] != 1)                                    # (B, K, h, w) or (2B, K, h, w)
        if guidance[i] != 1:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, guidance[i])                 # (B, K, h, w)
        finite.append(logits.isfinite().all())
        # A GPU that is asked in every step has nothing to do until the next arrives: it is asked in the end.
        if (tokens.device.type == "cpu" or i == steps - 1) and not (said := torch.stack(finite)).all():
            k = said.tolist().index(False)
            raise FloatingPointError(f"step {k + 1} of {steps} (t = {levels[k]:.3f})")
        tokens = choose(logits, mode[i], temperature[i], uniform(), codes)               # (B, h, w)
        changed = watch(i, levels[i + 1].item(), tokens) if watch is not None else None
        tokens, u = tokens if changed is None else changed.to(tokens), uniform()
        if i < renoise_steps:
            # The same random tokens every time, as in the original.
            tokens, _ = add_noise(tokens, t_next, noise, u)
    return tokens
