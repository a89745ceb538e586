"""Trains Stage C, the prior, and the tiny text encoder with it, on captioned emoji scenes made on the fly.

  python train_c.py --image-encoder runs/b/image_encoder --out runs/smoke_c --steps 20 --batch 8 --text-warmup 20   # CPU smoke run
  python train_c.py --image-encoder runs/b/image_encoder --out runs/c                 # a whole run, half an hour on 2 cores
  python train_c.py --image-encoder runs/b/image_encoder --out runs/c --resume        # go on from the last checkpoint

Pictures become targets through the image encoder of Stage B: 3x3x16 numbers, of which Stage C sees
(raw + 1) / 42. The released models use a ready-made CLIP text encoder; the tiny one is trained here
first, from nothing, since 64 objects and 8 colours need no more; then it stays as it is. 5 % of the
captions are replaced by "", each on its own: without that, classifier-free guidance has nothing to
steer away from.
Written to --out: checkpoint.pt, loss.csv, and at the end prior/, scheduler/, text_encoder/ and tokenizer/.
Paper: arXiv:2306.00637 (Stage C).  Needs: torch, transformers, numpy, pillow, tqdm.
"""
import argparse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--image-encoder", required=True, help="folder of the trained image encoder")
    g.add_argument("--cache", type=int, default=0, help="number of pictures whose latents are kept in memory and used again and again, which saves a quarter of the time (default: new pictures for ever)")
    g.add_argument("--init", default=None, help="folder with prior/, text_encoder/ and tokenizer/ to start from (default: random weights)")
    g.add_argument("--width", type=int, default=192, help="channels of Stage C (official 1536)")
    g.add_argument("--depth", type=int, default=6, help="blocks of Stage C (official 32)")
    g.add_argument("--text-width", type=int, default=128, help="channels of the text encoder (official 1280)")
    g.add_argument("--text-depth", type=int, default=3, help="layers of the text encoder (official 32)")
    g.add_argument("--text-warmup", type=int, default=1500, help="steps in which a fresh text encoder first learns what captions look like, as CLIP has from 2 billion pictures")
    g.add_argument("--train-text", action="store_true", help="let the text encoder learn along with Stage C (default: it stays as it is)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=3000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--batch", type=int, default=64, help="captioned pictures per forward pass")
    g.add_argument("--grad-accum", type=int, default=1, help="forward passes per optimizer step; the effective batch is batch x grad-accum")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate: linear warm-up, constant, linear decay to 0 over the last fifth")
    g.add_argument("--warmup", type=int, default=200, help="optimizer steps of warm-up")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm above which gradients are scaled down")
    g.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, which are the ones kept")
    g.add_argument("--caption-dropout", type=float, default=0.05, help="share of captions replaced by the empty one")
    g.add_argument("--loss-weight", choices=["v", "p2", "none"], default="v", help="what errors count by noise level: see v_weight and p2_weight in diffusion.py; none: all alike")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast type; fp32 on CPUs, bf16 on recent GPUs")
    g.add_argument("--compile", action="store_true", help="let torch.compile make the networks faster; needs a C++ compiler on CPUs")
    g.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True, help="folder for checkpoints, losses and pictures")
    g.add_argument("--decoder", default=None, help="folder with decoder/ and vqgan/: paint sample grids with it (default: none are painted)")
    g.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    g.add_argument("--save-every", type=int, default=250, help="optimizer steps between checkpoints")
    g.add_argument("--sample-every", type=int, default=1000, help="optimizer steps between sample grids")
    g.add_argument("--log-every", type=int, default=20, help="optimizer steps between lines of loss.csv")
    return p.parse_args(argv)


SAMPLE_PROMPTS = [
    "a rocket left of a moon on a blue background", "a red apple on a white background",
    "a small cat on a purple background", "a large rocket on a black background",
    "a cat above a red apple on a green background", "a moon below a tree on an orange background",
    "a banana right of a cat on a red background", "a tree left of a banana on a yellow background"]


def new_text_encoder(width: int, depth: int, length: int = 20):
    """-> (CLIPTokenizer, CLIPTextModel) for captions of emoji scenes, untrained.

    The tokenizer is a byte-level BPE like CLIP's own, so it takes any text, with merges learned on
    the words of 4096 captions and all object names: these become one token each, other words several.
    length in tokens, both ends included; the grammar's longest captions need 18.
    """
    from collections import Counter
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from scenes import OBJECTS, EmojiScenes
    # Byte-pair encoding: join the most frequent pair of pieces, again and again, here until each word is one
    # piece. Ties go by spelling, so that the tokenizer is the same on every machine (arXiv:1508.07909).
    words = {word for text in EmojiScenes("captioned").batch(0, 4096)[1] + OBJECTS for word in text.split()}
    pieces, merges = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)], []
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((a, b))
        for word in pieces:
            for i in reversed(range(len(word) - 1)):
                if word[i:i + 2] == [a, b]:
                    word[i:i + 2] = [a + b]
    # CLIP's order: all bytes, all bytes at a word's end, then one token per merge, then the two specials.
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=length)
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
                            num_hidden_layers=depth, num_attention_heads=width // 32, max_position_embeddings=length,
                            hidden_act="gelu", projection_dim=width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tokenizer, CLIPTextModel(config)


def warm_up(tokenizer, text_model, encoder, scenes, args, device):
    """Teaches a fresh text encoder what captions look like, before Stage C: the place of CLIP's pre-training.

    CLIP learned to lay the vector at a caption's end mark beside the vector of its picture
    (arXiv:2103.00020). The same in its plainest form: a throw-away linear layer must tell from that
    vector which semantic latent to expect. What objects look like, and that "left of" says where they
    go, is learned here in minutes; from Stage C's loss alone, which at most noise levels can see the
    objects in x_t itself, an hour taught half of it.
    """
    import torch
    from tqdm import tqdm
    from stage_b import preprocess
    from training import learning_rate, log_losses, to_tensor
    from wuerstchen import to_stored
    head = torch.nn.Linear(text_model.config.hidden_size, 16 * 3 * 3).to(device)
    parameters = [*text_model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    for step in tqdm(range(args.text_warmup), desc="Text encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.text_warmup, 3e-3, 100)
        pictures, captions = scenes.batch(5 * 10 ** 8 + step * 128, 128)     # not the scenes Stage C starts with
        with torch.no_grad():
            x_0 = to_stored(encoder(preprocess(to_tensor(pictures, device), 96)))            # (128, 16, 3, 3)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(device)
        expected = head(text_model(**tokens).pooler_output)                                  # (128, 144) from the end mark
        loss = (expected - x_0.flatten(1)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0:
            log_losses(args, step + 1, "text_loss.csv", loss=loss.item())


def main(args):
    # Imported here, so that --help answers at once.
    import copy
    import numpy as np
    import torch
    from tqdm import tqdm
    from scenes import EmojiScenes
    from diffusion import add_noise, p2_weight, v_weight
    from stage_b import preprocess
    from stage_c import StageC
    from text import TextEncoder
    from training import check_out, learning_rate, log_losses, save_checkpoint, save_grid, start_run, to_tensor
    from weights import (load_image_encoder, load_stage_a, load_stage_b, load_stage_c, load_text_encoder, save_scheduler,
                         save_stage_c, save_text_encoder)
    from wuerstchen import Wuerstchen, to_stored

    check_out(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype),
                              enabled=args.dtype != "fp32")
    torch.manual_seed(args.seed)
    weight = dict(v=v_weight, p2=p2_weight, none=torch.ones_like)[args.loss_weight]

    # --- data and models ---------------------------------------------------------------------------
    scenes = EmojiScenes("captioned", seed=args.seed + 2)    # scene i is a function of (seed, i): a resume is exact
    encoder = load_image_encoder(args.image_encoder).to(device).requires_grad_(False)    # eval mode, float32
    if args.init:
        prior = load_stage_c(f"{args.init}/prior").train()
        tokenizer, text_model = load_text_encoder(f"{args.init}/text_encoder", f"{args.init}/tokenizer")
    else:
        tokenizer, text_model = new_text_encoder(args.text_width, args.text_depth)
        text_model.to(device).train()
        if not args.resume:
            warm_up(tokenizer, text_model, encoder, scenes, args, device)
        prior = StageC(c=args.width, c_cond=args.text_width, c_timestep=32, depth=args.depth, heads=args.width // 32, dropout=0.0)
    text_model.train(args.train_text).requires_grad_(args.train_text)
    model = torch.nn.ModuleDict(dict(prior=prior, text=text_model)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        model["prior"].compile()                             # fuses the small operations; takes a minute or two first
    embed = TextEncoder(tokenizer, model["text"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.99),
                                  weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    first_step = start_run(args, parts)
    cache = {}                                               # batch number -> stored latents, captions
    painter = None
    if args.decoder:
        text = TextEncoder(tokenizer, ema["text"])
        painter = Wuerstchen(load_stage_a(f"{args.decoder}/vqgan"), load_stage_b(f"{args.decoder}/decoder"), ema["prior"],
                             text, text, size=128, guidance_b=4.0, device=device)

    # --- one pass of this loop is one optimizer step -----------------------------------------------
    for step in tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, desc="Stage C"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss_sum = 0.0
        for micro in range(args.grad_accum):
            number = step * args.grad_accum + micro
            if args.cache:
                number %= max(args.cache // args.batch, 1)
            if number in cache:
                x_0, captions = cache[number]
            else:
                pictures, captions = scenes.batch(number * args.batch, args.batch)
                with torch.no_grad():
                    x_0 = to_stored(encoder(preprocess(to_tensor(pictures, device), 96)))                    # (B, 16, 3, 3)
                if args.cache:
                    cache[number] = x_0, captions
            keep = torch.rand(args.batch) >= args.caption_dropout                        # (B,) every draw is per picture
            captions = [c if k else "" for c, k in zip(captions, keep.tolist())]
            # Noise levels a little past 1, clamped: a share of 7 % trains at t = 1, where sampling starts.
            t = ((1 - torch.rand(args.batch, device=device)) * 1.08 + 0.001).clamp(0.001, 1)        # (B,)
            eps = torch.randn_like(x_0)
            x_t = add_noise(x_0, eps, t)                                                 # (B, 16, 3, 3)
            with autocast:
                eps_hat = model["prior"](x_t, t, embed(captions)).float()                # (B, 16, 3, 3)
            loss = ((eps_hat - eps).square().mean(dim=(1, 2, 3)) * weight(t)).mean()
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

        # --- log, sample, save ---------------------------------------------------------------------
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log_losses(args, done, loss=loss_sum.item(), grad_norm=grad_norm.item())
        if painter and (done % args.sample_every == 0 or done == args.steps):
            pictures = np.stack([np.asarray(picture) for picture in painter(SAMPLE_PROMPTS)])   # (8, 128, 128, 3)
            save_grid(f"{args.out}/samples/step_{done:06d}.png", to_tensor(pictures), columns=4)
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, done, parts)

    save_stage_c(ema["prior"], f"{args.out}/prior")
    save_scheduler(f"{args.out}/scheduler")
    save_text_encoder(tokenizer, ema["text"], f"{args.out}/text_encoder", f"{args.out}/tokenizer")


if __name__ == "__main__":
    args = parse_args()                                      # first, so that --help answers at once
    from training import mistakes_in_one_line
    with mistakes_in_one_line():
        main(args)
