"""Fetches the parts of a pipeline from the Hugging Face hub.

  "v2", the parts wanted  -fetch->  part -> its folder or file in the hub's cache (HF_HOME)

Text-to-image needs seven parts of two repositories; encoding an image needs only the image encoder. Of each part
only the configuration and one weight file are fetched: .safetensors before .bin, half precision if it is wanted and
offered. Files in the cache are not fetched again, and offline=True (or HF_HUB_OFFLINE=1) fetches nothing.
Files are taken by name: the published model_index.json files name a module that diffusers has moved since, so
diffusers itself currently cannot open these folders.
Needs: huggingface_hub, which comes with transformers.

  python -m loading.hub v2                      # fetches v2 for text-to-image and prints where it is
  python -m loading.hub v2-base --parts prior   # one part only
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run this as: python -m loading.hub")

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path

from loading.errors import WeightsError, exit_on_user_error
from loading.files import STEM, find_file, write_atomically

# The revision of each repository: a commit's hash if one is known, "main" where none could be looked up, for
# repositories whose files have not changed since 2023. --revision overrides.
REVISIONS = {
    "warp-ai/wuerstchen":                        "c3da41406ddd4d9c48c49aa93981a82354351b83",
    "warp-ai/wuerstchen-prior":                  "main",
    "warp-ai/wuerstchen-prior-model-base":       "3f9205c8c2e7cf103192954fe6f096e66f9d4efc",
    "warp-ai/wuerstchen-prior-model-finetuned":  "main",
    "warp-ai/EfficientNetEncoder":               "main",
    "dome272/wuerstchen":                        "6eb6cf5494fa67472afdbcfd78a31dcb091b0c05",
    "dome272/wuerstchen (v1)":                   "c9a8af033966c756941168f2a537595a15e0c1a8",   # main once lacked v1's
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
# v1 as the authors published it. Its only text encoder, CLIP H, is the one of v2's Stage B.
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
# The image encoder has a repository of its own, 80 MB. It is also part of the authors' decoder file of 6 GB.
IMAGE_ENCODER = ("warp-ai/EfficientNetEncoder", "", STEM)
IMAGE_ENCODER_INSIDE = ("dome272/wuerstchen", "model_v2_stage_b.pt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# The parts that a task needs.
TEXT_TO_IMAGE = tuple(V2)
RECONSTRUCTION = ("image_encoder", "decoder", "text_encoder", "tokenizer", "vqgan")     # encodes and decodes an image


def revision_of(repo: str, override: str | None, weights: str = "v2") -> str:
    """Its revision in REVISIONS, unless the override, "NAME" for all repositories or "REPO=NAME" for one, applies."""
    which, _, name = (override or "").rpartition("=")
    return name if name and which in ("", repo) else REVISIONS.get(f"{repo} ({weights})", REVISIONS[repo])


def choices(folder: str, stem: str | None, half: bool) -> list[list[str]]:
    """The files of one part in its repository: of each inner list, the first that exists is fetched."""
    def inside(name: str) -> str:
        return f"{folder}/{name}" if folder else name
    if stem is None:
        return [[inside(name)] for name in TOKENIZER_FILES]
    if stem == "":
        return [[folder]]
    names = [f"{stem}{half_mark}{suffix}" for suffix in (".safetensors", ".bin")
             for half_mark in ((".fp16", "") if half else ("", ".fp16"))]
    if stem == "model":                      # transformers names its pickles differently
        names = [name.replace("model", "pytorch_model") if name.endswith(".bin") else name for name in names]
    return [[inside("config.json")], [inside(name) for name in names]]


def fetch(name: str, parts: tuple[str, ...] = TEXT_TO_IMAGE, half: bool = False, offline: bool = False,
          revision: str | None = None) -> dict[str, Path]:
    """The parts of the weights called `name`, from the cache or the hub -> part: its folder in the cache.

    parts: names of V2, or "image_encoder". half: prefer weight files in float16. revision: overrides REVISIONS, see
    revision_of. Raises WeightsError, in one line, for everything that goes wrong.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    sources = {part: NAMES[name][part] for part in parts if part in NAMES[name]}
    wanted = {}                                                     # repository -> the lists of choices()
    for repo, folder, stem in sources.values():
        wanted.setdefault(repo, []).extend(choices(folder, stem, half))
    chosen = {repo: choose(repo, revision_of(repo, revision, name), files, offline) for repo, files in wanted.items()}
    extracted = own_cache() / "image_encoder"
    extract = False
    if "image_encoder" in parts and "image_encoder" not in sources and not (extracted / "config.json").is_file():
        repo, folder, stem = IMAGE_ENCODER
        try:
            chosen[repo] = choose(repo, revision_of(repo, revision), choices(folder, stem, half=False), offline)
            sources["image_encoder"] = IMAGE_ENCODER
        except WeightsError:                 # not on the hub, or not in the cache: then out of the big file
            extract, (repo, file) = True, IMAGE_ENCODER_INSIDE
            chosen[repo] = choose(repo, revision_of(repo, revision), [[file]], offline)
    new = [size for files in chosen.values() for size in files.values()]
    if any(new):
        print(f"Fetching {sum(size > 0 for size in new)} files, {sum(new) / 1e9:.2f} GB, into {cache_folder()}",
              file=sys.stderr)
    snapshots = {repo: download(repo, revision_of(repo, revision, name), files) for repo, files in chosen.items()}
    if extract:
        from loading.weights import extract_image_encoder
        repo, file = IMAGE_ENCODER_INSIDE
        extract_image_encoder(snapshots[repo] / file, extracted)
        print(f"The image encoder is now in {extracted}; {snapshots[repo] / file} is no longer needed",
              file=sys.stderr)
    found = {part: snapshots[repo] / folder for part, (repo, folder, _) in sources.items()}
    return {"image_encoder": extracted} | found if "image_encoder" in parts else found


def choose(repo: str, revision: str, files: list[list[str]], offline: bool) -> dict[str, int]:
    """-> {file: bytes still to be fetched, 0 if it is in the cache}: of each inner list, the first that exists."""
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
            raise WeightsError(f"{repo}: {options[0]} is not in the cache {cache_folder()}, and --offline fetches "
                               f"nothing: run once without it" if offline
                               else f"{repo} at revision {revision} holds no {options[0]}")
    return chosen


def download(repo: str, revision: str, files: dict[str, int]) -> Path:
    """Fetches what is not in the cache -> the folder in it. A broken download resumes where it stopped."""
    from huggingface_hub import hf_hub_download
    with hub_errors(repo, revision):
        for name, new in files.items():
            path = hf_hub_download(repo, name, revision=revision, local_files_only=new == 0)
    return Path(path).parents[name.count("/")]


@contextlib.contextmanager
def hub_errors(repo: str, revision: str):
    """For calls of huggingface_hub: turns its many exceptions into a WeightsError that says what to do."""
    from huggingface_hub import constants, errors
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if isinstance(error, errors.GatedRepoError):
            message = (f"{repo} asks for its terms to be accepted: do so on {constants.ENDPOINT}/{repo}, "
                       f"then run `hf auth login`")
        elif isinstance(error, errors.RepositoryNotFoundError):
            message = (f"{constants.ENDPOINT} has no {repo}, or shows it only to its members: "
                       f"check HF_ENDPOINT, or run `hf auth login`")
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"{repo} has no revision {revision!r}: choose another with --revision, main is the newest"
        elif isinstance(error, errors.RemoteEntryNotFoundError):
            message = f"{repo} at revision {revision} lost a file while it was being fetched: {reason}"
        elif isinstance(error, errors.HfHubHTTPError):
            message = f"{constants.ENDPOINT} answered with an error: {reason}"
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = f"the disk is full: make room in {cache_folder()}, or set HF_HOME to another disk"
        else:                                # no network: the exception's class changes with the HTTP library
            message = (f"{constants.ENDPOINT} cannot be reached ({reason}): check the network. "
                       f"With --offline, weights in the cache can be used")
        raise WeightsError(message) from error


def hashes(paths: dict[str, Path | None]) -> dict[str, str]:
    """part -> sha256 of its weight file, to record what an image was made with. In the hub's cache it is the file's
    name; for other files it is computed, and remembered for large ones."""
    memory_file, result = own_cache() / "hashes.json", {}
    try:
        memory = json.loads(memory_file.read_text())
    except (OSError, ValueError):
        memory = {}
    for part in ("prior", "decoder", "vqgan", "image_encoder", "prior_text_encoder", "text_encoder"):
        if paths.get(part) is None:
            continue
        path = find_file(paths[part], (STEM, "model", "pytorch_model")).resolve()    # the cache links to hashed names
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


def own_cache() -> Path:
    """For files that we make of fetched weights, next to the hub's own cache."""
    from huggingface_hub import constants
    return Path(constants.HF_HOME) / "wuerstchen"


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m loading.hub", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=sorted(NAMES), help="which weights")
    p.add_argument("--parts", nargs="+", choices=[*V2, "image_encoder"], default=list(TEXT_TO_IMAGE),
                   help="default: all that text-to-image needs")
    p.add_argument("--half", action="store_true", help="weights in float16 where they are offered")
    p.add_argument("--offline", action="store_true", help="look only in the cache")
    p.add_argument("--revision",
                   help="branch, tag or commit instead of the tested ones; REPO=NAME for one repository")
    args = p.parse_args()
    for part, path in fetch(args.name, tuple(args.parts), args.half, args.offline, args.revision).items():
        print(f"{part:20}{path}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
