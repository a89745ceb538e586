"""Trains Stage A, the VQGAN, on emoji scenes made on the fly.

  python train_a.py --out runs/smoke_a --steps 20 --batch 4                  # CPU smoke run, half a minute
  python train_a.py --out runs/a --steps 1400                                # the tiny model that ships
  python train_a.py --out runs/a --steps 1400 --resume                       # go on from the last checkpoint

Order of the paper: A, then B with its image encoder (train_b.py), then C (train_c.py).
Written to --out: checkpoint.pt (everything a resume needs), loss.csv, samples/*.png, and at the end
vqgan/, the folder that sample.py and diffusers read.
Paper: arXiv:2306.00637 (Stage A).  Needs: torch, numpy, pillow, tqdm.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, default=48, help="channels at the coarsest level (official 384)")
    g.add_argument("--bottleneck-blocks", type=int, default=4, help="decoder blocks at the coarsest level (official 12)")
    g.add_argument("--codebook-size", type=int, default=1024, help="number of codes (official 8192)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=1400, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, default=16, help="pictures per forward pass")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate: linear warm-up, constant, linear decay to 0 over the last fifth")
    g.add_argument("--warmup", type=int, default=100, help="optimizer steps of warm-up")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm above which gradients are scaled down")
    g.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones kept")
    g.add_argument("--quantise", type=float, default=0.5, help="share of pictures decoded from snapped latents; the rest keep them as they are")
    g.add_argument("--commitment", type=float, default=0.25, help="weight of the commitment loss")
    g.add_argument("--revive-every", type=int, default=100, help="steps after which codes that were not used are put where latents are")
    g.add_argument("--gan-start", type=int, default=None, help="step at which the discriminator joins (default: never)")
    g.add_argument("--gan-weight", type=float, default=0.02, help="weight of the discriminator's opinion")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast type; fp32 on CPUs, bf16 on recent GPUs")
    g.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder for checkpoints, losses and pictures")
    g.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    g.add_argument("--save-every", type=int, default=500, help="optimizer steps between checkpoints")
    g.add_argument("--sample-every", type=int, default=500, help="optimizer steps between sample grids")
    g.add_argument("--log-every", type=int, default=20, help="optimizer steps between lines of loss.csv")
    return p.parse_args(argv)


def main(args):
    # Imported here, so that --help answers at once.
    import copy
    import torch
    from tqdm import tqdm
    from scenes import EmojiScenes
    from stage_a import PatchDiscriminator, StageA, discriminator_loss, generator_loss
    from training import check_out, learning_rate, log_losses, save_checkpoint, save_grid, start_run, to_tensor
    from weights import save_stage_a

    check_out(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype),
                              enabled=args.dtype != "fp32")
    torch.manual_seed(args.seed)

    # --- data and model ----------------------------------------------------------------------------
    scenes = EmojiScenes("all", seed=args.seed)              # scene i is a function of (seed, i): a resume is exact
    model = StageA(bottleneck_blocks=args.bottleneck_blocks, c_hidden=args.width,
                   codebook_size=args.codebook_size, scale_factor=1.0).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    discriminator = PatchDiscriminator().to(device)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.lr / 4, betas=(0.5, 0.99), weight_decay=0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    usage = torch.nn.Module()                                # a module, so that a checkpoint keeps what it counts
    usage.register_buffer("used", torch.zeros(args.codebook_size, dtype=torch.bool, device=device))
    usage.register_buffer("codes", torch.zeros((), dtype=torch.long, device=device))
    parts = dict(model=model, ema=ema, optimizer=optimizer, discriminator=discriminator, d_optimizer=d_optimizer,
                 scaler=scaler, usage=usage)
    first_step = start_run(args, parts)

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    for step in tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, desc="Stage A"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        gan = args.gan_start is not None and step >= args.gan_start
        log = {}
        for micro in range(args.grad_accum):
            pictures, _ = scenes.batch((step * args.grad_accum + micro) * args.batch, args.batch)
            images = to_tensor(pictures, device)                                         # (B, 3, 128, 128)
            quantise = torch.rand(args.batch, device=device) < args.quantise             # (B,) one draw per picture
            with autocast:
                out = model(images, quantise)
                # Squared error punishes a wrong colour, absolute error a soft edge.
                loss = out["reconstruction"] + 2 * (out["images"] - images).square().mean() \
                    + out["codebook"] + args.commitment * out["commitment"]
                if gan:
                    loss = loss + args.gan_weight * generator_loss(discriminator(out["images"]))
            scaler.scale(loss / args.grad_accum).backward()      # sum of parts = gradient of the mean
            if gan:
                with autocast:
                    d_loss = discriminator_loss(discriminator(images), discriminator(out["images"].detach()))
                d_optimizer.zero_grad(set_to_none=True)          # drops what the generator's loss left there
                scaler.scale(d_loss).backward()
                scaler.step(d_optimizer)
            for name in ("reconstruction", "codebook", "commitment"):
                log[name] = log.get(name, 0) + out[name].detach() / args.grad_accum
        with torch.no_grad():
            usage.used[out["indices"].flatten()] = True
            if (step + 1) % args.revive_every == 0:
                # A code without latents gets no gradient and stays dead: restart it at a random latent.
                z = model.encode_raw(images).flatten(0, 2)                               # (B*h*w, 4)
                dead = ~usage.used                                                       # (K,)
                model.codebook.codes[dead] = z[torch.randint(len(z), (int(dead.sum()),), device=device)]
                usage.codes.copy_(usage.used.sum())
                usage.used.zero_()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
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
            log_losses(args, done, **{name: value.item() for name, value in log.items()}, codes_used=usage.codes.item())
        if done % args.sample_every == 0 or done == args.steps:
            with torch.no_grad():
                shown = to_tensor(scenes.batch(10 ** 9, 8)[0], device)                   # far beyond any training index
                rows = [shown, ema.decode(ema.encode(shown)), ema.decode(ema.encode(shown, quantise=True))]
            save_grid(f"{args.out}/samples/step_{done:06d}.png", torch.cat(rows), columns=8)
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, done, parts)

    # --- end: fix the latents' scale and write the folder that sample.py reads ---------------------
    with torch.no_grad():
        z = ema.encode_raw(to_tensor(scenes.batch(10 ** 9, 256)[0], device))
        ema.scale_factor = ema.config["scale_factor"] = round(z.std().item(), 4)   # so that Stage B sees unit variance
        images = to_tensor(scenes.batch(2 * 10 ** 9, 128)[0], device)
        for name, quantise in (("not quantised", False), ("quantised", True)):
            error = (ema.decode(ema.encode(images, quantise)).clamp(0, 1) - images).square().mean()
            print(f"PSNR on 128 unseen scenes, {name}: {-10 * error.log10().item():.2f} dB")
    save_stage_a(ema, f"{args.out}/vqgan")


if __name__ == "__main__":
    args = parse_args()                                      # first, so that --help answers at once
    from training import mistakes_in_one_line
    with mistakes_in_one_line():
        main(args)
