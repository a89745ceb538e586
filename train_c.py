"""Trains Stage C, the prior: fine-tunes it, by LoRA or in full, or starts from nothing. One process or many.

  python train_c.py --weights tiny --data examples/unicorn --lora --out runs/smoke --steps 20 --batch 4     # CPU smoke run
  torchrun train_c.py --lora --data FOLDER --cache CACHE --out runs/lora                                    # official weights
  torchrun --nproc-per-node 8 train_c.py --data 'shards/{000..511}.tar' --batch 16 --fsdp --out runs/full   # all of Stage C
  python train_c.py --weights runs/b --init random --config tiny.json --data scenes:captioned --out runs/c  # from nothing

  picture -image encoder-> raw latent -(x + 1) / 42-> x_0 (B,16,h,w) -noise-> x_t -[C], caption-> eps_hat

One pass of the loop at the bottom is one optimizer step, and all of it is written out there. Three things decide
whether a fine-tune is any good, and are on by default: 5 % of the captions, each picture by itself, become "", or
else guidance loses what it steers away from; noise levels reach t = 1, where sampling starts; and the targets
come from the image encoder in float32. All that is random is a function of (seed, position in the stream of
samples), so that any number of processes sees the same work and a resumed run equals an unbroken one.
Paper: arXiv:2306.00637 (Stage C).  Needs: torch, torchvision, transformers, numpy, pillow, tqdm; our other files.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--weights", default="v2-base", help="what to start from, and where encoders and decoder come from: a name or folder as for sample.py (default: v2-base)")
    for part, what in (("prior", "Stage C"), ("prior-text-encoder", "its text encoder"), ("image-encoder", "the image encoder"),
                       ("decoder", "Stage B, for samples"), ("vqgan", "Stage A, for samples"), ("text-encoder", "Stage B's text encoder, for samples")):
        g.add_argument(f"--{part}", help=f"{what} from this folder instead")
    g.add_argument("--init", choices=["weights", "random"], default="weights", help="random: Stage C starts from nothing, the rest still comes from --weights")
    g.add_argument("--config", help="a config.json for --init random, in diffusers' words: c, depth, nhead, c_cond, c_r ... (default: the official size)")
    g.add_argument("--train-text", action="store_true", help="let Stage C's text encoder learn along, too; not with --lora")
    g = p.add_argument_group("LoRA")
    g.add_argument("--lora", action="store_true", help="train a LoRA: some 10 MB beside the weights, which stay as they are")
    g.add_argument("--rank", type=int, default=8, help="its rank: more can learn more, and forget more")
    g.add_argument("--alpha", type=float, help="its scale is alpha / rank (default: the rank, so 1)")
    g.add_argument("--targets", default="attention", help="attention, attention+mlp, all, or a regular expression on the names of layers")
    g.add_argument("--lora-dropout", type=float, default=0.0, help="share of its inputs that are dropped")
    g.add_argument("--rslora", action="store_true", help="scale alpha / sqrt(rank), for high ranks")
    g.add_argument("--dora", action="store_true", help="train length and direction of each weight apart (arXiv:2402.09353)")
    g.add_argument("--trigger", default="", help="words that call what was learned, noted in the file for its users")
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="a folder with captions beside pictures or in metadata.jsonl/.csv; tar shards, 'a/{000..031}.tar'; "
                                                 "hub:NAME; scenes:captioned; see data.py")
    g.add_argument("--resolution", type=int, help="px: the side of a square picture, or of one with the same area (default: 128 for the tiny weights, 1024 for others)")
    g.add_argument("--max-ratio", type=float, default=2.0, help="widest shape of the buckets that pictures are sorted into; 1: all are cropped to squares")
    g.add_argument("--crop", choices=["center", "random"], default="center", help="what of a picture is kept where its shape is not its bucket's")
    g.add_argument("--random-flip", action="store_true", help="mirror half of the pictures; not where left and right matter")
    g.add_argument("--caption-dropout", type=float, default=0.05, help="share of captions replaced by the empty one, each by itself")
    g.add_argument("--filter", action="append", default=[], metavar="min_KEY=NUMBER", help="keep only samples whose .json has KEY from (min_) or up to (max_) a number")
    g.add_argument("--cache", help="folder for latents and text embeddings, computed once, shared between runs; then neither encoder stays in memory, "
                                     "and an epoch is 1.2 (official size, 512 px) to 1.8 times (tiny) as fast")
    g.add_argument("--cache-dtype", choices=["fp16", "fp32"], default="fp16", help="how they are kept")
    g.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=1000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, default=4, help="pictures per process and forward pass; halve it if memory runs out and double --grad-accum")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum x processes")
    g.add_argument("--lr", type=float, help="peak learning rate (default: 1e-4; for full fine-tuning 1e-5)")
    g.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default="constant", help="of the learning rate, after the warm-up; trapezoid: down in the last fifth")
    g.add_argument("--warmup", type=int, default=50, help="optimizer steps in which the learning rate rises")
    g.add_argument("--preserve", type=float, default=0.0, help="share of the samples that get another prompt and must stay as before the training, so that "
                                                              "little is forgotten: 0.7 to 0.85 for a few pictures. The empty caption is then held, too")
    g.add_argument("--preserve-prompts", help="what it must not forget: a text file with a prompt per line, as many different ones as there are; at the start Stage C paints "
                                              "a latent for each, kept in --cache or --out")
    g.add_argument("--weight-decay", type=float, default=0.01, help="not for norms, biases and LoRA")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm, over all processes, above which gradients are scaled down")
    g.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones kept; 0: no averaging")
    g.add_argument("--loss-weight", choices=["p2", "none", "min-snr", "v"], default="p2", help="what errors count by noise level, see training/losses.py; p2: the original's")
    g.add_argument("--offset-noise", type=float, default=0.0, help="noise common to a whole channel, so that very dark and bright pictures are learned; 0.05 to 0.1")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="autocast type (default: bf16 on a GPU, else fp32)")
    g.add_argument("--checkpointing", choices=["products", "blocks"], nargs="?", const="blocks", help="keep less for the backward pass and compute it "
                   "again: products keeps matrix products and attention alone, blocks only what stands between blocks, a third slower")
    g.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
    g.add_argument("--fsdp", action="store_true", help="split weights and optimizer over the processes, where they do not fit one GPU")
    g.add_argument("--max-bad-steps", type=int, default=10, help="stop after so many steps in a row with a loss or gradient that is not finite")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder: checkpoints/, samples/, log.jsonl, curves.png, and in the end what sample.py --weights takes")
    g.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; SIGTERM and Ctrl-C save, too")
    g.add_argument("--keep", type=int, default=2, help="checkpoints kept")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl")
    g.add_argument("--val-every", type=int, default=250, help="steps between validations; 0: none")
    g.add_argument("--val-data", help="pictures to validate on, as --data (default: some of --data, which then tell how well it is fitted)")
    g.add_argument("--val-count", type=int, default=16, help="pictures in a validation, each at 10 noise levels with noise that is always the same")
    g.add_argument("--sample-every", type=int, default=0, help="steps between sample grids, step 0 included; 0: none, and no decoder is loaded")
    g.add_argument("--sample-prompts", help="a text file, one prompt per line (default: four captions of the data)")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="log there, too, if it is installed")
    g.add_argument("--dry-run", action="store_true", help="say what would be trained on what, with memory and first captions, and stop")
    g.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository of the Hugging Face hub")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()      # before the imports below, which take seconds: --help and mistyped options answer at once

import contextlib
import copy
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
from loading.layouts import locate
import lora
from training.cache import Cache, CachedTexts, fill_cache, hash_of, latent_key
from training.data import bucket_sizes, fit, nearest_bucket, open_dataset, read_filters, read_prompts
from training.order import BatchSampler, batches, sample_rng
from training.losses import LOSS_WEIGHTS
from loading.files import write_atomically
from extras.images import grid
from training.report import FILES, draw_curves, dry_run, push, write_result
from stage_b import preprocess
from stage_c import StageC
from loading.errors import RESUME_HINT, UserError, as_user_error, exit_on_user_error
from training.checkpoints import Checkpoints, Log
from training.optim import build_optimizer, EMA, learning_rate
from training.processes import GracefulExit, Processes
from loading.names import config_to_ours
from loading.weights import is_tiny, load_image_encoder, load_stage_a, load_stage_b, load_stage_c, load_text_encoder
from wuerstchen import Sampling, TextEncoder, Wuerstchen, add_noise, denoise, scale_semantic

T_GRID = [0.05 + 0.1 * i for i in range(10)]         # noise levels of the validation


def check(args) -> None:
    """Ends the program for arguments that make no sense, before anything is loaded."""
    for name, low in (("rank", 1), ("steps", 1), ("batch", 1), ("grad_accum", 1), ("save_every", 1), ("keep", 1), ("log_every", 1), ("val_count", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {low}")
    for name in ("caption_dropout", "lora_dropout", "ema", "preserve"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number from 0 to below 1")
    if args.lora and (args.train_text or args.init == "random"):
        raise UserError("--lora leaves all weights as they are: it does not go with --train-text or --init random")
    if bool(args.preserve) != bool(args.preserve_prompts) or args.preserve and (args.train_text or args.init == "random"):
        raise UserError("--preserve and --preserve-prompts go together, and with neither --train-text nor --init random, which leave nothing as it was")
    if args.weights == "v1":
        raise UserError("--weights v1 can be painted with, not fine-tuned: training puts latents into v2's scale; choose v2-base")
    if args.config and args.init != "random":
        raise UserError("--config gives the sizes of a new Stage C: add --init random")
    if args.cache and (args.crop == "random" or args.train_text):
        raise UserError("--cache keeps what does not change: it does not go with --crop random or --train-text")
    if args.fsdp and (args.lora or args.train_text):
        raise UserError("--fsdp is for all of Stage C: a LoRA fits one GPU, and --train-text is for the tiny model")


# ----- one sample -------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """Item (position, index, bucket) -> dict of x, caption, t, eps: a function of these three and the seed alone.

    position: place in the endless stream of samples; index: which picture that is; x: pixels (h,w,3) uint8, or with
    a cache the latent (16,h',w').
    """
    def __init__(self, pictures, buckets, args, cache=None, replaced: dict[int, int] | None = None, painted=None, prompts: list[str] = ()):
        self.pictures, self.buckets, self.args, self.cache, self.replaced = pictures, buckets, args, cache, replaced or {}
        self.painted, self.prompts = painted, prompts        # for --preserve: what Stage C painted for these prompts
        self.same_bucket = [np.flatnonzero(pictures.bucket == bucket) for bucket in range(len(buckets))]

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        (position, index, bucket), args = where, self.args
        h, w = self.buckets[bucket]

        def rng(purpose: str) -> np.random.Generator:
            return sample_rng(args.seed, position, purpose)
        flip = bool(args.random_flip and rng("flip").random() < 0.5)
        if self.cache is None:
            pixels, index = self.pictures.read_or_next(index, self.same_bucket[bucket])      # (H, W, 3)
            x = torch.from_numpy(np.array(fit(pixels, (h, w), args.crop, flip, rng("crop"))))
        else:
            index = self.replaced.get(index, index)
            latent = self.cache.get(latent_key(self.pictures, index, (h, w), flip))
            if latent is None:
                raise UserError(f"an entry of --cache {args.cache} was damaged while it was in use, and removed: start again with --resume auto")
            x = torch.from_numpy(latent).float()                                             # (16, h', w')
        captions = self.pictures.captions(index)
        caption = captions[rng("caption").integers(len(captions))]
        dropped = rng("caption dropout").random() < args.caption_dropout
        more = {}
        if args.preserve:
            # Without a caption, too, it shall stay as it was: guidance steers away from that, and would from what is learned here.
            preserve, number = dropped or rng("preserve").random() < args.preserve, rng("prompt").integers(len(self.prompts))
            more = dict(preserve=preserve, painted=torch.zeros(16, h * 3 // 128, w * 3 // 128))
            if preserve:
                caption, more["painted"] = self.prompts[number], torch.from_numpy(self.painted.get(painted_key(self.prompts[number], (h, w)))).float()
        caption = "" if dropped else caption
        eps = rng("noise").standard_normal((16, h * 3 // 128, w * 3 // 128), dtype=np.float32)
        if args.offset_noise:
            eps += args.offset_noise * rng("offset").standard_normal((16, 1, 1), dtype=np.float32)
        # A little past 1, clamped: 7 % train at t = 1, where sampling starts. In float64, then float32: bfloat16
        # would draw 256 different levels.
        t = min(max((1 - rng("timestep").random()) * 1.08 + 0.001, 0.001), 1.0)
        return dict(x=x, caption=caption, t=np.float32(t), eps=torch.from_numpy(eps), position=position, **more)


# ----- what the loop works with -----------------------------------------------------------------------

def painted_key(prompt: str, size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} {prompt}"


def paint(predict, prompts: list[str], sizes: list[tuple[int, int]], painted, args, processes, rows: int = 16) -> None:
    """For --preserve: a latent for each prompt in each size, as the model paints it now, into the cache `painted`.

    Why not noise the pictures at hand, and ask the model for its opinion with another prompt? It never meets such x_t,
    and what it then says (there is no cat in this unicorn) only hinders what is to be learned. predict: see denoise.
    """
    for h, w in sizes:
        missing = set(painted.missing([painted_key(prompt, (h, w)) for prompt in prompts]))
        processes.wait()                                                 # all have looked before the first is written
        numbers = [i for i, prompt in enumerate(prompts) if painted_key(prompt, (h, w)) in missing][processes.rank::processes.world]
        for start in tqdm(range(0, len(numbers), rows), desc="painting what is preserved", disable=processes.rank > 0 or not numbers):
            part = numbers[start:start + rows]
            noise = [sample_rng(args.seed, i, "painted").standard_normal((16, h * 3 // 128, w * 3 // 128), dtype=np.float32) for i in part]
            noise = torch.from_numpy(np.stack(noise)).to(processes.device)               # (n, 16, h', w')
            latents = denoise(predict([prompts[i] for i in part]), noise, lambda: noise, Sampling(15, "dpm++", 4.0))
            for i, latent in zip(part, latents.cpu().numpy()):
                painted.put(painted_key(prompts[i], (h, w)), latent)
    processes.wait()


# ----- what is trained ---------------------------------------------------------------------------------

TRAINING_PARTS = ("prior", "prior_text_encoder", "prior_tokenizer", "image_encoder")


def build_prior(args, place, dtype):
    """Stage C to be trained. In float32, since the steps of an optimizer are too small for less; under a LoRA, which has
    float32 weights of its own, the frozen weights take half the memory in `dtype`."""
    if args.init == "weights":
        return load_stage_c(place, dtype if args.lora else torch.float32)
    try:
        return StageC(**(config_to_ours(json.loads(Path(args.config).read_text()), StageC) if args.config else {}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--config {args.config} cannot be used: {error}") from error


class Learner(torch.nn.Module):
    """Stage C, and the text encoder if it learns, too, as one module with one forward: what DDP needs."""
    def __init__(self, prior, text_model=None):
        super().__init__()
        self.prior, self.text = prior, text_model

    def forward(self, x_t, t, text):
        """x_t (B,16,h,w), t (B,), text (B,N,D) or, if the encoder learns, the tokenizer's output -> eps_hat (B,16,h,w)."""
        if not isinstance(text, torch.Tensor):
            text = self.text(text["input_ids"], attention_mask=text["attention_mask"]).last_hidden_state
        return self.prior(x_t, t, text)


# ----- looking at a run -------------------------------------------------------------------------------

def fixed_set(pictures, buckets, encode, args) -> list[tuple]:
    """The pictures of the validation: (x_0 (1,16,h,w), caption) of each, always the same ones."""
    chosen = np.random.default_rng([args.seed, 1]).permutation(len(pictures))[:args.val_count]
    result = []
    for i in chosen.tolist() if args.val_every else []:
        size = buckets[nearest_bucket(pictures.sizes[i:i + 1], buckets)[0]]
        pixels = fit(pictures.read(i), size, "center", False, sample_rng(args.seed, i, "validation"))
        result.append((encode(torch.from_numpy(pixels.copy())[None]), pictures.captions(i)[0]))
    return result


def validate(model, fixed, embed, weight, autocast, args, processes) -> dict[str, float]:
    """Raw loss at each level of T_GRID, and their weighted mean, with pictures and noise that never change.

    The training loss tells little: at t = 0.05 it is a hundred times that at t = 0.95, and which t were drawn decides it.
    """
    t = torch.tensor(T_GRID, device=processes.device)                                    # (10,)
    sums = torch.zeros(len(T_GRID) + 1, device=processes.device)
    for i, (x_0, caption) in enumerate(fixed):
        if not args.fsdp and i % processes.world != processes.rank:      # under FSDP all must compute together
            continue
        eps = torch.from_numpy(sample_rng(args.seed, i, "validation").standard_normal((len(t), *x_0.shape[1:]), dtype="float32")).to(x_0)
        with torch.no_grad(), autocast:
            text = embed([caption])
            text = {k: v.expand(len(t), -1) for k, v in text.items()} if args.train_text else text.expand(len(t), -1, -1)
            eps_hat = model(add_noise(x_0.expand_as(eps), eps, t), t, text).float()      # (10, 16, h, w)
        sums[:-1] += (eps_hat - eps).square().mean(dim=(1, 2, 3))
        sums[-1] += 1
    sums = sums if args.fsdp else processes.sum(sums)
    raw = sums[:-1] / sums[-1]
    return dict(val_loss=(raw * weight(t)).mean().item()) | {f"val_loss_t_{level:.2f}": value for level, value in zip(T_GRID, raw.tolist())}


def sample_prompts(args, pictures) -> list[str]:
    if args.sample_prompts:
        with as_user_error():
            return read_prompts(args.sample_prompts)
    return list(dict.fromkeys(pictures.captions(i)[0] for i in range(min(len(pictures), 100))))[:4]


def build_painter(paths, prior, tokenizer, text_model, device, dtype):
    """The pipeline with the model that learns in it. Stage B and its text encoder are let go between two grids."""
    tiny, shared = is_tiny(paths["image_encoder"]), paths["text_encoder"] == paths["prior_text_encoder"]
    text_c = TextEncoder(tokenizer, text_model)
    networks = dict(stage_a=lambda: load_stage_a(paths["vqgan"], dtype).to(device), stage_c=prior, text_encoder_c=text_c,
                    stage_b=lambda: load_stage_b(paths["decoder"], dtype).to(device), text_encoder_b=text_c)
    if not shared:
        networks["text_encoder_b"] = lambda: TextEncoder(*load_text_encoder(paths["text_encoder"], paths["tokenizer"], dtype))
    pipeline = Wuerstchen(networks, 128 if tiny else 1024, device, dtype, b=Sampling(12, guidance=4.0 if tiny else 1.0))
    pipeline.unloaded = dict(networks)
    return pipeline



def paint_samples(painter, prompts, args, autocast, with_lora: bool):
    """A grid: a row for each prompt, always from the same noise; under a LoRA a column without it and one with it."""
    columns = {}
    with autocast:
        for title, on in (("without LoRA", False), ("with LoRA", True)) if args.lora and with_lora else (("", True),):
            if args.lora:
                (lora.enable if on else lora.disable)(painter.part("stage_c"))
            columns[title] = [painter(prompt, seed=args.seed)[0] for prompt in prompts]
    if args.lora:
        lora.enable(painter.part("stage_c"))
    painter.networks = dict(painter.unloaded)
    return grid([image for row in zip(*columns.values()) for image in row], len(columns), [*columns] if len(columns) > 1 else None, prompts)


# ----- the run ----------------------------------------------------------------------------------------

def main(args):

    check(args)
    checkpoints = Checkpoints(f"{args.out}/checkpoints", args.keep)
    resumed = checkpoints.find(args.resume)
    stop, processes = GracefulExit(), Processes(args.device)
    device, first = processes.device, processes.rank == 0
    args.dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    args.lr = args.lr or (1e-5 if not args.lora and args.init == "weights" else 1e-4)
    args.alpha = args.alpha or float(args.rank)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "workers", "device", "push_to_hub")}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(args.seed)

    # --- models ------------------------------------------------------------------------------------
    files = {part: getattr(args, part) for part in FILES if getattr(args, part)}
    paths = locate(args.weights, files, (*hub.TEXT_TO_IMAGE, "image_encoder") if args.sample_every else TRAINING_PARTS)
    prior = build_prior(args, paths["prior"], dtype).to(device)
    tokenizer, text_model = load_text_encoder(paths["prior_text_encoder"], paths["prior_tokenizer"], torch.float32 if args.train_text else dtype)
    text_model.to(device).train(args.train_text).requires_grad_(args.train_text)
    image_encoder = load_image_encoder(paths["image_encoder"]).to(device).requires_grad_(False)     # eval mode, float32: the targets are exact
    if image_encoder.config.get("network") == "efficientnet_v2_l":
        raise UserError(f"{paths['image_encoder']} is the image encoder of v1, whose latents are not in the scale of this training: choose v2's")
    before = hash_of(prior) if args.preserve else None
    if args.lora:
        with as_user_error():
            lora.add_lora(prior, args.rank, args.alpha, args.lora_dropout, args.targets, rslora=args.rslora, dora=args.dora)
    prior.checkpointing = args.checkpointing
    untrained = copy.deepcopy(prior).to(dtype).requires_grad_(False).eval() if args.preserve and not args.lora else None
    model = Learner(prior.train(), text_model if args.train_text else None)

    # --- data --------------------------------------------------------------------------------------
    buckets = bucket_sizes(args.resolution or (128 if is_tiny(paths["image_encoder"]) else 1024), max_ratio=args.max_ratio)
    index = Path(args.cache or args.out) / "index"
    with processes.main_first(), as_user_error():             # what one has indexed or fetched serves the others
        pictures = open_dataset(args.data, index_folder=index, **read_filters(args.filter))
        validation = open_dataset(args.val_data, index_folder=index) if args.val_data else pictures
    pictures.bucket = nearest_bucket(pictures.sizes, buckets)
    plan = BatchSampler(pictures.bucket, args.batch * args.grad_accum * processes.world, args.seed)
    cache = text_cache = None
    if args.cache:
        cache = Cache(args.cache, hash_of(image_encoder), dict(kind="latents", crop="center", dtype=dict(fp16="float16", fp32="float32")[args.cache_dtype]))
        text_cache = Cache(args.cache, hash_of(text_model), dict(kind="texts", dtype=dict(fp16="float16", fp32="float32")[args.cache_dtype]))
    texts = CachedTexts(TextEncoder(tokenizer, text_model), text_cache)
    painted, preserved = None, []
    if args.preserve:
        with as_user_error():
            preserved = read_prompts(args.preserve_prompts)
        painted = Cache(args.cache or index, before, dict(kind="painted", seed=args.seed, dtype="float16"))

    @torch.no_grad()
    def encode(pixels):
        """(B,h,w,3) uint8 -> x_0 (B,16,h',w') float32, of about unit variance."""
        h, w = pixels.shape[1:3]
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 255
        return scale_semantic(image_encoder(preprocess(images, (h * 3 // 4, w * 3 // 4))))

    def embed(captions: list[str]):
        if args.train_text:
            return tokenizer(captions, padding="max_length", truncation=True, max_length=texts.encoder.length, return_tensors="pt").to(device)
        return texts(captions).to(device)                                                # (B, N, D)

    @torch.no_grad()
    def said_before(x_t, t, text):
        """eps_hat (B,16,h,w) of the model as it was: a copy of it, or itself without its LoRA."""
        with autocast:
            if untrained is not None:
                return untrained(x_t, t, text).float()
            lora.disable(prior.eval())
            eps_hat = prior(x_t, t, text).float()
            lora.enable(prior.train())
            return eps_hat

    def as_it_was(prompts: list[str]):
        """A prediction as denoise wants it."""
        with_text, without = embed(prompts), embed([""] * len(prompts))                  # (n, N, D)
        return lambda x, t, both: said_before(*((torch.cat([x, x]), torch.cat([t, t]), torch.cat([with_text, without])) if both else (x, t, with_text)))

    if first:
        print(pictures.describe(), file=sys.stderr)
    if args.dry_run:
        return dry_run(args, model, pictures, buckets, plan) if first else None
    replaced = {}
    if args.cache:
        with as_user_error():
            replaced = fill_cache(pictures, lambda i: [buckets[pictures.bucket[i]]], args.random_flip, {"x": cache}, {"x": encode}, texts, processes)
    if args.preserve:
        paint(as_it_was, preserved, [buckets[number] for number in np.unique(pictures.bucket)], painted, args, processes)
    fixed, prompts = fixed_set(validation, buckets, encode, args), sample_prompts(args, pictures)
    if args.cache:
        for caption in (*preserved, *(caption for _, caption in fixed)):
            texts.one(caption)
        image_encoder = texts.encoder = None                                             # all is in the cache: their memory is free
        text_model = text_model if args.sample_every else None

    # --- optimizer, averages, and where the run stands -----------------------------------------------
    if args.fsdp and processes.many:
        mesh = init_device_mesh(device.type, (processes.world,))
        for block in (*prior.res_blocks, *prior.attention_blocks, model):                # the root takes what is left
            fully_shard(block, mesh=mesh)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    averaged, weight = EMA(model, args.ema), LOSS_WEIGHTS[args.loss_weight]
    whole = dict(full_state_dict=True, cpu_offload=True)                                 # gathered from all processes, if they are split
    start = bad = bad_in_all = 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_c.py", settings)
        start, bad, bad_in_all, averaged.updates = (state[name] for name in ("step", "bad", "bad_in_all", "updates"))
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(**whole))
        scaler.load_state_dict(state["scaler"])
        set_model_state_dict(model, state["averaged"], options=StateDictOptions(**whole, strict=False))
        averaged.swap()
        set_model_state_dict(model, state["model"], options=StateDictOptions(**whole, strict=False))
    if args.compile:
        prior.compile()
    forward = model
    if processes.many and not args.fsdp:
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def save(step: int) -> None:
        """All processes take part, as each may hold a part of the weights; rank 0 writes."""
        learned = StateDictOptions(**whole, ignore_frozen_params=True)
        content = dict(script="train_c.py", settings=settings, step=step, bad=bad, bad_in_all=bad_in_all, scaler=scaler.state_dict(),
                       updates=averaged.updates, model=get_model_state_dict(model, options=learned),
                       optimizer=get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**whole)))
        content["model"] = {name: tensor.clone() for name, tensor in content["model"].items()}       # swap() moves what they are views of
        averaged.swap()
        content["averaged"] = get_model_state_dict(model, options=learned)
        if first:
            checkpoints.save(step, content)
        averaged.swap()
        processes.wait()

    log = Log(args.out, start, args.report_to, settings) if first else None
    painter = build_painter(paths, prior, tokenizer, text_model, device, dtype) if args.sample_every and (first or args.fsdp) else None

    def look(step: int) -> None:
        """Validation and samples, with the averaged weights."""
        model.eval()
        averaged.swap()
        if args.val_every and (step % args.val_every == 0 or step == args.steps):
            values = validate(model, fixed, embed, weight, autocast, args, processes)
            if first:
                log.write(step, **values)
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps) and painter is not None:
            sheet = paint_samples(painter, prompts, args, autocast, with_lora=step > 0)
            if first:
                write_atomically(f"{args.out}/samples/step_{step:06d}.png", sheet.save)
        averaged.swap()
        model.train()
        processes.wait()

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    samples = batches(Samples(pictures, buckets, args, cache, replaced, painted, preserved), plan, processes, args, start)
    sums, since, clock = torch.zeros(2, 10, device=device), start, time.time()           # raw loss and count by noise level
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Stage C", disable=not first)
    smooth = None
    if start == 0:
        look(0)                              # the untouched model: proof that validation and sampling are set up rightly
    step = start
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss_sum = torch.zeros((), device=device)
        for micro in range(args.grad_accum):
            batch = next(samples)
            x_0 = batch["x"].to(device) if args.cache else encode(batch["x"])            # (B, 16, h, w)
            t, eps = batch["t"].to(device), batch["eps"].to(device)                      # (B,), (B, 16, h, w)
            text = embed(batch["caption"])                                              # (B, N, D)
            torch.manual_seed(hash((args.seed, step, micro, processes.rank)) % 2 ** 63)  # dropout inside the network survives a resume
            # Gradients are averaged over processes once per step, in the last backward. The forward belongs inside
            # no_sync(), too: DDP decides in forward whether the coming backward all-reduces.
            last = micro == args.grad_accum - 1
            if args.fsdp and processes.many:
                model.set_requires_gradient_sync(last)                                   # its name for the same
            if args.preserve:                # rows that show what the model itself painted
                rows = batch["preserve"].to(device).view(-1, 1, 1, 1)                    # (B, 1, 1, 1)
                x_0 = torch.where(rows, batch["painted"].to(device), x_0)
            x_t = add_noise(x_0, eps, t)                                                 # (B, 16, h, w)
            if args.preserve:                # and what it said of them is right
                eps = torch.where(rows, said_before(x_t, t, text), eps)
            with contextlib.nullcontext() if last or forward is model else forward.no_sync():
                with autocast:
                    eps_hat = forward(x_t, t, text).float()                              # (B, 16, h, w)
                raw = (eps_hat - eps).square().mean(dim=(1, 2, 3))                       # (B,)
                loss = (raw * weight(t)).mean()
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
                draw_curves(log.lines(), ["loss", "val_loss", "grad_norm", *(f"val_loss_t_{t:.2f}" for t in T_GRID[::3])], f"{args.out}/curves.png")
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
            write_result(args, prior, weights, tokenizer, text_model, len(pictures))
            if args.push_to_hub:
                push(args)
        averaged.swap()
        processes.wait()
    stop.restore()
    processes.close()


if __name__ == "__main__":
    with exit_on_user_error(RESUME_HINT):
        main(ARGS)
