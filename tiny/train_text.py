"""Trains a small text encoder from scratch, before a Stage C from scratch, like the pre-training of CLIP.

  python -m tiny.train_text --image-encoder runs/b/image_encoder --out runs/text          # 10 minutes on one core

  caption -tokenizer-> ids (B,20) -CLIP text model-> (B,20,D); its vector at the end token -linear-> predicted latents

CLIP learned to make the vector at a caption's end token similar to the vector of its image (arXiv:2103.00020). This is
the same idea in its simplest form: a linear layer, which is discarded after training, predicts the semantic latents
from the vector at the end token. So the encoder learns in minutes how objects look and where "left of" places them.
Written to --out: text_encoder/, tokenizer/, checkpoints/, log.jsonl.
Needs: torch, tokenizers, numpy, pillow, tqdm.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tiny/train_text.py` finds our modules

from collections import Counter

from loading.errors import RESUME_HINT, exit_on_user_error
from loading.options import BATCH, SEED, Parser, integer, positive_int
from training.options import add_checkpoint_options, add_schedule_options


def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m tiny.train_text")
    p.add_argument("--image-encoder", required=True, help="folder of the trained image encoder")
    p.add_argument("--out", required=True, help="folder for the result")
    p.add_argument("--width", type=integer(32, 8192, 32), default=128,
                   help="channels, 32 for each head of attention (official: 1280)")
    p.add_argument("--depth", type=integer(1, 100), default=3, help="layers (official: 32)")
    p.add_argument("--batch", type=BATCH, default=128, help="captioned images per step")
    add_schedule_options(p, steps=1500, lr=3e-3, schedule="trapezoid", warmup=100)
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if available)")
    p.add_argument("--seed", type=SEED, default=0, help="seed of weights and data")
    p.add_argument("--log-every", type=positive_int, default=20, help="optimizer steps between lines of log.jsonl")
    add_checkpoint_options(p, save_every=500, keep=1)
    return p.parse_args(argv)


if __name__ == "__main__":       # stands before the slow imports, so that --help is fast
    with exit_on_user_error(RESUME_HINT, "lower --batch"):
        args = parse_args()
        from tiny import train_text
        sys.exit(train_text.main(args))

import torch
from torch import nn
from tokenizers import pre_tokenizers
from tqdm import tqdm

from loading.arguments import usable_device
from loading.text_encoder import CLIPTextModel, TextEncoder, Tokenizer, byte_pair_encoding
from loading.weights import load_image_encoder, save_text_encoder
from stage_b import preprocess
from training.checkpoints import Checkpoints, Log, check_finite, load_state, settings_of, state_of
from training.optim import learning_rate
from training.processes import GracefulExit
from training.report import due
from training.samples import to_tensor
from training.scenes import CELLS, EmojiScenes
from wuerstchen import scale_semantic


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Learns a byte-pair encoding (arXiv:1508.07909): merges the most frequent pair of tokens, until each word is one
    token. Returns the pairs in order. Of equally frequent pairs, the alphabetically last is taken, on all machines."""
    pieces, merges = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)], []
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((a, b))
        for word in pieces:
            for i in reversed(range(len(word) - 1)):
                if word[i:i + 2] == [a, b]:
                    word[i:i + 2] = [a + b]
    return merges


def new_text_encoder(width: int, depth: int, length: int = 20) -> TextEncoder:
    """Returns an untrained text encoder for captions of emoji scenes.

    The tokenizer is a byte-level BPE like CLIP's, so it takes any text. Its merges are learned on the words of 4096
    captions and all object names: each of these words becomes one token, other words become several. length: number of
    tokens of a text, including the start and end tokens; the longest captions need 18."""
    texts = EmojiScenes("captioned", varied=True).batch(0, 4096)[1] + CELLS
    merges = learn_merges({word for text in texts for word in text.split()})
    # The tokens are in CLIP's order: all bytes, all bytes that end a word, one token per merge, two special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges),
              "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(byte_pair_encoding(vocabulary, merges), dict(model_max_length=length))
    return TextEncoder(tokenizer, CLIPTextModel(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=width // 32, max_position_embeddings=length, hidden_act="gelu"))


def main(args):
    checkpoints = Checkpoints(args, results=("text_encoder", "tokenizer"))
    resumed, settings = checkpoints.find(args.resume), settings_of(args)
    device = usable_device(args.device)
    torch.manual_seed(args.seed)
    scenes = EmojiScenes("captioned", seed=args.seed + 3, varied=True)   # scene i depends only on seed and i
    encoder = load_image_encoder(args.image_encoder).to(device).requires_grad_(False)
    text_encoder = new_text_encoder(args.width, args.depth).to(device).train()
    head = nn.Linear(args.width, 16 * 3 * 3).to(device)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    parts, start = dict(model=text_encoder.model, head=head, optimizer=optimizer), 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_text.py", settings)
        start = state["step"]
        load_state(resumed, state, parts)
    log, stop = Log(args.out, start), GracefulExit()
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Text encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        pixels, captions = scenes.batch(step * args.batch, args.batch)
        with torch.no_grad():
            x_0 = scale_semantic(encoder(preprocess(to_tensor(pixels, device), 96)))         # (B, 16, 3, 3)
        ids, mask = text_encoder.tokens(captions)
        at_end = text_encoder.model(ids, mask)[torch.arange(len(ids)), mask.sum(1) - 1]      # (B, 128)
        predicted = head(at_end)                                                             # (B, 144)
        loss = (predicted - x_0.flatten(1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if due(args.log_every, done, args.steps):
            log.write(done, loss=loss.item(), lr=learning_rate(step, args))
        stopping = stop.received             # read only once: a signal may arrive between two reads
        if due(args.save_every, done, args.steps) or stopping:
            checkpoints.save(done, state_of(parts) | dict(script="train_text.py", settings=settings, step=done))
        if stopping and done < args.steps:
            stop.leave(stopping, done)
    check_finite(text_encoder.state_dict(), "the result")
    save_text_encoder(text_encoder, f"{args.out}/text_encoder", f"{args.out}/tokenizer")
    stop.restore()

