"""Shows a run to the user: its progress bar, curves of its log and, with --dry-run, a description of the run.

Needs: torch, pillow, tqdm; order.py, samples.py, loading/.
"""
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from loading.files import bytes_text, write_atomically
from training.order import sample_rng
from training.samples import draw_caption


def due(every: int, step: int, steps: int) -> bool:
    """Returns whether an action is due: `step` is a multiple of `every`, or the last of `steps`. every 0: never."""
    return bool(every) and (step % every == 0 or step == steps)


class Progress:
    """Shows the progress bar of a run, and computes values for the log from the steps since the log's last line.

    Iterating yields the numbers of the remaining steps, from `start`. batch: samples per step of all processes.
    """
    def __init__(self, title: str, start: int, args, processes, batch: int):
        self.processes, self.batch, self.smooth = processes, batch, None
        self.since, self.clock = start, time.time()
        self.sums = torch.zeros(2, 10, device=processes.device)  # loss sums and sample counts of 10 ranges of t
        self.bar = tqdm(range(start, args.steps), title, args.steps, initial=start, disable=not processes.is_main)

    def __iter__(self):
        return iter(self.bar)

    def add(self, t: Tensor, raw: Tensor) -> None:
        """Adds the unweighted losses raw (B,) of samples to self.sums, by their noise levels t (B,)."""
        level, raw = (t * 10).long().clamp(max=9), raw.detach()
        self.sums[0].index_add_(0, level, raw.nan_to_num(0, 0, 0))       # NaN and infinity do not count
        self.sums[1].index_add_(0, level, raw.isfinite().float())

    def values(self, step: int, loss: Tensor) -> dict:
        """Returns {name: value} for the log. loss: the last step's loss, a scalar. All processes must call this."""
        loss = (self.processes.sum(loss.clone()) / self.processes.world).item()
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        raw, count = self.processes.sum(self.sums.clone())
        speed = (step - self.since) * self.batch / (time.time() - self.clock)
        on_gpu = self.processes.device.type == "cuda"
        values = dict(loss=loss, smooth_loss=self.smooth, images_per_second=speed,
                      memory_gib=torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else None)
        raw = (raw / count).tolist()                                     # NaN (0 / 0) for a level without samples
        values |= {f"raw_loss_t_0.{i}": raw[i] for i in range(10) if not math.isnan(raw[i])}
        self.sums.zero_()
        self.since, self.clock = step, time.time()
        return values

    def show(self, line: dict, *more: str) -> None:
        """Shows values of `line`, a line of the log, and the texts `more` to the right of the progress bar."""
        words = [f"mean loss {line['smooth_loss']:.4f}", f"|grad| {line['grad_norm']:.2f}", *more,
                 f"lr {line['lr']:.1e}", f"{line['images_per_second']:.1f} images/s"]
        if line["memory_gib"]:
            words.append(f"{line['memory_gib']:.1f} GiB")
        self.bar.set_postfix_str(", ".join(words))


def checkpoint_bytes(args, model, discriminator=None) -> int:
    """Returns a checkpoint's size in bytes: weights, EMA weights, AdamW's two moments, and 300 bytes per tensor for the
    file's header. With a LoRA, the size includes the separate LoRA file. A checkpoint of train_a.py also has frozen
    weights and the discriminator; with --ema 0, it has no EMA weights."""
    learned = [p.nbytes + 300 for p in model.parameters() if p.requires_grad]
    other = [p.nbytes + 300 for p in (*model.parameters(), *model.buffers()) if not p.requires_grad]
    if hasattr(args, "fsdp"):
        copies = 5 if getattr(args, "lora", False) else 4
        return copies * sum(learned) + 2 * sum(buffer.nbytes for buffer in model.buffers())
    more = [3 * (p.nbytes + 300) for p in discriminator.parameters()] if discriminator is not None else []
    return (4 if args.ema else 3) * sum(learned) + sum(other) + sum(more)


def free_bytes(folder: Path) -> int:
    """Returns the number of free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.resolve()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def outline(args, model, dataset, sizes, order, discriminator=None) -> None:
    """Prints a run's parameter count, memory, disk space, images per step and epochs. order: a BatchSampler.
    sizes: (height, width) of each bucket. discriminator: the one that train_a.py trains, or None."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    # Weight, gradient, AdamW's two moments and EMA weight: five float32 numbers for each trained parameter.
    memory = learned * 4 * (5 if args.ema else 4) + frozen
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    print(f"{learned:,} of {sum(p.numel() for p in model.parameters()):,} parameters learn, in {len(names)} tensors: "
          f"{', '.join(names[:3])}, ...")
    print(f"{memory / 2 ** 30:.2f} GiB for weights, gradients, optimizer and EMA, without activations"
          + (": see --checkpointing" if hasattr(args, "checkpointing") else ""))
    size = checkpoint_bytes(args, model, discriminator)
    print(f"{bytes_text(size)} for a checkpoint, {bytes_text(size * args.keep)} for the {args.keep} of --keep, and one "
          f"more while it is written; {args.out} has {bytes_text(free_bytes(Path(args.out)))} free")
    epochs = args.steps * order.batch / len(dataset)
    print(f"{order.batch} images per step, {args.steps} steps are {epochs:.1f} epochs; buckets: "
          + ", ".join(f"{sizes[i][1]}x{sizes[i][0]} px {n}" for i, n in sorted(order.counts.items())))


def dry_run(args, model, dataset, sizes, order, draw_noise: Callable | None = None) -> None:
    """Calls outline, prints latents' shapes and captions. draw_noise(rng, h, w) returns Stage B's {name: noise}."""
    outline(args, model, dataset, sizes, order)
    positions, indices, number = order.step(0)
    h, w = sizes[number]
    shapes = dict(semantic=(16, h * 3 // 128, w * 3 // 128))
    if draw_noise:
        noise = draw_noise(np.random.default_rng(), h // 4, w // 4)
        shapes |= {name: tuple(tensor.shape) for name, tensor in noise.items()}
    latents = ", ".join(f"{name} {(order.batch, *shape)}" for name, shape in shapes.items())
    share = getattr(args, "preserve", 0)
    print(f"step 0: {latents}; its first captions, after dropout"
          f"{f', of which {share:.0%} are replaced by --preserve-prompts' if share else ''}:")
    for position, index in list(zip(positions.tolist(), indices.tolist()))[:8]:
        rng = partial(sample_rng, args.seed, position)
        caption, dropped = draw_caption(dataset, index, rng, args.caption_dropout)
        print(f"  {dataset.name(index)}: {'' if dropped else caption!r}")


def draw_curves(lines: list[dict], names: list[str], path: str | Path, width: int = 560, height: int = 300) -> None:
    """Writes a PNG file with a plot of each of `names`, keys of `lines`, over the steps. Loss axes are logarithmic."""
    font, plots = ImageFont.load_default(size=12), []
    for name in names:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))
                  and math.isfinite(line[name])]
        if len(points) < 2:
            continue
        logarithmic = "loss" in name and min(y for _, y in points) > 0
        xs, ys = [x for x, _ in points], [math.log10(y) if logarithmic else y for _, y in points]
        (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
        y1 = y1 if y1 > y0 else y0 + 1
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = 70, 24, width - 16, height - 34

        def place(x, y):
            return left + (x - x0) / max(x1 - x0, 1) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)
        for i in range(5):
            y = y0 + (y1 - y0) * i / 4
            draw.line([place(x0, y), place(x1, y)], fill="#e0e0e0")
            draw.text((left - 6, place(x0, y)[1]), f"{10 ** y if logarithmic else y:.3g}", "black", font, anchor="rm")
            x = x0 + (x1 - x0) * i / 4
            draw.text((place(x, y0)[0], bottom + 6), f"{x:.0f}", "black", font, anchor="ma")
        draw.line([place(x, y) for x, y in zip(xs, ys)], fill="#2060b0", width=2)
        draw.text((left, 4), name.replace("_", " ") + (" (logarithmic)" if logarithmic else ""), "black", font)
        draw.text((right, height - 4), "step", "black", font, anchor="rd")
        plots.append(image)
    if plots:
        sheet = Image.new("RGB", (width, height * len(plots)), "white")
        for i, plot in enumerate(plots):
            sheet.paste(plot, (0, i * height))
        write_atomically(path, sheet.save)
