"""Trains Stage B, the diffusion decoder, jointly with the image encoder, or alone for pictures of one kind. One process or many.

  python train_b.py --weights tiny --freeze-encoder --out runs/smoke --steps 20 --batch 4 --data scenes:all:64      # CPU smoke run
  python train_b.py --freeze-encoder --data FOLDER --cache CACHE --out runs/domain                         # official decoder, your pictures
  python train_b.py --init random --config models/tiny --vqgan runs/a/vqgan --image-encoder runs/encoder/image_encoder --text-encoder none \\
      --loss head --cache CACHE --out runs/b
  torchrun --nproc-per-node 8 train_b.py --init random --backbone IMAGENET.pth --data 'shards/{000..511}.tar' --resolution 512 768 1024 \\
      --batch 16 --fsdp --out runs/b                                                                       # the official size, from nothing
  python train_b.py --v1 --weights tiny --init random --config models/tiny-v1 --image-encoder models/tiny/image_encoder --freeze-encoder \\
      --cache CACHE --out runs/b_v1                                                                        # v1's Stage B, which makes tokens

  picture -[image encoder]-> semantic (B,16,h',w') -noise, dropout-> [B] -> a, b;  eps_hat = (x_t - a) / b
  picture -VQGAN, frozen-> x_0 (B,4,h,w) -noise-> x_t                -> [B]

A diffusion autoencoder: the encoder squeezes a picture into 1/42 of its width and height, 16 numbers each, and the only
way to lower the loss is to put into them what Stage B needs to denoise the VQGAN's latents. One pass of the loop at the
bottom is one optimizer step. All that is random is a function of (seed, position in the stream of samples), so that any
number of processes sees the same work, and a resumed run equals an unbroken one. Surprise: with --grad-accum that is
exact only with --freeze-encoder, as the encoder's BatchNorm sees one forward pass (of all processes) at a time.
Stage C knows only the encoder it was trained on: where that goes on learning, Stage C must be trained anew.
With --v1 all is the same but what Stage B does: see `if args.v1` in the loop, stage_b_v1.py and tokens.py.
Paper: arXiv:2306.00637 (Stage B).  Needs: torch, torchvision, numpy, pillow, tqdm; transformers for text; our other files.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--v1", action="store_true", help="train the Stage B of Würstchen v1, by cross-entropy over the VQGAN's tokens")
    g.add_argument("--weights", help="what to start from, and where the other parts come from: a name or folder as for sample.py (default: v2, with --v1 v1)")
    for part, what in (("decoder", "Stage B"), ("image-encoder", "the image encoder, also with --init random"), ("vqgan", "Stage A"),
                       ("text-encoder", "Stage B's text encoder; none: one zero token in place of text, where there is no text encoder yet,")):
        g.add_argument(f"--{part}", help=f"{what} from this folder instead")
    g.add_argument("--init", choices=["weights", "random"], default="weights", help="random: Stage B and the image encoder start from nothing")
    g.add_argument("--config", help="sizes for --init random, in diffusers' words: a folder with decoder/config.json and image_encoder/config.json, a file for Stage B alone, "
                                    "or official (the default)")
    g.add_argument("--backbone", help="a file of torchvision's efficientnet_v2_s, trained on ImageNet, from which a new image encoder starts, as the paper's did")
    g.add_argument("--freeze-encoder", action="store_true", help="leave the image encoder as it is, to the bit: Stage C stays valid")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="scenes:all:32000:1", help="a folder of pictures, with captions or without; tar shards, 'a/{000..031}.tar'; hub:NAME; see data.py "
                                                                 "(default: emoji scenes, scenes:all:NUMBER:SEED)")
    g.add_argument("--resolution", type=int, nargs="+", help="px: the side of a square picture, or of one with the same area; of several, each step draws one "
                                                             "(default: 128 for the tiny encoder, 1024 for others, with --v1 512)")
    g.add_argument("--max-ratio", type=float, default=2.0, help="widest shape of the buckets that pictures are sorted into; 1: all are cropped to squares")
    g.add_argument("--crop", choices=["center", "random"], default="center", help="what of a picture is kept where its shape is not its bucket's")
    g.add_argument("--random-flip", action="store_true", help="mirror half of the pictures; not where left and right matter")
    g.add_argument("--caption-dropout", type=float, default=0.05, help="share of captions replaced by the empty one, each by itself")
    g.add_argument("--semantic-dropout", type=float, default=0.05, help="share of semantic latents that are zeroed, each by itself, for guidance")
    g.add_argument("--semantic-noise", type=float, default=0.3, help="share of semantic latents that get noise of a level up to 0.5, each by itself, so that Stage C's small errors do no harm")
    g.add_argument("--filter", action="append", default=[], metavar="min_KEY=NUMBER", help="keep only samples whose .json has KEY from (min_) or up to (max_) a number")
    g.add_argument("--cache", help="folder for the VQGAN's latents, with --freeze-encoder semantic ones, too, and text embeddings, computed once, shared between runs")
    g.add_argument("--cache-dtype", choices=["fp16", "fp32"], default="fp16", help="how they are kept")
    g.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    g = p.add_argument_group("optimisation; small: with the tiny encoder")
    g.add_argument("--steps", type=int, default=6000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, help="pictures per process and forward pass; halve it if memory runs out and double --grad-accum (default: 4; small 32)")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum x processes")
    g.add_argument("--lr", type=float, help="peak learning rate (default: 1e-4 from nothing, 1e-5 from weights; small 1.5e-3)")
    g.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default="trapezoid", help="of the learning rate, after the warm-up; trapezoid: down in the last fifth")
    g.add_argument("--warmup", type=int, default=100, help="optimizer steps in which the learning rate rises")
    g.add_argument("--weight-decay", type=float, default=1e-3, help="not for norms and biases")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm, over all processes, above which gradients are scaled down")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, which are the ones kept; 0: no averaging (default: 0.999; small 0.998)")
    g.add_argument("--blind", type=int, help="first steps in which x_t is empty, so that Stage B must paint the picture from the semantic latent alone: the fastest "
                                             "way to learn that (default: 0; small, from nothing 2000; with --v1, where all tokens are then random, 0)")
    g.add_argument("--guide-attention", type=float, help="with --v1: weight of a loss that shows attention which semantic vector lies over which place "
                                                        "(default: 0; small 0.3, for as long as it learns)")
    g.add_argument("--high-noise", type=float, help="exponent that draws noise levels towards 1, where Stage B must rely on the semantic latent; 1 draws them evenly (default: 1; small 1.5, with --v1 1)")
    g.add_argument("--loss", choices=["eps", "head"], help="eps, the default: error of the predicted noise, as the released models were trained; head: signal and noise "
                                                                          "scale, the two outputs it is made of, each by itself, which learns faster from random weights")
    g.add_argument("--loss-weight", choices=["v", "p2", "none"], help="what errors count by noise level, see training/losses.py (default: p2, the original's; small v)")
    g.add_argument("--even-contrast", action="store_true", help="let pictures of little contrast (a fish on its own colour, a snowflake's lines) count more: the squared error alone hardly sees them")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="autocast type (default: bf16 on a GPU, else fp32)")
    g.add_argument("--checkpointing", action="store_true", help="compute blocks again in the backward pass: a fraction of the memory, a third slower")
    g.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
    g.add_argument("--fsdp", action="store_true", help="split weights and optimizer over the processes, where they do not fit one GPU")
    g.add_argument("--max-bad-steps", type=int, default=10, help="stop after so many steps in a row with a loss or gradient that is not finite")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder: checkpoints/, samples/, log.jsonl, curves.png, and in the end decoder/ and image_encoder/")
    g.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    g.add_argument("--save-every", type=int, default=250, help="steps between checkpoints; SIGTERM and Ctrl-C save, too")
    g.add_argument("--keep", type=int, default=2, help="checkpoints kept")
    g.add_argument("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    g.add_argument("--val-every", type=int, default=250, help="steps between validations; 0: none")
    g.add_argument("--val-data", help="pictures to validate on, as --data (default: some of --data, which then tell how well it is fitted; for emoji scenes unseen ones)")
    g.add_argument("--val-count", type=int, default=16, help="pictures in a validation, each at 10 noise levels with noise that is always the same, and in the PSNR of --sample-every")
    g.add_argument("--sample-every", type=int, default=500, help="steps between grids and PSNR of pictures through encoder, B and A, step 0 included; 0: none")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="log there, too, if it is installed")
    g.add_argument("--dry-run", action="store_true", help="say what would be trained on what, with memory and first captions, and stop")
    g.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository of the Hugging Face hub")
    args = p.parse_args(argv)
    args.weights = args.weights or ("v1" if args.v1 else "v2")
    return args


if __name__ == "__main__":
    ARGS = parse_args()      # before the imports below, which take seconds: --help and mistyped options answer at once

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from tqdm import tqdm

from loading import hub
from loading.layouts import SHIPPED, locate
from v1 import training as tokens
from training.cache import Cache, CachedTexts, fill_cache, hash_of, latent_key
from training.data import bucket_sizes, fit, nearest_bucket, open_dataset, read_filters
from training.order import BatchSampler, batches, sample_rng
from training.losses import LOSS_WEIGHTS
from loading.files import read_config, to_half, write_atomically, write_files, STEM
from extras.images import grid, psnr
from training.report import draw_curves, dry_run
from training.results import push, settings_table
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder, preprocess
from v1.losses import training_errors
from v1.sampling import add_noise as replace_tokens
from v1.stage_b import StageBV1
from loading.errors import RESUME_HINT, UserError, as_user_error, exit_on_user_error
from training.checkpoints import Checkpoints, Log
from training.optim import EMA, learning_rate
from training.processes import GracefulExit, Processes, SynchronisedBatchNorm
from loading.names import config_to_diffusers, config_to_ours, to_diffusers
from loading.weights import (check_widths, load_image_encoder, load_stage_a, load_stage_b, load_stage_b_v1,
                             load_text_encoder, save_model, stage_b_of)
from wuerstchen import (Noise, Sampling, TextEncoder, add_noise, alphas_cumprod, denoise, per_row, scale_semantic,
                        to_pil, unscale_semantic)

T_GRID = [0.05 + 0.1 * i for i in range(10)]         # noise levels of the validation
STEPS, STEPS_V1 = (4, 12), (4, 8)                    # of the sampler, in the grids
PARTS = ("decoder", "image_encoder", "vqgan", "text_encoder")


def check(args) -> None:
    """Ends the program for arguments that make no sense, before anything is loaded."""
    for name, low in (("steps", 1), ("batch", 1), ("grad_accum", 1), ("save_every", 1), ("keep", 1), ("log_every", 1), ("val_count", 1), ("blind", 0), ("guide_attention", 0)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {low}")
    for name in ("caption_dropout", "semantic_dropout", "ema"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number from 0 to below 1")
    if not 0 <= args.semantic_noise <= 1:
        raise UserError(f"--semantic-noise is {args.semantic_noise}, expected a share from 0 to 1")
    if args.high_noise is not None and args.high_noise <= 0:
        raise UserError(f"--high-noise is {args.high_noise}, expected an exponent above 0: 1 draws noise levels evenly, 1.5 more of the high ones")
    for name in ("loss", "loss_weight", "even_contrast"):
        if args.v1 and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for v2, whose Stage B makes latents; --v1 has a loss of its own, cross-entropy over tokens: leave one of them away")
    if args.guide_attention and not args.v1:
        raise UserError("--guide-attention is for --v1: in v2 the semantic latent is laid over the picture, so that there is nothing to find")
    if args.config and args.init != "random":
        raise UserError("--config gives the sizes of a new Stage B: add --init random")
    if args.backbone and (args.init != "random" or args.image_encoder):
        raise UserError("--backbone is where a new image encoder starts: it goes with --init random and without --image-encoder")
    if args.init == "random" and args.decoder:
        raise UserError("--decoder says where Stage B starts, and so does --init random: leave one of them away")
    if args.init == "random" and args.freeze_encoder and not args.image_encoder:
        raise UserError("--freeze-encoder would keep an image encoder that has learned nothing: add --image-encoder FOLDER")
    if args.cache and args.crop == "random":
        raise UserError("--cache keeps what does not change: it does not go with --crop random")


def set_defaults(args, small: bool, device) -> None:
    """What suits an emoji model of a few million weights on a CPU, or a released one, see models/tiny/README.md."""
    new = args.init == "random"
    for name, value in dict(resolution=[128 if small else 512 if args.v1 else 1024], batch=32 if small else 4, lr=1.5e-3 if small else 1e-4 if new else 1e-5,
                            ema=0.998 if small else 0.999, blind=2000 if small and new and not args.v1 else 0,
                            guide_attention=0.3 if small and args.v1 else 0, high_noise=1.5 if small and not args.v1 else 1.0, loss="ce" if args.v1 else "eps",
                            loss_weight="none" if args.v1 else "v" if small else "p2", dtype="fp32" if device.type == "cpu" else "bf16").items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# ----- one sample -------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """Item (position, index, size) -> dict of all that the step needs of a sample: a function of these three and the seed alone.

    position: place in the endless stream of samples; index: which picture that is; size: number of the picture's size.
    pixels (h,w,3) uint8; with a cache x_0 (4,h/4,w/4), and with a frozen encoder also stored (16,h',w') in place of pixels.
    c_latent: channels of x_0; with --v1, where x_0 is tokens (h/4,w/4), the number of codes.
    """
    def __init__(self, pictures, sizes, groups: int, args, c_latent: int, caches: dict | None = None, replaced: dict[int, int] | None = None):
        self.pictures, self.sizes, self.args, self.c_latent, self.caches, self.replaced = pictures, sizes, args, c_latent, caches or {}, replaced or {}
        self.same_bucket = [np.flatnonzero(pictures.bucket == group) for group in range(groups)]

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        (position, index, number), args = where, self.args
        h, w = self.sizes[number]

        def rng(purpose: str) -> np.random.Generator:
            return sample_rng(args.seed, position, purpose)
        flip, item = bool(args.random_flip and rng("flip").random() < 0.5), {}
        index = self.replaced.get(index, index)
        if "stored" not in self.caches:
            pixels, index = self.pictures.read_or_next(index, self.same_bucket[number % len(self.same_bucket)])      # (H, W, 3)
            item["pixels"] = torch.from_numpy(np.array(fit(pixels, (h, w), args.crop, flip, rng("crop") if args.crop == "random" else None)))
        for name, cache in self.caches.items():
            latent = cache.get(latent_key(self.pictures, index, (h, w), flip))
            if latent is None:
                raise UserError(f"an entry of --cache {args.cache} was damaged while it was in use, and removed: start again with --resume auto")
            item[name] = torch.from_numpy(latent).long() if latent.dtype.kind == "i" else torch.from_numpy(latent).float()
        caption = ""
        if args.text_encoder != "none":
            captions = self.pictures.captions(index)
            caption = captions[rng("caption").integers(len(captions))]
            if rng("caption dropout").random() < args.caption_dropout:
                caption = ""
        spoil = rng("semantic")
        noisy, dropped, level = spoil.random() < args.semantic_noise, spoil.random() < args.semantic_dropout, spoil.random() * 0.5
        eps_semantic = spoil.standard_normal((16, h * 3 // 128, w * 3 // 128), dtype=np.float32)
        if args.v1:
            noise = tokens.draw(rng("noise"), self.c_latent, h // 4, w // 4)
        else:
            noise = dict(eps=torch.from_numpy(rng("noise").standard_normal((self.c_latent, h // 4, w // 4), dtype=np.float32)))
        return item | noise | dict(caption=caption, chance=np.float32(rng("timestep").random()), position=position,
                                   t_semantic=np.float32(level if noisy else 0), eps_semantic=torch.from_numpy(eps_semantic), dropped=bool(dropped))


class SizedPlan(BatchSampler):
    """A BatchSampler whose steps have sizes: the third of what step() returns is the place of (resolution, bucket) in `sizes`.

    Which resolution step k has is a function of (seed, k). buckets: of the first resolution, which is the largest, with the
    most shapes; in the others, each of them goes to the nearest.
    """
    def __init__(self, shapes: np.ndarray, resolutions: list[int], max_ratio: float, batch: int, seed: int):
        resolutions = sorted(set(resolutions), reverse=True)
        self.shapes = bucket_sizes(resolutions[0], max_ratio=max_ratio)
        self.sizes, self.resolutions = [*self.shapes], resolutions                       # number = r * len(shapes) + bucket
        for resolution in resolutions[1:]:
            smaller = bucket_sizes(resolution, max_ratio=max_ratio)
            self.sizes += [smaller[i] for i in nearest_bucket(self.shapes, smaller)]
        self.bucket = nearest_bucket(shapes, self.shapes)                                # (N,)
        super().__init__(self.bucket, batch, seed)

    def step(self, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        positions, indices, bucket = super().step(k)
        drawn = sample_rng(self.seed, k, "resolution").integers(len(self.resolutions))
        return positions, indices, int(drawn) * len(self.shapes) + bucket


# ----- what the loop works with -----------------------------------------------------------------------

def to_images(pixels, device):
    """(B,h,w,3) uint8 -> (B,3,h,w) float32 in [0, 1], in channels-last memory, as the pixels are already."""
    return pixels.to(device).permute(0, 3, 1, 2).float() / 255


def to_encoder(images):
    """(B,3,h,w) in [0, 1] -> what the image encoder takes, (B,3,3h/4,3w/4)."""
    h, w = images.shape[2:]
    return preprocess(images, (h * 3 // 4, w * 3 // 4))


def noise_levels(chance, step: int, args):
    """chance (B,) in [0, 1) -> noise levels t (B,). A little past 1, clamped: 7 % train at t = 1, where sampling starts."""
    if step < args.blind and args.v1:        # all tokens are random
        return torch.ones_like(chance)
    if step < args.blind:                    # middling ones, at which the head's `a` is x_0 at a size that is easy to learn
        return 0.4 + 0.5 * chance
    t = ((1 - chance) * 1.08 + 0.001).clamp(0.001, 1)
    return 1 - (1 - t) ** args.high_noise


def errors(a, b, x_0, x_t, eps, t, loss: str):
    """What the head said, a and b, all (B,4,h,w), against what is right -> the mean squared error of each picture (B,)."""
    if loss == "eps":
        return ((x_t - a) / b - eps).square().mean(dim=(1, 2, 3))
    # eps = (x_t - a) / b is right for a = sqrt(ab) x_0 and b = sqrt(1 - ab), and both are known. In eps, any error of b is
    # multiplied by x_t's noise, and that drowns what the picture has to teach. The divisor turns errors of `a` into
    # errors of eps; its least value keeps nearly clean pictures from ruling.
    ab = per_row(alphas_cumprod(t), x_0)                                                 # (B, 1, 1, 1)
    squares = (a - ab.sqrt() * x_0).square() + (b - (1 - ab).sqrt()).square()            # (B, 4, h, w)
    return (squares / (1 - ab).clamp(min=0.2)).mean(dim=(1, 2, 3))


def contrast_weight(x_0):
    """Lets pictures of little contrast count more: x_0 (B,4,h,w) -> (B,), to be divided by its mean over many pictures.

    How much a wrong object costs in squared error goes with its contrast, how wrong it is does not. The variance
    within the latent of an emoji scene is 0.04 at least, 0.3 in the median, 1.2 at most.
    """
    return 1 / (x_0.var(dim=(2, 3)).mean(dim=1) + 0.15)                  # 0.15: few shall not rule; 0.3 to 2.2 times the mean


def mean_contrast_weight(pictures, plan, encode, args) -> float:
    """Its mean over 256 pictures of the data. That of a batch would make the weight of a picture depend on its neighbours."""
    if not args.even_contrast:
        return 1.0
    chosen, weights = sample_rng(args.seed, 0, "contrast").permutation(len(pictures))[:256], []
    for i in chosen.tolist():
        pixels, i = pictures.read_or_next(i, np.flatnonzero(plan.bucket == plan.bucket[i]))
        weights.append(contrast_weight(encode(torch.from_numpy(np.array(fit(pixels, plan.shapes[plan.bucket[i]])))[None])).item())
    return float(np.mean(weights))


# ----- what is trained ---------------------------------------------------------------------------------

def find_places(args) -> dict:
    """Where the parts are that are needed; nothing else is fetched."""
    files = {part: getattr(args, part) for part in PARTS if getattr(args, part) not in (None, "none")}
    wanted = ["vqgan"] + ["decoder", "image_encoder"] * (args.init == "weights") + ["text_encoder", "tokenizer"] * (args.text_encoder != "none")
    paths = locate(args.weights, files, tuple(wanted))
    if args.init == "weights" and paths["image_encoder"] is None:
        raise UserError(f"{args.weights} has no image encoder: add --image-encoder FOLDER")
    return paths


def in_units(decoder) -> bool:
    """Are semantic latents (raw + 1) / 42 for Stage C? In v1, which has CLIP-H's texts of width 1024, they are raw: see Wuerstchen.load."""
    return not (isinstance(decoder, StageBV1) and decoder.config["c_text"] == 1024)


def new_encoder(kind: type = EfficientNetEncoder, backbone: str | None = None, units: bool = True, **config):
    encoder = kind(**config)
    # Fixed, so that what Stage C is given, (raw + 1) / 42 or raw, has mean 0 and variance 1: what diffusion is made for.
    torch.nn.init.constant_(encoder.norm.weight, 42 if units else 1)
    torch.nn.init.constant_(encoder.norm.bias, -1 if units else 0)
    if backbone:
        if kind is not EfficientNetEncoder:
            raise UserError(f"--backbone is for EfficientNetV2-S, --config asks for a {kind.__name__}")
        try:
            tensors = torch.load(backbone, map_location="cpu", weights_only=True)
            encoder.backbone.load_state_dict({name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")})
        except Exception as error:           # torch has many kinds for a file that will not do
            raise UserError(f"--backbone {backbone} cannot be used, expected torchvision's efficientnet_v2_s: {str(error).splitlines()[0][:150]}") from error
    return encoder


def build(args, paths) -> tuple:
    """Stage B and the image encoder, in float32, since the steps of an optimizer are too small for less."""
    stage = StageBV1 if args.v1 else StageB
    if args.init == "weights":
        if stage_b_of(paths["decoder"]) is not stage:
            raise UserError(f"{paths['decoder']} is a Stage B of {'v2, --v1 trains that of v1: leave it away' if args.v1 else 'v1: add --v1'}, or --init random for a new one")
        return (load_stage_b_v1 if args.v1 else load_stage_b)(paths["decoder"]), load_image_encoder(paths["image_encoder"])
    decoder, kind, sizes = {}, EfficientNetEncoder, {}
    try:
        if args.config not in (None, "official"):
            folder = Path(args.config)
            decoder = config_to_ours(read_config(folder / "decoder") if folder.is_dir() else json.loads(folder.read_text()), stage)
            place = locate(folder, parts=("image_encoder",))["image_encoder"] if folder.is_dir() else None
            if place is not None:
                config = read_config(place)
                kind = TinyImageEncoder if config.get("_class_name") == "TinyImageEncoder" else EfficientNetEncoder
                sizes = config_to_ours(config, kind)
        decoder = stage(**decoder)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--config {args.config} cannot be used: {error}") from error
    if args.image_encoder:
        return decoder, load_image_encoder(paths["image_encoder"])
    return decoder, new_encoder(kind, args.backbone, in_units(decoder), **sizes)


class Learner(torch.nn.Module):
    """Stage B, and the image encoder if it learns, as one module with one forward: what DDP needs."""
    def __init__(self, decoder, encoder=None):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder

    def forward(self, source, x_t=None, t=None, text=None, t_semantic=None, eps_semantic=None, dropped=None):
        """source: pictures (B,3,H,W) for the encoder, or raw semantic latents (B,16,h',w'); x_t (B,4,h,w), t (B,), text (B,N,D)
        -> a, b, 2 x (B,4,h,w), or of tokens x_t (B,h,w) logits (B,K,h,w); without x_t the raw semantic latents.

        t_semantic (B,): level of the noise eps_semantic (B,16,h',w') on them, 0 for none; dropped (B,): which are zeroed.
        """
        semantic = self.encoder(source).float() if source.shape[1] == 3 else source      # (B, 16, h', w')
        if x_t is None:
            return semantic
        if t_semantic is not None:
            if in_units(self.decoder):       # noise is of variance 1, as the latents are in Stage C's eyes
                noised = unscale_semantic(add_noise(scale_semantic(semantic), eps_semantic, t_semantic))
            else:
                noised = add_noise(semantic, eps_semantic, t_semantic)
            semantic = torch.where(per_row(t_semantic > 0, semantic), noised, semantic)
            semantic = semantic.masked_fill(per_row(dropped, semantic), 0.0)
        if isinstance(self.decoder, StageBV1):
            return self.decoder(x_t, t, semantic, text)                                  # (B, K, h, w)
        return self.decoder.signal_and_scale(x_t, t, semantic, text)                     # 2 x (B, 4, h, w)


def build_optimizer(model, args):
    """AdamW, of groups with a `share` of the learning rate each; weight decay for matrices only.

    Adam moves every weight by about the learning rate; behind semantic latents, which are of size 42, a step moves the
    output 42 times as far as elsewhere. 1/42 would even that out; 1/8 learned no worse.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim >= 2, "semantic_" in name.split("decoder.")[-1] and name.startswith("decoder.")), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=args.weight_decay * matrix, share=1 / 8 if mapper else 1.0)
                              for (matrix, mapper), params in groups.items()], lr=args.lr, betas=(0.9, 0.99), fused=True)


# ----- looking at a run -------------------------------------------------------------------------------

class Fixed:
    """The pictures of validation and grids, always the same ones, as squares of the largest resolution.

    pixels (N,r,r,3) uint8, captions, x_0 (N,4,r/4,r/4); source (N,...): what the learner takes, pictures or semantic latents.
    """
    def __init__(self, args, processes, pictures, resolution: int, index_folder, encoders: dict):
        source = args.val_data
        if source is None and args.data.split(":")[0] == "scenes":       # of another seed: never in training
            source = f"scenes:all:{max(args.val_count, 64)}:1000000000"
        with processes.main_first(), as_user_error():
            pictures = open_dataset(source, index_folder=index_folder, captions_required=False) if source else pictures
        chosen = np.random.default_rng([args.seed, 1]).permutation(len(pictures))[:args.val_count]
        rows = [(*pictures.read_or_next(i, np.arange(len(pictures))), sample_rng(args.seed, i, "validation")) for i in chosen.tolist()]
        self.pixels = torch.from_numpy(np.stack([fit(pixels, (resolution, resolution), "center", False, rng) for pixels, _, rng in rows]))
        self.captions = [pictures.captions(i)[0] for _, i, _ in rows]
        self.x_0 = torch.cat([encoders["x_0"](row) for row in self.pixels.split(1)])
        if "stored" in encoders:
            self.source = unscale_semantic(torch.cat([encoders["stored"](row) for row in self.pixels.split(1)]))
        else:
            self.source = to_encoder(to_images(self.pixels, processes.device))


@torch.no_grad()
def validate(model, fixed, embed, weight, autocast, args, processes) -> dict[str, float]:
    """Raw loss at each level of T_GRID, and their weighted mean, with pictures and noise that never change.

    The training loss tells little: which t were drawn decides it. Nothing is dropped here, and no noise put on the semantic latent.
    """
    t = torch.tensor(T_GRID, device=processes.device)                                    # (10,)
    sums = torch.zeros(len(T_GRID) + 1, device=processes.device)
    for i, caption in enumerate(fixed.captions):
        if not args.fsdp and i % processes.world != processes.rank:      # under FSDP all must compute together
            continue
        x_0 = fixed.x_0[i:i + 1].expand(len(t), -1, -1, -1)                              # (10, 4, h, w)
        eps = torch.from_numpy(sample_rng(args.seed, i, "validation").standard_normal(tuple(x_0.shape), dtype="float32")).to(x_0)
        x_t = add_noise(x_0, eps, t)
        with autocast:
            semantic = model(fixed.source[i:i + 1]).expand(len(t), -1, -1, -1)
            a, b = model(semantic, x_t, t, embed([caption]).expand(len(t), -1, -1))
        sums[:-1] += errors(a.float(), b.float(), x_0, x_t, eps, t, args.loss)
        sums[-1] += 1
    sums = sums if args.fsdp else processes.sum(sums)
    raw = sums[:-1] / sums[-1]
    return dict(val_loss=(raw * weight(t)).mean().item()) | {f"val_loss_t_{level:.2f}": value for level, value in zip(T_GRID, raw.tolist())}


@torch.no_grad()
def reconstruct(model, vqgan, fixed, embed, scale: float, steps: int, autocast, args):
    """The fixed pictures through encoder, B and A, from noise that is always the same: (N,3,r,r) in [0, 1]."""
    painted = []
    for i in range(0, len(fixed.captions), args.batch):
        x_0, captions = fixed.x_0[i:i + args.batch], fixed.captions[i:i + args.batch]
        draw, text = Noise([args.seed + i + k for k in range(len(captions))]), embed(captions)
        with autocast:
            semantic = model(fixed.source[i:i + args.batch])

        def predict(x, t, both):
            if both:                         # and without condition: zeros, and the empty caption
                x, t = torch.cat([x, x]), torch.cat([t, t])
            with autocast:
                a, b = model(torch.cat([semantic, 0 * semantic]) if both else semantic, x, t,
                             torch.cat([text, embed([""] * len(text))]) if both else text)
            return (x - a.float()) / b.float()
        latents = denoise(predict, draw(*x_0.shape[1:]).to(x_0), lambda: draw(*x_0.shape[1:]).to(x_0), Sampling(steps, guidance=scale))
        painted.append(vqgan.decode(latents).clamp(0, 1))
    return torch.cat(painted)                                                            # (N, 3, r, r)


def look_at(model, vqgan, fixed, embed, own_guidance: float, autocast, args) -> tuple:
    """-> PSNR of each way through the chain, and a grid of up to 8 pictures: how guidance and steps change them."""
    real = to_images(fixed.pixels, fixed.x_0.device)
    columns, values = {"picture": real}, {}
    decode, paint, steps_tried = (vqgan.decode_indices, tokens.reconstruct, STEPS_V1) if args.v1 else (vqgan.decode, reconstruct, STEPS)
    with torch.no_grad():
        columns["A alone"] = torch.cat([decode(row).clamp(0, 1) for row in fixed.x_0.split(args.batch)])
    values["psnr_a"] = psnr(columns["A alone"], real)
    for scale in dict.fromkeys((1.0, own_guidance)):
        for steps in steps_tried:
            images = columns[f"guidance {scale:g}, {steps} steps"] = paint(model, vqgan, fixed, embed, scale, steps, autocast, args)
            values[f"psnr_guidance_{scale:g}_steps_{steps}"] = psnr(images, real)
    shown = [to_pil(images[:8]) for images in columns.values()]
    return values, grid([image for row in zip(*shown) for image in row], len(columns), [*columns])


# ----- the run ----------------------------------------------------------------------------------------

def stage_c_fits(args) -> bool:
    """Has the frozen image encoder a Stage C, in --weights? It is from there, or --image-encoder names that one."""
    if not args.freeze_encoder or args.init == "weights" or args.weights in hub.NAMES:
        return args.freeze_encoder and args.init == "weights"
    own = locate(args.weights, parts=("image_encoder",))["image_encoder"]
    return own is not None and own.resolve() == Path(args.image_encoder).resolve()


def write_result(args, decoder, encoder, weights: dict, pictures: int, lines: list[dict]) -> None:
    """decoder/, image_encoder/ and README.md; and where Stage C still fits, base.json, which tells sample.py --weights where the rest is.

    decoder, encoder: of the right classes and sizes, for weights named decoder.* and, if the encoder has learned, encoder.*
    lines: of log.jsonl, where PSNR stands
    """
    def filled(model, name: str):
        model.load_state_dict({key.removeprefix(name): tensor for key, tensor in weights.items() if key.startswith(name)}, assign=True)
        return model
    out = Path(args.out)
    (save_model if args.v1 else save_model)(filled(decoder, "decoder."), out / "decoder")
    encoder = encoder if args.freeze_encoder else filled(encoder, "encoder.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in to_diffusers(encoder.state_dict(), encoder).items()}
    half = to_half(tensors)
    if args.freeze_encoder and any(not torch.equal(half[name].to(tensor.dtype), tensor) for name, tensor in tensors.items()):
        half = tensors                       # what is frozen does not change by rounding, either
    write_files(config_to_diffusers(encoder), half, out / "image_encoder", STEM)
    if stage_c_fits(args):
        files = {part: str(Path(getattr(args, part)).resolve()) for part in PARTS if getattr(args, part) not in (None, "none")}
        base = dict(weights=args.weights if args.weights in (*SHIPPED, *hub.NAMES) else str(Path(args.weights).resolve()), files=files)
        write_atomically(out / "base.json", lambda path: path.write_text(json.dumps(base, indent=2) + "\n"))
    last = next((line for line in reversed(lines) if "psnr_a" in line), {})
    measured = "\n".join([f"| PSNR of {args.val_count} pictures | dB |", "|---|---:|"] * bool(last) +
                         [f"| {'Stage A alone' if name == 'psnr_a' else name[5:].replace('_', ' ')} | {value:.2f} |" for name, value in last.items() if name.startswith("psnr")])
    grids = sorted((out / "samples").glob("*.png"))
    use = f'--weights {out.name} --prompt "..."' if stage_c_fits(args) else \
        f"--weights {args.weights} --decoder {out.name}/decoder --image-encoder {out.name}/image_encoder --reconstruct photo.png"
    card = f"""---
license: mit
tags: [wuerstchen, diffusion-autoencoder]
---
# {out.name}

Würstchen's Stage B{' of v1' if args.v1 else ''}{'' if args.freeze_encoder else ' and its image encoder'}, from {'nothing' if args.init == 'random' else f'`{args.weights}`'}, {args.steps} steps on {pictures} pictures.
{'' if args.freeze_encoder else 'Stage C knows only the encoder it was trained on, and must be trained anew.'}

    python sample.py {use}

{measured}

{f'![pictures, and what is left of them](samples/{grids[-1].name})' if grids else ''}

| setting | value |
|---|---|
{settings_table(args)}
"""
    write_atomically(out / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def main(args):
    check(args)
    checkpoints = Checkpoints(f"{args.out}/checkpoints", args.keep)
    resumed = checkpoints.find(args.resume)
    stop, processes = GracefulExit(), Processes(args.device)
    device, first = processes.device, processes.rank == 0
    torch.manual_seed(args.seed)

    # --- models ------------------------------------------------------------------------------------
    paths = find_places(args)
    decoder, encoder = build(args, paths)
    kind, small = type(encoder), isinstance(encoder, TinyImageEncoder)
    set_defaults(args, small, device)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "workers", "device", "push_to_hub")}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    vqgan = load_stage_a(paths["vqgan"]).to(device).requires_grad_(False)               # eval mode, float32: the targets are exact
    codes = vqgan.config["codebook_size"]
    if args.v1 and codes != decoder.codebook_size:
        raise UserError(f"the VQGAN has {codes} tokens, Stage B is for {decoder.codebook_size}: give it another --config, or another --vqgan")
    if args.v1 and args.init == "random":
        decoder.init_tokens(vqgan.codebook.codes)
    text_encoder = None
    if args.text_encoder != "none":
        check_widths(decoder.config["c_text"], paths["text_encoder"], "Stage B")
        text_encoder = TextEncoder(*load_text_encoder(paths["text_encoder"], paths["tokenizer"], dtype))
        text_encoder.model.to(device).requires_grad_(False)
    encoder.to(device).requires_grad_(not args.freeze_encoder)
    encoder.norm.requires_grad_(False)                                                   # its 42 and -1 fix the latents' units
    if args.freeze_encoder:
        encoder.eval()                   # else BatchNorm's statistics would go on drifting, gradients or not
    elif processes.many:
        SynchronisedBatchNorm.convert(encoder)
    decoder.checkpointing = args.checkpointing
    model = Learner(decoder.to(device), None if args.freeze_encoder else encoder).train()

    # --- data --------------------------------------------------------------------------------------
    index = Path(args.cache or args.out) / "index"
    with processes.main_first(), as_user_error():             # what one has indexed or fetched serves the others
        pictures = open_dataset(args.data, index_folder=index, captions_required=False, **read_filters(args.filter))
        plan = SizedPlan(pictures.sizes, args.resolution, args.max_ratio, args.batch * args.grad_accum * processes.world, args.seed)
    pictures.bucket = plan.bucket
    small_numbers = dict(dtype=dict(fp16="float16", fp32="float32")[args.cache_dtype])
    caches, text_cache = {}, None
    if args.cache:
        kept = dict(kind="tokens", dtype=tokens.cache_dtype(codes)) if args.v1 else dict(kind="vqgan", **small_numbers)
        caches["x_0"] = Cache(args.cache, hash_of(vqgan), dict(crop="center", **kept))
        if args.freeze_encoder:              # the same entries as train_c.py's
            caches["stored"] = Cache(args.cache, hash_of(encoder), dict(kind="latents", crop="center", **small_numbers))
        if text_encoder:
            text_cache = Cache(args.cache, hash_of(text_encoder.model), dict(kind="texts", **small_numbers))
    texts = CachedTexts(text_encoder, text_cache) if text_encoder else None

    @torch.no_grad()
    def encode_vqgan(pixels):
        """(B,h,w,3) uint8 -> x_0 (B,4,h/4,w/4) float32, never quantised; with --v1 its tokens (B,h/4,w/4) int64."""
        return (vqgan.encode_indices if args.v1 else vqgan.encode)(to_images(pixels, device))

    @torch.no_grad()
    def encode_semantic(pixels):
        """(B,h,w,3) uint8 -> the frozen encoder's latents (B,16,h',w') as Stage C knows them, of about unit variance."""
        return scale_semantic(encoder(to_encoder(to_images(pixels, device))))

    def embed(captions: list[str]):
        """Captions -> (B,N,c_text); without a text encoder one zero token each."""
        if texts is None:
            return torch.zeros(len(captions), 1, decoder.config["c_text"], device=device)
        return texts(captions).to(device)

    if first:
        print(pictures.describe(), file=sys.stderr)
    if args.dry_run:
        h, w = plan.sizes[plan.step(0)[2]]
        x_0 = f"tokens ({plan.batch}, {h // 4}, {w // 4})" if args.v1 else f"x_0 and eps ({plan.batch}, {decoder.config['c_in']}, {h // 4}, {w // 4})"
        return dry_run(args, model, pictures, plan.sizes, plan, processes, f"{x_0}, semantic latents ({plan.batch}, 16, {h * 3 // 128}, {w * 3 // 128})") \
            if first else None
    encoders = dict(x_0=encode_vqgan) | (dict(stored=encode_semantic) if args.freeze_encoder else {})
    replaced = {}
    if args.cache:
        with as_user_error():
            replaced = fill_cache(pictures, lambda i: plan.sizes[plan.bucket[i]::len(plan.shapes)], args.random_flip, caches, encoders, texts, processes)
    fixed = Fixed(args, processes, pictures, plan.resolutions[0], index, encoders) if args.val_every or args.sample_every else None
    mean_contrast = mean_contrast_weight(pictures, plan, encode_vqgan, args)
    if args.cache and args.freeze_encoder:
        encoder.to("cpu")                                                                # no longer needed on the device

    # --- optimizer, averages, and where the run stands -----------------------------------------------
    if args.fsdp and processes.many:
        mesh = init_device_mesh(device.type, (processes.world,))
        blocks = [block for level in (*decoder.down_blocks, *decoder.up_blocks) for block in level]
        for part in (*blocks, *([encoder] if not args.freeze_encoder else []), model):   # the root takes what is left
            fully_shard(part, mesh=mesh)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    averaged, weight = EMA(model, args.ema), LOSS_WEIGHTS[args.loss_weight]
    whole = dict(full_state_dict=True, cpu_offload=True)                                 # gathered from all processes, if they are split
    start = bad = bad_in_all = 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_b.py", settings)
        if state["settings"].get("v1", False) != args.v1:
            raise UserError(f"{resumed} is of {'v2: leave --v1 away' if args.v1 else 'v1: add --v1'}, or choose another --resume")
        start, bad, bad_in_all, averaged.updates = (state[name] for name in ("step", "bad", "bad_in_all", "updates"))
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(**whole))
        scaler.load_state_dict(state["scaler"])
        set_model_state_dict(model, state["averaged"], options=StateDictOptions(**whole, strict=False))
        averaged.swap()
        set_model_state_dict(model, state["model"], options=StateDictOptions(**whole, strict=False))
    token_errors = training_errors
    guide = tokens.AttentionGuide(decoder) if args.guide_attention else None             # here, so that under FSDP its layers are whole when it looks
    if args.compile:
        if args.v1:
            decoder.compile()                                                            # fuses the small operations
            token_errors = torch.compile(training_errors)                                # 1024 or 8192 scores per token: each pass over them counts
        else:
            decoder.signal_and_scale = torch.compile(decoder.signal_and_scale)
        if not args.freeze_encoder:
            encoder.compile()
    forward = model
    if processes.many and not args.fsdp:     # BatchNorm's buffers are the same everywhere already
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)

    def save(step: int) -> None:
        """All processes take part, as each may hold a part of the weights; rank 0 writes. BatchNorm's statistics are among the
        model's tensors; they are averages already, so the averaged weights have none of their own."""
        learned = StateDictOptions(**whole, ignore_frozen_params=True)
        content = dict(script="train_b.py", settings=settings, step=step, bad=bad, bad_in_all=bad_in_all, scaler=scaler.state_dict(),
                       updates=averaged.updates, model=get_model_state_dict(model, options=learned),
                       optimizer=get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**whole)))
        content["model"] = {name: tensor.clone() for name, tensor in content["model"].items()}       # swap() moves what they are views of
        averaged.swap()
        content["averaged"] = get_model_state_dict(model, options=learned)
        if first:
            checkpoints.save(step, content)
        averaged.swap()
        processes.wait()

    log = Log(args.out, start or -1, args.report_to, settings) if first else None
    # A small Stage B hesitates between objects; guidance makes it follow the semantic latent more resolutely.
    own_guidance = 2.0 if args.v1 else 4.0 if small else 1.0

    def look(step: int) -> None:
        """Validation and grids, with the averaged weights."""
        model.eval()
        averaged.swap()
        if args.val_every and (step % args.val_every == 0 or step == args.steps):
            values = (tokens.validate(model, fixed, embed, T_GRID, autocast, args, processes) if args.v1 else
                      validate(model, fixed, embed, weight, autocast, args, processes))
            if first:
                log.write(step, **values)
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps) and (first or args.fsdp):
            values, sheet = look_at(model, vqgan, fixed, embed, own_guidance, autocast, args)
            if first:
                log.write(step, **values)
                write_atomically(f"{args.out}/samples/step_{step:06d}.png", sheet.save)
        averaged.swap()
        model.train()
        processes.wait()

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    samples = batches(Samples(pictures, plan.sizes, len(plan.shapes), args, codes if args.v1 else decoder.config["c_in"], caches, replaced), plan, processes, args, start)
    sums, since, clock = torch.zeros(2, 10, device=device), start, time.time()           # raw loss and count by noise level
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Stage B", disable=not first)
    smooth = None
    if start == 0:
        look(0)                              # the untouched model: proof that validation and sampling are set up rightly
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["share"]
        loss_sum, statistics = torch.zeros((), device=device), [buffer.clone() for buffer in model.buffers()]
        for micro in range(args.grad_accum):
            batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in next(samples).items()}
            x_0 = batch["x_0"] if args.cache else encode_vqgan(batch["pixels"])          # (B, 4, h, w); --v1: (B, h, w)
            if not args.freeze_encoder:
                source = to_encoder(to_images(batch["pixels"], device))                  # (B, 3, H, W)
            else:
                source = unscale_semantic(batch["stored"] if args.cache else encode_semantic(batch["pixels"]))     # (B, 16, h', w')
            text = embed(batch["caption"])                                              # (B, N, c_text)
            t = noise_levels(batch["chance"], step, args)                                # (B,)
            if args.v1:                      # each token gives way to a random one with probability t
                x_t, mask = replace_tokens(x_0, t, batch["random_tokens"], batch["u"])   # 2 x (B, h, w)
            else:
                eps = batch["eps"]
                x_t = add_noise(x_0, eps, t)                                             # (B, 4, h, w)
            if step < args.blind and not args.v1:
                # Nothing to see in x_t; ones, as zeros would have no direction for the first norm. At t = 1, `a` would be a
                # hundredth of x_0.
                x_t, ab = torch.ones_like(x_0), per_row(alphas_cumprod(t), x_0)
                eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()                          # what it would have to be
            torch.manual_seed(hash((args.seed, step, micro, processes.rank)) % 2 ** 63)  # dropout inside the networks survives a resume
            # Gradients are averaged over processes once per step, in the last backward. The forward belongs inside
            # no_sync(), too: DDP decides in forward whether the coming backward all-reduces.
            last = micro == args.grad_accum - 1
            if args.fsdp and processes.many:
                model.set_requires_gradient_sync(last)                                   # its name for the same
            with contextlib.nullcontext() if last or forward is model else forward.no_sync():
                with autocast:
                    said = forward(source, x_t, t, text, batch["t_semantic"], batch["eps_semantic"], batch["dropped"])
                if args.v1:
                    raw = token_errors(said, x_0, t, mask)                               # (B,) from logits (B, K, h, w)
                else:
                    a, b = said                                                          # 2 x (B, 4, h, w)
                    raw = errors(a.float(), b.float(), x_0, x_t, eps, t, args.loss)      # (B,)
                contrast = contrast_weight(x_0) / mean_contrast if args.even_contrast else 1
                loss = (raw * weight(t) * contrast).mean()
                if guide:
                    loss = loss + args.guide_attention * guide.loss()
                scaler.scale(loss / args.grad_accum).backward()                          # sum of parts = gradient of the mean
            loss_sum += loss.detach() / args.grad_accum
            level = (t * 10).long().clamp(max=9)
            sums[0].index_add_(0, level, raw.detach())
            sums[1].index_add_(0, level, torch.ones_like(raw))
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.clip)
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm      # FSDP: over all processes
        # One process that skipped a step alone would leave the others waiting: all decide together. Under fp16, infinite
        # gradients are the scaler's business, which skips them and lowers its scale.
        wrong = ~loss_sum.isfinite() | (~grad_norm.isfinite() & (not scaler.is_enabled()))
        if processes.any(wrong):
            bad, bad_in_all = bad + 1, bad_in_all + 1
            for buffer, before in zip(model.buffers(), statistics):                      # BatchNorm's have seen it: a NaN would stay
                buffer.copy_(before)
            sums.nan_to_num_(0, 0, 0)
            if first:
                log.write(step + 1, bad_step=True, positions=batch["position"].tolist(), captions=batch["caption"])
            if bad >= args.max_bad_steps:
                save(step)
                raise UserError(f"{bad} steps in a row came to NaN or infinity, up to step {step + 1}; the last good state is in {args.out}/checkpoints: "
                              f"lower --lr, or use --dtype bf16 or fp32; what was in these batches is in {args.out}/log.jsonl")
        else:
            bad = 0
            scaler.step(optimizer)
            averaged.update()
        scaler.update()                                                                  # after a bad step, too: it has seen its gradients
        optimizer.zero_grad(set_to_none=True)

        # --- log, validate, sample, save ----------------------------------------------------------------
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            mean = (processes.sum(loss_sum.clone()) / processes.world).item()
            smooth = mean if smooth is None else 0.9 * smooth + 0.1 * mean
            raw, count = processes.sum(sums.clone())
            speed = (done - since) * plan.batch / (time.time() - clock)
            if first:
                levels = {f"raw_loss_t_0.{i}": (raw[i] / count[i]).item() for i in range(10) if count[i] > 0}
                memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
                log.write(done, loss=mean, smooth_loss=smooth, grad_norm=grad_norm.item(), lr=learning_rate(step, args), images_per_second=speed,
                          memory_gib=memory, bad_steps=bad_in_all, epoch=plan.epoch_of(done * plan.batch), **levels)
                bar.set_postfix_str(f"loss {smooth:.4f}, |grad| {grad_norm.item():.2f}, lr {learning_rate(step, args):.1e}, {speed:.1f} images/s"
                                    + (f", {memory:.1f} GiB" if memory else ""))
            sums.zero_()
            since, clock = done, time.time()
        if any(every and (done % every == 0 or done == args.steps) for every in (args.val_every, args.sample_every)):
            look(done)
            if first:
                shown = [f"psnr_guidance_{scale:g}_steps_{(STEPS_V1 if args.v1 else STEPS)[-1]}" for scale in dict.fromkeys((1.0, own_guidance))]
                shown += ["grad_norm", *(f"val_{what}_t_{t:.2f}" for what in ("loss", "accuracy") for t in T_GRID[::3])]
                draw_curves(log.lines(), ["loss", "val_loss", *shown], f"{args.out}/curves.png")
        stopping = processes.any(stop.received)
        if done % args.save_every == 0 or done == args.steps or stopping:
            save(done)
        if stopping and done < args.steps:
            if first:
                print(f"stopped after step {done}, all of it saved: --resume auto goes on", file=sys.stderr)
            break
    else:
        averaged.swap()
        weights = get_model_state_dict(model, options=StateDictOptions(**whole))
        if first:
            with torch.device("meta"):       # new ones, as under FSDP the models themselves hold a part of each tensor
                blank = type(decoder)(**decoder.config), encoder if args.freeze_encoder else kind(**encoder.config)
            write_result(args, *blank, weights, len(pictures), log.lines())
            if args.push_to_hub:
                push(args)
        averaged.swap()
        processes.wait()
    stop.restore()
    processes.close()


if __name__ == "__main__":
    with exit_on_user_error(RESUME_HINT):
        main(ARGS)
