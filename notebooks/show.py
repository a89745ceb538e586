"""What every notebook starts with, and how it draws: one look for all figures, and rows of images with labels.

  from show import finish, img_grid, plt, scenes, start, torch
  model = start()                                    # the small model; one thread, no gradients
  images, captions = scenes(16, seed=8)
  plt.plot(x, y, label="loss"); finish("title", "x", "y")

The background is white, so figures are readable in a dark theme; 9 inches at 100 dpi fit a laptop's window. Each image
is stored with a description of what it shows, made of its titles and labels, for readers who cannot see it.
Needs: torch, matplotlib, IPython; the rest of the repository.
"""
import io
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# tqdm asks for ipywidgets in every notebook, but no bar is drawn here. It warns when it is imported.
warnings.filterwarnings("ignore", message="IProgress not found")
# Notebooks 6 and 7 ask for a unicorn before the model knows the word.
warnings.filterwarnings("ignore", message="the model does not know")
warnings.filterwarnings("ignore", message="guidance_. is below 1")       # on purpose, to see what it does

from training.samples import to_tensor  # noqa: E402   after the path to it, and without tqdm's warning
from training.scenes import EmojiScenes  # noqa: E402
from wuerstchen import Wuerstchen  # noqa: E402

WIDTH = 9      # inches
plt.rcParams.update({"figure.dpi": 100, "figure.facecolor": "white", "savefig.facecolor": "white",
                     "axes.facecolor": "white", "figure.figsize": (WIDTH, 3.6), "figure.constrained_layout.use": True,
                     "font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                     "axes.spines.right": False, "figure.titlesize": 13, "axes.titlesize": 12})


def start(weights="tiny", gradients=False, **options):
    """-> a pipeline, by default of the small weights. One thread: the networks are tiny, and a second one gains
    little. options: of Wuerstchen.load; fast=False gives the plain modules of the stage files."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(gradients)
    return Wuerstchen.load(weights, **options)


def scenes(n, seed, kind="captioned"):
    """-> n images (n, 3, 128, 128) in [0, 1] and their captions. kind: "captioned" or "all" objects."""
    images, captions = EmojiScenes(kind, seed=seed).batch(0, n)
    return to_tensor(images), captions


def describe(figure):
    """What a figure shows, in one line, from its titles, axes, legends and labels."""
    texts = [figure.get_suptitle()]
    for ax in figure.axes:
        texts += [ax.get_title(), " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
        texts += [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text))


def finish(title=None, xlabel=None, ylabel=None):
    """Ends a figure: its title, the names of its axes if there is one pair of them, legends, and off it goes."""
    figure = plt.gcf()
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    if title:
        (axes[0].set_title if len(axes) == 1 else figure.suptitle)(title)
    if xlabel or ylabel:
        axes[0].set(xlabel=xlabel, ylabel=ylabel)
    labels = {ax: tuple(ax.get_legend_handles_labels()[1]) for ax in axes}
    explained = {labels[ax] for ax in axes if ax.get_legend()} | {()}
    for ax in axes:
        if labels[ax] not in explained:            # the same lines need one legend
            ax.legend(fontsize=9)
            explained.add(labels[ax])
    file, text = io.BytesIO(), describe(figure)
    figure.savefig(file, format="png")
    plt.close(figure)
    display({"image/png": file.getvalue(), "text/plain": text}, raw=True, metadata={"image/png": {"alt": text}})


def img_grid(rows, title, columns=None, labels=None, size=None, cmap="RdBu_r", numbers=False):
    """Draws rows of images under one title.

    rows     a list of images, or of such lists. An image is a PIL image, a tensor (3,H,W) in [0, 1], or a tensor (H,W),
             which is drawn in colours from blue (negative) over white (0) to red (positive), with one scale for all.
    columns  texts above the first row, or above every image if there are as many; labels: texts left of each row.
    size     height of an image in inches; default: what fits. numbers: write the values into images (H,W).
    """
    rows = rows if isinstance(rows[0], (list, tuple)) else [rows]
    width = max(len(row) for row in rows)
    size = size or min(2.0, (WIDTH - 0.6) / width)
    maps = [np.asarray(image) for row in rows for image in row if getattr(image, "ndim", 3) == 2]
    limit = max((float(np.abs(values).max()) for values in maps), default=1.0) or 1.0
    low = -limit if any((values < 0).any() for values in maps) else 0.0
    every = columns is not None and len(columns) == sum(len(row) for row in rows)
    lines = max((text.count("\n") for text in columns or ()), default=0) + 1
    height = (size + 0.05) * len(rows) + 0.16 * lines * (len(rows) if every else 1) + 0.5
    fig, axes = plt.subplots(len(rows), width, squeeze=False, figsize=(min(size * width + 0.9, WIDTH), height))
    fig.suptitle(title)
    for i, row in enumerate(rows):
        for k in range(width):
            ax = axes[i, k]
            ax.set(xticks=[], yticks=[], frame_on=False)
            if k >= len(row):
                continue
            image = row[k]
            if getattr(image, "ndim", 3) == 2:
                drawn = ax.imshow(np.asarray(image), cmap=cmap, vmin=low, vmax=limit)
                for (y, x), value in np.ndenumerate(np.asarray(image)) if numbers else ():
                    ax.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8,
                            color="white" if abs(value) > 0.6 * limit else "black")
            else:
                ax.imshow(image if not hasattr(image, "ndim") else np.clip(np.asarray(image).transpose(1, 2, 0), 0, 1))
            if columns is not None and (every or i == 0):
                ax.set_title(columns[i * width + k if every else k], fontsize=9.5)
            if labels is not None and k == 0:
                ax.set_ylabel(labels[i], rotation=0, ha="right", va="center", fontsize=9.5)
    if maps:
        fig.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02, aspect=30)
    finish()


def activations(title, **tensors):
    """Draws each tensor (1,H,W,C) or (1,N,C) as rows of numbers: a line for each position, a column for each channel.
    Its shape, mean and standard deviation stand above; each has a scale of its own, blue is negative, red positive."""
    fig, axes = plt.subplots(len(tensors), 1, squeeze=False, figsize=(WIDTH, 0.5 + 1.05 * len(tensors)))
    fig.suptitle(title)
    for ax, (name, x) in zip(axes[:, 0], tensors.items()):
        values = x.detach().float().reshape(-1, x.shape[-1])
        limit = values.abs().quantile(0.995)
        ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{name} {tuple(x.shape)}: mean {values.mean():z.2f}, deviation {values.std():.2f}", fontsize=9.5)
    finish()
