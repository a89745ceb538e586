"""Trains the small image encoder on emoji scenes, before Stage B: the place of EfficientNet's ImageNet weights.

  python -m tiny.train_encoder --out runs/encoder          # nine minutes on 2 cores

  scene (B,3,96,96) -encoder-> (B,16,3,3) -noise, head-> in each of the 9 cells: which object, where exactly, how large, on which colour

From Stage B's loss alone an encoder learns little, as at nearly all noise levels Stage B can see the objects in x_t
itself. So it first learns to name them: a throw-away head, the same for each of the 3 x 3 positions of the semantic
latent, must tell from its 16 numbers which object has its center in that cell (the idea of arXiv:1506.02640).
Then `train_b.py --init random --image-encoder OUT/image_encoder` goes on with it, jointly with Stage B.
Written to --out: image_encoder/, checkpoints/, log.jsonl.
Needs: torch, numpy, pillow, tqdm.
"""
import argparse
import sys
from pathlib import Path


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder for the result")
    p.add_argument("--config", default=str(Path(__file__).parents[1] / "models" / "tiny" / "image_encoder"),
                   help="sizes: a folder with the config.json of a TinyImageEncoder (default: models/tiny/image_encoder)")
    p.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    p.add_argument("--batch", type=int, default=64, help="scenes per step")
    p.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    p.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default="trapezoid",
                   help="of the learning rate, after the warm-up; trapezoid: down in the last fifth")
    p.add_argument("--warmup", type=int, default=100, help="optimizer steps in which the learning rate rises")
    p.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    p.add_argument("--log-every", type=int, default=20, help="optimizer steps between lines of log.jsonl")
    p.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    p.add_argument("--save-every", type=int, default=250,
                   help="steps between checkpoints; SIGTERM and Ctrl-C save, too")
    p.add_argument("--keep", type=int, default=1, help="checkpoints kept")
    return p.parse_args(argv)


def facts(scenes: list):
    """What is true of scenes, as scenes.EmojiScenes describes them -> numpy arrays of what the head must tell.

    objects (B,9): the number of the object whose center is in each cell, row by row, or that of "nothing", the last;
    places (B,9,3): its x and y within the cell and its size, all about 0 to 1; colours (B,): the background's number.
    """
    import numpy as np
    from training.scenes import COLOURS, OBJECTS
    number, cell = {name: i for i, name in enumerate(OBJECTS)}, 128 / 3                          # cell: px
    objects, places = np.full((len(scenes), 9), len(OBJECTS)), np.zeros((len(scenes), 9, 3), np.float32)
    for i, scene in enumerate(scenes):
        for name, size, (x, y) in zip(scene.objects, scene.sizes, scene.centers):
            k = int(y // cell) * 3 + int(x // cell)
            objects[i, k], places[i, k] = number[name], (x / cell % 1, y / cell % 1, size / 64)
    return objects, places, np.array([list(COLOURS).index(scene.colour) for scene in scenes])


def main(args):
    # Imported here, so that --help answers at once.
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm
    from wuerstchen import add_noise
    from loading.errors import UserError, WeightsError
    from loading.files import read_config
    from training.scenes import COLOURS, OBJECTS, EmojiScenes
    from stage_b import TinyImageEncoder, preprocess
    from training.checkpoints import Checkpoints, Log
    from training.optim import learning_rate
    from training.processes import GracefulExit
    from training.samples import to_tensor
    from loading.names import config_to_ours
    from loading.weights import save_model
    from wuerstchen import scale_semantic

    for name in ("steps", "batch", "log_every", "save_every", "keep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    checkpoints = Checkpoints(f"{args.out}/checkpoints", args.keep)
    resumed, stop = checkpoints.find(args.resume), GracefulExit()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device")}
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    # scene i is a function of (seed, i)
    scenes, nothing = EmojiScenes("all", seed=args.seed + 1), len(OBJECTS)
    try:
        encoder = TinyImageEncoder(**config_to_ours(read_config(args.config), TinyImageEncoder)).to(device).train()
    except (WeightsError, TypeError, RuntimeError) as error:
        raise UserError(f"--config {args.config} cannot be used: {error}") from error
    head = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.GELU(),
                               torch.nn.Linear(256, nothing + 1 + 3 + len(COLOURS))).to(device)
    importance = torch.ones(nothing + 1, device=device)
    importance[nothing] = 0.2                                                            # most cells hold nothing
    # without its last norm's 42 and -1
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    parts, start = dict(model=encoder, head=head, optimizer=optimizer), 0
    if resumed is not None:
        state = checkpoints.load(resumed, "train_encoder.py", settings)
        start = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    log = Log(args.out, start)
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Image encoder"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        first = 5 * 10 ** 8 + step * args.batch                                          # not the scenes Stage B sees
        objects, places, colours = (torch.from_numpy(a).to(device) for a in facts(scenes.scenes(first, args.batch)))
        # (B, 16, 3, 3)
        stored = scale_semantic(encoder(preprocess(to_tensor(scenes.batch(first, args.batch)[0], device), 96)))
        # Noise on the latent makes neighbouring codes mean similar things; Stage C will not hit them exactly.
        # of its own in each step: it survives a resume
        torch.manual_seed(hash((args.seed, step)) % 2 ** 63)
        noisy = add_noise(stored, torch.randn_like(stored), torch.rand(args.batch, device=device) * 0.3)
        out = head(noisy.flatten(2).transpose(1, 2))                                     # (B, 9, 140)
        there, names, where, on = objects != nothing, out[..., :nothing
                                                          + 1], out[..., nothing + 1:nothing
                                                                    + 4], out[..., nothing + 4:]
        place_error = (where - places)[there].abs().mean()
        loss = F.cross_entropy(names.flatten(0, 1), objects.flatten(), importance) + 4 * place_error \
            + 0.3 * F.cross_entropy(on.flatten(0, 1), colours.repeat_interleave(9))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log.write(done, loss=loss.item(), lr=learning_rate(step, args), place_error=place_error.item(),
                      objects_right=(names.argmax(-1) == objects)[there].float().mean().item(),
                      colour_right=(on.argmax(-1) == colours[:, None]).float().mean().item())
        if done % args.save_every == 0 or done == args.steps or stop.received:
            checkpoints.save(done, dict(script="train_encoder.py", settings=settings, step=done,
                                        **{name: part.state_dict() for name, part in parts.items()}))
        if stop.received and done < args.steps:
            print(f"stopped after step {done}, all of it saved: --resume auto goes on", file=sys.stderr)
            break
    else:
        save_model(encoder.eval(), f"{args.out}/image_encoder")
    stop.restore()


if __name__ == "__main__":
    args = parse_args()                                      # first, so that --help answers at once
    from loading.errors import RESUME_HINT, exit_on_user_error
    with exit_on_user_error(RESUME_HINT):
        main(args)
