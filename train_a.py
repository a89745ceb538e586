"""Trains Stage A, the VQGAN: from nothing, or fine-tunes one, or its decoder alone. One process or many.

  python train_a.py --out runs/smoke_a --steps 20 --batch 4                                        # CPU smoke run, half a minute
  python train_a.py --out runs/a                                                                   # the small size; 14 minutes on one core
  torchrun --nproc-per-node 8 train_a.py --config official --data 'shards/{000..511}.tar' --batch 32 --perceptual vgg16 --gan-start 50000 --out runs/a
  python train_a.py --init models/tiny/vqgan --freeze-encoder --data FOLDER --out runs/decoder     # its latents stay as they are

  picture (B,3,H,W) -encoder-> z (B,h,w,4) -nearest code, for a share of the pictures-> z or q -decoder-> picture (B,3,H,W)

One pass of the loop at the bottom is one optimizer step, and all of it is written out there. Order of the paper: A, then
B with its image encoder (train_b.py), then C (train_c.py): whoever trains A's encoder anew must train B anew, too.
Surprise: quantisation is skipped for half of the pictures, each by itself. v2 decodes latents that were never snapped to a
code, v1 only such that were; a decoder that has seen both is good at both. All that is random is a function of (seed,
position in the stream of samples), so that any number of processes sees the same work and a resumed run equals an unbroken one.
Paper: arXiv:2306.00637 (Stage A); VQGAN: arXiv:2012.09841.  Needs: torch, numpy, pillow, tqdm; torchvision for --perceptual.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, default=48, help="channels at the coarsest level (official 384)")
    g.add_argument("--bottleneck-blocks", type=int, default=4, help="decoder blocks at the coarsest level (official 12)")
    g.add_argument("--codebook-size", type=int, default=1024, help="number of codes (official 8192)")
    g.add_argument("--config", help="in place of these three: official, or a config.json in diffusers' words (embed_dim, bottleneck_blocks, num_vq_embeddings ...)")
    g.add_argument("--init", help="start from this folder or file of weights, as for sample.py --vqgan, not from nothing")
    g.add_argument("--freeze-encoder", action="store_true", help="only the decoder learns, for the pictures of a domain: latents and codebook stay to the bit, and with them Stage B")
    g = p.add_argument_group("loss")
    g.add_argument("--l1", type=float, default=1.0, help="weight of the absolute error, which punishes soft edges")
    g.add_argument("--l2", type=float, default=2.0, help="weight of the squared error, which punishes wrong colours")
    g.add_argument("--perceptual", help="compare pictures by a classifier's features, too: a file of torchvision's VGG16 weights, or vgg16, which downloads it; for photos, not emoji")
    g.add_argument("--perceptual-weight", type=float, default=0.1, help="weight of that comparison")
    g.add_argument("--quantise", type=float, default=0.5, help="share of pictures decoded from snapped latents; the rest keep them as they are")
    g.add_argument("--codebook", choices=["gradient", "ema"], default="gradient", help="how codes follow their latents: by a loss, or as running means")
    g.add_argument("--codebook-decay", type=float, default=0.99, help="of these means")
    g.add_argument("--commitment", type=float, default=0.25, help="weight of the commitment loss, which keeps latents near their codes")
    g.add_argument("--revive-every", type=int, default=100, help="steps after which codes that were not used are put where latents are")
    g.add_argument("--gan-start", type=int, help="step at which the discriminator joins, best when reconstruction has settled (default: never)")
    g.add_argument("--gan-weight", type=float, default=0.1, help="how strongly its opinion pulls at the last layer, 1: as strongly as the reconstruction")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="scenes:all:100000:0", help="a folder of pictures; tar shards, 'a/{000..031}.tar'; FILE.parquet; hub:NAME; scenes:all:NUMBER:SEED; "
                                                                 "see data.py; captions are not needed (default: %(default)s)")
    g.add_argument("--resolution", type=int, help="px, side of the squares to train on, a multiple of 4 (default: 128 for scenes, else 256); larger pictures work, too, then")
    g.add_argument("--crop", choices=["center", "random"], help="which square of a picture (default: random)")
    g.add_argument("--random-flip", action="store_true", help="mirror half of the pictures")
    g.add_argument("--filter", action="append", default=[], metavar="min_KEY=NUMBER", help="keep only samples whose .json has KEY from (min_) or up to (max_) a number")
    g.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=8000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, default=4, help="pictures per process and forward pass; halve it if memory runs out and double --grad-accum")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum x processes")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; the discriminator's is a quarter of it; 1e-4 at the official size")
    g.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default="trapezoid", help="of the learning rate, after the warm-up; trapezoid: down in the last fifth")
    g.add_argument("--warmup", type=int, default=100, help="optimizer steps in which the learning rate rises")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="not for norms and biases")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm, over all processes, above which gradients are scaled down")
    g.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones kept; 0: no averaging")
    g.add_argument("--norm-steps", type=int, default=300, help="steps after which BatchNorm keeps its statistics: what a picture becomes then no longer depends on those "
                                                               "beside it, in training as in use; later for larger models")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="autocast type (default: bf16 on a GPU, else fp32)")
    g.add_argument("--max-bad-steps", type=int, default=10, help="stop after so many steps in a row with a loss or gradient that is not finite")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder: checkpoints/, samples/, log.jsonl, curves.png, and in the end vqgan/, which sample.py and train_b.py read")
    g.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; SIGTERM and Ctrl-C save, too")
    g.add_argument("--keep", type=int, default=2, help="checkpoints kept")
    g.add_argument("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    g.add_argument("--val-every", type=int, default=1000, help="steps between validations; 0: none")
    g.add_argument("--val-data", help="pictures to validate on, as --data (default: scenes of another seed; else some of --data, which then tell how well it is fitted)")
    g.add_argument("--val-count", type=int, default=64, help="pictures in a validation")
    g.add_argument("--sample-every", type=int, default=2000, help="steps between sample grids, step 0 included; 0: none")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="log there, too, if it is installed")
    g.add_argument("--dry-run", action="store_true", help="say what would be trained on what, with memory, and stop")
    g.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository of the Hugging Face hub")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()      # before the imports below, which take seconds: --help and mistyped options answer at once

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.data import fit, open_dataset, read_filters
from training.order import BatchSampler, batches, sample_rng
from loading.files import STEM, write_atomically, write_files
from extras.images import grid
from training.report import draw_curves, outline, push, settings_table
from stage_a import (OFFICIAL, CodebookAverages, PatchDiscriminator, StageA, adaptive_weight, count, discriminator_loss, generator_loss,
                     perceptual_loss, perplexity)
from loading.errors import RESUME_HINT, UserError, as_user_error, exit_on_user_error
from training.checkpoints import Checkpoints, Log
from training.optim import build_optimizer, EMA, learning_rate
from training.processes import GracefulExit, Processes, SynchronisedBatchNorm
from loading.names import config_to_diffusers, config_to_ours, to_diffusers
from loading.weights import load_stage_a, save_model

TERMS = ("loss", "l1", "l2", "perceptual", "codebook", "commitment", "generator", "gan_weight", "discriminator")


def check(args) -> None:
    """Ends the program for arguments that make no sense, before anything is loaded."""
    for name, low in (("width", 2), ("bottleneck_blocks", 1), ("codebook_size", 1), ("steps", 1), ("batch", 1), ("grad_accum", 1), ("revive_every", 1),
                      ("save_every", 1), ("keep", 1), ("log_every", 1), ("val_count", 1), ("norm_steps", 0), ("gan_start", 0), ("l1", 0), ("l2", 0), ("commitment", 0)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {low}")
    for name in ("ema", "codebook_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number from 0 to below 1")
    if not 0 <= args.quantise <= 1:
        raise UserError(f"--quantise is {args.quantise}, expected a share from 0 to 1")
    if args.resolution is not None and (args.resolution < 4 or args.resolution % 4):
        raise UserError(f"--resolution is {args.resolution}, expected a multiple of 4, as 4 x 4 pixels become one latent")
    if args.perceptual and args.resolution is not None and args.resolution < 16:
        raise UserError(f"--resolution is {args.resolution}: --perceptual halves pictures four times, so it needs at least 16")
    if args.init and args.config:
        raise UserError("--init brings its own sizes: leave --config away")
    if args.freeze_encoder and not args.init:
        raise UserError("--freeze-encoder keeps an encoder that has learned: add --init FOLDER")
    if not args.l1 and not args.l2 and not args.perceptual:
        raise UserError("--l1 and --l2 are both 0: nothing says what pictures should look like")


# ----- one sample -------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """Item (position, index, bucket) -> dict of x, pixels (h,w,3) uint8, and quantise: a function of these three and the seed alone."""
    def __init__(self, pictures, args):
        self.pictures, self.args, self.everything = pictures, args, np.arange(len(pictures))

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        (position, index, _), args = where, self.args
        pixels, index = self.pictures.read_or_next(index, self.everything)                   # (H, W, 3)
        flip = bool(args.random_flip and sample_rng(args.seed, position, "flip").random() < 0.5)
        pixels = fit(pixels, (args.resolution, args.resolution), args.crop, flip, sample_rng(args.seed, position, "crop"))
        quantise = bool(sample_rng(args.seed, position, "quantise").random() < args.quantise)
        return dict(x=torch.from_numpy(np.array(pixels)), quantise=quantise, position=position)


# ----- what is trained ---------------------------------------------------------------------------------

def build_model(args) -> StageA:
    """Stage A to be trained, in float32, since the steps of an optimizer are too small for less."""
    if args.init:
        model = load_stage_a(args.init)
    elif args.config == "official":
        model = StageA(**OFFICIAL)
    else:
        try:
            sizes = config_to_ours(json.loads(Path(args.config).read_text()), StageA) if args.config else dict(
                c_hidden=args.width, bottleneck_blocks=args.bottleneck_blocks, codebook_size=args.codebook_size)
            model = StageA(**sizes)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"--config {args.config} cannot be used: {error}" if args.config else f"these sizes cannot be used: {error}") from error
    if args.freeze_encoder:
        model.requires_grad_(False)
        for part in (model.from_latent, model.decoder, model.to_pixels):
            part.requires_grad_(True)
    elif args.codebook == "ema":
        model.codebook.requires_grad_(False)         # CodebookAverages moves it
    return model


def train_mode(model: StageA, step: int, args) -> None:
    """BatchNorm, in train mode, holds the latents' scale while all is young. But it makes each latent depend on the batch, most of all
    where backgrounds are plain, and the decoder must then paint from what it will never see in use: measured on scenes in
    batches of 4, 2.9 dB after 3 minutes. So from --norm-steps on it uses its running statistics. In train mode it also moves these, and with
    them every latent, though no weight learns: not with --freeze-encoder."""
    model.train()
    model.norm_latent.train(step < args.norm_steps and not args.freeze_encoder)


class VGGFeatures(torch.nn.Module):
    """What VGG16 (arXiv:1409.1556) sees: its activations before each halving of the picture, five lists of patterns."""
    LAYERS = (3, 8, 15, 22, 29)      # relu1_2, 2_2, 3_3, 4_3, 5_3, those of LPIPS

    def __init__(self, weights: str):
        """weights: a file of torchvision's VGG16 weights, or "vgg16". Raises UserError."""
        super().__init__()
        try:
            from torchvision.models import VGG16_Weights, vgg16
        except ImportError:
            raise UserError("--perceptual needs a package: pip install torchvision") from None
        try:
            if weights == "vgg16":
                tensors = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
            elif weights.endswith(".safetensors"):
                from safetensors.torch import load_file
                tensors = load_file(weights)
            else:
                tensors = torch.load(weights, map_location="cpu", weights_only=True)
            with torch.device("meta"):                                   # the classifier, 90 % of its weights, is never made
                self.layers = vgg16().features[:self.LAYERS[-1] + 1]
            names = self.layers.state_dict().keys()
            self.layers.load_state_dict({name: tensors[f"features.{name}"].float() for name in names}, assign=True)
        except Exception as error:                                       # each library raises its own kinds
            raise UserError(f"--perceptual {weights}: {str(error).splitlines()[0][:150] or type(error).__name__}; expected vgg16, or a file of torchvision's VGG16 "
                          "weights (vgg16-397923af.pth); without --perceptual training goes without") from error
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))      # ImageNet's
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images):
        """images (B,3,H,W) in [0, 1] -> [(B,64,H,W), (B,128,H/2,W/2), ... (B,512,H/16,W/16)]."""
        x, features = (images - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.LAYERS:
                features.append(x)
        return features


@torch.no_grad()
def revive(model, averages, averaged, dead, z, step: int, args, processes) -> None:
    """Codes that no latent was near, dead (K,) bool, are put at latents of this step, drawn from those of all processes.

    Such a code gets no gradient and stays where it is for ever. z: this process's latents (B,h,w,4) of each micro-step. Which are
    drawn does not depend on how processes and micro-steps share the step: each process adds those it has.
    """
    n, z = z[0].shape[:3].numel(), torch.cat([part.float().flatten(0, 2) for part in z])     # (micro-steps * n, 4)
    chosen = torch.from_numpy(sample_rng(args.seed, step, "revive").integers(len(z) * processes.world, size=int(dead.sum()))).to(z.device)
    micro, rank, place = chosen // (n * processes.world), chosen // n % processes.world, chosen % n      # in the order of order.split
    latents = z[micro * n + place] * (rank == processes.rank)[:, None]
    latents = processes.sum(latents)                                                         # (number of dead, 4)
    model.codebook.codes[dead] = latents
    if averages is not None:
        averages.restart(dead, latents)
    if "codebook.codes" in averaged.mean:            # halfway between where a code was and where it is there are no latents
        averaged.mean["codebook.codes"][dead] = latents


# ----- looking at a run -------------------------------------------------------------------------------

def fixed_set(pictures, args) -> torch.Tensor:
    """The pictures of the validation, always the same ones: (N,3,h,w) uint8."""
    chosen = np.random.default_rng([args.seed, 1]).permutation(len(pictures))[:args.val_count]
    return torch.stack([torch.from_numpy(fit(pictures.read(i), (args.resolution, args.resolution)).copy()).permute(2, 0, 1) for i in chosen.tolist()])


@torch.no_grad()
def validate(model, fixed, args, processes) -> dict[str, float]:
    """PSNR in dB, of the mean squared error of all pictures, decoded from latents as they are and from snapped ones."""
    errors = torch.zeros(3, dtype=torch.float64, device=processes.device)
    counts = torch.zeros(model.config["codebook_size"], device=processes.device)
    for images in fixed[processes.rank::processes.world].split(args.batch):
        images = images.to(processes.device).float() / 255
        z = model.encode_raw(images)                                                         # (B, h, w, 4)
        indices = model.codebook.nearest(z)                                                  # (B, h, w)
        for i, painted in enumerate((model.decode_raw(z), model.decode_indices(indices))):
            errors[i] += (painted.clamp(0, 1) - images).square().mean((1, 2, 3)).sum()
        errors[2] += len(images)
        counts += indices.flatten().bincount(minlength=len(counts))
    errors, counts = processes.sum(errors), processes.sum(counts)
    plain, quantised = (-10 * (errors[:2] / errors[2]).clamp(min=1e-10).log10()).tolist()
    return dict(val_psnr=plain, val_psnr_quantised=quantised, val_codes_used=int((counts > 0).sum()), val_perplexity=perplexity(counts).item())


@torch.no_grad()
def sample_sheet(model, fixed, device) -> Image.Image:
    """Three rows: pictures; what becomes of them; the same by way of the codebook."""
    images = fixed[:8].to(device).float() / 255
    rows = torch.cat([images, *(model.decode(model.encode(images, quantise)) for quantise in (False, True))])
    rows = (rows.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()         # (24, h, w, 3)
    return grid([Image.fromarray(image) for image in rows], len(images), row_labels=["picture", "not quantised", "quantised"])


def write_result(args, model, values: dict, pictures: int) -> None:
    """vqgan/ and README.md. float16, as released, where that loses nothing that had to stay: frozen weights."""
    out = Path(args.out)
    frozen = [p for p in model.parameters() if not p.requires_grad] if args.freeze_encoder else []
    if all(torch.equal(p.half().float(), p) for p in frozen):
        save_model(model, out / "vqgan")
    else:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in to_diffusers(model.state_dict(), model).items()}
        write_files(config_to_diffusers(model), tensors, out / "vqgan", STEM)
    card = f"""---
license: mit
tags: [vqgan, wuerstchen]
---
# {out.name}

Würstchen's Stage A, {f'from `{args.init}`, ' if args.init else ''}{args.steps} steps on {pictures} pictures.
On {args.val_count} pictures{f' of `{args.val_data}`' if args.val_data else ''}: PSNR {values['val_psnr']:.2f} dB, quantised {values['val_psnr_quantised']:.2f} dB.

    python sample.py --weights tiny --vqgan {out.name}/vqgan --reconstruct photo.png

| setting | value |
|---|---|
{settings_table(args)}
"""
    write_atomically(out / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


# ----- the run ----------------------------------------------------------------------------------------

def main(args):
    check(args)
    checkpoints = Checkpoints(f"{args.out}/checkpoints", args.keep)
    resumed = checkpoints.find(args.resume)
    stop, processes = GracefulExit(), Processes(args.device)
    device, first = processes.device, processes.rank == 0
    scenes = args.data.split(":")[0] == "scenes"
    args.resolution = args.resolution or (128 if scenes else 256)
    args.crop, args.dtype = args.crop or "random", args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "workers", "device", "push_to_hub")}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(args.seed)

    # --- model and data ----------------------------------------------------------------------------
    model = build_model(args).to(device)
    discriminator = PatchDiscriminator().to(device) if args.gan_start is not None else None
    vgg = VGGFeatures(args.perceptual).to(device) if args.perceptual else None
    averages = CodebookAverages(model.codebook.codes, args.codebook_decay).to(device) if args.codebook == "ema" and not args.freeze_encoder else None
    index = Path(args.out) / "index"
    val_data = args.val_data or (f"scenes:all:{args.val_count}:987654321" if scenes else None)   # scenes of another seed: unseen ones
    with processes.main_first(), as_user_error():             # what one has indexed or fetched serves the others
        pictures = open_dataset(args.data, captions_required=False, index_folder=index, **read_filters(args.filter))
        validation = open_dataset(val_data, captions_required=False, index_folder=index) if val_data else pictures
    pictures.bucket = np.zeros(len(pictures), np.int64)              # all are cut to the same square
    plan = BatchSampler(pictures.bucket, args.batch * args.grad_accum * processes.world, args.seed)
    if first:
        print(pictures.describe(), file=sys.stderr)
    if args.dry_run:
        return outline(args, model, pictures, [(args.resolution, args.resolution)], plan) if first else None
    fixed = fixed_set(validation, args)                                                      # (N, 3, h, w)

    # --- optimizers, averages, and where the run stands ----------------------------------------------
    # Adam's second mean forgets within 100 steps: gradients shrink fast at the start, and runs are short.
    optimizer = build_optimizer(model, args, betas=(0.9, 0.99))
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.lr / 4, betas=(0.5, 0.99), weight_decay=0, fused=True) if discriminator else None
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    averaged = EMA(model, args.ema)
    usage = torch.zeros(2, model.config["codebook_size"], device=device)                     # of each code: since codes were revived, since a line was logged
    parts = dict(model=model, optimizer=optimizer, scaler=scaler) | (dict(discriminator=discriminator, d_optimizer=d_optimizer) if discriminator else {}) \
        | (dict(codebook=averages) if averages else {})
    start = bad = bad_in_all = 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_a.py", settings)
        if averages is not None and "codebook" not in state:
            raise UserError(f"{resumed} was made with --codebook gradient: go on with that, or start anew with --init {args.out}/vqgan")
        start, bad, bad_in_all, averaged.updates = (state[name] for name in ("step", "bad", "bad_in_all", "updates"))
        try:
            for name, part in parts.items():
                if name in state:                # a discriminator may join a run that began without one
                    part.load_state_dict(state[name])
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{resumed} does not fit: {str(error).splitlines()[0]}: resume with the sizes and --freeze-encoder it was made with") from error
        usage.copy_(state["usage"])
        for name, mean in averaged.mean.items():
            mean.copy_(state["averaged"].get(name, averaged.live[name]))
    SynchronisedBatchNorm.convert(model)
    forward, forward_d = model, discriminator
    if processes.many:
        def distributed(module):
            # Buffers are the same everywhere already: BatchNorm's since it is synchronised.
            return torch.nn.parallel.DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)
        forward, forward_d = distributed(model), distributed(discriminator) if discriminator else None

    def save(step: int) -> None:
        if first:
            checkpoints.save(step, dict(script="train_a.py", settings=settings, step=step, bad=bad, bad_in_all=bad_in_all, usage=usage, averaged=averaged.mean,
                                        updates=averaged.updates, **{name: part.state_dict() for name, part in parts.items()}))
        processes.wait()

    log = Log(args.out, start, args.report_to, settings) if first else None

    def look(step: int) -> None:
        """Validation and samples, with the averaged weights. BatchNorm's statistics are running means already."""
        model.eval()
        averaged.swap()
        if args.val_every and (step % args.val_every == 0 or step == args.steps):
            values = validate(model, fixed, args, processes)
            if first:
                log.write(step, **values)
        if first and args.sample_every and (step % args.sample_every == 0 or step == args.steps):
            write_atomically(f"{args.out}/samples/step_{step:06d}.png", sample_sheet(model, fixed, device).save)
        averaged.swap()
        processes.wait()

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    samples = batches(Samples(pictures, args), plan, processes, args, start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Stage A", disable=not first)
    since, clock, smooth = start, time.time(), None
    if start == 0:
        look(0)
    for step in bar:
        train_mode(model, step, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for group in d_optimizer.param_groups if d_optimizer else ():
            group["lr"] = learning_rate(step, args) / 4
        gan = discriminator is not None and step >= args.gan_start
        terms, counted, latents = torch.zeros(len(TERMS), device=device), 0, []
        statistics = [buffer.clone() for buffer in model.norm_latent.buffers()]
        for micro in range(args.grad_accum):
            batch = next(samples)
            images = batch["x"].to(device).permute(0, 3, 1, 2).float() / 255                 # (B, 3, H, W), channels-last in memory
            # Gradients are averaged over processes once per step, in the last backward. The forward belongs inside
            # no_sync(), too: DDP decides in forward whether the coming backward all-reduces.
            # 2 processes with 4 pictures do what 1 process does with 8. Two micro-steps of 4 do not quite: until --norm-steps BatchNorm
            # takes mean and variance of one pass, and the discriminator's weight is that of one, too.
            with contextlib.ExitStack() as not_yet:
                if processes.many and micro < args.grad_accum - 1:
                    for module in (forward, forward_d) if discriminator else (forward,):
                        not_yet.enter_context(module.no_sync())
                with autocast:
                    out = forward(images, batch["quantise"].to(device))
                    painted = out["images"].float()                                          # (B, 3, H, W)
                    perceptual = perceptual_loss(vgg(painted), vgg(images)) if vgg else painted.new_zeros(())
                l1, l2 = out["reconstruction"], (painted - images).square().mean()
                reconstruction = args.l1 * l1 + args.l2 * l2 + args.perceptual_weight * perceptual
                loss = reconstruction
                if not args.freeze_encoder:
                    loss = loss + args.commitment * out["commitment"] + (out["codebook"] if averages is None else 0)
                opinion = gan_weight = d_loss = torch.zeros((), device=device)
                if gan:
                    discriminator.requires_grad_(False)              # it says what it thinks, and does not learn from being deceived
                    with autocast:
                        opinion = generator_loss(discriminator(painted).float())
                    gan_weight = args.gan_weight * adaptive_weight(scaler.scale(reconstruction), scaler.scale(opinion), model.to_pixels.weight,
                                                                   lambda gradient: processes.sum(gradient) / processes.world)
                    loss = loss + gan_weight * opinion
                    discriminator.requires_grad_(True)
                scaler.scale(loss / args.grad_accum).backward()                              # sum of parts = gradient of the mean
                if gan:
                    with autocast:
                        real, fake = forward_d(torch.cat([images, painted.detach()])).float().chunk(2)   # 2 x (B, 1, H/4, W/4)
                    d_loss = discriminator_loss(real, fake)
                    scaler.scale(d_loss / args.grad_accum).backward()
            terms += torch.stack([loss, l1, l2, perceptual, out["codebook"], out["commitment"], opinion, gan_weight, d_loss]).detach() / args.grad_accum
            latents.append(out["latents"].detach())
            counted = counted + count(latents[-1], out["indices"], len(usage[0]))
        counted = processes.sum(counted)                                                     # (K, 1 + 4) of the whole step
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.clip)
        wrong = ~terms.isfinite().all() | (~grad_norm.isfinite() & (not scaler.is_enabled()))
        if gan:
            scaler.unscale_(d_optimizer)
            d_norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), args.clip)
            wrong = wrong | (~d_norm.isfinite() & (not scaler.is_enabled()))
        # One process that skipped a step alone would leave the others waiting: all decide together. Under fp16, infinite
        # gradients are the scaler's business, which skips them and lowers its scale.
        if processes.any(wrong):
            bad, bad_in_all = bad + 1, bad_in_all + 1
            for buffer, before in zip(model.norm_latent.buffers(), statistics):
                buffer.copy_(before)                                 # a running mean would never forget a NaN
            if first:
                log.write(step + 1, bad_step=True, positions=batch["position"].tolist())
            if bad >= args.max_bad_steps:
                save(step)
                raise UserError(f"{bad} steps in a row came to NaN or infinity, up to step {step + 1}; the last good state is in {args.out}/checkpoints: "
                              f"lower --lr, or use --dtype bf16 or fp32; what was in these batches is in {args.out}/log.jsonl")
        else:
            bad = 0
            scaler.step(optimizer)
            if gan:
                scaler.step(d_optimizer)
            averaged.update()
            usage += counted[:, 0]
            if averages is not None:
                averages.update(model.codebook.codes, counted[:, 0], counted[:, 1:])
            if (step + 1) % args.revive_every == 0:
                if not args.freeze_encoder:
                    revive(model, averages, averaged, usage[0] == 0, latents, step, args, processes)
                usage[0] = 0
        scaler.update()                                              # after a bad step, too: it has seen its gradients
        optimizer.zero_grad(set_to_none=True)
        if gan:
            d_optimizer.zero_grad(set_to_none=True)

        # --- log, validate, sample, save ----------------------------------------------------------------
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            means = (processes.sum(terms.clone()) / processes.world).tolist()
            smooth = means[0] if smooth is None else 0.9 * smooth + 0.1 * means[0]
            speed = (done - since) * plan.batch / (time.time() - clock)
            if first:
                kept = {name: mean for name, mean in zip(TERMS, means) if mean or name in ("loss", "l1", "l2")}
                memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
                log.write(done, **kept, smooth_loss=smooth, grad_norm=grad_norm.item(), lr=learning_rate(step, args), images_per_second=speed, memory_gib=memory,
                          bad_steps=bad_in_all, epoch=plan.epoch_of(done * plan.batch), codes_used=int((usage[1] > 0).sum()), perplexity=perplexity(usage[1]).item())
                bar.set_postfix_str(f"loss {smooth:.4f}, |grad| {grad_norm.item():.2f}, {int((usage[1] > 0).sum())} codes, lr {learning_rate(step, args):.1e}, "
                                    f"{speed:.1f} images/s" + (f", {memory:.1f} GiB" if memory else ""))
            usage[1] = 0
            since, clock = done, time.time()
        if any(every and (done % every == 0 or done == args.steps) for every in (args.val_every, args.sample_every)):
            look(done)
            if first:
                draw_curves(log.lines(), ["loss", "val_psnr", "val_psnr_quantised", "perplexity", "grad_norm", "gan_weight"], f"{args.out}/curves.png")
        stopping = processes.any(stop.received)
        if done % args.save_every == 0 or done == args.steps or stopping:
            save(done)
        if stopping and done < args.steps:
            if first:
                print(f"stopped after step {done}, all of it saved: --resume auto goes on", file=sys.stderr)
            break
    else:
        model.eval()
        averaged.swap()
        values = validate(model, fixed, args, processes)
        if first:
            if not args.freeze_encoder:          # so that Stage B sees unit variance
                with torch.no_grad():
                    z = torch.cat([model.encode_raw(images.to(device).float() / 255) for images in fixed.split(args.batch)])
                model.scale_factor = model.config["scale_factor"] = round(z.std().item(), 4)
            print(f"PSNR on {len(fixed)} pictures{' that were not trained on' * bool(val_data)}: not quantised {values['val_psnr']:.2f} dB, "
                  f"quantised {values['val_psnr_quantised']:.2f} dB")
            write_result(args, model, values, len(pictures))
            if args.push_to_hub:
                push(args)
        averaged.swap()
        processes.wait()
    stop.restore()
    processes.close()


if __name__ == "__main__":
    with exit_on_user_error(RESUME_HINT):
        main(ARGS)
