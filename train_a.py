"""Trains Stage A, the VQGAN, from scratch, or fine-tunes it or its decoder. One process or many.

  python train_a.py --out runs/smoke_a --steps 20 --batch 4           # CPU smoke run, half a minute
  python train_a.py --out runs/a                                      # the small size
  torchrun --nproc-per-node 8 train_a.py --config official --data 'shards/{000..511}.tar' \\
      --batch 32 --perceptual vgg16 --gan-start 50000 --out runs/a
  python train_a.py --init models/tiny/vqgan --freeze-encoder --data FOLDER --out runs/decoder

  image (B,3,H,W) -encoder-> z (B,h,w,4) -nearest code, for a share of the images-> z or q
                  -decoder-> image (B,3,H,W)

One pass of the loop at the bottom is one optimizer step, written out in full. The paper trains A
first, then B with its image encoder (train_b.py), then C (train_c.py). A new encoder of Stage A
needs a new Stage B; with --freeze-encoder the latents stay the same, so Stage B stays valid.
Note: for half of the images, chosen at random, the decoder gets unquantised latents. v2 decodes
only unquantised latents, v1 only quantised ones; a decoder trained on both is good at both.
All random numbers depend only on the seed and the position in the stream of samples. So any number
of processes sees the same samples, and a resumed run equals an uninterrupted one.
Paper: arXiv:2306.00637 (Stage A); VQGAN: arXiv:2012.09841.
Needs: torch, numpy, pillow, tqdm; torchvision for --perceptual.
"""
import sys

from loading.errors import MEMORY_HINT, RESUME_HINT, UserError, exit_on_user_error
from loading.options import Number, Parser, below_one, integer, positive_int, unit_float
from training.options import (add_data_options, add_optimization_options, add_output_options,
                              check_services)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument_group("model").add_argument
    add("--width", type=integer(2, 8192), default=48,
        help="channels at the coarsest level (official: 384)")
    add("--bottleneck-blocks", type=integer(1, 100), default=4,
        help="decoder blocks at the coarsest level (official: 12)")
    add("--codebook-size", type=integer(1, 2 ** 20), default=1024,
        help="number of codes (official: 8192)")
    add("--config", help="instead of these three: official, or a config.json with diffusers' names "
                         "(embed_dim, bottleneck_blocks, num_vq_embeddings ...)")
    add("--init", help="start from this folder or file of weights, as for sample.py --vqgan")
    add("--freeze-encoder", action="store_true",
        help="train only the decoder, for images of one kind: latents and codebook stay the same "
             "to the bit, so Stage B stays valid")
    add = p.add_argument_group("loss").add_argument
    add("--l1", type=Number(0), default=1.0,
        help="weight of the absolute error: against soft edges")
    add("--l2", type=Number(0), default=2.0,
        help="weight of the squared error: against wrong colours")
    add("--perceptual", help="also compare images by the features of a classifier: a file of "
        "torchvision's VGG16 weights, or vgg16, which downloads it; for photos, not for emoji")
    add("--perceptual-weight", type=Number(0), default=0.1, help="weight of that comparison")
    add("--quantise", type=unit_float, default=0.5,
        help="share of images that are decoded from quantised latents")
    add("--codebook", choices=["gradient", "ema"], default="gradient",
        help="how codes follow their latents: by a loss, or as running means")
    add("--codebook-decay", type=below_one, default=0.99, help="decay of these means")
    add("--commitment", type=Number(0), default=0.25,
        help="weight of the commitment loss, which keeps latents near their codes")
    add("--revive-every", type=positive_int, default=100,
        help="steps after which unused codes are moved to where latents are")
    add("--gan-start", type=integer(0), help="step at which the discriminator joins, best when the "
        "reconstruction no longer improves (default: never)")
    add("--gan-weight", type=Number(0), default=0.1,
        help="pull of the discriminator at the last layer, relative to the reconstruction's")
    g = add_data_options(p, "scenes:all:100000:0", crop=None, captions=False,
                         what="; captions are not used (default: %(default)s)")
    g.add_argument("--resolution", type=integer(4, 4096, step=4),
                   help="px, side of the squares to train on, a multiple of 4; larger images work "
                        "with the result as well (default: 128 for scenes, else 256)")
    g = add_optimization_options(
        p, steps=8000, batch=4, lr=2e-3, schedule="trapezoid", warmup=100, weight_decay=1e-4,
        ema=0.999, large=False,
        lr_note="; the discriminator's is a quarter of it; use 1e-4 for the official size")
    g.add_argument("--norm-steps", type=integer(0), default=300,
                   help="steps after which BatchNorm keeps its statistics, so that a latent no "
                        "longer depends on the batch; later for larger models")
    add_output_options(p, result="vqgan/, which sample.py and train_b.py read", save_every=1000,
                       log_every=20, val_every=1000, val_count=64, sample_every=2000,
                       samples="grids of reconstructions",
                       val_data="; for scenes: those of another seed")
    return p.parse_args(argv)


if __name__ == "__main__":       # stands before the slow imports, so that --help is fast
    with exit_on_user_error(RESUME_HINT, MEMORY_HINT):
        args = parse_args()
        import train_a
        sys.exit(train_a.main(args))

import contextlib
from functools import partial

import numpy as np
import torch
from PIL import Image

from extras.images import grid
from loading.files import write_atomically
from loading.weights import load_stage_a, new_model
from stage_a import StageA
from training.checkpoints import Checkpoints, Log, load_state, settings_of, state_of
from training.codebook import CodebookUpdates, perplexity
from training.optim import (EMA, NanSteps, build_optimizer, clip_gradients, learning_rate,
                            set_precision, take_step)
from training.order import BatchSampler, batches, micro_batches, sample_rng
from training.processes import GracefulExit, Processes, SynchronisedBatchNorm, no_sync
from training.report import Progress, draw_curves, due, outline
from training.results import finished, write_stage_a
from training.samples import ImageReader, open_data, steps_of, to_tensor
from training.sheets import failure_is_a_warning
from training.validation import fixed_images
from training.vqgan_losses import (PatchDiscriminator, VGGFeatures, adaptive_weight,
                                   discriminator_loss, generator_loss, perceptual_loss)

CURVES = ["loss", "val_psnr", "val_psnr_quantised", "perplexity", "grad_norm", "gan_weight"]


def check(args) -> None:
    """Raises UserError for options that cannot be used together, before anything is loaded."""
    check_services(args)
    if args.perceptual and args.resolution is not None and args.resolution < 16:
        raise UserError(f"--resolution is {args.resolution}, but --perceptual halves images four "
                        f"times, so it needs at least 16")
    if args.init and args.config:
        raise UserError("--init brings its own sizes: remove --config")
    if args.freeze_encoder and not args.init:
        raise UserError("--freeze-encoder needs a trained encoder: add --init FOLDER")
    if not args.l1 and not args.l2 and not args.perceptual:
        raise UserError("--l1 and --l2 are both 0, so no loss compares images: set one of them, "
                        "or --perceptual")


# ----- one sample --------------------------------------------------------------------------------

class StageASamples(torch.utils.data.Dataset):
    """Maps (position, index, bucket) to a sample, which depends only on these three and the seed.

    position: number of the sample in an endless stream. index: number of its image. bucket: index
    of its size in `sizes`. The sample is a dict of pixels (h,w,3) uint8, position, and quantise (a
    bool: whether the decoder gets quantised latents)."""
    def __init__(self, dataset, sizes, args):
        self.args, self.read = args, ImageReader(dataset, sizes, args, True, {}, {})

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        position, index, bucket = where
        rng = partial(sample_rng, self.args.seed, position)
        _, item = self.read(index, bucket, rng)
        quantise = bool(rng("quantise").random() < self.args.quantise)
        return item | dict(quantise=quantise, position=position)


# ----- the model and its loss --------------------------------------------------------------------

def build_model(args) -> StageA:
    """Returns Stage A in float32, because 16 bits would round small updates of weights away."""
    if args.init:
        model = load_stage_a(args.init)
    elif args.config:
        model = new_model(StageA, None if args.config == "official" else args.config)
    else:
        model = new_model(StageA, None, c_hidden=args.width, codebook_size=args.codebook_size,
                          bottleneck_blocks=args.bottleneck_blocks)
    if args.freeze_encoder:
        model.requires_grad_(False)
        for part in (model.from_latent, model.decoder, model.to_pixels):
            part.requires_grad_(True)
    elif args.codebook == "ema":
        model.codebook.requires_grad_(False)         # no gradient: CodebookAverages updates it
    return model


def train_mode(model: StageA, step: int, args) -> None:
    """Sets train mode. From --norm-steps on, BatchNorm uses running statistics, as after training.

    In the first steps, BatchNorm in train mode sets the scale of the latents. But it makes latents
    depend on their batch, most of all for plain backgrounds, so the decoder learns from latents
    that do not occur after training. For scenes in batches of 4, this costs 2.9 dB of PSNR in a run
    of 3 minutes. Train mode also changes the running statistics, and so all latents, even if the
    weights are frozen. So with --freeze-encoder, BatchNorm is never in train mode.
    """
    model.train()
    model.norm_latent.train(step < args.norm_steps and not args.freeze_encoder)


def losses(output: dict, fake, images, vgg, autocast, args) -> tuple:
    """Returns three results: the reconstruction loss (), the total loss () without that of the
    discriminator, a dict of terms. output: of StageA.forward; fake: its images; images: targets."""
    terms = dict(l1=output["reconstruction"], l2=(fake - images).square().mean(),
                 codebook=output["codebook"], commitment=output["commitment"])
    reconstruction = args.l1 * terms["l1"] + args.l2 * terms["l2"]
    if vgg is not None:
        with autocast:
            terms["perceptual"] = perceptual_loss(vgg(fake), vgg(images))
        reconstruction = reconstruction + args.perceptual_weight * terms["perceptual"]
    loss = reconstruction
    if not args.freeze_encoder:
        loss = loss + args.commitment * terms["commitment"]
    if not args.freeze_encoder and args.codebook == "gradient":
        loss = loss + terms["codebook"]
    return reconstruction, loss, terms


# ----- validation and sample sheets --------------------------------------------------------------

@torch.no_grad()
def validate(model, fixed, args, processes) -> dict[str, float]:
    """Returns figures by name: the PSNR in dB (of the mean squared error over all images), with
    unquantised and with quantised latents, and the use of codes. fixed: images (N,3,H,W) uint8."""
    errors = torch.zeros(3, device=processes.device)
    counts = torch.zeros(model.config["codebook_size"], device=processes.device)
    for images in fixed[processes.rank::processes.world].split(args.batch):
        images = images.to(processes.device).float() / 255
        z = model.encode_raw(images)                                     # (B, h, w, 4)
        indices = model.codebook.nearest(z)                              # (B, h, w)
        for i, output in enumerate((model.decode_raw(z), model.decode_indices(indices))):
            errors[i] += (output.clamp(0, 1) - images).square().mean((1, 2, 3)).sum()
        errors[2] += len(images)
        counts += indices.flatten().bincount(minlength=len(counts))
    errors, counts = processes.sum(errors), processes.sum(counts)
    plain, quantised = (-10 * (errors[:2] / errors[2]).clamp(min=1e-10).log10()).tolist()
    return dict(val_psnr=plain, val_psnr_quantised=quantised,
                val_codes_used=int((counts > 0).sum()), val_perplexity=perplexity(counts).item())


@torch.no_grad()
def sample_sheet(model, fixed, device) -> Image.Image:
    """Draws rows of images, and of their reconstructions from unquantised and quantised latents."""
    images = fixed[:8].to(device).float() / 255
    rows = torch.cat([images, *(model.decode(model.encode(images, q)) for q in (False, True))])
    rows = (rows.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return grid([Image.fromarray(image) for image in rows], len(images),
                row_labels=["image", "not quantised", "quantised"])


# ----- the run -----------------------------------------------------------------------------------

def main(args):
    check(args)
    checkpoints = Checkpoints(args, results=("vqgan",))
    resumed = checkpoints.find(args.resume, processes := Processes(args.device))
    device, scenes = processes.device, args.data.split(":")[0] == "scenes"
    args.resolution = args.resolution or (128 if scenes else 256)
    args.crop = args.crop or "random"
    _, autocast = set_precision(args, device)
    torch.manual_seed(args.seed)

    # --- data and model --------------------------------------------------------------------------
    unseen = f"scenes:all:{args.val_count}:987654321" if scenes else None  # scenes not trained on
    dataset, val_data = open_data(args, processes, captions_required=False, unseen=unseen)
    args.steps = steps_of(args, dataset, processes)
    if checkpoints.finished(resumed, args.steps):
        return processes.on_main(finished, args)
    settings = settings_of(args)
    model = build_model(args).to(device)
    discriminator = PatchDiscriminator().to(device) if args.gan_start is not None else None
    vgg = VGGFeatures(args.perceptual).to(device) if args.perceptual else None
    sizes, dataset.bucket = [(args.resolution,) * 2], np.zeros(len(dataset), np.uint8)
    order = BatchSampler(dataset.bucket, args.batch * args.grad_accum * processes.world, args.seed,
                         dataset.folder)
    if args.dry_run:
        return processes.on_main(outline, args, model, dataset, sizes, order,
                                 discriminator)
    fixed = torch.cat([pixels for pixels, _ in fixed_images(val_data, sizes, args)])
    fixed = fixed.permute(0, 3, 1, 2)                                    # (N, 3, h, w) uint8

    # --- optimizers, EMA, and the state of the run -----------------------------------------------
    optimizer, d_optimizer = build_optimizer(model, args), None
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    ema = EMA(model, args.ema)
    codebook = CodebookUpdates(model, ema, args, processes)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    if discriminator is not None:
        d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.lr / 4,
                                        betas=(0.5, 0.99), weight_decay=0, fused=True)
        parts |= dict(discriminator=discriminator, d_optimizer=d_optimizer)
    if codebook.averages is not None:
        parts |= dict(codebook=codebook.averages)
    start, state = 0, {}
    if resumed is not None:
        state = checkpoints.load(resumed, "train_a.py", settings, ("codebook", "freeze_encoder"))
        start = state["step"]
        load_state(resumed, state, parts, ema, usage=codebook.usage)
    SynchronisedBatchNorm.convert(model)
    parallel = processes.data_parallel(model)
    parallel_d = processes.data_parallel(discriminator) if discriminator is not None else None
    log = Log(args.out, start, args.report_to, settings, enabled=processes.is_main)

    def save(step: int) -> None:
        nan_steps.look()
        state = state_of(parts, ema) | dict(
            script="train_a.py", settings=settings, step=step, bad=nan_steps.in_a_row,
            bad_in_all=nan_steps.in_all, usage=codebook.usage)
        processes.on_main(checkpoints.save, step, state, nan_steps.in_a_row == 0)

    def evaluate(step: int) -> None:
        """Runs validation and draws a sample sheet, both with the EMA weights."""
        model.eval()
        with ema.applied():
            if due(args.val_every, step, args.steps):
                log.write(step, **validate(model, fixed, args, processes))
            if due(args.sample_every, step, args.steps) and processes.is_main:
                with failure_is_a_warning(step):
                    write_atomically(f"{args.out}/samples/step_{step:06d}.png",
                                     sample_sheet(model, fixed, device).save)
                    log.images(step)
        processes.wait()

    nan_steps, state = NanSteps(args, processes, log, state), None   # frees the checkpoint's memory

    # --- one pass of this loop is one optimizer step ---------------------------------------------
    stop, progress = GracefulExit(), Progress("Stage A", start, args, processes, order.batch)
    samples = batches(StageASamples(dataset, sizes, args), order, processes, args, start)
    evaluate(start)
    for step in progress:
        train_mode(model, step, args)
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for group in d_optimizer.param_groups if d_optimizer else ():
            group["lr"] = lr / 4
        gan = discriminator is not None and step >= args.gan_start
        sums, statistics = {}, [buffer.clone() for buffer in model.norm_latent.buffers()]
        for micro, batch in enumerate(micro_batches(samples, args, processes, save, step)):
            images = to_tensor(batch["pixels"], device)                  # (B, 3, H, W)
            # 2 processes with 4 images each compute the same as 1 process with 8. 2 micro-steps of
            # 4 do not: each has its own gan_weight and, until --norm-steps, BatchNorm statistics.
            with contextlib.ExitStack() as stack:
                if micro < args.grad_accum - 1:  # only the last micro-step averages gradients
                    for module in (parallel, parallel_d) if gan else (parallel,):
                        stack.enter_context(no_sync(module))
                with autocast:
                    output = parallel(images, batch["quantise"])
                fake = output["images"].float()                          # (B, 3, H, W)
                reconstruction, loss, terms = losses(output, fake, images, vgg, autocast, args)
                if gan:
                    discriminator.requires_grad_(False)  # g_loss must not train the discriminator
                    with autocast:
                        g_loss = generator_loss(discriminator(fake).float())
                    gan_weight = args.gan_weight * adaptive_weight(
                        scaler.scale(reconstruction), scaler.scale(g_loss), model.to_pixels.weight,
                        lambda gradient: processes.sum(gradient) / processes.world)
                    loss = loss + gan_weight * g_loss
                    discriminator.requires_grad_(True)
                scaler.scale(loss / args.grad_accum).backward()  # so that gradients sum to a mean
                if gan:
                    with autocast:
                        logits = parallel_d(torch.cat([images, fake.detach()])).float()
                    d_loss = discriminator_loss(*logits.chunk(2))        # 2 x (B, 1, H/4, W/4)
                    scaler.scale(d_loss / args.grad_accum).backward()
                    terms |= dict(generator=g_loss, gan_weight=gan_weight, discriminator=d_loss)
            for name, value in (terms | dict(loss=loss)).items():
                sums[name] = sums.get(name, 0) + value.detach().float() / args.grad_accum
            codebook.add(output["latents"], output["indices"])
        scaler.unscale_(optimizer)
        norms = grad_norm = clip_gradients(model, args.clip)
        if gan:
            scaler.unscale_(d_optimizer)
            norms = grad_norm + clip_gradients(discriminator, args.clip)
        # All processes skip a step, or none does: if only one did, the others would wait for it.
        # In fp16, infinite gradients do not count: the scaler skips the step and lowers its scale.
        values = torch.stack([*sums.values()])
        is_nan = ~values.isfinite().all() | (~norms.isfinite() & (not scaler.is_enabled()))
        skip = nan_steps.skip(is_nan, step, zip(model.norm_latent.buffers(), statistics),
                              positions=batch["position"])
        take_step([optimizer, d_optimizer] if gan else [optimizer], scaler, ema, skip)
        codebook.update(step, skip)
        scaler.update()  # GradScaler requires this after unscale_, even in a skipped step
        nan_steps.check(due(args.log_every, step + 1, args.steps), save)

        done = step + 1
        if due(args.log_every, done, args.steps):
            means = (processes.sum(values.clone()) / processes.world).tolist()
            line = dict(zip(sums, means)) | progress.values(done, sums["loss"]) | codebook.used()
            line |= dict(grad_norm=grad_norm.item(), lr=lr, bad_steps=nan_steps.in_all,
                         epoch=order.epoch_of(done * order.batch))
            log.write(done, **line)
            progress.show(line, f"{line['codes_used']} codes")
        stopping = processes.largest(stop.received)
        if due(args.save_every, done, args.steps) or stopping:
            save(done)
        if stopping and done < args.steps:
            stop.leave(stopping, done, processes)
        if due(args.val_every, done, args.steps) or due(args.sample_every, done, args.steps):
            evaluate(done)
            draw_curves(log.lines(), CURVES, f"{args.out}/curves.png")
    nan_steps.check_last()
    model.eval()
    with ema.applied():
        values = validate(model, fixed, args, processes)
        processes.on_main(write_stage_a, args, model, fixed, values, len(dataset))
    stop.restore()
    processes.close()

