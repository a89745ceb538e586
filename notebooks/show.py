"""How the notebooks draw: one look for all figures, and rows of images with labels.

The background is white, so figures are readable in a dark theme; 9 inches at 100 dpi fit a laptop's window.
Needs: matplotlib.
"""
import warnings

import matplotlib.pyplot as plt
import numpy as np

# tqdm asks for ipywidgets in every notebook, but no bar is drawn here. It warns when it is imported: import this file
# first.
warnings.filterwarnings("ignore", message="IProgress not found")
# Notebooks 5 and 6 ask for a unicorn before the model knows the word.
warnings.filterwarnings("ignore", message="the model does not know")
warnings.filterwarnings("ignore", message="guidance_. is below 1")       # on purpose, to see what it does

WIDTH = 9      # inches
plt.rcParams.update({"figure.dpi": 100, "figure.facecolor": "white", "savefig.facecolor": "white",
                     "axes.facecolor": "white", "figure.figsize": (WIDTH, 3.6), "figure.constrained_layout.use": True,
                     "font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                     "axes.spines.right": False, "figure.titlesize": 13, "axes.titlesize": 12})


def pictures(rows, title, columns=None, labels=None, size=None, cmap="RdBu_r", numbers=False):
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
    fig.suptitle(title)
    plt.show()
