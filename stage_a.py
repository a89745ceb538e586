"""Stage A, the VQGAN: squeezes pixels four times per side, and paints them back.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

Stage A is trained first and knows nothing of text or diffusion: an autoencoder whose latents can be
snapped to a codebook of 8192 vectors of 4 numbers ("tokens"). Würstchen v1 generates the tokens
themselves; v2, the default, generates the latents *before* snapping, so sampling uses `decode` only.
In   images (B,3,H,W) in [0, 1] (not [-1, 1]), H and W multiples of `downscale` (4)
Out  latents (B,4,H/4,W/4), roughly unit variance; images come back unclamped
Surprise: latents are divided by `scale_factor` (0.3764, fixed by the released weights) on the way
     out of `encode` and multiplied on the way into `decode`; `decode_indices` starts from the
     codebook, which lives in the undivided units, and does not scale.

Inside, activations are channels-last, (B,H,W,C): a Linear or a norm then reads C contiguously, and a
convolution gets its (B,C,H,W) as a view with channels-last strides, which costs nothing.
Paper: arXiv:2306.00637 (Stage A); VQGAN: arXiv:2012.09841; codebook: arXiv:1711.00937.
Needs: torch only. This file works when copied alone.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

OFFICIAL = dict(levels=2, bottleneck_blocks=12, c_hidden=384, c_latent=4, codebook_size=8192, scale_factor=0.3764)


def channels_first(x: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,C,H,W), a view. Convolutions want this order of dimensions."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H,W,C), a view. Linear layers and norms want this order of dimensions."""
    return x.permute(0, 2, 3, 1)


def pixel_unshuffle(x: Tensor, p: int) -> Tensor:
    """(B,H,W,C) -> (B,H/p,W/p,C*p*p): every p x p patch becomes one position. Channel order: c, row, column."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 5, 2, 4).reshape(b, h // p, w // p, c * p * p)


def pixel_shuffle(x: Tensor, p: int) -> Tensor:
    """(B,H,W,C*p*p) -> (B,H*p,W*p,C), the inverse of pixel_unshuffle."""
    b, h, w, c = x.shape
    c //= p * p
    return x.reshape(b, h, w, c, p, p).permute(0, 1, 4, 2, 5, 3).reshape(b, h * p, w * p, c)


class VQResBlock(nn.Module):
    """Two residual halves: a depthwise 3x3 mixes positions, an MLP mixes channels.

    `gammas` are six learned numbers: scale and shift of each half's norm, and how much of each half
    is added. They start at zero, so that an untrained block returns its input.
    """
    def __init__(self, c: int):
        super().__init__()
        # Replicate padding: zeros would paint a dark rim, since this is the stage that makes pixels.
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode="replicate")
        self.expand = nn.Linear(c, 4 * c)
        self.contract = nn.Linear(4 * c, c)
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,W,C) -> (B,H,W,C)."""
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
                or x.numel() <= 2 ** 19):
            return self.mlp(self.mix(x))
        # On a CPU a band of rows at a time: what comes and goes in between then fits its cache, and new memory, which costs time, is
        # taken once. Measured at official size: 8 % less for a decoding. Few numbers fit as they are.
        height, n = x.shape[1], max(1, 2 ** 20 // x[0, 0].numel())
        y, wide = torch.empty(x.shape, dtype=x.dtype), x.new_empty(512, self.expand.out_features)
        for picture, result in zip(x, y):
            for top in range(0, height, n):
                # One row more above and below, where the convolution looks; beyond the rim that is the rim again, as its padding is.
                rows = torch.arange(top - 1, min(top + n, height) + 1).clamp(0, height - 1)
                band = self.mix(picture[rows][None])[0, 1:-1]                            # (n, W, C)
                for part, target in zip(band.flatten(0, 1).split(512), result[top:top + n].flatten(0, 1).split(512)):
                    self.mlp(part, wide[:len(part)], target)
        return y

    def mix(self, x: Tensor) -> Tensor:
        """The first half: x (B,H,W,C) -> (B,H,W,C)."""
        scale, shift, gate = self.gammas[:3]
        h = channels_last(self.depthwise(channels_first(self.norm(x, scale, shift))))    # (B, H, W, C)
        return torch.addcmul(x, h, gate)

    def norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (...,C) -> (...,C) with mean 0 and variance 1 over C, then scaled and shifted, in one pass over x."""
        c = x.shape[-1:]
        return F.layer_norm(x, c, (1 + scale).expand(c), shift.expand(c), eps=1e-6)

    def mlp(self, x: Tensor, wide: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The second half: x (...,C) -> (...,C), in `out` if given, and then what lies between its layers in wide (...,4C)."""
        scale, shift, gate = self.gammas[3:]
        h = self.norm(x, scale, shift)                                                   # (..., C)
        if wide is None:
            h = F.gelu(self.expand(h))                                                   # (..., 4C)
        else:
            h = F.gelu(torch.addmm(self.expand.bias, h, self.expand.weight.T, out=wide), out=wide)
        return torch.addcmul(x, self.contract(h), gate, out=out)


class Codebook(nn.Module):
    """Vector quantisation: every latent vector is replaced by the nearest of `size` learned ones."""
    def __init__(self, size: int, c: int):
        super().__init__()
        # As wide as what BatchNorm makes of the latents. Codes that start closer together than that are a
        # trap: the outermost few win every latent, move, win again, and the others are never used.
        self.codes = nn.Parameter(torch.randn(size, c))                                  # (K, C)

    def nearest(self, z: Tensor) -> Tensor:
        """z (B,H,W,C) -> indices (B,H,W) of the nearest codes, squared Euclidean distance.

        |z - c|^2 = |z|^2 - 2 z.c + |c|^2, and |z|^2 is the same for every c, so it is left out. In
        float32, always: two of 8192 codes in 4 dimensions are often closer than half precision can tell.
        """
        z, codes = z.float(), self.codes.float()
        return (codes.square().sum(1) - 2 * z @ codes.T).argmin(-1)                      # (B, H, W)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z (B,H,W,C) -> quantised z (B,H,W,C), indices (B,H,W), codebook loss, commitment loss.

        The codebook loss pulls codes to the latents, the commitment loss latents to their codes
        (arXiv:1711.00937, eq. 3). argmin has no gradient, so z + (q - z).detach() passes the
        decoder's gradient straight through to z.
        """
        indices = self.nearest(z)                                                        # (B, H, W)
        q = F.embedding(indices, self.codes)                                             # (B, H, W, C)
        codebook_loss, commitment_loss = F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())
        return z + (q - z).detach(), indices, codebook_loss, commitment_loss


class StageA(nn.Module):
    """The VQGAN. Defaults are the official sizes (18.4 M parameters)."""
    def __init__(self, levels: int = 2, bottleneck_blocks: int = 12, c_hidden: int = 384, c_latent: int = 4,
                 codebook_size: int = 8192, scale_factor: float = 0.3764):
        super().__init__()
        widths = [c_hidden // 2 ** i for i in reversed(range(levels))]                   # official: 192, 384
        self.config = dict(levels=levels, bottleneck_blocks=bottleneck_blocks, c_hidden=c_hidden,
                           c_latent=c_latent, codebook_size=codebook_size, scale_factor=scale_factor)
        self.downscale = 2 ** levels            # pixels per latent position and side
        self.scale_factor = scale_factor

        self.embed = nn.Linear(3 * 4, widths[0])                     # after pixel_unshuffle by 2
        self.encoder = nn.ModuleList()
        for i, width in enumerate(widths):
            if i > 0:
                self.encoder.append(nn.Conv2d(widths[i - 1], width, 4, stride=2, padding=1))
            self.encoder.append(VQResBlock(width))
        self.to_latent = nn.Linear(widths[-1], c_latent, bias=False)
        self.norm_latent = nn.BatchNorm2d(c_latent)                  # keeps the latents' scale in check
        self.codebook = Codebook(codebook_size, c_latent)
        self.from_latent = nn.Linear(c_latent, widths[-1])
        self.decoder = nn.ModuleList()
        for i, width in enumerate(reversed(widths)):
            # Nearly all of the decoder's work happens at the coarsest level, where it is cheapest.
            self.decoder.extend(VQResBlock(width) for _ in range(bottleneck_blocks if i == 0 else 1))
            if i < levels - 1:
                self.decoder.append(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1))
        self.to_pixels = nn.Linear(widths[0], 3 * 4)                 # before pixel_shuffle by 2

    def encode_raw(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> latents (B,h,w,4) in the codebook's units, not quantised."""
        if images.shape[1] != 3 or images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise ValueError(f"Stage A got images of shape {tuple(images.shape)}, expected (B, 3, H, W) with "
                             f"H and W multiples of {self.downscale}: crop or resize them first.")
        x = self.embed(pixel_unshuffle(channels_last(images), 2))                        # (B, H/2, W/2, C0)
        for layer in self.encoder:
            x = layer(x) if isinstance(layer, VQResBlock) else channels_last(layer(channels_first(x)))
        return channels_last(self.norm_latent(channels_first(self.to_latent(x))))        # (B, H/4, W/4, 4)

    def decode_raw(self, z: Tensor) -> Tensor:
        """z (B,h,w,4) in the codebook's units -> images (B,3,H,W), unclamped."""
        x = self.from_latent(z)                                                          # (B, h, w, C)
        for layer in self.decoder:
            x = layer(x) if isinstance(layer, VQResBlock) else channels_last(layer(channels_first(x)))
        return channels_first(pixel_shuffle(self.to_pixels(x), 2))                       # (B, 3, H, W)

    def encode(self, images: Tensor, quantise: bool = False) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> latents (B,4,H/4,W/4) as Stage B wants them.

        quantise=True snaps them to the codebook first. Raises ValueError for impossible shapes.
        """
        z = self.encode_raw(images)
        if quantise:
            z = F.embedding(self.codebook.nearest(z), self.codebook.codes)
        return channels_first(z) / self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,4,h,w) from Stage B or `encode` -> images (B,3,4h,4w). Clamp to [0, 1] before saving."""
        if latents.shape[1] != self.config["c_latent"]:
            raise ValueError(f"Stage A got latents of shape {tuple(latents.shape)}, expected "
                             f"{self.config['c_latent']} channels: 16 channels are Stage C latents, decode them with Stage B.")
        return self.decode_raw(channels_last(latents * self.scale_factor))

    def decode_tiled(self, latents: Tensor, tile: int = 64) -> Tensor:
        """The same pictures as `decode`, in tiles of `tile` x `tile` latents: memory for a large one is that for a tile.

        Nothing in the decoder looks at the whole picture, so a tile comes out right if it is decoded with as many
        neighbours around it as the decoder looks far: one for each block, one for each upsampling. The
        tiles then fit together without blending, equal to `decode` but for the rounding of larger products.
        """
        h, w = latents.shape[-2:]
        reach, up = len(self.decoder) + 1, self.downscale
        images = latents.new_empty(len(latents), 3, h * up, w * up)
        for y in range(0, h, tile):
            for x in range(0, w, tile):
                top, left = max(y - reach, 0), max(x - reach, 0)
                part = self.decode(latents[..., top:y + tile + reach, left:x + tile + reach])
                part = part[..., (y - top) * up:(y - top + tile) * up, (x - left) * up:(x - left + tile) * up]
                images[..., y * up:(y + tile) * up, x * up:(x + tile) * up] = part
        return images                                                                    # (B, 3, H, W)

    def encode_indices(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> codebook indices (B,H/4,W/4), int64."""
        return self.codebook.nearest(self.encode_raw(images))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """indices (B,h,w) in [0, codebook_size) -> images (B,3,4h,4w), unclamped."""
        return self.decode_raw(F.embedding(indices, self.codebook.codes))

    def forward(self, images: Tensor, quantise: bool | Tensor = True) -> dict[str, Tensor]:
        """One training pass: images (B,3,H,W) -> dict of images, indices and losses.

        quantise: True, False, or one bool for each row (B,). v2 decodes latents that were never
        quantised, so a decoder trained half of the time without quantisation is good at both.
        Returned losses are unweighted: reconstruction (mean |error|), codebook, commitment. latents (B,h,w,4): not quantised.
        """
        z = self.encode_raw(images)                                                      # (B, h, w, 4)
        q, indices, codebook_loss, commitment_loss = self.codebook(z)
        rows = torch.as_tensor(quantise, device=z.device).reshape(-1, 1, 1, 1)           # (1 or B, 1, 1, 1)
        reconstruction = self.decode_raw(torch.where(rows, q, z))                        # (B, 3, H, W)
        return dict(images=reconstruction, latents=z, indices=indices, reconstruction=(reconstruction - images).abs().mean(),
                    codebook=codebook_loss, commitment=commitment_loss)


class CodebookAverages(nn.Module):
    """The other way to train a codebook: each code is the running mean of the latents nearest to it, without gradients.

    Per code a running number of latents N and their running sum m; the code is m / N. A code then goes where its
    latents are at a speed of its own, whatever the learning rate. arXiv:1711.00937, appendix A.1, eq. 6 to 8.
    """
    def __init__(self, codes: Tensor, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("sizes", torch.ones(len(codes)))                            # (K,)    N
        self.register_buffer("sums", codes.detach().clone())                             # (K, C)  m

    @torch.no_grad()
    def update(self, codes: Tensor, counts: Tensor, sums: Tensor) -> None:
        """codes (K,C), changed in place; counts (K,) and sums (K,C) of the latents of a step, see `count`."""
        self.sizes.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        # Laplace smoothing, as if each code had 1e-5 latents more: without it a code that nothing is near divides by 0.
        total = self.sizes.sum()
        sizes = (self.sizes + 1e-5) * total / (total + len(codes) * 1e-5)                # (K,)
        codes.copy_(self.sums / sizes[:, None])

    @torch.no_grad()
    def restart(self, dead: Tensor, latents: Tensor) -> None:
        """Codes that were moved, dead (K,) bool, begin anew with the one latent they were put at: latents (number of dead, C)."""
        self.sizes[dead], self.sums[dead] = 1.0, latents


@torch.no_grad()
def count(z: Tensor, indices: Tensor, size: int) -> Tensor:
    """Latents z (..., C) and their nearest codes (...) -> (K, 1 + C): for each code, how many there are, and their sum."""
    z = torch.cat([torch.ones_like(z[..., :1]), z], dim=-1).float().flatten(0, -2)       # (N, 1 + C)
    return z.new_zeros(size, z.shape[1]).index_add_(0, indices.flatten(), z)


def perplexity(counts: Tensor) -> Tensor:
    """How often each code was used, (K,) -> as how many codes, used equally often, that is: exp of the entropy; 1 to K."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Distance of two batches of pictures in the eyes of a classifier: its activations, layer by layer, each (B,C,h,w) -> scalar.

    Every position's vector is brought to length 1, so that loud layers and places do not drown the others; squared
    distances are summed over channels, averaged over positions, summed over layers. That is LPIPS (arXiv:1801.03924,
    eq. 1) with all weights 1; its learned weights are not used.
    """
    def unit(x):
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
    return sum((unit(a.float()) - unit(b.float())).square().sum(1).mean() for a, b in zip(features, targets, strict=True))


class PatchDiscriminator(nn.Module):
    """Says for every patch of 18 x 18 pixels how real it looks. Used in training only.

    A mean error is smallest for a blurred average of all plausible details; a discriminator rejects
    blur, since no real patch looks like it (arXiv:1611.07004, sec. 3.2).
    """
    def __init__(self, c: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),                  # (B, c, H/2, W/2)
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),              # (B, 2c, H/4, W/4)
            nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.LeakyReLU(0.2),                    # (B, 4c, H/4, W/4)
            nn.Conv2d(4 * c, 1, 1))                                                      # (B, 1, H/4, W/4)

    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> logits (B,1,H/4,W/4), positive = real."""
        return self.layers(images * 2 - 1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: real patches above +1, painted ones below -1. Logits of any shape -> scalar. arXiv:2012.09841, sec. 3.1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Painted patches should look real. Logits of any shape -> scalar."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor, mean=lambda gradient: gradient) -> Tensor:
    """What the generator's loss must be multiplied with to pull at the last layer as strongly as the reconstruction does.

    Both losses are scalars with a graph, last_layer is the weight that makes the pixels -> scalar without one. Neither a fixed
    weight nor a discriminator that grows sure of itself can then push reconstruction aside. arXiv:2012.09841, eq. 7, clamped.
    mean: averages a gradient over processes, so that all take the same weight.
    """
    lengths = [mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm() for loss in (reconstruction, generator)]
    # Under float16 a gradient may be infinite until the loss scale has come down; the step is then skipped anyway.
    return (lengths[0] / (lengths[1] + 1e-6)).nan_to_num(0.0).clamp(0, 1e4).detach()
