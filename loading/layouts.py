"""Finds the parts of a pipeline, in a folder of any known layout or by a name such as "v2".

  "tiny", "v2", "hub:owner/name" or a folder  -locate->  {part: its folder or file, or None}

hub.py fetches weights from the hub, and also the text encoders for a folder of original files, which contains none.
Needs: the standard library; huggingface_hub when something is fetched.
"""
import fnmatch
from pathlib import Path
from typing import Iterable

from loading.errors import WeightsError, warn
from loading.files import is_safetensors, listing, read_config, read_json
from loading.hub import (NAMES, OFFICIAL, TEXT_TO_IMAGE, V1, Repository, fetch, fetch_part, hint, is_reference, some)

# ----- folders: where each part is -----------------------------------------------------------------------------------
# LAYOUTS is {layout: {part: its folder or file}}. The first layout of which all three MODELS exist is used.

ONE_FOLDER = dict(                      # our layout: Stages C and B share one text encoder and one scheduler
    prior="prior", prior_text_encoder="text_encoder", prior_tokenizer="tokenizer", prior_scheduler="scheduler",
    decoder="decoder", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
    vqgan="vqgan", image_encoder="image_encoder")
COMBINED = ONE_FOLDER | dict(           # diffusers' WuerstchenCombinedPipeline
    prior="prior_prior", prior_text_encoder="prior_text_encoder", prior_tokenizer="prior_tokenizer",
    prior_scheduler="prior_scheduler")
LAYOUTS = {
    "one folder": ONE_FOLDER,
    "combined pipeline": COMBINED,
    "published pair": {                 # the two released repositories as subfolders
        part: f"wuerstchen{'-prior' * (part.startswith('prior') or part == 'image_encoder')}/{folder}"
        for part, folder in ONE_FOLDER.items()},
    "original files": COMBINED | dict(  # the authors' .pt files, published without text encoders
        prior="model_v2_stage_c*.pt", decoder="model_v2_stage_b.pt", vqgan="vqgan_f4_v1_500k.pt",
        image_encoder="model_v2_stage_b.pt"),
    "original files of v1": ONE_FOLDER | dict(
        prior="model_stage_c*.pt", decoder="model_stage_b.pt", vqgan="vqgan_f4_v1_500k.pt",
        image_encoder="model_stage_b.pt"),
}
SHIPPED = {name: Path(__file__).parents[1] / "models" / name for name in ("tiny", "tiny-v1")}   # in this repository
MODELS = ("prior", "decoder", "vqgan")
OPTIONAL = ("image_encoder", "scheduler", "prior_scheduler")
TEXT = ("prior_text_encoder", "prior_tokenizer", "text_encoder", "tokenizer")
# TRAINED: parts that training may write. HALVES: {a half pipeline of diffusers: its parts}; v2 has the other parts.
TRAINED = ("prior", "prior_text_encoder", "prior_tokenizer", "decoder", "image_encoder")
HALVES = dict(WuerstchenPriorPipeline=("prior", "prior_text_encoder", "prior_tokenizer"),
              WuerstchenDecoderPipeline=("decoder", "text_encoder", "tokenizer", "vqgan"))


def find_parts(folder: str | Path, given: Iterable[str] = ()) -> dict[str, Path | None]:
    """Returns {part, as named in LAYOUTS: its path in the folder, or None if it is missing}. given: parts that may be
    missing, in addition to OPTIONAL and, in the layouts of original files, the text encoders. Raises WeightsError if
    other parts are missing, or if the folder follows none of the layouts."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder of weights: there is no such folder")
    paths = [*folder.glob("*"), *folder.glob("wuerstchen*/*")]
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_dir() or path.suffix == ".pt"}
    return {part: name and folder / name for part, name in match_layout(names, given, folder, listing(folder)).items()}


def match_layout(names: set[str], given: Iterable[str], source, found: str) -> dict[str, str | None]:
    """Finds the parts of a pipeline by `names` of folders and .pt files. Returns {part: its name, or None if missing}.
    given, and the errors raised: see find_parts. source, found: the searched place and its content, for messages."""
    def find(pattern: str) -> str | None:
        matches = sorted(fnmatch.filter(names, pattern))
        if len(matches) > 1:                             # several versions of a file: the last name is the newest
            warn(f"{source} holds several files {pattern}: taking {matches[-1]}")
        return matches[-1] if matches else None
    for name, layout in LAYOUTS.items():
        parts = {part: find(pattern) for part, pattern in layout.items()}
        if any(parts.values()) and all(parts[part] or part in given for part in MODELS):
            needed = layout.keys() - set(OPTIONAL) - set(TEXT if name.startswith("original") else ()) - set(given)
            missing = {layout[part]: None for part in layout if part in needed and parts[part] is None}
            if missing:
                raise WeightsError(f"{source} looks like the layout {name!r} but lacks {', '.join(missing)}")
            return parts
    wanted = "; or ".join(", ".join(layout[part] + "/" * (not name.startswith("original")) for part in MODELS)
                          for name, layout in LAYOUTS.items())
    raise WeightsError(f"{source} does not hold weights in a known layout: looked for {wanted}; found {found}")


def check_scheduler(folder: str | Path | None) -> None:
    """Raises WeightsError if a `scheduler` folder has another noise schedule than wuerstchen.py. All released weights
    use s = 0.008 and scaler = 1. With a wrong schedule, images would be grey noise."""
    if folder is None:
        return
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    if config.get("s", 0.008) != 0.008 or config.get("scaler", 1.0) != 1.0:
        raise WeightsError(f"{path} asks for a noise schedule with s = {config.get('s')} and scaler = "
                           f"{config.get('scaler')}; only s = 0.008 and scaler = 1 are supported")


# ----- all sources: names, folders, single parts ---------------------------------------------------------------------

def official_name(weights: str | Path) -> str | Path:
    """Converts an official repository such as "warp-ai/wuerstchen" to its key in NAMES. Returns others unchanged."""
    repo = str(weights).removeprefix("hub:")
    if repo == "dome272/wuerstchen" and not Path(weights).exists():
        raise WeightsError(f"{weights} holds both v1 and v2: write v1 or v2 instead")
    return weights if Path(weights).exists() else OFFICIAL.get(repo, str(weights))   # Path("tiny") becomes "tiny"


def is_name(weights: str | Path) -> bool:
    """Returns whether a name of weights, a part or a LoRA means the same on any machine, unlike a local path."""
    return weights in NAMES or weights in SHIPPED or is_reference(weights) or official_name(weights) in NAMES


def locate(weights: str | Path, files: dict[str, str | Path] | None = None, parts: tuple[str, ...] = TEXT_TO_IMAGE,
           half: bool = False, offline: bool = False, revision: str | None = None,
           named_by: tuple = ()) -> dict[str, Path | None]:
    """Finds the parts of a pipeline, and fetches them if necessary. Returns {part: its folder or file, or None}.

    weights: a name in SHIPPED or NAMES, a folder, or a repository, hub:OWNER/NAME. parts: the wanted parts; only these
    are fetched, or required in a folder. files: {part: path or hub:OWNER/NAME} of parts to use instead of those of
    `weights`; the tokenizer of a text encoder is in its folder, or next to it in `tokenizer`. half, offline, revision:
    see hub.fetch. named_by: the weights whose base.json named `weights`, to detect cycles. Raises
    WeightsError if a part is missing or cannot be fetched."""
    weights = official_name(weights)
    name, weights = weights, SHIPPED.get(weights, weights)
    options = dict(half=half, offline=offline, revision=revision)
    parts = with_tokenizers(parts)
    own = single_parts(files or {}, options)         # first, so that errors in them come before a download
    if is_reference(weights):
        weights = fetch_repository(str(weights), set(parts) - own.keys(), options)
    if weights not in NAMES and base_of(Path(weights)):
        return locate_trained(Path(weights), own, parts, options, (*named_by, str(name)))
    if weights in NAMES:
        found = fetch(weights, tuple(part for part in parts if part not in own), **options)
    elif Path(weights).is_dir():
        found = find_parts(weights, given=own.keys() | set(TEXT_TO_IMAGE) - set(parts))
        # The authors published .pt files without the text encoders, which are CLIP's: fetch these from the hub.
        missing = tuple(part for part in TEXT_TO_IMAGE if part in parts and found[part] is None and part not in own)
        v1 = found["decoder"] is not None and found["decoder"].name == V1["decoder"][1]
        found |= fetch("v1" if v1 else "v2", missing, **options) if missing else {}
    else:
        found = "it is a file" if Path(weights).is_file() else "there is no such folder"
        raise WeightsError(f"there are no weights called {str(name)!r}, and {found}: expected "
                           f"{', '.join((*SHIPPED, *NAMES))}, or a folder{hint(name)}")
    for part in ("scheduler", "prior_scheduler"):
        check_scheduler(found.get(part))
    unwanted = dict.fromkeys(set(TEXT_TO_IMAGE) - set(parts))
    return dict.fromkeys(ONE_FOLDER) | found | unwanted | own


def with_tokenizers(parts: Iterable[str]) -> tuple[str, ...]:
    """Returns names of parts, with the tokenizer of each text encoder added. Raises WeightsError for unknown names."""
    known = (*TEXT_TO_IMAGE, "image_encoder")
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise WeightsError(f"parts is {parts!r:.80}, expected a list with some of {', '.join(known)}")
    if not (parts := tuple(parts)):
        raise WeightsError(f"parts is empty: expected some of {', '.join(known)}")
    if unknown := [part for part in parts if part not in known]:
        raise WeightsError(f"there is no part called {unknown[0]!r:.80}: expected some of {', '.join(known)}")
    encoders = [part for part in parts if part.endswith("text_encoder")]
    return tuple(dict.fromkeys((*parts, *(part.replace("text_encoder", "tokenizer") for part in encoders))))


def base_of(folder: Path) -> tuple[dict, tuple[str, ...]] | None:
    """Returns (content of base.json, parts that the folder may have). The content names the weights with the other
    parts. A folder with one of diffusers' HALVES has no base.json, so its content is dict(weights="v2").
    Returns None for other folders. Raises WeightsError if base.json is invalid."""
    if (folder / "base.json").is_file():
        base = read_json(folder / "base.json")
        files = base.get("files", {})
        names = [base.get("weights"), base.get("lora") or "", *(files.values() if isinstance(files, dict) else [files])]
        if not all(isinstance(name, str) and "\0" not in name for name in names) or not names[0] or names[1] == ".." \
                or Path(names[1]).name != names[1] or not {*files} <= ONE_FOLDER.keys():
            raise WeightsError(f"{folder / 'base.json'} cannot be used: expected a file that train_b.py or train_c.py "
                               f"wrote, with the names of weights, files and lora")
        # Training a LoRA writes no prior. So a prior in its folder was left by another run, and is ignored.
        return base, tuple(part for part in TRAINED if not (base.get("lora") and part.startswith("prior")))
    index = folder / "model_index.json"
    half = HALVES.get(str(read_json(index).get("_class_name"))) if index.is_file() else None
    return (dict(weights="v2"), half) if half else None


def locate_trained(folder: Path, own: dict, parts: tuple[str, ...], options: dict, named_by: tuple) -> dict:
    """Returns {part: path or None}, like locate, for a folder with only some parts. The other parts come from the
    weights that base_of(folder) names. own: {part: path} of parts to use instead. options: half, offline and revision
    as a dict. named_by: see locate. Adds the key "lora" if the training run that wrote the folder, or the run that it
    started from, trained a LoRA for the prior in the result."""
    base, names = base_of(folder)
    start, start_files = base["weights"], base.get("files", {})
    if start in named_by:
        raise WeightsError(f"{folder / 'base.json'} names {start}, which names it again: it needs weights")
    # If base.json was downloaded from the hub, its paths belong to another machine, so only names are allowed.
    if is_reference(named_by[-1]):
        for name in (start, *(file for part, file in start_files.items() if part not in own)):
            if not is_name(name):
                raise WeightsError(f"{named_by[-1]}: its base.json names {name}, on the machine where it was trained: "
                                   f"name its parts instead, --prior {named_by[-1]} with --weights")
    trained = {part: folder / ONE_FOLDER[part] for part in names if (folder / ONE_FOLDER[part]).is_dir()}
    found = locate(start, start_files | trained | own, parts, **options, named_by=named_by)
    if "prior" in trained | own:                             # a LoRA of base.json's weights fits only their prior
        found.pop("lora", None)
    elif base.get("lora"):
        found["lora"] = folder / base["lora"]
    return found


def fetch_repository(reference: str, wanted: set[str], options: dict) -> Path:
    """Fetches the wanted parts of a repository in any layout. Returns its folder in the cache. Also fetches the
    schedulers, to check them, and the image encoder's configuration, on which the default image size depends."""
    repo = Repository(reference, options["offline"], options["revision"])
    names = [name for name in ("base.json", "model_index.json") if name in repo.names]
    base, own = (base_of(repo.fetch(names)) if names else None) or ({}, ())
    if own:
        where = {part: ONE_FOLDER[part] for part in own if ONE_FOLDER[part] in repo.folders()}
    else:
        entries = repo.folders() | {name for name in repo.names if name.endswith(".pt")}
        where = match_layout(entries, set(TEXT_TO_IMAGE) - wanted, reference, some(repo.names))
    for part, place in where.items():
        if place and (part in wanted or part in ("scheduler", "prior_scheduler")):
            names += repo.files_of(place, options["half"])
        elif place and part == "image_encoder" and f"{place}/config.json" in repo.names:
            names.append(f"{place}/config.json")
    if base.get("lora"):
        names += repo.files_of(base["lora"])
    return repo.fetch(names)


def single_parts(files: dict[str, str | Path | None], options: dict) -> dict[str, Path]:
    """Converts {part: path or hub:OWNER/NAME} to {part: path}, and adds the tokenizer of each text encoder. Fetches
    parts from the hub. options: see locate_trained."""
    own = {part: Path(path) for part, path in files.items() if path is not None}
    for part, path in own.items():
        if is_reference(path):
            own[part] = fetch_part(path, (COMBINED[part], *{ONE_FOLDER[part]} - {COMBINED[part]}, ""),
                                   ("tokenizer",) * part.endswith("text_encoder"), **options)
        elif not path.exists():
            raise WeightsError(f"{part}: {path}: there is no such file or folder{hint(path)}")
        elif path.is_dir() and "tokenizer" not in part:      # report errors before other parts are fetched
            read_config(path)
        elif path.is_file() and path.suffix != ".json":
            is_safetensors(path)
    for encoder, tokenizer in (("prior_text_encoder", "prior_tokenizer"), ("text_encoder", "tokenizer")):
        if encoder in own:
            own.setdefault(tokenizer, own[encoder] if (own[encoder] / "tokenizer_config.json").is_file()
                           else own[encoder].parent / "tokenizer")
    return own
