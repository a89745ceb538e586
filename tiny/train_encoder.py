"""Trains the small image encoder on emoji scenes, before Stage B, like EfficientNet's pre-training on ImageNet.

  python -m tiny.train_encoder --out runs/encoder          # 7 minutes on one core

  scene (B,3,96,96) -encoder-> (B,16,3,3) -noise, head-> for each of the 9 cells: object, position, size, background

Stage B's loss by itself teaches an encoder little, because at almost all noise levels Stage B can see the objects in
x_t. So the encoder first learns to recognise objects. A head, which is discarded after training, gets the 16 numbers of
one position (cell) of the semantic latents and predicts which object has its center there (as YOLO, arXiv:1506.02640).
`train_b.py --init random --image-encoder OUT/image_encoder` then trains the encoder further, jointly with Stage B.
Written to --out: image_encoder/, checkpoints/, log.jsonl.
Needs: torch, numpy, pillow, tqdm.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tiny/train_encoder.py` finds our modules

from pathlib import Path

from loading.errors import RESUME_HINT, exit_on_user_error
from loading.options import BATCH, SEED, Parser, positive_int
from training.options import add_checkpoint_options, add_schedule_options

CONFIG = Path(__file__).parents[1] / "models" / "tiny" / "image_encoder"
FIRST_SCENE = 5 * 10 ** 8        # number of the first scene: high, so that Stage B trains on others


def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m tiny.train_encoder")
    p.add_argument("--out", required=True, help="folder for the result")
    p.add_argument("--config", default=str(CONFIG), help="sizes: a folder with the config.json of a TinyImageEncoder "
                                                         "(default: models/tiny/image_encoder)")
    p.add_argument("--batch", type=BATCH, default=64, help="scenes per step")
    add_schedule_options(p, steps=1200, lr=1.5e-3, schedule="trapezoid", warmup=100)
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if available)")
    p.add_argument("--seed", type=SEED, default=0, help="seed of weights, data and noise")
    p.add_argument("--log-every", type=positive_int, default=20, help="optimizer steps between lines of log.jsonl")
    add_checkpoint_options(p, save_every=250, keep=1)
    return p.parse_args(argv)


if __name__ == "__main__":       # stands before the slow imports, so that --help is fast
    with exit_on_user_error(RESUME_HINT, "lower --batch"):
        args = parse_args()
        from tiny import train_encoder
        sys.exit(train_encoder.main(args))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from loading.arguments import usable_device
from loading.weights import new_model, save_model
from stage_b import TinyImageEncoder, preprocess
from training.checkpoints import Checkpoints, Log, check_finite, load_state, settings_of, state_of
from training.optim import learning_rate
from training.processes import GracefulExit
from training.report import due
from training.samples import to_tensor
from training.scenes import CANVAS, CELLS, COLOURS, EmojiScenes
from wuerstchen import add_noise, scale_semantic

NOTHING = len(CELLS)             # the label of a cell without an object


def labels_of(scenes: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the labels that the head should predict for scenes of EmojiScenes: objects, places, colours.

    objects (B,9): index of the object whose center is in each cell, row by row, or NOTHING; places (B,9,3): x and y of
    that center within the cell, from 0 to 1, and size / 64; colours (B,): index of the background's colour.
    """
    cell = CANVAS / 3                                                                        # side of a cell in px
    objects, places = np.full((len(scenes), 9), NOTHING), np.zeros((len(scenes), 9, 3), np.float32)
    for i, scene in enumerate(scenes):
        for name, size, (x, y) in zip(scene.objects, scene.sizes, scene.centers):
            k = int(y // cell) * 3 + int(x // cell)
            objects[i, k], places[i, k] = CELLS.index(name), (x / cell % 1, y / cell % 1, size / 64)
    return objects, places, np.array([list(COLOURS).index(scene.colour) for scene in scenes])


def build_head() -> nn.Module:
    """Returns the head: a cell's 16 numbers -> object logits (last: NOTHING), place (x, y, size), colour logits."""
    return nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, NOTHING + 1 + 3 + len(COLOURS)))


def head_loss(output: Tensor, objects: Tensor, places: Tensor, colours: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss () and a dict of values for the log. output (B,9,140): the head's. Others: from labels_of."""
    names, where, background = output.split([NOTHING + 1, 3, len(COLOURS)], dim=-1)
    there = objects != NOTHING                                                               # (B, 9)
    importance = torch.ones(NOTHING + 1, device=output.device)
    importance[NOTHING] = 0.2                                                        # low, because most cells are empty
    place_error = (where - places)[there].abs().mean()
    loss = F.cross_entropy(names.flatten(0, 1), objects.flatten(), importance) + 4 * place_error \
        + 0.3 * F.cross_entropy(background.flatten(0, 1), colours.repeat_interleave(9))
    return loss, dict(loss=loss, place_error=place_error,
                      objects_right=(names.argmax(-1) == objects)[there].float().mean(),
                      colour_right=(background.argmax(-1) == colours[:, None]).float().mean())


def main(args):
    checkpoints = Checkpoints(args, results=("image_encoder",))
    resumed, settings = checkpoints.find(args.resume), settings_of(args)
    device = usable_device(args.device)
    torch.manual_seed(args.seed)
    scenes = EmojiScenes("varied", seed=args.seed + 1)                   # scene i depends only on seed and i
    encoder, head = new_model(TinyImageEncoder, args.config).to(device).train(), build_head().to(device)
    parameters = [p for p in encoder.parameters() if p.requires_grad]    # without the last norm, which is fixed
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    parts, start = dict(model=encoder, head=head, optimizer=optimizer), 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_encoder.py", settings)
        start = state["step"]
        load_state(resumed, state, parts)
    log, stop = Log(args.out, start), GracefulExit()
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Image encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        first = FIRST_SCENE + step * args.batch
        objects, places, colours = (torch.from_numpy(a).to(device) for a in labels_of(scenes.scenes(first, args.batch)))
        images = to_tensor(scenes.batch(first, args.batch)[0], device)                       # (B, 3, 128, 128)
        latents = scale_semantic(encoder(preprocess(images, 96)))                            # (B, 16, 3, 3)
        # Stage C will generate latents with small errors. Noise in training gives similar scenes nearby latents, so
        # these errors change little. Each step seeds its noise, so a resumed run equals an uninterrupted one.
        torch.manual_seed(hash((args.seed, step)) % 2 ** 63)
        noisy = add_noise(latents, torch.randn_like(latents), torch.rand(args.batch, device=device) * 0.3)
        loss, values = head_loss(head(noisy.flatten(2).transpose(1, 2)), objects, places, colours)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if due(args.log_every, done, args.steps):
            log.write(done, lr=learning_rate(step, args), **{name: value.item() for name, value in values.items()})
        stopping = stop.received             # read only once: a signal may arrive between two reads
        if due(args.save_every, done, args.steps) or stopping:
            checkpoints.save(done, state_of(parts) | dict(script="train_encoder.py", settings=settings, step=done))
        if stopping and done < args.steps:
            stop.leave(stopping, done)
    check_finite(encoder.state_dict(), "the result")
    save_model(encoder.eval(), f"{args.out}/image_encoder")
    stop.restore()

