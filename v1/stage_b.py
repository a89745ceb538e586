"""Stage B of Würstchen v1, Paella: turns small semantic latents into the VQGAN's tokens.

  caption -CLIP-> (B,77,1024) -[C]-> (B,16,12,12) -[B]-> (B,128,128) tokens -[A]-> (B,3,512,512)

The task is the same as in stage_b.py, but the diffusion is discrete: an image is a grid of tokens, each one of the 8192
vectors in Stage A's codebook. A token cannot have "a little noise". Instead, the noise level t is the share of tokens
that were replaced by random tokens, all of them at t = 1. The network does not see which tokens were replaced. It does
not predict noise either: for every position it predicts the probability of each token in the clean image. It is a
classifier, trained with cross-entropy (losses.py), so there is no step formula. The sampler (sampling.py) draws all
tokens at once from these probabilities. Each token then fits its position, but not yet its neighbours. So the sampler
replaces a share of the tokens (the next, lower t) by random ones, and calls the network again. 8 steps are enough.

              v2, continuous                                v1, discrete
  noise       sqrt(ab) x_0 + sqrt(1 - ab) eps               each token random with probability t
  network     predicts eps, (B,4,h,w)                       predicts logits, (B,8192,h,w)
  loss        squared error                                 cross-entropy
  step        a little of the way to the predicted x_0      all of the way, then part of the way back
  guidance    on eps                                        on logits

In   tokens (B,h,w) int64, h and w multiples of 8; t (B,) noise level, 0 = clean, 1 = noise; semantic
     (B,16,h',w') (zeros = no guidance); text (B,77,1024) of CLIP-H, or None
Out  logits (B,8192,h,w). Note: v2 resizes the semantic latents to the size of the image features. Here they are a
     sequence before the text tokens, and attention finds which of them matter for an image position.

Papers: arXiv:2306.00637v1 (Stage B), arXiv:2211.07292 (Paella).  Needs: torch; stage_b.py, whose blocks it is made of.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stage_b import (AttentionBlock, Depthwise, ResBlock, TimestepBlock, channels_first, channels_last, layer_norm,
                     timestep_embedding, widen)


class SkipResBlock(ResBlock):
    """A ResBlock whose first convolution also gets the U-Net's skip connection, which is as wide as x.

    Each group of the convolution is two neighbouring channels of the concatenated (x, skip): output channel g depends
    on the channels 2g and 2g + 1 of all 2C channels, not on x_g and skip_g.
    """
    def __init__(self, c: int, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__(c, 0, kernel_size, dropout)
        self.depthwise = Depthwise(2 * c, c, kernel_size, padding=kernel_size // 2, groups=c)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Applies the block to x and the skip connection, both (B,H,W,C). Returns (B,H,W,C)."""
        h = channels_first(torch.cat([x, skip], dim=-1))                                 # (B, 2C, H, W)
        h = layer_norm(channels_last(self.depthwise(h)), self.grn.gamma.dtype)           # (B, H, W, C)
        h = self.grn(F.gelu(self.expand(h)))                                             # (B, H, W, 4C)
        return x + self.contract(F.dropout(h, self.dropout, self.training))              # (B, H, W, C)


class StageBV1(nn.Module):
    """v1's Stage B (Paella), which predicts clean tokens. Defaults are the official sizes (731 M parameters).

    levels  one pattern per resolution, finest first; pattern i is repeated blocks[i] times. C = ResBlock,
            T = TimestepBlock, A = AttentionBlock (heads: -1 for a level that has none).
    dropout one rate for all levels, or one for each level.
    """
    def __init__(self, codebook_size: int = 8192, c_token: int = 256, c_timestep: int = 64, patch_size: int = 2,
                 c_cond: int = 1024, c_hidden=(640, 1280, 1280), heads=(-1, 16, 16), blocks=(4, 12, 4),
                 levels=("CT", "CTA", "CTA"), c_semantic: int = 16, c_text: int = 1024, kernel_size: int = 3,
                 dropout: float | list[float] = 0.1):
        super().__init__()
        self.config = dict(codebook_size=codebook_size, c_token=c_token, c_timestep=c_timestep, patch_size=patch_size,
                           c_cond=c_cond, c_hidden=tuple(c_hidden), heads=tuple(heads), blocks=tuple(blocks),
                           levels=tuple(levels), c_semantic=c_semantic, c_text=c_text, kernel_size=kernel_size,
                           dropout=dropout)
        self.checkpointing = False             # True: gradient checkpointing of each block
        depth = len(c_hidden)
        rates = dropout if isinstance(dropout, list | tuple) else [dropout] * depth
        self.patch_size, self.c_timestep, self.codebook_size = patch_size, c_timestep, codebook_size
        self.multiple = patch_size * 2 ** (depth - 1)      # the sides of the token grid must be multiples of this

        def block(letter: str, level: int, skip: bool) -> nn.Module:
            if letter == "C" and skip:
                return SkipResBlock(c_hidden[level], kernel_size, rates[level])
            if letter == "C":
                return ResBlock(c_hidden[level], 0, kernel_size, rates[level])
            if letter == "T":
                return TimestepBlock(c_hidden[level], c_timestep)
            if letter == "A":
                return AttentionBlock(c_hidden[level], c_cond, heads[level], rates[level])
            raise ValueError(f"Stage B level pattern {levels[level]!r} has an unknown letter {letter!r}: "
                             f"use C, T and A.")

        self.embed_token = nn.Embedding(codebook_size, c_token)
        self.embed = nn.Linear(c_token * patch_size ** 2, c_hidden[0])
        self.embed_semantic = nn.Linear(c_semantic, c_cond)
        self.embed_text = nn.Linear(c_text, c_cond)
        # The lists below have an entry for each level, 0 = finest; None if a level has no such layer.
        self.downsample = nn.ModuleList(
            nn.Conv2d(c_hidden[i - 1], c_hidden[i], 2, stride=2) if i > 0 else None for i in range(depth))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(c_hidden[i], c_hidden[i - 1], 2, stride=2) if i > 0 else None for i in range(depth))
        self.down_blocks = nn.ModuleList(nn.ModuleList(
            block(letter, i, skip=False) for letter in levels[i] * blocks[i]) for i in range(depth))
        # The first up block of a level also gets the level's skip connection, except at the deepest level.
        self.up_blocks = nn.ModuleList(nn.ModuleList(
            block(letter, i, skip=k == 0 and i < depth - 1) for k, letter in enumerate(levels[i] * blocks[i]))
            for i in range(depth))
        self.head = nn.Linear(c_hidden[0], c_token * patch_size ** 2)
        self.classify = nn.Linear(c_token, codebook_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets initial values for training from scratch. Loading weights overwrites all of them."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)       # initially, all tokens have the same probability
        nn.init.normal_(self.embed_token.weight, std=math.sqrt(1 / self.codebook_size))
        self.classify.weight.copy_(self.embed_token.weight)      # initial logits: similarity to each token's embedding
        for module in self.modules():
            if isinstance(module, ResBlock):     # so that the sum of all blocks' outputs does not grow with depth
                module.contract.weight *= math.sqrt(1 / sum(self.config["blocks"]))
            elif isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)             # initially, t has no effect

    @torch.no_grad()
    def init_tokens(self, codes: Tensor) -> None:
        """Sets initial token embeddings for training from scratch. They are similar for tokens that look alike. codes:
        Stage A's codebook, (codebook_size,c).

        With random embeddings, a colour that has 50 tokens would have to be learned 50 times. A token's features are
        its code z, all products of two components of z, and cosines of random projections of z. From z and the
        products, a linear layer can compute the logits of a Gaussian around any mean m, because -|z - m|^2 / (2 s^2) is
        linear in them. The cosines are for distributions with several modes (random Fourier features, Rahimi and Recht
        2007).
        """
        codes = codes.float().cpu()         # computed on the CPU, so that the embeddings are the same for all devices
        z = (codes - codes.mean(0)) / codes.std(0)                                       # (K, c)
        rows, columns = torch.triu_indices(z.shape[1], z.shape[1])
        exact = torch.cat([z, z[:, rows] * z[:, columns]], dim=1)                        # (K, c + c (c + 1) / 2)
        exact = exact[:, :self.config["c_token"]]
        n = self.config["c_token"] - exact.shape[1]
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(z.shape[1], n, generator=generator) * 2                 # (c, n)
        phases = torch.rand(n, generator=generator) * 2 * math.pi                        # (n,)
        features = torch.cat([exact, (z @ directions + phases).cos()], dim=1)            # (K, c_token)
        features = (features - features.mean(0)) / features.std(0) / math.sqrt(features.shape[1])
        self.embed_token.weight.copy_(features)
        self.classify.weight.copy_(features)

    def condition(self, semantic: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns the sequence (B,h'*w' + N,c_cond) to which all attention blocks attend: first the semantic latents
        (B,16,h',w'), then the text embeddings (B,N,c_text), if given."""
        sequence = self.embed_semantic(channels_last(semantic).flatten(1, 2))            # (B, h'*w', c_cond)
        if text is not None:
            sequence = torch.cat([sequence, self.embed_text(text)], dim=1)               # (B, h'*w' + N, c_cond)
        return layer_norm(sequence)

    def forward(self, tokens: Tensor, t: Tensor, semantic: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns logits (B,codebook_size,h,w) of the clean tokens, from noised tokens (B,h,w) at noise levels t (B,),
        semantic latents (B,16,h',w') of any size, and text embeddings (B,N,c_text) or None.

        Raises ValueError if h or w is not a multiple of `multiple` (official: 8).
        """
        if tokens.ndim != 3 or tokens.shape[1] % self.multiple or tokens.shape[2] % self.multiple:
            raise ValueError(f"Stage B of v1 got tokens of shape {tuple(tokens.shape)}, expected (B, h, w) with h and "
                             f"w multiples of {self.multiple}: images need sides that are multiples of "
                             f"{4 * self.multiple}.")
        sequence = self.condition(semantic, text)                                        # (B, h'*w' + N, c_cond)
        x = channels_first(layer_norm(self.embed_token(tokens)))                         # (B, c_token, h, w)
        t_embedding = timestep_embedding(t, self.c_timestep).to(dtype := x.dtype)        # (B, c_timestep)
        x = channels_last(F.pixel_unshuffle(x, self.patch_size))                         # (B, h/2, w/2, 4 * c_token)
        x = widen(layer_norm(self.embed(x)))                                             # (B, h/2, w/2, C0)

        skips = []
        for i, blocks in enumerate(self.down_blocks):                                    # down to the coarsest level
            if i > 0:
                x = self.downsample[i](channels_first(layer_norm(x, dtype)))
                x = widen(channels_last(x))                                              # (B, H/2, W/2, C_i)
            x = self.run_level(blocks, x, t_embedding, sequence)
            skips.append(x)
        for i in reversed(range(len(self.up_blocks))):                                   # up to the finest level
            x = self.run_level(self.up_blocks[i], x, t_embedding, sequence, skips[i])
            if i > 0:
                x = self.upsample[i](channels_first(layer_norm(x, dtype)))
                x = widen(channels_last(x))                                              # (B, 2H, 2W, C_(i-1))
        x = channels_first(self.head(layer_norm(x, dtype)))                              # (B, 4 * c_token, h/2, w/2)
        x = F.pixel_shuffle(x, self.patch_size)                                          # (B, c_token, h, w)
        return channels_first(self.classify(layer_norm(channels_last(x))))               # (B, 8192, h, w)

    def run_level(self, blocks: nn.ModuleList, x: Tensor, t_embedding: Tensor, sequence: Tensor,
                  skip: Tensor | None = None) -> Tensor:
        """Applies a level's blocks to x (B,H,W,C). Returns (B,H,W,C). skip: the skip connection, for a SkipResBlock."""
        for block in blocks:
            inputs = ([skip] if isinstance(block, SkipResBlock) else [] if isinstance(block, ResBlock) else
                      [t_embedding if isinstance(block, TimestepBlock) else sequence])
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *inputs, use_reentrant=False)                   # (B, H, W, C)
            else:
                x = block(x, *inputs)                                                    # (B, H, W, C)
        return x
