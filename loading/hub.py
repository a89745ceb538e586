"""Finds the parts of a pipeline: in a folder of any layout, or on the Hugging Face hub, which it fetches them from.

  "v2", the parts wanted  -fetch->  part -> its folder or file in the hub's cache (HF_HOME)

Text-to-image needs seven parts of two repositories; encoding a picture needs the image encoder
alone. Of each part only the configuration and one weight file are fetched: .safetensors before
.bin, half precision where it is wanted and offered. What is in the cache already is not fetched
again, and with offline=True (or HF_HUB_OFFLINE=1) nothing is.
Files are taken by name. The published model_index.json files name a module that diffusers has
moved since, so that diffusers itself cannot open these folders at present.
Needs: huggingface_hub, which comes with transformers.

  python -m loading.hub v2                      # fetches v2 for text-to-image and says where it is
  python -m loading.hub v2-base --parts prior   # one part only
"""
import argparse
import contextlib
import errno
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Iterable

from loading.errors import WeightsError
from loading.files import STEM, find_file, listing, write_atomically
from loading.weights import extract_image_encoder

# Which state of each repository. A commit's hash where one is known; "main" where none could be
# looked up, as for those whose files have not changed since 2023. --revision overrides.
REVISIONS = {
    "warp-ai/wuerstchen":                        "c3da41406ddd4d9c48c49aa93981a82354351b83",
    "warp-ai/wuerstchen-prior":                  "main",
    "warp-ai/wuerstchen-prior-model-base":       "3f9205c8c2e7cf103192954fe6f096e66f9d4efc",
    "warp-ai/wuerstchen-prior-model-finetuned":  "main",
    "warp-ai/EfficientNetEncoder":               "main",
    "dome272/wuerstchen":                        "6eb6cf5494fa67472afdbcfd78a31dcb091b0c05",
    "dome272/wuerstchen (v1)":                   "c9a8af033966c756941168f2a537595a15e0c1a8",     # main did not always have v1's files
}

# part -> (repository, folder in it, stem of its weight file; None: all of TOKENIZER_FILES); or (repository, file, "")
V2 = {
    "prior":               ("warp-ai/wuerstchen-prior", "prior", STEM),
    "prior_text_encoder":  ("warp-ai/wuerstchen-prior", "text_encoder", "model"),            # CLIP bigG
    "prior_tokenizer":     ("warp-ai/wuerstchen-prior", "tokenizer", None),
    "decoder":             ("warp-ai/wuerstchen", "decoder", STEM),
    "text_encoder":        ("warp-ai/wuerstchen", "text_encoder", "model"),                  # CLIP H
    "tokenizer":           ("warp-ai/wuerstchen", "tokenizer", None),
    "vqgan":               ("warp-ai/wuerstchen", "vqgan", STEM),
}
# v1, as the authors published it; the one text encoder that it has, CLIP H, is that of v2's Stage B.
V1 = {part: V2[part.removeprefix("prior_")] for part in V2} | {
    "prior":               ("dome272/wuerstchen", "model_stage_c_ema.pt", ""),
    "decoder":             ("dome272/wuerstchen", "model_stage_b.pt", ""),
    "vqgan":               ("dome272/wuerstchen", "vqgan_f4_v1_500k.pt", ""),
    "image_encoder":       ("dome272/wuerstchen", "model_stage_b.pt", ""),
}
NAMES = {
    "v1":           V1,                                      # 512 px
    "v2":           V2,                                      # halfway between the two below: the best for most prompts
    "v2-base":      V2 | {"prior": ("warp-ai/wuerstchen-prior-model-base", "", STEM)},       # to fine-tune
    "v2-aesthetic": V2 | {"prior": ("warp-ai/wuerstchen-prior-model-finetuned", "", STEM)},  # 1024 px only
}
NAMES["v2-interpolated"] = NAMES["v2"]
# The image encoder has a repository of its own, 80 MB; and it is part of the authors' decoder file of 6 GB.
IMAGE_ENCODER = ("warp-ai/EfficientNetEncoder", "", STEM)
IMAGE_ENCODER_INSIDE = ("dome272/wuerstchen", "model_v2_stage_b.pt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# What a task needs.
TEXT_TO_IMAGE = tuple(V2)                                                               # all but the image encoder
# a picture, encoded and painted again
RECONSTRUCTION = ("image_encoder", "decoder", "text_encoder", "tokenizer", "vqgan")


# ----- folders: which part stands where ---------------------------------------------------------------
# The first layout whose three models are all there counts.

LAYOUTS = {
    "one folder": dict(             # ours: one text encoder and one scheduler serve Stages C and B
        prior="prior", prior_text_encoder="text_encoder", prior_tokenizer="tokenizer", prior_scheduler="scheduler",
        decoder="decoder", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
        vqgan="vqgan", image_encoder="image_encoder"),
    "combined pipeline": dict(      # diffusers' WuerstchenCombinedPipeline
        prior="prior_prior", prior_text_encoder="prior_text_encoder", prior_tokenizer="prior_tokenizer",
        prior_scheduler="prior_scheduler",
        decoder="decoder", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
        vqgan="vqgan", image_encoder="image_encoder"),
    "published pair": dict(         # the two released folders side by side
        prior="wuerstchen-prior/prior", prior_text_encoder="wuerstchen-prior/text_encoder",
        prior_tokenizer="wuerstchen-prior/tokenizer", prior_scheduler="wuerstchen-prior/scheduler",
        decoder="wuerstchen/decoder", text_encoder="wuerstchen/text_encoder", tokenizer="wuerstchen/tokenizer",
        scheduler="wuerstchen/scheduler",
        vqgan="wuerstchen/vqgan", image_encoder="wuerstchen-prior/image_encoder"),
    "original files": dict(         # the authors' .pt files; the text encoders were never among them
        prior="model_v2_stage_c*.pt", prior_text_encoder="prior_text_encoder", prior_tokenizer="prior_tokenizer",
        prior_scheduler="prior_scheduler",
        decoder="model_v2_stage_b.pt", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
        vqgan="vqgan_f4_v1_500k.pt", image_encoder="model_v2_stage_b.pt"),
    "original files of v1": dict(
        prior="model_stage_c*.pt", prior_text_encoder="text_encoder", prior_tokenizer="tokenizer",
        prior_scheduler="scheduler",
        decoder="model_stage_b.pt", text_encoder="text_encoder", tokenizer="tokenizer", scheduler="scheduler",
        vqgan="vqgan_f4_v1_500k.pt", image_encoder="model_stage_b.pt"),
}
# what comes with the code
SHIPPED = {name: Path(__file__).parents[1] / "models" / name for name in ("tiny", "tiny-v1")}
OPTIONAL = ("image_encoder", "scheduler", "prior_scheduler")
TEXT = ("prior_text_encoder", "prior_tokenizer", "text_encoder", "tokenizer")


def find_parts(folder: str | Path, given: Iterable[str] = ()) -> dict[str, Path | None]:
    """Where the parts of a pipeline stand in a folder, under the names used in LAYOUTS; None for parts that are absent
    and optional, and, beside the original files, for text encoders. given: parts that need not be there.

    Raises WeightsError if the folder follows none of the layouts, or lacks a part that is needed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder of weights: there is no such folder")

    def there(place: str) -> Path | None:
        # a pattern only where several files would do: the last is the newest
        found = sorted(folder.glob(place))
        if len(found) > 1:
            warnings.warn(f"{folder} holds several files {place}: taking {found[-1].name}")
        return found[-1] if found and (found[-1].is_dir() or found[-1].suffix == ".pt") else None
    for name, layout in LAYOUTS.items():
        parts = {part: there(place) for part, place in layout.items()}
        if any(parts.values()) and all(parts[part] or part in given for part in ("prior", "decoder", "vqgan")):
            needed = parts.keys() - set(OPTIONAL) - set(TEXT if name.startswith("original") else ()) - set(given)
            missing = {layout[part]: None for part in layout if part in needed and parts[part] is None}
            if missing:
                raise WeightsError(f"{folder} looks like the layout {name!r} but lacks {', '.join(missing)}")
            return parts
    wanted = "; or ".join(", ".join(layout[part] + "/" * (not name.startswith("original"))
                                    for part in ("prior", "decoder", "vqgan"))
                          for name, layout in LAYOUTS.items())
    raise WeightsError(f"{folder} holds no weights that are understood: looked for {wanted}; found {listing(folder)}")


def check_scheduler(folder: str | Path | None) -> None:
    """Raises WeightsError if a `scheduler` folder asks for another noise schedule than wuerstchen.py has. None: nothing to check.

    All released weights use s = 0.008 and scaler = 1; sampled with another schedule, weights make grey noise.
    """
    if folder is None:
        return
    path = Path(folder) / "scheduler_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    if config.get("s", 0.008) != 0.008 or config.get("scaler", 1.0) != 1.0:
        raise WeightsError(f"{path} asks for a noise schedule with s = {config.get('s')} and scaler = {config.get('scaler')}; "
                           f"only s = 0.008 and scaler = 1 are supported")


# ----- the hub -----------------------------------------------------------------------------------------

def locate(weights: str | Path, files: dict[str, str | Path] | None = None, parts: tuple[str, ...] = TEXT_TO_IMAGE,
           half: bool = False, offline: bool = False, revision: str | None = None) -> dict[str, Path | None]:
    """Where the parts of a pipeline are -> part: folder or file, under the names used in LAYOUTS; None if absent.

    weights: a name in SHIPPED or NAMES, or a folder. parts: what is wanted; only that is fetched, and missed where a folder
    lacks it. files: single parts from elsewhere, which are then not looked for.
    A text encoder's tokenizer stands in the same folder, or beside it in one called tokenizer. Raises WeightsError.
    """
    name, weights = weights, SHIPPED.get(weights, weights)
    # what a training wrote: some parts, and where the rest is
    if weights not in NAMES and (base := Path(weights) / "base.json").is_file():
        try:
            base = json.loads(base.read_text(encoding="utf-8"))
            rest = base["weights"], base.get("files", {})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{base} cannot be used: {error}; expected what train_b.py and train_c.py write") from error
        trained = {part: Path(weights) / name for part, name in (("prior", "prior"),
                                                                 ("prior_text_encoder", "text_encoder"),
                                                                 ("decoder", "decoder"),
                                                                 ("image_encoder", "image_encoder"))
                   if (Path(weights) / name).is_dir()}
        found = locate(rest[0], rest[1] | trained | (files or {}), parts, half, offline, revision)
        return found | (dict(lora=Path(weights) / base["lora"]) if base.get("lora") else {})
    own = {part: Path(path) for part, path in (files or {}).items() if path is not None}
    for part, path in own.items():           # before anything is fetched
        if not path.exists():
            raise WeightsError(f"{part}: {path}: there is no such file or folder")
    for encoder, tokenizer in (("prior_text_encoder", "prior_tokenizer"), ("text_encoder", "tokenizer")):
        if encoder in own:
            own.setdefault(tokenizer, own[encoder] if (own[encoder] / "tokenizer_config.json").is_file()
                           else own[encoder].parent / "tokenizer")
    if weights in NAMES:
        found = fetch(weights, tuple(part for part in parts if part not in own), half, offline, revision)
    else:
        if not Path(weights).is_dir():
            raise WeightsError(f"there are no weights called {str(name)!r}, and there is no such folder: expected {', '.join((*SHIPPED, *NAMES))}, or a folder")
        found = find_parts(weights, given=own.keys() | set(TEXT_TO_IMAGE) - set(parts))
        # The authors published their .pt files without the text encoders, which are CLIP's own.
        absent = tuple(part for part in TEXT_TO_IMAGE if part in parts and found[part] is None and part not in own)
        v1 = found["decoder"] is not None and found["decoder"].name == V1["decoder"][1]
        found |= fetch("v1" if v1 else "v2", absent, half, offline, revision) if absent else {}
    for part in ("scheduler", "prior_scheduler"):
        check_scheduler(found.get(part))
    not_wanted = dict.fromkeys(set(TEXT_TO_IMAGE) - set(parts))
    return dict.fromkeys(LAYOUTS["one folder"]) | found | not_wanted | own


def revision_of(repo: str, override: str | None, weights: str = "v2") -> str:
    """REVISIONS', unless the override, "NAME" for all repositories or "REPO=NAME" for one, concerns this one."""
    which, _, name = (override or "").rpartition("=")
    return name if name and which in ("", repo) else REVISIONS.get(f"{repo} ({weights})", REVISIONS[repo])


def choices(folder: str, stem: str | None, half: bool) -> list[list[str]]:
    """The files of one part in one repository: of each inner list the first that exists is fetched."""
    def inside(name: str) -> str:
        return f"{folder}/{name}" if folder else name
    if stem is None:
        return [[inside(name)] for name in TOKENIZER_FILES]
    if stem == "":
        return [[folder]]
    names = [f"{stem}{half_mark}{suffix}" for suffix in (".safetensors", ".bin")
             for half_mark in ((".fp16", "") if half else ("", ".fp16"))]
    if stem == "model":                      # transformers has another name for its pickles
        names = [name.replace("model", "pytorch_model") if name.endswith(".bin") else name for name in names]
    return [[inside("config.json")], [inside(name) for name in names]]


def fetch(name: str, parts: tuple[str, ...] = TEXT_TO_IMAGE, half: bool = False, offline: bool = False,
          revision: str | None = None) -> dict[str, Path]:
    """The parts of the weights called `name`, from the cache or the hub -> part: its folder in the cache.

    parts: names of V2, or "image_encoder". half: prefer weight files in float16. revision: in place of
    REVISIONS', see revision_of. Raises WeightsError, in one line, for whatever goes wrong.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    sources = {part: NAMES[name][part] for part in parts if part in NAMES[name]}
    wanted = {}                                                     # repository -> what choices() returns
    for repo, folder, stem in sources.values():
        wanted.setdefault(repo, []).extend(choices(folder, stem, half))
    chosen = {repo: choose(repo, revision_of(repo, revision, name), files, offline) for repo, files in wanted.items()}
    target = image_encoder_folder()
    extract = False
    if "image_encoder" in parts and "image_encoder" not in sources and not (target / "config.json").is_file():
        repo, folder, stem = IMAGE_ENCODER
        try:
            chosen[repo] = choose(repo, revision_of(repo, revision), choices(folder, stem, half=False), offline)
            sources["image_encoder"] = IMAGE_ENCODER
        except WeightsError:                 # not there, or not in the cache: then out of the big file
            extract, (repo, file) = True, IMAGE_ENCODER_INSIDE
            chosen[repo] = choose(repo, revision_of(repo, revision), [[file]], offline)
    new = [size for files in chosen.values() for size in files.values()]
    if any(new):
        print(f"Fetching {sum(size > 0 for size in new)} files, {sum(new) / 1e9:.2f} GB, into {cache_folder()}",
              file=sys.stderr)
    snapshots = {repo: download(repo, revision_of(repo, revision, name), files) for repo, files in chosen.items()}

    found = {part: snapshots[repo] / folder for part, (repo, folder, _) in sources.items()}
    if extract:
        repo, file = IMAGE_ENCODER_INSIDE
        extract_image_encoder(snapshots[repo] / file, target)
        print(f"The image encoder is now in {target}; {snapshots[repo] / file} is no longer needed", file=sys.stderr)
    return found if "image_encoder" not in parts else {"image_encoder": target} | found


def choose(repo: str, revision: str, files: list[list[str]], offline: bool) -> dict[str, int]:
    """-> {file: bytes still to be fetched, 0 if in the cache}: of each inner list the first that there is."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    def cached(name: str, commit: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    if offline:
        there = {name: 0 for options in files for name in options if cached(name, revision)}
    else:
        with hub_errors(repo, revision):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        there = {file.rfilename: 0 if cached(file.rfilename, info.sha) else file.size or 1 for file in info.siblings}
    chosen = {}
    for options in files:
        name = next((name for name in options if name in there), None)
        if name is not None:
            chosen[name] = there[name]
        elif Path(options[0]).name not in TOKENIZER_FILES:          # of a tokenizer's files, some are enough
            raise WeightsError(f"{repo}: {options[0]} is not in the cache {cache_folder()}, and offline nothing is fetched" if offline
                               else f"{repo} at revision {revision} holds no {options[0]}")
    return chosen


def download(repo: str, revision: str, files: dict[str, int]) -> Path:
    """Fetches what is not in the cache yet -> the folder there that holds it all. What was interrupted goes on where it stopped."""
    from huggingface_hub import hf_hub_download
    with hub_errors(repo, revision):
        for name, new in files.items():
            path = hf_hub_download(repo, name, revision=revision, local_files_only=new == 0)
    return Path(path).parents[name.count("/")]


@contextlib.contextmanager
def hub_errors(repo: str, revision: str):
    """Around calls of huggingface_hub: its many exceptions become a WeightsError that says what to do."""
    from huggingface_hub import constants, errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(f"{repo} asks for its terms to be accepted: do so on {constants.ENDPOINT}/{repo}, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"{constants.ENDPOINT} has no {repo}, or shows it to its members only: is HF_ENDPOINT right? "
                           f"Does `hf auth login` help?") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision!r}: choose another with --revision, main is the newest") from error
    except errors.RemoteEntryNotFoundError as error:
        raise WeightsError(f"{repo} at revision {revision} lost a file while it was being fetched: {first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        raise WeightsError(f"{constants.ENDPOINT} answered with an error: {first_line(error)}") from error
    except Exception as error:               # no network: the class of its exception changes with the HTTP library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise WeightsError(f"the disk is full: make room in {cache_folder()}, or set HF_HOME to another disk") from error
        raise WeightsError(f"{constants.ENDPOINT} cannot be reached ({first_line(error)}): is there a network? "
                           f"What is in the cache can be used with --offline") from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def hashes(paths: dict[str, Path | None]) -> dict[str, str]:
    """part -> sha256 of its weight file: what a picture was made with. For files from the hub it is their name in the cache;
    for others it is computed, and remembered for large ones."""
    import hashlib
    memory_file, result = own_cache() / "hashes.json", {}
    try:
        memory = json.loads(memory_file.read_text())
    except (OSError, ValueError):
        memory = {}
    for part in ("prior", "decoder", "vqgan", "image_encoder", "prior_text_encoder", "text_encoder"):
        if paths.get(part) is None:
            continue
        # the hub's cache holds links to files named by hash
        path = find_file(paths[part], (STEM, "model", "pytorch_model")).resolve()
        if re.fullmatch("[0-9a-f]{64}", path.name):
            result[part] = path.name
            continue
        state = path.stat()
        key = f"{path} {state.st_size} {state.st_mtime_ns}"
        if key not in memory:
            with open(path, "rb") as file:
                memory[key] = hashlib.file_digest(file, "sha256").hexdigest()
            if state.st_size > 100e6:                                # a second or more
                with contextlib.suppress(OSError):
                    write_atomically(memory_file, lambda temporary: temporary.write_text(json.dumps(memory)))
        result[part] = memory[key]
    return result


def cache_folder() -> str:
    from huggingface_hub import constants
    return constants.HF_HUB_CACHE


def image_encoder_folder() -> Path:
    """Where the image encoder lies once it has been taken out of the big file."""
    return own_cache() / "image_encoder"


def own_cache() -> Path:
    """Where what we make of fetched weights is kept, beside the hub's own cache."""
    from huggingface_hub import constants
    return Path(constants.HF_HOME) / "wuerstchen"


def main(args):
    try:
        for part, place in fetch(args.name, tuple(args.parts), args.half, args.offline, args.revision).items():
            print(f"{part:20}{place}")
    except WeightsError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=sorted(NAMES), help="which weights")
    p.add_argument("--parts", nargs="+", choices=[*V2, "image_encoder"], default=list(TEXT_TO_IMAGE),
                   help="default: all that text-to-image needs")
    p.add_argument("--half", action="store_true", help="weights in float16 where they are offered")
    p.add_argument("--offline", action="store_true", help="look in the cache only")
    p.add_argument("--revision", help="branch, tag or commit in place of the tested ones; REPO=NAME for one repository")
    main(p.parse_args())
