"""Trains Stage B, the diffusion decoder, with or without its image encoder. One process or many.

  python train_b.py --weights tiny --freeze-encoder --data scenes:all:64 --out runs/smoke --steps 20
  python train_b.py --freeze-encoder --data FOLDER --cache CACHE --out runs/domain
  python train_b.py --init random --config models/tiny --vqgan runs/a/vqgan --loss head \\
      --image-encoder runs/encoder/image_encoder --text-encoder none --cache CACHE --out runs/b
  torchrun --nproc-per-node 8 train_b.py --init random --backbone IMAGENET.pth --batch 16 --fsdp \\
      --data 'shards/{000..511}.tar' --resolution 512 768 1024 --out runs/b    # the official size
  python train_b.py --v1 --weights tiny --init random --config models/tiny-v1 --freeze-encoder \\
      --image-encoder models/tiny/image_encoder --cache CACHE --out runs/b_v1  # tokens, as in v1

  image -[image encoder]-> semantic (B,16,h',w') -noise, dropout-> [B] -> a, b; eps_hat = (x_t-a)/b
  image -VQGAN, frozen-> x_0 (B,4,h,w) -noise-> x_t             -> [B]

The first command is a smoke run on a CPU; the second adapts Stage B to your images.
Stage B is a diffusion autoencoder. Its encoder reduces an image to 1/42 of its width and height,
with 16 channels. The loss makes it encode what Stage B needs to denoise x_t.
One pass of the loop at the bottom is one optimizer step. The random numbers of a sample depend only
on (seed, position in the stream of samples), those of dropout only on (seed, step, process). So any
number of processes sees the same samples, and a resumed run equals an uninterrupted one.
Note: gradient accumulation (--grad-accum) equals a larger batch only with --freeze-encoder, because
the encoder's BatchNorm sees one forward pass (of all processes) at a time.
Stage C only works with the encoder it was trained on; if you train the encoder, train C again.
With --v1, functions of v1/training.py replace those of the same names here: see `stage` in main.
Paper: arXiv:2306.00637 (Stage B).
Needs: torch, torchvision, numpy, pillow, tqdm; tokenizers for text; training/, loading/, v1/.
"""
import sys

from loading.options import RESOLUTION, Number, Parser, below_one, integer, unit_float
from training.options import (add_data_options, add_optimization_options, add_output_options,
                              check_services)


def parse_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group("model")
    g.add_argument("--v1", action="store_true", help="train the Stage B of Würstchen v1, by "
                   "cross-entropy over the VQGAN's tokens")
    g.add_argument("--weights", help="where to start, and where the other parts come from: a name "
                   "or folder as for sample.py (default: v2, with --v1 v1)")
    for part, name in (("decoder", "Stage B"), ("vqgan", "Stage A"),
                       ("image-encoder", "the image encoder, also with --init random"),
                       ("text-encoder", "Stage B's text encoder (none: zeros replace text)")):
        g.add_argument(f"--{part}", help=f"{name} from this folder instead")
    g.add_argument("--init", choices=["weights", "random"], default="weights",
                   help="random: Stage B and the image encoder start from random weights")
    g.add_argument("--config", help="sizes for --init random, with diffusers' keys: a folder with "
                   "decoder/config.json and image_encoder/config.json, a file for Stage B only, or "
                   "official (the default)")
    g.add_argument("--backbone", help="a file of torchvision's efficientnet_v2_s, trained on "
                   "ImageNet, from which a new image encoder starts, as in the paper")
    g.add_argument("--freeze-encoder", action="store_true",
                   help="do not change the image encoder: Stage C stays valid")
    g = add_data_options(p, default="scenes:all:32000:1",
                         cache="latents of the VQGAN and of a frozen image encoder, and text "
                         "embeddings")
    g.add_argument("--resolution", type=RESOLUTION, nargs="+", help="px: the side of a square "
                   "image, or of one with the same area; of several, each step draws one (default: "
                   "128 for the tiny encoder, 1024 for others, with --v1 512)")
    g.add_argument("--semantic-dropout", type=below_one, default=0.05, help="share of semantic "
                   "latents that are zeroed, each drawn separately, for guidance")
    g.add_argument("--semantic-noise", type=unit_float, default=0.3, help="share of semantic "
                   "latents that get noise of a level up to 0.5, so that Stage C's small errors do "
                   "no harm")
    g = add_optimization_options(
        p, title="optimization (small: the default with the tiny encoder)", steps=6000, batch=None,
        lr=None, schedule="trapezoid", warmup=100, weight_decay=1e-3, ema=None,
        batch_note=" (default: 4; small 32)", ema_note=" (default: 0.999; small 0.998)",
        lr_note=" (default: from random weights 1e-4, else 1e-5; small 1.5e-3)")
    g.add_argument("--blind", type=integer(0), help="first steps in which x_t is empty, so that "
                   "Stage B must generate the image from the semantic latents, the fastest way to "
                   "learn that; with --v1 all tokens are random (default: 0; small and random: "
                   "2000)")
    g.add_argument("--guide-attention", type=Number(0), help="with --v1: weight of a loss that "
                   "shows attention where each semantic vector belongs (default: 0; small 0.3)")
    g.add_argument("--high-noise", type=Number(0, above=True), help="exponent that moves noise "
                   "levels towards 1, where semantic latents matter (default: 1, even; small 1.5, "
                   "not with --v1)")
    g.add_argument("--loss", choices=["eps", "head"], help="eps, the default: error of the noise, "
                   "as in the authors' script for Stage C (v2's B has none); head: of the two "
                   "outputs, signal and noise scale, which learns faster from random weights")
    g.add_argument("--loss-weight", choices=["v", "p2", "none"], help="weight of errors by noise "
                   "level: training/losses.py (default: p2, as in that script; small v)")
    g.add_argument("--even-contrast", action="store_true", help="give images of little contrast "
                   "more weight (a snowflake's lines): the squared error hardly sees them")
    g.add_argument("--checkpointing", action="store_true",
                   help="recompute blocks in the backward pass: far less memory, but slower")
    add_output_options(
        p, result="decoder/ and image_encoder/", save_every=250, log_every=20, val_every=250,
        val_count=16, val_note=", each at 10 noise levels, and in the PSNR of --sample-every",
        val_data="; for emoji scenes unseen ones", sample_every=500,
        samples="grids and PSNR of images through encoder, B and A")
    args = p.parse_args(argv)
    args.weights = args.weights or ("v1" if args.v1 else "v2")
    return args


if __name__ == "__main__":       # stands before the slow imports, so that --help is fast
    from loading.errors import MEMORY_HINT, RESUME_HINT, exit_on_user_error
    with exit_on_user_error(RESUME_HINT, f"{MEMORY_HINT}, or add --checkpointing"):
        args = parse_args()
        import train_b
        sys.exit(train_b.main(args))

from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

import v1.training
from loading.errors import UserError, as_user_error
from stage_b import TinyImageEncoder
from training.cache import CachedTexts, fill_cache
from training.checkpoints import Checkpoints, Log, full_state, load_full_state, settings_of
from training.losses import LOSS_WEIGHTS
from training.models import (LEVELS_AT_ONCE, NETWORK, cache_settings,  # noqa: F401
                             block_groups, decode, encode, load_models, match_vqgan, pipeline,
                             semantic_scale)              # most are used only as stage.NAME
from training.optim import (EMA, NanSteps, build_optimizer, clip_gradients, learning_rate,
                            set_precision, take_step)
from training.order import batches, micro_batches, sample_rng
from training.processes import GracefulExit, Processes, compile_blocks, no_sync
from training.report import Progress, draw_curves, dry_run, due
from training.results import finished, write_stage_b
from training.samples import (ImageReader, MultiSizeSampler, draw_caption, encoder_input, no_text,
                              open_cache, open_data, semantic_latents, steps_of,
                              to_tensor)
from training.sheets import Reconstructions, failure_is_a_warning
from training.validation import T_GRID, fixed_set, random_images, validate
from wuerstchen import add_noise, alphas_cumprod, per_row, unscale_semantic

CURVES = ["loss", "val_loss",
          *(f"psnr_guidance_{scale}_steps_{steps}" for scale in (1, 2, 4) for steps in (8, 12)),
          "grad_norm", *(f"val_{of}_t_{t:.2f}" for of in ("loss", "accuracy") for t in T_GRID[::3])]


def check(args) -> None:
    """Raises UserError for options that cannot be used together, before anything is loaded."""
    check_services(args)
    new, only_v2 = args.init == "random", ("loss", "loss_weight", "even_contrast")
    only_v2 = [f"--{name.replace('_', '-')}" for name in only_v2 if args.v1 and getattr(args, name)]
    for conflict, message in (
            (only_v2, f"{', '.join(only_v2)} is for v2, whose Stage B generates latents; --v1 has "
             f"its own loss, cross-entropy over tokens: remove one of them"),
            (args.guide_attention and not args.v1, "--guide-attention is for --v1: in v2 the "
             "semantic latents lie over the image, so there is nothing to find"),
            (args.config and not new, "--config has the sizes of a new Stage B: add --init random"),
            (args.backbone and (not new or args.image_encoder), "--backbone is where a new image "
             "encoder starts: it goes with --init random and without --image-encoder"),
            (new and args.decoder, "--decoder says where Stage B starts, and so does --init "
             "random: remove one of them"),
            (new and args.freeze_encoder and not args.image_encoder, "--freeze-encoder would keep "
             "an image encoder that has learned nothing: add --image-encoder FOLDER"),
            (args.cache and args.crop == "random",
             "--cache keeps what does not change: it does not go with --crop random")):
        if conflict:
            raise UserError(message)


def set_defaults(args, small: bool) -> None:
    """Gives unset options the defaults for small (emoji scenes) or released (large) models."""
    new = args.init == "random"
    values = dict(resolution=[128 if small else 1024], batch=32 if small else 4,
                  lr=1.5e-3 if small else 1e-4 if new else 1e-5, ema=0.998 if small else 0.999,
                  blind=2000 if small and new else 0, guide_attention=0,
                  high_noise=1.5 if small else 1.0, loss="eps", loss_weight="v" if small else "p2")
    for name, value in (values | (v1.training.defaults(small) if args.v1 else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# ----- one sample ---------------------------------------------------------------------------------

class StageBSamples(torch.utils.data.Dataset):
    """Maps (position, index, number) to a sample, which depends only on these three and the seed.

    position: number of the sample in an endless stream. index: number of its image. number: index
    of its size in `sizes`. The sample is a dict: if cached, x_0 (4,h/4,w/4) and semantic latents
    `stored` (16,h',w'); if `stored` is not cached, pixels (h,w,3) uint8; caption; position; chance,
    from which noise_levels computes t; the noise of draw_noise; for the semantic latents, noise
    eps_semantic (16,h',w'), its level t_semantic (0: none), dropped (a bool: set them to 0)."""
    def __init__(self, dataset, sizes, args, caches, replaced, draw_noise):
        self.dataset, self.sizes, self.args, self.draw_noise = dataset, sizes, args, draw_noise
        self.read = ImageReader(dataset, sizes, args, "stored" not in caches, caches, replaced)

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        (position, index, number), args = where, self.args
        (h, w), rng = self.sizes[number], partial(sample_rng, args.seed, position)
        index, item = self.read(index, number, rng)
        caption, dropped = draw_caption(self.dataset, index, rng, args.caption_dropout)
        item["caption"] = "" if dropped or args.text_encoder == "none" else caption
        spoil = rng("semantic")      # for conditioning augmentation, arXiv:2106.15282
        noisy, zeroed = (spoil.random() < p for p in (args.semantic_noise, args.semantic_dropout))
        level, shape = spoil.random() * 0.5, (16, h * 3 // 128, w * 3 // 128)
        eps_semantic = torch.from_numpy(spoil.standard_normal(shape, dtype=np.float32))
        return item | self.draw_noise(rng("noise"), h // 4, w // 4) | dict(
            chance=np.float32(rng("timestep").random()), eps_semantic=eps_semantic,
            t_semantic=np.float32(level if noisy else 0), dropped=bool(zeroed), position=position)


# ----- noise and loss of v2; v1/training.py has functions of the same names for v1 ----------------

def draw_noise(rng: np.random.Generator, h: int, w: int, config: dict) -> dict:
    """Draws the noise of one sample. Returns {"eps": (4,h,w)}. config: of Stage B."""
    return dict(eps=torch.from_numpy(rng.standard_normal((config["c_in"], h, w), dtype=np.float32)))


def noise_levels(chance, blind: bool, args):
    """Converts chance (B,), uniform from 0 to 1, to noise levels t (B,). 7.5 % of them are 1, where
    sampling starts; if blind (see corrupt), all are 0.4 to 0.9, where the head learns `a` well."""
    t = ((1 - chance) * 1.08 + 0.001).clamp(0.001, 1)
    return 0.4 + 0.5 * chance if blind else 1 - (1 - t) ** args.high_noise


def corrupt(batch: dict, x_0, t, blind: bool) -> tuple:
    """Returns x_t and eps, each (B,4,h,w). If blind, x_t tells nothing about x_0: all of x_t is 1
    (the first norm cannot normalise 0), and eps is such that add_noise(x_0, eps, t) is this x_t."""
    if not blind:
        return add_noise(x_0, batch["eps"], t), batch["eps"]
    x_t, ab = torch.ones_like(x_0), per_row(alphas_cumprod(t), x_0)
    return x_t, (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()


def forward(decoder, x_t, t, semantic, text) -> tuple:
    """Returns Stage B's outputs a and b, each (B,4,h,w); the predicted eps is (x_t - a) / b."""
    return decoder.signal_and_scale(x_t, t, semantic, text)


def prediction(output, x_t):
    """Returns the predicted noise (B,4,h,w), for sampling. output: the pair a, b from `forward`."""
    a, b = output
    return (x_t - a.float()) / b.float()


def raw_losses(output, x_0, x_t, eps, t, args):
    """Returns each image's mean squared error (B,), of eps or, with --loss head, of a and b."""
    a, b = (part.float() for part in output)
    if args.loss == "eps":
        return ((x_t - a) / b - eps).square().mean(dim=(1, 2, 3))
    # ab is alpha_bar. The targets a = sqrt(ab) x_0, b = sqrt(1 - ab) make (x_t - a) / b equal eps.
    # (The loss on eps multiplies errors of b by the noise in x_t, which hides the gradient of `a`.)
    # Dividing by 1 - ab weights errors of `a` like the loss on eps, but by at most 1 / 0.2.
    ab = per_row(alphas_cumprod(t), x_0)                                           # (B, 1, 1, 1)
    squares = (a - ab.sqrt() * x_0).square() + (b - (1 - ab).sqrt()).square()      # (B, 4, h, w)
    return (squares / (1 - ab).clamp(min=0.2)).mean(dim=(1, 2, 3))


def contrast_weight(x_0):
    """Returns a loss weight (B,) for images with latents x_0 (B,4,h,w), which callers normalise.

    The squared error of a wrong object grows with the object's contrast; the weight corrects this.
    The variance within the latents of an emoji scene is at least 0.04, at most 1.2, median 0.3.
    """
    return 1 / (x_0.var(dim=(2, 3)).mean(dim=1) + 0.15)  # 0.3 to 2.2 times the mean weight


def mean_contrast_weight(dataset, sizes, encode_vqgan, args) -> float:
    """Returns the mean of contrast_weight over 256 images, or 1 without --even-contrast."""
    if not args.even_contrast:
        return 1.0
    images = random_images(dataset, sizes, sample_rng(args.seed, 0, "contrast"), 256)
    return float(np.mean([contrast_weight(encode_vqgan(pixels)).item() for pixels, _ in images]))


# ----- what is trained ----------------------------------------------------------------------------

class EncoderAndDecoder(torch.nn.Module):
    """Stage B and, if it is trained, the image encoder, as one module, which DDP needs."""
    def __init__(self, decoder, encoder, stage):
        super().__init__()
        self.decoder, self.encoder, self.stage = decoder, encoder, stage
        self.scale, self.unscale = stage.semantic_scale(decoder)

    def forward(self, source, x_t=None, t=None, text=None, t_semantic=None, eps_semantic=None,
                dropped=None):
        """Encodes source if it is images (B,3,H,W); otherwise it is raw semantic latents
        (B,16,h',w'). Returns the semantic latents if x_t is None, else the result of stage.forward.

        t (B,), text (B,N,D): other inputs of Stage B. eps_semantic (B,16,h',w'), t_semantic (B,):
        noise for the semantic latents, its level (0: none). dropped (B,): whether to zero them."""
        semantic = self.encoder(source).float() if source.shape[1] == 3 else source
        if x_t is None:                                                            # (B, 16, h', w')
            return semantic
        if t_semantic is not None:           # add_noise expects variance 1, so scale first
            noised = self.unscale(add_noise(self.scale(semantic), eps_semantic, t_semantic))
            semantic = torch.where(per_row(t_semantic > 0, semantic), noised, semantic)
            semantic = semantic.masked_fill(per_row(dropped, semantic), 0.0)
        return self.stage.forward(self.decoder, x_t, t, semantic, text)


def share_of_learning_rate(name: str) -> float:
    """Returns a factor of a weight's learning rate: 1/8 if it multiplies semantic latents, else 1.
    Adam changes weights by about the learning rate. Semantic latents are about 42 in size, so these
    weights would change the output 42 times as much. 1/42 would compensate; 1/8 was as good."""
    return 1 / 8 if name.startswith("decoder.") and "semantic_" in name[len("decoder."):] else 1.0


# ----- the run ------------------------------------------------------------------------------------

def main(args):
    check(args)
    checkpoints = Checkpoints(args, results=("decoder", "image_encoder"))
    resumed = checkpoints.find(args.resume, processes := Processes(args.device))
    dtype, autocast = set_precision(args, device := processes.device)
    torch.manual_seed(args.seed)

    # --- data, before any model is downloaded, and models -----------------------------------------
    dataset, val_data = open_data(args, processes, captions_required=False,
                                  unseen=f"scenes:all:{max(args.val_count, 64)}:1000000000")
    stage = v1.training if args.v1 else sys.modules[__name__]  # modules with the same functions
    decoder, encoder, vqgan, text_encoder = load_models(args, stage, dtype, processes)
    set_defaults(args, small := isinstance(encoder, TinyImageEncoder))
    model = EncoderAndDecoder(decoder, None if args.freeze_encoder else encoder, stage)
    args.steps = steps_of(args, dataset, processes)
    if checkpoints.finished(resumed, args.steps):
        return processes.on_main(finished, args)
    settings = settings_of(args)
    with as_user_error():
        order = MultiSizeSampler(dataset.sizes, args.resolution, args.max_ratio, args.batch *
                                 args.grad_accum * processes.world, args.seed, dataset.folder)
    dataset.bucket, draw = order.bucket, partial(stage.draw_noise, config=decoder.config)
    if args.dry_run:
        return processes.on_main(dry_run, args, model, dataset, order.sizes, order, draw)

    @torch.no_grad()
    def encode_vqgan(pixels):
        """Encodes pixels (B,h,w,3) uint8 to x_0 (B,4,h/4,w/4); with --v1, to tokens (B,h/4,w/4)."""
        return stage.encode(vqgan, to_tensor(pixels, device))

    encode_semantic = partial(semantic_latents, encoder, device=device)  # with --freeze-encoder
    encoders, caches, replaced = dict(x_0=encode_vqgan), {}, {}
    if args.freeze_encoder:
        encoders["stored"] = encode_semantic
    embed = (CachedTexts(text_encoder, device) if text_encoder else                # (B, N, c_text)
             partial(no_text, decoder.config, device))
    if args.cache:
        caches["x_0"] = open_cache(args, vqgan, crop="center", **stage.cache_settings(vqgan))
        if args.freeze_encoder:          # train_c.py uses the same cache entries
            caches["stored"] = open_cache(args, encoder, kind="latents", crop="center")
        if text_encoder:
            embed.cache = open_cache(args, text_encoder.model, kind="texts")
        with as_user_error():
            replaced = fill_cache(dataset, order.sizes_of, args.random_flip, caches, encoders,
                                  embed if text_encoder else None, processes)
    fixed = sheets = None
    if args.val_every or args.sample_every:
        fixed = fixed_set(val_data, order.resolutions[0], encoders, args, device)
        sheets = Reconstructions(args, model, stage, vqgan, small, fixed, embed, autocast,
                                 processes)
    mean_contrast = mean_contrast_weight(dataset, order.shapes, encode_vqgan, args)
    if args.cache and args.freeze_encoder:
        encoder.to("cpu")                # frees device memory: the cache replaces the encoder

    # --- optimizer, EMA, and the state of the run -------------------------------------------------
    weight, raw_losses = LOSS_WEIGHTS[args.loss_weight], stage.raw_losses
    if args.compile:
        compile_blocks(block_groups(decoder))
        raw_losses = torch.compile(raw_losses)
        if not args.freeze_encoder:
            encoder.compile()
    if args.fsdp:
        processes.split_weights(model, block_groups(decoder), dtype)
    optimizer = build_optimizer(model, args, share=share_of_learning_rate)
    ema = EMA(model, args.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    start, state = 0, {}
    if resumed is not None:
        state = checkpoints.load(resumed, "train_b.py", settings, ("v1", "freeze_encoder"),
                                 processes)
        start = state["step"]
        load_full_state(resumed, state, model, optimizer, scaler, ema, processes)
    guide = v1.training.AttentionGuide(decoder) if args.guide_attention else None
    parallel = model if args.fsdp else processes.data_parallel(model)
    log = Log(args.out, start, args.report_to, settings, enabled=processes.is_main)

    def save(step: int) -> None:
        nan_steps.look()
        state = full_state(model, optimizer, scaler, ema)        # all processes must call this
        state |= dict(script="train_b.py", settings=settings, step=step,
                      bad=nan_steps.in_a_row, bad_in_all=nan_steps.in_all)
        processes.on_main(checkpoints.save, step, state, nan_steps.in_a_row == 0)

    def evaluate(step: int) -> None:
        """Runs validation and reconstructs images, both with the EMA weights."""
        model.eval()
        with ema.applied():
            if due(args.val_every, step, args.steps):
                log.write(step, **validate(model, fixed, embed, weight, stage, autocast, args,
                                           processes))
            if due(args.sample_every, step, args.steps):
                with failure_is_a_warning(step):
                    log.write(step, **sheets.write(step))
                    log.images(step)
        model.train()
        processes.wait()

    nan_steps, state = NanSteps(args, processes, log, state), None   # frees the checkpoint's memory

    # --- one pass of this loop is one optimizer step ----------------------------------------------
    stop, progress = GracefulExit(), Progress("Stage B", start, args, processes, order.batch)
    samples = batches(StageBSamples(dataset, order.sizes, args, caches, replaced, draw), order,
                      processes, args, start)
    evaluate(start)      # before the first step, to find errors in validation and sampling
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["share"]
        loss_sum, blind = torch.zeros((), device=device), step < args.blind
        statistics = [buffer.clone() for buffer in model.buffers()]
        for micro, batch in enumerate(micro_batches(samples, args, processes, save, step)):
            x_0 = batch["x_0"] if caches else encode_vqgan(batch["pixels"])        # (B, 4, h, w)
            if args.freeze_encoder:                                                # (B, 16, h', w')
                source = batch["stored"] if caches else encode_semantic(batch["pixels"])
                source = unscale_semantic(source)
            else:
                source = encoder_input(to_tensor(batch["pixels"], device))         # (B, 3, H, W)
            text = embed(batch["caption"])                                         # (B, N, c_text)
            t = stage.noise_levels(batch["chance"], blind, args)                   # (B,)
            x_t, target = stage.corrupt(batch, x_0, t, blind)                      # (B, 4, h, w)
            # Dropout's seed does not depend on past steps, so a resumed run has the same dropout.
            torch.manual_seed(hash((args.seed, step, micro, processes.rank)) % 2 ** 63)
            # Only the last backward of a step averages gradients over processes. no_sync must also
            # contain forward, because DDP decides in forward whether backward communicates.
            last = micro == args.grad_accum - 1
            with nullcontext() if last else no_sync(parallel):
                with autocast:
                    output = parallel(source, x_t, t, text, batch["t_semantic"],
                                      batch["eps_semantic"], batch["dropped"])
                raw = raw_losses(output, x_0, x_t, target, t, args)                # (B,)
                contrast = contrast_weight(x_0) / mean_contrast if args.even_contrast else 1
                loss = (raw * weight(t) * contrast).mean()
                if guide:
                    loss = loss + args.guide_attention * guide.loss()
                scaler.scale(loss / args.grad_accum).backward()  # so that gradients sum to a mean
            loss_sum += loss.detach() / args.grad_accum
            progress.add(t, raw)
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model, args.clip)
        # All processes skip a step, or none does: if only one did, the others would wait for it.
        # In fp16, infinite gradients do not count: the scaler skips the step and lowers its scale.
        is_nan = ~loss_sum.isfinite() | (~grad_norm.isfinite() & (not scaler.is_enabled()))
        skip = nan_steps.skip(is_nan, step, zip(model.buffers(), statistics),
                              positions=batch["position"], captions=batch["caption"])
        take_step([optimizer], scaler, ema, skip)
        scaler.update()  # GradScaler requires this after unscale_, even in a skipped step
        nan_steps.check(due(args.log_every, step + 1, args.steps), save)

        # --- log, save, validate, sample ----------------------------------------------------------
        done = step + 1
        if due(args.log_every, done, args.steps):
            line = progress.values(done, loss_sum) | dict(
                grad_norm=grad_norm.item(), lr=learning_rate(step, args),
                bad_steps=nan_steps.in_all, epoch=order.epoch_of(done * order.batch))
            log.write(done, **line)
            progress.show(line)
        stopping = processes.largest(stop.received)
        if due(args.save_every, done, args.steps) or stopping:
            save(done)
        if stopping and done < args.steps:
            stop.leave(stopping, done, processes)
        if due(args.val_every, done, args.steps) or due(args.sample_every, done, args.steps):
            evaluate(done)
            draw_curves(log.lines(), CURVES, f"{args.out}/curves.png")
    nan_steps.check_last()
    with ema.applied():
        write_stage_b(args, model, encoder, dataset, log.lines(), processes)
    stop.restore()
    processes.close()
