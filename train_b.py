"""Trains Stage B, the diffusion decoder, jointly with the image encoder, on emoji scenes made on the fly.

  python train_b.py --vqgan runs/a/vqgan --out runs/smoke_b --steps 20 --batch 4 --encoder-warmup 20  # CPU smoke run, a minute
  python train_b.py --vqgan runs/a/vqgan --out runs/b --loss head --cache 32000      # a whole run, hours on 2 cores
  python train_b.py --vqgan runs/a/vqgan --out runs/b --loss head --cache 32000 --resume   # go on from the last checkpoint

A diffusion autoencoder: the encoder squeezes a picture into 3x3x16 numbers, and the only way to
lower the loss is to put into them what Stage B needs to denoise the VQGAN's latents. The tiny text
encoder is born later, with Stage C, so Stage B first trains with one zero token in place of text;
after Stage C, --init runs/b --freeze-encoder --text-encoder ... shows it the real text.
Written to --out: checkpoint.pt, loss.csv, samples/*.png, and at the end decoder/ and image_encoder/.
Paper: arXiv:2306.00637 (Stage B).  Needs: torch, numpy, pillow, tqdm; transformers with --text-encoder.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--vqgan", required=True, help="folder of the trained Stage A")
    g.add_argument("--text-encoder", default=None, help="folder with text_encoder/ and tokenizer/ (default: train without text)")
    g.add_argument("--init", default=None, help="folder with decoder/ and image_encoder/ to start from (default: random weights)")
    g.add_argument("--image-encoder", default=None, help="image_encoder/ folder to start from in place of the warm-up; the decoder starts from --init or random")
    g.add_argument("--freeze-encoder", action="store_true", help="leave the image encoder as it is: Stage C stays valid")
    g.add_argument("--encoder-warmup", type=int, default=1200, help="steps in which a fresh image encoder first learns to name objects, as EfficientNet has on ImageNet")
    g.add_argument("--cache", type=int, default=0, help="number of pictures whose VQGAN latents (and semantic ones, with a frozen encoder) are kept in memory, 20 kB each, and used again and again, which saves a third to a half of the time (default: new pictures for ever)")
    g.add_argument("--c-text", type=int, default=128, help="width of the text encoder that will be used (official 1024)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=6000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, default=32, help="pictures per forward pass")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum")
    g.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate: linear warm-up, constant, linear decay to 0 over the last fifth")
    g.add_argument("--warmup", type=int, default=100, help="optimizer steps of warm-up")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm above which gradients are scaled down")
    g.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the ones kept")
    g.add_argument("--semantic-dropout", type=float, default=0.05, help="share of pictures whose semantic latent is zeroed, for guidance")
    g.add_argument("--semantic-noise", type=float, default=0.3, help="share of pictures whose semantic latent gets noise of a level up to 0.5, so that Stage C's small errors do no harm")
    g.add_argument("--text-dropout", type=float, default=0.05, help="share of captions replaced by the empty one")
    g.add_argument("--high-noise", type=float, default=1.5, help="exponent that draws noise levels towards 1, where Stage B must rely on the semantic latent; 1 draws them evenly")
    g.add_argument("--blind", type=int, default=2000, help="first steps in which x_t is empty, so that Stage B must paint the picture from the semantic latent alone: the fastest way to learn that")
    g.add_argument("--loss", choices=["eps", "head"], default="eps", help="eps: error of the predicted noise, as the released models were trained; head: signal and noise scale, the two outputs it is made of, each by itself, which learns faster from random weights")
    g.add_argument("--loss-weight", choices=["v", "p2", "none"], default="v", help="what errors count by noise level: see v_weight and p2_weight in diffusion.py; none: all alike")
    g.add_argument("--even-contrast", action="store_true", help="let pictures of little contrast (a fish on its own colour, a snowflake's lines) count more: the squared error alone hardly sees them")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast type; fp32 on CPUs, bf16 on recent GPUs")
    g.add_argument("--compile", action="store_true", help="let torch.compile make the networks faster; needs a C++ compiler on CPUs")
    g.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder for checkpoints, losses and pictures")
    g.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    g.add_argument("--save-every", type=int, default=250, help="optimizer steps between checkpoints")
    g.add_argument("--sample-every", type=int, default=500, help="optimizer steps between sample grids")
    g.add_argument("--log-every", type=int, default=20, help="optimizer steps between lines of loss.csv")
    return p.parse_args(argv)


def warm_up(encoder, scenes, args, device):
    """Teaches a fresh image encoder what is where, before Stage B: the place of EfficientNet's ImageNet weights.

    A throw-away head, the same for each of the 3 x 3 positions of the semantic latent, must tell from
    its 16 numbers which object has its center in that cell, where exactly, how large, and on which
    colour (the idea of arXiv:1506.02640). Without this the encoder would learn from Stage B's loss
    alone, which at nearly all noise levels can see the objects in x_t itself.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm
    from scenes import COLOURS, OBJECTS
    from stage_b import preprocess
    from training import learning_rate, log_losses, to_tensor
    from diffusion import add_noise
    from wuerstchen import to_stored
    nothing, cell = len(OBJECTS), 128 / 3                                # a class of its own; px
    number = {name: i for i, name in enumerate(OBJECTS)}

    def facts(batch: list) -> tuple:
        """-> object in each cell (B,9), its place in the cell and its size, all about 0..1 (B,9,3), colour (B,)."""
        objects, places = np.full((len(batch), 9), nothing), np.zeros((len(batch), 9, 3), np.float32)
        for i, scene in enumerate(batch):
            for name, size, (x, y) in zip(scene.objects, scene.sizes, scene.centers):
                k = int(y // cell) * 3 + int(x // cell)
                objects[i, k], places[i, k] = number[name], (x / cell % 1, y / cell % 1, size / 64)
        colours = np.array([list(COLOURS).index(scene.colour) for scene in batch])
        return tuple(torch.from_numpy(a).to(device) for a in (objects, places, colours))

    head = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.GELU(), torch.nn.Linear(256, 128 + 1 + 3 + 8)).to(device)
    importance = torch.ones(129, device=device)
    importance[nothing] = 0.2                                            # most cells hold nothing
    optimizer = torch.optim.AdamW([p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad],
                                  lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    for step in tqdm(range(args.encoder_warmup), desc="Image encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.encoder_warmup, args.lr, args.warmup)
        start = 5 * 10 ** 8 + step * 64                                  # not the scenes Stage B starts with
        objects, places, colours = facts(scenes.scenes(start, 64))
        stored = to_stored(encoder(preprocess(to_tensor(scenes.batch(start, 64)[0], device), 96)))   # (64, 16, 3, 3)
        # Noise on the latent makes neighbouring codes mean similar things; Stage C will not hit them exactly.
        noisy = add_noise(stored, torch.randn_like(stored), torch.rand(64, device=device) * 0.3)
        out = head(noisy.flatten(2).transpose(1, 2))                                                 # (64, 9, 140)
        there = objects != nothing                                                                   # (64, 9)
        loss = F.cross_entropy(out[..., :129].flatten(0, 1), objects.flatten(), importance) \
            + 4 * (out[..., 129:132] - places)[there].abs().mean() \
            + 0.3 * F.cross_entropy(out[..., 132:].flatten(0, 1), colours.repeat_interleave(9))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0:
            log_losses(args, step + 1, "encoder_loss.csv", loss=loss.item(),
                       objects_right=(out[..., :129].argmax(-1) == objects)[there].float().mean().item(),
                       place_error=(out[..., 129:132] - places)[there].abs().mean().item(),
                       colour_right=(out[..., 132:].argmax(-1) == colours[:, None]).float().mean().item())


def contrast_weight(x_0):
    """Weights of mean 1 that let pictures of little contrast count more: x_0 (B,4,h,w) -> (B,).

    How much a wrong object costs in squared error goes with its contrast, how wrong it is does not. The variance
    within the latent of an emoji scene is 0.04 at least, 0.3 in the median, 1.2 at most.
    """
    weight = 1 / (x_0.var(dim=(2, 3)).mean(dim=1) + 0.15)                # 0.15: few shall not rule; weights end up at 0.3 to 2.2
    return weight / weight.mean()


def main(args):
    # Imported here, so that --help answers at once.
    import copy
    import torch
    from tqdm import tqdm
    from scenes import EmojiScenes
    from diffusion import add_noise, alphas_cumprod, denoise, linear_timesteps, p2_weight, per_row, v_weight
    from stage_b import StageB, TinyImageEncoder, preprocess
    from text import TextEncoder
    from training import check_out, learning_rate, log_losses, save_checkpoint, save_grid, start_run, to_tensor
    from weights import load_image_encoder, load_stage_a, load_stage_b, load_text_encoder, save_image_encoder, save_stage_b
    from wuerstchen import to_raw, to_stored

    check_out(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype),
                              enabled=args.dtype != "fp32")
    torch.manual_seed(args.seed)
    weight = dict(v=v_weight, p2=p2_weight, none=torch.ones_like)[args.loss_weight]

    # --- data and models ---------------------------------------------------------------------------
    scenes = EmojiScenes("all", seed=args.seed + 1)          # scene i is a function of (seed, i): a resume is exact
    vqgan = load_stage_a(args.vqgan).to(device).requires_grad_(False)
    text_encoder = None
    if args.text_encoder:
        text_encoder = TextEncoder(*load_text_encoder(f"{args.text_encoder}/text_encoder", f"{args.text_encoder}/tokenizer"))
        text_encoder.model.to(device)
    if args.init:
        decoder = load_stage_b(f"{args.init}/decoder").train()
    else:
        # Shaped by what a CPU can train: little work at 16 x 16, most of it at 8 x 8 and 4 x 4.
        decoder = StageB(c_timestep=32, c_cond=64, c_hidden=(32, 128, 256), heads=(-1, 4, 4), blocks=(4, 4, 1),
                         levels=("CT", "CT", "CTCTA"), inject=(False, True, True), c_text=args.c_text, dropout=0.0)
    if args.image_encoder or args.init:
        encoder = load_image_encoder(args.image_encoder or f"{args.init}/image_encoder")
    else:
        encoder = TinyImageEncoder().to(device)
        if not args.resume:
            warm_up(encoder, scenes, args, device)
    # Frozen means eval() too: BatchNorm would go on drifting, gradients or not.
    encoder.train(not args.freeze_encoder).requires_grad_(not args.freeze_encoder)
    encoder.norm.requires_grad_(False)                       # its 42 and -1 fix the latents' units
    model = torch.nn.ModuleDict(dict(decoder=decoder, encoder=encoder)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        decoder.signal_and_scale = torch.compile(decoder.signal_and_scale)     # fuses the small operations; slow to start
        model["encoder"].compile()
    # Adam moves every weight by about the learning rate; behind inputs of size 42 a step moves the output 42 times as
    # far as elsewhere. 1/42 would even that out; 1/8 learned no worse.
    mappers = [p for name, p in decoder.named_parameters() if name.startswith("semantic_")]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is mapper for mapper in mappers)]
    optimizer = torch.optim.AdamW([dict(params=others, share=1.0), dict(params=mappers, share=1 / 8)], lr=args.lr,
                                  betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    first_step = start_run(args, parts)
    cache = {}                                               # batch number -> VQGAN latents, semantic latents, captions

    def embed(captions: list[str]) -> torch.Tensor:
        """Captions -> (B, N, c_text); without a text encoder one zero token each."""
        if text_encoder is None:
            return torch.zeros(len(captions), 1, decoder.config["c_text"], device=device)
        return text_encoder(captions)

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    for step in tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, desc="Stage B"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup) * group["share"]
        loss_sum = 0.0
        for micro in range(args.grad_accum):
            number = step * args.grad_accum + micro
            if args.cache:
                number %= max(args.cache // args.batch, 1)
            x_0, semantic, captions = cache.get(number, (None, None, None))
            if x_0 is None or semantic is None:
                pictures, captions = scenes.batch(number * args.batch, args.batch)
                images = to_tensor(pictures, device)                                     # (B, 3, 128, 128)
                if x_0 is None:
                    with torch.no_grad():
                        x_0 = vqgan.encode(images)                                       # (B, 4, 32, 32) never quantised
                with autocast, torch.set_grad_enabled(not args.freeze_encoder):
                    semantic = model["encoder"](preprocess(images, 96)).float()          # (B, 16, 3, 3)
                if args.cache:                   # a latent of an encoder that still learns is stale at the next step
                    cache[number] = x_0, semantic if args.freeze_encoder else None, captions
            with torch.no_grad():
                keep = torch.rand(args.batch) >= args.text_dropout                       # (B,) every draw is per picture
                text = embed([c if k else "" for c, k in zip(captions, keep.tolist())])  # (B, N, c_text)
            # Noise levels a little past 1, clamped: a share of 7 % trains at t = 1, where sampling starts.
            t = ((1 - torch.rand(args.batch, device=device)) * 1.08 + 0.001).clamp(0.001, 1)        # (B,)
            t = 1 - (1 - t) ** args.high_noise                                           # (B,)
            eps = torch.randn_like(x_0)
            x_t = add_noise(x_0, eps, t)                                                 # (B, 4, 32, 32)
            if step < args.blind:
                # Nothing to see in x_t; ones, as zeros would have no direction for the first norm. At middling t, the
                # head's `a` is x_0 at a size that is easy to learn; at t = 1 it is a hundredth of it.
                t = 0.4 + 0.5 * torch.rand(args.batch, device=device)
                x_t, ab = torch.ones_like(x_0), per_row(alphas_cumprod(t), x_0)
                eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()                          # what it would have to be
            t_semantic = torch.rand(args.batch, device=device) * 0.5                     # (B,)
            noisy = torch.rand(args.batch, device=device) < args.semantic_noise          # (B,)
            dropped = torch.rand(args.batch, device=device) < args.semantic_dropout      # (B,)
            with autocast:
                stored = to_stored(semantic)
                noised = to_raw(add_noise(stored, torch.randn_like(stored), t_semantic))
                semantic = torch.where(per_row(noisy, stored), noised, semantic)
                semantic = semantic.masked_fill(per_row(dropped, stored), 0.0)
                a, b = decoder.signal_and_scale(x_t, t, semantic, text)                  # 2 x (B, 4, 32, 32)
                a, b = a.float(), b.float()
            if args.loss == "eps":
                error = ((x_t - a) / b - eps).square()
            else:
                # eps = (x_t - a) / b is right for a = sqrt(ab) x_0 and b = sqrt(1 - ab), and both are known. In eps, any
                # error of b is multiplied by x_t's noise, and that drowns what the picture has to teach. The divisor
                # turns errors of `a` into errors of eps; its least value keeps nearly clean pictures from ruling.
                ab = per_row(alphas_cumprod(t), x_0)                                     # (B, 1, 1, 1)
                error = ((a - ab.sqrt() * x_0).square() + (b - (1 - ab).sqrt()).square()) / (1 - ab).clamp(min=0.2)
            loss = (error.mean(dim=(1, 2, 3)) * weight(t) * (contrast_weight(x_0) if args.even_contrast else 1)).mean()
            scaler.scale(loss / args.grad_accum).backward()      # sum of parts = gradient of the mean
            loss_sum += loss.detach() / args.grad_accum
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(args.ema, (1 + step) / (10 + step))      # young averages must forget the first weights
            for p_ema, p in zip(ema.parameters(), model.parameters()):
                p_ema.lerp_(p, 1 - decay)
            for b_ema, b in zip(ema.buffers(), model.buffers()):
                b_ema.copy_(b)                                   # BatchNorm's running statistics are averages already

        # --- log, sample, save ---------------------------------------------------------------------
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log_losses(args, done, loss=loss_sum.item(), grad_norm=grad_norm.item())
        if done % args.sample_every == 0 or done == args.steps:
            with torch.no_grad():
                pictures, captions = scenes.batch(10 ** 9, 16)                           # far beyond any training index
                shown, generator = to_tensor(pictures, device), torch.Generator().manual_seed(0)
                semantic, text = ema["encoder"](preprocess(shown, 96)), embed(captions)
                def draw():
                    return torch.randn(16, 4, 32, 32, generator=generator).to(device)
                latents = denoise(lambda x, t, _: ema["decoder"](x, t, semantic, text), draw(), draw, linear_timesteps(12))
                painted = vqgan.decode(latents).clamp(0, 1)
                psnr = -10 * (painted - shown).square().mean().log10().item()
            tqdm.write(f"step {done}: loss {loss_sum.item():.4f}, PSNR of 16 unseen scenes through encoder, B and A {psnr:.2f} dB")
            save_grid(f"{args.out}/samples/step_{done:06d}.png",
                      torch.stack([shown, vqgan.decode(vqgan.encode(shown)), painted], 1).flatten(0, 1).unflatten(0, (2, 8, 3))
                      .transpose(1, 2).flatten(0, 2), columns=8)                         # rows: scene, A alone, all, twice
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, done, parts)

    save_stage_b(ema["decoder"], f"{args.out}/decoder")
    save_image_encoder(ema["encoder"], f"{args.out}/image_encoder")


if __name__ == "__main__":
    args = parse_args()                                      # first, so that --help answers at once
    from training import mistakes_in_one_line
    with mistakes_in_one_line():
        main(args)
