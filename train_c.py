"""Trains Stage C, the prior: a LoRA, a full fine-tune, or from random weights. One process or many.

  python train_c.py --weights tiny --data examples/unicorn --lora --lr 3e-3 --batch 8 --steps 100 \\
      --sample-prompt "a unicorn on a green background" --sample-every 100 --out runs/smoke
  torchrun train_c.py --lora --data FOLDER --cache CACHE --out runs/lora          # official weights
  torchrun --nproc-per-node 8 train_c.py --data 'shards/{000..511}.tar' --batch 16 --fsdp \\
      --out runs/full                                                             # all of Stage C
  python train_c.py --weights tiny --init random --config models/tiny/prior/config.json \\
      --data scenes:captioned --out runs/c                                  # from random weights

  image -image encoder-> raw -(x + 1) / 42-> x_0 (B,16,h,w) -noise-> x_t -[C], text-> eps_hat

The first command takes a minute on a CPU; runs/smoke/samples shows images of the prompt without and
with the LoRA. One pass of the loop at the bottom is one optimizer step, written out in full. Three
things decide whether a fine-tune is good, and are on by default. 5 % of the captions, each drawn
separately, are replaced by "", which guidance needs. Noise levels reach t = 1, where sampling
starts. The image encoder computes x_0 in float32.
The random numbers of a sample depend only on (seed, position in the stream of samples), those of
dropout only on (seed, step, process). So any number of processes sees the same samples, and a
resumed run equals an uninterrupted one.
Paper: arXiv:2306.00637 (Stage C).
Needs: torch, torchvision, tokenizers, numpy, pillow, tqdm; training/, loading/, wuerstchen.py.
"""
import sys

from loading.options import RESOLUTION, Number, Parser, below_one, integer
from training.options import (add_data_options, add_optimization_options, add_output_options,
                              check_services)


def parse_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group("model")
    g.add_argument("--weights", default="v2-base", help="where to start, and where encoders and "
                   "decoder come from: a name or folder as for sample.py (default: %(default)s)")
    for part, name in (("prior", "Stage C"), ("prior-text-encoder", "its text encoder"),
                       ("image-encoder", "the image encoder"), ("decoder", "Stage B, for samples"),
                       ("vqgan", "Stage A, for samples"),
                       ("text-encoder", "Stage B's text encoder, for samples")):
        g.add_argument(f"--{part}", help=f"{name} from this folder instead")
    g.add_argument("--init", choices=["weights", "random"], default="weights",
                   help="random: Stage C starts from random weights, the rest comes from --weights")
    g.add_argument("--config", help="sizes for --init random: a config.json with diffusers' keys "
                   "(c, depth, nhead, c_cond, c_r ...; default: the official size)")
    g.add_argument("--train-text", action="store_true",
                   help="also train Stage C's text encoder; not with --lora")
    g = p.add_argument_group("LoRA")
    g.add_argument("--lora", action="store_true",
                   help="train a LoRA, a small file next to the weights, which do not change")
    g.add_argument("--lora-weights", metavar="FILE", help="continue this LoRA, a file or a run's "
                   "folder, with its rank, alpha and targets")
    g.add_argument("--rank", type=integer(1, 8192),
                   help="a higher one learns more and forgets more (default: 8)")
    g.add_argument("--alpha", type=Number(0, above=True),
                   help="its scale is alpha / rank (default: the rank)")
    g.add_argument("--targets", help="layers that get a LoRA: attention, attention+mlp, all, or a "
                   "regular expression for their names (default: attention)")
    g.add_argument("--lora-dropout", type=below_one, default=0.0, help="share of inputs to drop")
    g.add_argument("--rslora", action="store_true", help="scale alpha / sqrt(rank), for high ranks")
    g.add_argument("--dora", action="store_true",
                   help="train length and direction of each weight separately (arXiv:2402.09353)")
    g.add_argument("--trigger", default="", help="trigger words, noted in the file for its users")
    g = add_data_options(p, cache="latents and text embeddings (neither encoder then stays in "
                         "memory)")
    g.add_argument("--resolution", type=RESOLUTION, help="px: the side of a square image, or of "
                   "one with the same area (default: 128 for the tiny weights, 1024 for others)")
    g = add_optimization_options(
        p, steps=1000, batch=4, lr=None, schedule="constant", warmup=50, weight_decay=0.01,
        ema=0.999, beta2=0.999, lr_note=" (default: 1e-4; for full fine-tuning 1e-5)",
        decay_note="not for norms, biases and LoRA")
    g.add_argument("--loss-weight", choices=["p2", "none", "min-snr", "v"], default="p2",
                   help="weight of errors by noise level: training/losses.py; p2 is the original's")
    g.add_argument("--offset-noise", type=Number(0), default=0.0, help="noise shared by a whole "
                   "channel, so that very dark and bright images are learned; 0.05 to 0.1")
    g.add_argument("--preserve", type=below_one, default=0.0, help="share of the samples that get "
                   "another prompt and train the network to predict what it did before, so that "
                   "little is forgotten; 0.75 is tried, see docs/FINETUNE.md")
    g.add_argument("--preserve-prompts", help="what not to forget: a text file with a prompt per "
                   "line, as diverse as possible. Stage C first generates latents for each")
    g.add_argument("--checkpointing", choices=["products", "blocks"], nargs="?", const="blocks",
                   help="keep less for the backward pass and recompute the rest: products keeps "
                   "matrix products and attention, blocks only the input of each block, which is "
                   "slower")
    add_output_options(p, result="a folder for sample.py --weights", save_every=500, log_every=10,
                       val_every=250, val_count=16, val_note=", each at 10 noise levels",
                       sample_every=0, samples="sample sheets, which need all stages in memory",
                       prompts=True)
    return p.parse_args(argv)


if __name__ == "__main__":       # stands before the slow imports, so that --help is fast
    from loading.errors import MEMORY_HINT, RESUME_HINT, exit_on_user_error
    with exit_on_user_error(RESUME_HINT, f"{MEMORY_HINT}, or add --checkpointing"):
        args = parse_args()
        import train_c
        sys.exit(train_c.main(args))

from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from loading.errors import UserError, as_user_error
from loading.hub import TEXT_TO_IMAGE
from loading.weights import (is_tiny, load_image_encoder, load_stage_c, load_text_encoder,
                             new_model)
from stage_c import CHECKPOINTING, StageC
from training.cache import CachedTexts, fill_cache
from training.checkpoints import Checkpoints, Log, full_state, load_full_state, settings_of
from training.data import bucket_sizes, nearest_bucket
from training.loras import check_lora, locate_start, start_lora
from training.losses import LOSS_WEIGHTS
from training.optim import (EMA, NanSteps, build_optimizer, clip_gradients, learning_rate,
                            set_precision, take_step)
from training.order import BatchSampler, batches, micro_batches, sample_rng
from training.preserve import Teacher, TeacherLatents
from training.processes import GracefulExit, Processes, compile_blocks, no_sync
from training.report import Progress, draw_curves, dry_run, due
from training.results import finished, write_lora, write_stage_c
from training.samples import (ImageReader, draw_caption, embed_once, open_cache, open_data,
                              semantic_latents, steps_of)
from training.sheets import SampleSheets, failure_is_a_warning
from training.validation import T_GRID, by_level, fixed_images, fixed_noise, mean_over
from wuerstchen import add_noise

CURVES = ["loss", "val_loss", "grad_norm", *(f"val_loss_t_{t:.2f}" for t in T_GRID[::3])]


def check(args) -> None:
    """Raises UserError for options that cannot be used together, before anything is loaded."""
    check_services(args)
    new = args.train_text or args.init == "random"      # the text embeddings or Stage C will be new
    for conflict, message in (
            (args.lora and new, "--lora leaves all weights unchanged: it does not go with "
             "--train-text or --init random"),
            (bool(args.preserve) != bool(args.preserve_prompts) or args.preserve and new,
             "--preserve and --preserve-prompts go together, and not with --train-text or "
             "--init random, which leave nothing to preserve"),
            (args.weights == "v1", "--weights v1 can generate images but not be fine-tuned: "
             "training uses the latent scale of v2; choose v2-base"),
            (args.config and args.init != "random",
             "--config gives the sizes of a new Stage C: add --init random"),
            (args.cache and (args.crop == "random" or args.train_text), "--cache keeps what does "
             "not change: it does not go with --crop random or --train-text"),
            (args.fsdp and (args.lora or args.train_text), "--fsdp is for all of Stage C: a LoRA "
             "fits on one GPU, and --train-text is for the tiny model")):
        if conflict:
            raise UserError(message)
    check_lora(args)


# ----- one sample ---------------------------------------------------------------------------------

class StageCSamples(torch.utils.data.Dataset):
    """Maps (position, index, bucket) to a sample, which depends only on these three and the seed.

    position: number of the sample in an endless stream. index: number of its image. bucket: index
    of its size in `buckets`. The sample is a dict of x_0 (16,h',w') with a cache, else pixels
    (h,w,3) uint8; caption; t; eps (16,h',w'); position; and, for --preserve, preserve (a bool:
    whether the target is the teacher's prediction) and teacher_latents (16,h',w')."""
    def __init__(self, dataset, buckets, args, caches, replaced, preserved=None):
        self.dataset, self.buckets, self.args, self.preserved = dataset, buckets, args, preserved
        self.read = ImageReader(dataset, buckets, args, not caches, caches, replaced)

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        (position, index, bucket), args = where, self.args
        (h, w), rng = self.buckets[bucket], partial(sample_rng, args.seed, position)
        index, item = self.read(index, bucket, rng)
        caption, dropped = draw_caption(self.dataset, index, rng, args.caption_dropout)
        if self.preserved:
            prompt, item["teacher_latents"] = self.preserved.draw(rng, (h, w), dropped)
            item["preserve"], caption = prompt is not None, caption if prompt is None else prompt
        eps = rng("noise").standard_normal((16, h * 3 // 128, w * 3 // 128), dtype=np.float32)
        if args.offset_noise:
            eps += args.offset_noise * rng("offset").standard_normal((16, 1, 1), dtype=np.float32)
        # t is uniform up to 1.08, then clamped to 1, so 7.5 % are 1, where sampling starts. It
        # stays in float32, because bfloat16 has only 8 significant bits.
        t = min(max((1 - rng("timestep").random()) * 1.08 + 0.001, 0.001), 1.0)
        return item | dict(caption="" if dropped else caption, t=np.float32(t),
                           eps=torch.from_numpy(eps), position=position)


# ----- what is trained ----------------------------------------------------------------------------

TRAINING_PARTS = ("prior", "prior_text_encoder", "prior_tokenizer", "image_encoder")


def load_models(args, paths, dtype, autocast, device) -> tuple:
    """Returns Stage C (with its LoRA if --lora), the teacher of --preserve or None, the image
    encoder and the text encoder. The image encoder stays in eval mode and in float32, so that the
    latents x_0 are exact."""
    prior = build_prior(args, paths["prior"], dtype).to(device)
    text_encoder = load_text_encoder(paths["prior_text_encoder"], paths["prior_tokenizer"],
                                     torch.float32 if args.train_text else dtype)
    text_encoder.to(device).train(args.train_text).requires_grad_(args.train_text)
    image_encoder = load_image_encoder(paths["image_encoder"]).to(device).requires_grad_(False)
    if image_encoder.config.get("network") == "efficientnet_v2_l":
        raise UserError(f"{paths['image_encoder']} is the image encoder of v1, whose latents have "
                        f"another scale than this training uses: choose that of v2")
    teacher = Teacher(prior, args.lora, dtype, autocast) if args.preserve else None
    if args.lora:
        start_lora(prior, args)
    prior.checkpointing = args.checkpointing
    return prior, teacher, image_encoder, text_encoder


def build_prior(args, path, dtype) -> StageC:
    """Returns Stage C in float32, because 16 bits would round small updates of weights away. With
    --lora, Stage C is frozen and therefore in `dtype`, to save memory; the LoRA is in float32."""
    if args.init == "weights":
        return load_stage_c(path, dtype if args.lora else torch.float32)
    return new_model(StageC, args.config)


class TextAndPrior(torch.nn.Module):
    """Stage C and, if it is trained, the text encoder, as one module, which DDP needs."""
    def __init__(self, prior, text_model=None):
        super().__init__()
        self.prior, self.text = prior, text_model

    def forward(self, x_t, t, text):
        """Returns the predicted noise eps_hat (B,16,h,w). x_t (B,16,h,w), t (B,), text (B,N,D). If
        the text encoder is trained, text is a tuple of token ids (B,N) and mask (B,N) instead."""
        if not isinstance(text, torch.Tensor):
            text = self.text(*text)
        return self.prior(x_t, t, text)


def validate(model, fixed, embed, weight, autocast, args, processes) -> dict[str, float]:
    """Returns figures by name: the loss at each noise level of T_GRID, and the weighted mean of
    these. fixed: pairs of x_0 (1,16,h,w) and caption. Images and noise are always the same."""
    t = torch.tensor(T_GRID, device=processes.device)                              # (10,)

    def raw_losses(i: int):
        x_0, caption = fixed[i]
        eps = fixed_noise(i, x_0.shape[1:], args).to(x_0)                          # (10, 16, h, w)
        with autocast:
            text = embed([caption] * len(t))
            eps_hat = model(add_noise(x_0.expand_as(eps), eps, t), t, text).float()
        return (eps_hat - eps).square().mean(dim=(1, 2, 3))
    raw = mean_over(len(fixed), raw_losses, args, processes)
    return dict(val_loss=(raw * weight(t)).mean().item()) | by_level(raw, "val_loss")


# ----- the run ------------------------------------------------------------------------------------

def main(args):
    check(args)
    checkpoints = Checkpoints(args, ("lora.safetensors" if args.lora else "prior", "base.json"))
    resumed = checkpoints.find(args.resume, processes := Processes(args.device))
    if args.lr is None:
        args.lr = 1e-5 if not args.lora and args.init == "weights" else 1e-4
    dtype, autocast = set_precision(args, device := processes.device)
    torch.manual_seed(args.seed)

    # --- data, before any model is downloaded, and models -----------------------------------------
    dataset, val_data = open_data(args, processes)
    args.steps = steps_of(args, dataset, processes)
    if checkpoints.finished(resumed, args.steps):
        return processes.on_main(finished, args)
    parts = (*TEXT_TO_IMAGE, "image_encoder") if args.sample_every else TRAINING_PARTS
    paths = locate_start(args, parts)
    prior, teacher, image_encoder, text_encoder = load_models(args, paths, dtype, autocast, device)
    settings = settings_of(args)      # after load_models, which reads args.rank from --lora-weights
    model = TextAndPrior(prior.train(), text_encoder.model if args.train_text else None)
    resolution = args.resolution or (128 if is_tiny(paths["image_encoder"]) else 1024)
    with as_user_error():
        buckets = bucket_sizes(resolution, max_ratio=args.max_ratio)
    dataset.bucket = nearest_bucket(dataset.sizes, buckets)
    order = BatchSampler(dataset.bucket, args.batch * args.grad_accum * processes.world, args.seed,
                         dataset.folder)
    if args.dry_run:
        return processes.on_main(dry_run, args, model, dataset, buckets, order)

    encode = partial(semantic_latents, image_encoder, device=device)               # pixels -> x_0

    def embed(captions: list[str]):
        """Returns captions' embeddings (B,N,D) or, with --train-text, their token ids and mask."""
        if not args.train_text:
            return texts(captions)
        return text_encoder.tokens(captions)

    caches, replaced, preserved = {}, {}, None
    texts = CachedTexts(text_encoder, device)
    if args.cache:
        caches = {"x_0": open_cache(args, image_encoder, kind="latents", crop="center")}
        texts.cache = open_cache(args, text_encoder.model, kind="texts")
        with as_user_error():
            replaced = fill_cache(dataset, lambda i: [buckets[dataset.bucket[i]]], args.random_flip,
                                  caches, {"x_0": encode}, texts, processes)
    if args.preserve:
        sizes = [buckets[i] for i in np.unique(dataset.bucket)]
        preserved = TeacherLatents(args, teacher).generate(teacher, embed, sizes, processes)
    images = fixed_images(val_data, buckets, args) if args.val_every else []
    fixed = [(encode(pixels), caption) for pixels, caption in images]
    sheets = SampleSheets(args, model, text_encoder, paths, dataset, autocast, dtype,
                          processes) if args.sample_every else None
    if args.cache:               # the cache replaces the encoders: free their memory
        texts.fill([caption for _, caption in fixed] + (preserved.prompts if preserved else []))
        encode = image_encoder = text_encoder = None
        texts.encoder = partial(embed_once, paths, dtype)    # used only if a cache entry is damaged

    # --- optimizer, EMA, and the state of the run -------------------------------------------------
    groups = [*zip(prior.res_blocks, prior.timestep_blocks, prior.attention_blocks)]
    if args.compile:
        products = args.checkpointing == "products"  # if so, blocks are compiled with `checkpoint`
        prior.checkpointing = None if products else args.checkpointing
        compile_blocks(groups, CHECKPOINTING["products"] if products else None)
    if args.fsdp:
        processes.split_weights(model, groups, dtype)
    optimizer, ema = build_optimizer(model, args), EMA(model, args.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    weight = LOSS_WEIGHTS[args.loss_weight]
    start, state = 0, {}
    if resumed is not None:
        state = checkpoints.load(resumed, "train_c.py", settings, (
            "lora", "lora_weights", "rank", "alpha", "targets", "rslora", "dora", "train_text"),
                                 processes)
        start = state["step"]
        load_full_state(resumed, state, model, optimizer, scaler, ema, processes)
    parallel = model if args.fsdp else processes.data_parallel(model)
    log = Log(args.out, start, args.report_to, settings, enabled=processes.is_main)

    def save(step: int) -> None:
        nan_steps.look()
        state = full_state(model, optimizer, scaler, ema)        # every process must call it
        state |= dict(script="train_c.py", settings=settings, step=step,
                      bad=nan_steps.in_a_row, bad_in_all=nan_steps.in_all)
        processes.on_main(checkpoints.save, step, state, nan_steps.in_a_row == 0)
        with ema.applied() if args.lora else nullcontext():
            processes.on_main(write_lora, args, prior, step, len(dataset))

    def evaluate(step: int) -> None:
        """Runs validation and draws a sample sheet, both with the EMA weights."""
        model.eval()
        with ema.applied():
            if due(args.val_every, step, args.steps):
                log.write(step, **validate(model, fixed, embed, weight, autocast, args, processes))
            if due(args.sample_every, step, args.steps):
                with failure_is_a_warning(step):
                    sheets.write(step)
                    log.images(step)
        model.train()
        processes.wait()

    nan_steps, state = NanSteps(args, processes, log, state), None   # frees the checkpoint's memory

    # --- one pass of this loop is one optimizer step ----------------------------------------------
    stop, progress = GracefulExit(), Progress("Stage C", start, args, processes, order.batch)
    samples = batches(StageCSamples(dataset, buckets, args, caches, replaced, preserved), order,
                      processes, args, start)
    evaluate(start)      # before the first step, to find errors in validation and sampling
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss_sum = torch.zeros((), device=device)
        for micro, batch in enumerate(micro_batches(samples, args, processes, save, step)):
            x_0 = batch["x_0"] if caches else encode(batch["pixels"])              # (B, 16, h, w)
            eps, t = batch["eps"], batch["t"]                                # (B, 16, h, w), (B,)
            text = embed(batch["caption"])                                         # (B, N, D)
            x_t, target = add_noise(x_0, eps, t), eps                              # (B, 16, h, w)
            if args.preserve:
                x_t, target = teacher.replace(batch, x_t, eps, t, text)
            # Dropout's seed does not depend on past steps, so a resumed run has the same dropout.
            torch.manual_seed(hash((args.seed, step, micro, processes.rank)) % 2 ** 63)
            # Only the last backward of a step averages gradients over processes. no_sync must also
            # contain forward, because DDP decides in forward whether backward communicates.
            last = micro == args.grad_accum - 1
            with nullcontext() if last else no_sync(parallel):
                with autocast:
                    eps_hat = parallel(x_t, t, text).float()                       # (B, 16, h, w)
                raw = (eps_hat - target).square().mean(dim=(1, 2, 3))              # (B,)
                loss = (raw * weight(t)).mean()
                scaler.scale(loss / args.grad_accum).backward()  # so that gradients sum to a mean
            loss_sum += loss.detach() / args.grad_accum
            progress.add(t, raw)
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model, args.clip)
        # All processes skip a step, or none does: if only one did, the others would wait for it.
        # In fp16, infinite gradients do not count: the scaler skips the step and lowers its scale.
        is_nan = ~loss_sum.isfinite() | (~grad_norm.isfinite() & (not scaler.is_enabled()))
        skip = nan_steps.skip(is_nan, step, positions=batch["position"], captions=batch["caption"])
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
        write_stage_c(args, model, text_encoder, dataset, processes)
    stop.restore()
    processes.close()
