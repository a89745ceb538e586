"""Trains a small text encoder from nothing, for a Stage C from nothing: the place of CLIP's pre-training.

  python -m tiny.train_text --image-encoder runs/b/image_encoder --out runs/text          # ten minutes on 2 cores

  caption -tokenizer-> ids (B,20) -CLIP text model-> (B,20,D); its vector at the end mark -linear-> expected latent

CLIP learned to lay the vector at a caption's end mark beside the vector of its picture (arXiv:2103.00020). The
same in its plainest form: a throw-away linear layer must tell from that vector which semantic latent to expect.
What objects look like, and that "left of" says where they go, is learned here in minutes; from Stage C's loss
alone, which at most noise levels can see the objects in x_t itself, an hour taught half of it.
Written to --out: text_encoder/, tokenizer/, checkpoints/, log.jsonl.
Needs: torch, transformers, numpy, pillow, tqdm.
"""
import argparse
import sys


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image-encoder", required=True, help="folder of the trained image encoder")
    p.add_argument("--out", required=True, help="folder for the result")
    p.add_argument("--width", type=int, default=128, help="channels (official: 1280)")
    p.add_argument("--depth", type=int, default=3, help="layers (official: 32)")
    p.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    p.add_argument("--batch", type=int, default=128, help="captioned pictures per step")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default="trapezoid",
                   help="of the learning rate, after the warm-up; trapezoid: down in the last fifth")
    p.add_argument("--warmup", type=int, default=100, help="optimizer steps in which the learning rate rises")
    p.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    p.add_argument("--log-every", type=int, default=20, help="optimizer steps between lines of log.jsonl")
    p.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    p.add_argument("--save-every", type=int, default=500,
                   help="steps between checkpoints; SIGTERM and Ctrl-C save, too")
    p.add_argument("--keep", type=int, default=1, help="checkpoints kept")
    return p.parse_args(argv)


def new_text_encoder(width: int, depth: int, length: int = 20):
    """-> (CLIPTokenizer, CLIPTextModel) for captions of emoji scenes, untrained.

    The tokenizer is a byte-level BPE like CLIP's own, so it takes any text, with merges learned on
    the words of 4096 captions and all object names: these become one token each, other words several.
    length in tokens, both ends included; the grammar's longest captions need 18.
    """
    from collections import Counter
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from training.scenes import OBJECTS, EmojiScenes
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
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                              model_max_length=length)
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
                            num_hidden_layers=depth, num_attention_heads=width // 32, max_position_embeddings=length,
                            hidden_act="gelu", projection_dim=width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tokenizer, CLIPTextModel(config)


def main(args):
    # Imported here, so that --help answers at once.
    import torch
    from tqdm import tqdm
    from training.scenes import EmojiScenes
    from stage_b import preprocess
    from training.checkpoints import Checkpoints, Log
    from training.optim import learning_rate
    from training.processes import GracefulExit
    from training.samples import to_tensor
    from loading.weights import load_image_encoder, save_text_encoder
    from wuerstchen import scale_semantic

    checkpoints = Checkpoints(f"{args.out}/checkpoints", args.keep)
    resumed, stop = checkpoints.find(args.resume), GracefulExit()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device")}
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    scenes = EmojiScenes("captioned", seed=args.seed + 3)    # scene i is a function of (seed, i)
    encoder = load_image_encoder(args.image_encoder).to(device).requires_grad_(False)
    tokenizer, text_model = new_text_encoder(args.width, args.depth)
    head = torch.nn.Linear(args.width, 16 * 3 * 3).to(device)
    parameters = [*text_model.to(device).train().parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    parts, start = dict(model=text_model, head=head, optimizer=optimizer), 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_text.py", settings)
        start = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    log = Log(args.out, start)
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Text encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        pictures, captions = scenes.batch(step * args.batch, args.batch)
        with torch.no_grad():
            x_0 = scale_semantic(encoder(preprocess(to_tensor(pictures, device), 96)))            # (B, 16, 3, 3)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(device)
        # (B, 144) from the end mark
        expected = head(text_model(**tokens).pooler_output)
        loss = (expected - x_0.flatten(1)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log.write(done, loss=loss.item(), lr=learning_rate(step, args))
        if done % args.save_every == 0 or done == args.steps or stop.received:
            checkpoints.save(done, dict(script="train_text.py", settings=settings, step=done,
                                        **{name: part.state_dict() for name, part in parts.items()}))
        if stop.received and done < args.steps:
            print(f"stopped after step {done}, all of it saved: --resume auto goes on", file=sys.stderr)
            break
    else:
        save_text_encoder(tokenizer, text_model.eval(), f"{args.out}/text_encoder", f"{args.out}/tokenizer")
    stop.restore()


if __name__ == "__main__":
    args = parse_args()                                      # first, so that --help answers at once
    from loading.errors import RESUME_HINT, exit_on_user_error
    with exit_on_user_error(RESUME_HINT):
        main(args)
