"""Layouts: finds the parts of a pipeline, in a folder of any known layout or under a name such as "v2".

  "tiny", "v2" or a folder, and the parts wanted  -locate->  {part: its folder or file, or None}

A name of the hub, and text encoders that a folder of the original files lacks, are fetched by hub.py.
Needs: the standard library; huggingface_hub when something is fetched.
"""
import warnings
from pathlib import Path
from typing import Iterable

from loading.errors import WeightsError
from loading.files import listing, read_json
from loading.hub import NAMES, TEXT_TO_IMAGE, V1, fetch

# ----- folders: where each part is -----------------------------------------------------------------------------------
# The first layout counts whose three models are all present.

ONE_FOLDER = dict(                      # ours: one text encoder and one scheduler serve Stages C and B
    prior="prior", prior_text_encoder="text_encoder", prior_tokenizer="tokenizer", prior_scheduler="scheduler",
    decoder="decoder", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
    vqgan="vqgan", image_encoder="image_encoder")
COMBINED = ONE_FOLDER | dict(           # diffusers' WuerstchenCombinedPipeline
    prior="prior_prior", prior_text_encoder="prior_text_encoder", prior_tokenizer="prior_tokenizer",
    prior_scheduler="prior_scheduler")
LAYOUTS = {
    "one folder": ONE_FOLDER,
    "combined pipeline": COMBINED,
    "published pair": {                 # the two released folders side by side
        part: f"wuerstchen{'-prior' * (part.startswith('prior') or part == 'image_encoder')}/{folder}"
        for part, folder in ONE_FOLDER.items()},
    "original files": COMBINED | dict(  # the authors' .pt files; they published no text encoders with them
        prior="model_v2_stage_c*.pt", decoder="model_v2_stage_b.pt", vqgan="vqgan_f4_v1_500k.pt",
        image_encoder="model_v2_stage_b.pt"),
    "original files of v1": ONE_FOLDER | dict(
        prior="model_stage_c*.pt", decoder="model_stage_b.pt", vqgan="vqgan_f4_v1_500k.pt",
        image_encoder="model_stage_b.pt"),
}
SHIPPED = {name: Path(__file__).parents[1] / "models" / name for name in ("tiny", "tiny-v1")}    # part of this code
MODELS = ("prior", "decoder", "vqgan")
OPTIONAL = ("image_encoder", "scheduler", "prior_scheduler")
TEXT = ("prior_text_encoder", "prior_tokenizer", "text_encoder", "tokenizer")


def find_parts(folder: str | Path, given: Iterable[str] = ()) -> dict[str, Path | None]:
    """Where the parts of a pipeline are in a folder, by their names in LAYOUTS; None for optional parts that are
    missing, and next to the original files also for text encoders. given: parts that may be missing.

    Raises WeightsError if the folder follows none of the layouts, or lacks a part that is needed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder of weights: there is no such folder")

    def find(pattern: str) -> Path | None:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:                               # of several versions, the last is the newest
            warnings.warn(f"{folder} holds several files {pattern}: taking {found[-1].name}")
        return found[-1] if found and (found[-1].is_dir() or found[-1].suffix == ".pt") else None
    for name, layout in LAYOUTS.items():
        parts = {part: find(pattern) for part, pattern in layout.items()}
        if any(parts.values()) and all(parts[part] or part in given for part in MODELS):
            needed = layout.keys() - set(OPTIONAL) - set(TEXT if name.startswith("original") else ()) - set(given)
            missing = {layout[part]: None for part in layout if part in needed and parts[part] is None}
            if missing:
                raise WeightsError(f"{folder} looks like the layout {name!r} but lacks {', '.join(missing)}")
            return parts
    wanted = "; or ".join(", ".join(layout[part] + "/" * (not name.startswith("original")) for part in MODELS)
                          for name, layout in LAYOUTS.items())
    raise WeightsError(f"{folder} does not hold weights in a known layout: looked for {wanted}; "
                       f"found {listing(folder)}")


def check_scheduler(folder: str | Path | None) -> None:
    """Raises WeightsError if a `scheduler` folder asks for another noise schedule than wuerstchen.py has.

    All released weights use s = 0.008 and scaler = 1. Sampled with another schedule, weights give grey noise.
    """
    if folder is None:
        return
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    if config.get("s", 0.008) != 0.008 or config.get("scaler", 1.0) != 1.0:
        raise WeightsError(f"{path} asks for a noise schedule with s = {config.get('s')} and scaler = "
                           f"{config.get('scaler')}; only s = 0.008 and scaler = 1 are supported")


# ----- all sources: names, folders, single parts ---------------------------------------------------------------------

def locate(weights: str | Path, files: dict[str, str | Path] | None = None, parts: tuple[str, ...] = TEXT_TO_IMAGE,
           half: bool = False, offline: bool = False, revision: str | None = None) -> dict[str, Path | None]:
    """Where the parts of a pipeline are -> part, by its name in LAYOUTS: folder or file; None if missing.

    weights: a name in SHIPPED or NAMES, or a folder. parts: those that are wanted; only these are fetched, or
    required of a folder. files: single parts from elsewhere, which are then not looked for. A text encoder's
    tokenizer is in the same folder, or next to it in `tokenizer`. half, offline, revision: see hub.fetch.
    Raises WeightsError.
    """
    name, weights = weights, SHIPPED.get(weights, weights)
    options = dict(half=half, offline=offline, revision=revision)
    if weights not in NAMES and (Path(weights) / "base.json").is_file():
        return locate_trained(Path(weights), files or {}, parts, options)
    own = single_parts(files or {})                          # checked before anything is fetched
    if weights in NAMES:
        found = fetch(weights, tuple(part for part in parts if part not in own), **options)
    elif Path(weights).is_dir():
        found = find_parts(weights, given=own.keys() | set(TEXT_TO_IMAGE) - set(parts))
        # The authors published their .pt files without the text encoders, which are CLIP's own.
        missing = tuple(part for part in TEXT_TO_IMAGE if part in parts and found[part] is None and part not in own)
        v1 = found["decoder"] is not None and found["decoder"].name == V1["decoder"][1]
        found |= fetch("v1" if v1 else "v2", missing, **options) if missing else {}
    else:
        raise WeightsError(f"there are no weights called {str(name)!r}, and there is no such folder: expected "
                           f"{', '.join((*SHIPPED, *NAMES))}, or a folder")
    for part in ("scheduler", "prior_scheduler"):
        check_scheduler(found.get(part))
    unwanted = dict.fromkeys(set(TEXT_TO_IMAGE) - set(parts))
    return dict.fromkeys(ONE_FOLDER) | found | unwanted | own


def locate_trained(folder: Path, files: dict, parts: tuple[str, ...], options: dict) -> dict[str, Path | None]:
    """The parts that a training wrote into `folder`, and the other parts from the weights named in its base.json."""
    try:
        base = read_json(folder / "base.json")
        start, start_files = base["weights"], base.get("files", {})
    except (WeightsError, KeyError) as error:
        raise WeightsError(f"{folder / 'base.json'} cannot be used: {error}; "
                           f"expected a file that train_b.py or train_c.py wrote") from error
    trained = {part: folder / ONE_FOLDER[part] for part in ("prior", "prior_text_encoder", "decoder", "image_encoder")
               if (folder / ONE_FOLDER[part]).is_dir()}
    found = locate(start, start_files | trained | files, parts, **options)
    return found | (dict(lora=folder / base["lora"]) if base.get("lora") else {})


def single_parts(files: dict[str, str | Path | None]) -> dict[str, Path]:
    """Parts given one by one, as paths, and the tokenizers that belong to their text encoders."""
    own = {part: Path(path) for part, path in files.items() if path is not None}
    for part, path in own.items():
        if not path.exists():
            raise WeightsError(f"{part}: {path}: there is no such file or folder")
    for encoder, tokenizer in (("prior_text_encoder", "prior_tokenizer"), ("text_encoder", "tokenizer")):
        if encoder in own:
            own.setdefault(tokenizer, own[encoder] if (own[encoder] / "tokenizer_config.json").is_file()
                           else own[encoder].parent / "tokenizer")
    return own
