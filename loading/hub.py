"""Fetches the parts of a pipeline from the Hugging Face hub.

  "v2", the parts wanted  -fetch->  part -> its folder or file in the hub's cache (HF_HOME)

Text-to-image needs seven parts of two repositories; encoding an image needs only the image encoder. Of each part
only the configuration and one weight file are fetched: .safetensors before .bin, half precision if it is wanted and
offered. Files in the cache are not fetched again, and offline=True (or HF_HUB_OFFLINE=1) fetches nothing.
Files are taken by name: the published model_index.json files name a module that diffusers has moved since, so
diffusers itself currently cannot open these folders.
Anyone's repository is hub:OWNER/NAME, a revision and a place in it hub:OWNER/NAME@REVISION/FOLDER, see Repository.
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
from collections.abc import Iterable
from pathlib import Path

from loading.errors import WeightsError, exit_on_user_error
from loading.files import STEM, find_file, pick_weights, shards, write_atomically

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
# Repositories that hold one of these.
OFFICIAL = {"warp-ai/wuerstchen": "v2", "warp-ai/wuerstchen-prior": "v2",
            "warp-ai/wuerstchen-prior-model-base": "v2-base",
            "warp-ai/wuerstchen-prior-model-finetuned": "v2-aesthetic"}
# The image encoder has a repository of its own, 80 MB. It is also part of the authors' decoder file of 6 GB.
IMAGE_ENCODER = ("warp-ai/EfficientNetEncoder", "", STEM)
IMAGE_ENCODER_INSIDE = ("dome272/wuerstchen", "model_v2_stage_b.pt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# What else is read in a folder with weights.
SMALL_FILES = ("config.json", "scheduler_config.json", "words.json", *TOKENIZER_FILES)
# LoRAs in a folder: our own runs' file, peft's, diffusers'; .safetensors rather than .bin.
LORA_FILES = ("lora.safetensors", *(f"{stem}{suffix}" for stem in ("adapter_model", "pytorch_lora_weights")
                                    for suffix in (".safetensors", ".bin")))
REFERENCE = re.compile(r"hub:([\w-][\w.-]*/[\w-][\w.-]*)(?:@(refs/\w+/\w+|[^/@]+))?(?:/(.*?))?/?")
# The parts that a task needs.
TEXT_TO_IMAGE = tuple(V2)
RECONSTRUCTION = ("image_encoder", "decoder", "text_encoder", "tokenizer", "vqgan")     # encodes and decodes an image


def revision_of(repo: str, override: str | None, weights: str = "v2") -> str:
    """Its revision in REVISIONS, unless the override, "NAME" for all repositories or "REPO=NAME" for one, applies."""
    which, _, name = (override or "").rpartition("=")
    return name if name and which in ("", repo) else REVISIONS.get(f"{repo} ({weights})", REVISIONS.get(repo, "main"))


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
    announce([size for files in chosen.values() for size in files.values()])
    snapshots = {repo: download(repo, revision_of(repo, revision, name), files) for repo, files in chosen.items()}
    if extract:
        from loading.weights import extract_image_encoder
        repo, file = IMAGE_ENCODER_INSIDE
        extract_image_encoder(snapshots[repo] / file, extracted)
        print(f"The image encoder is now in {extracted}; {snapshots[repo] / file} is no longer needed",
              file=sys.stderr)
    found = {part: snapshots[repo] / folder for part, (repo, folder, _) in sources.items()}
    return {"image_encoder": extracted} | found if "image_encoder" in parts else found


def announce(sizes: list[int]) -> None:
    if any(sizes):
        print(f"Fetching {sum(size > 0 for size in sizes)} files, {sum(sizes) / 1e9:.2f} GB, into {cache_folder()}",
              file=sys.stderr)


def is_offline(offline: bool) -> bool:
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def file_sizes(repo: str, revision: str, offline: bool) -> dict[str, int]:
    """-> {file: bytes still to be fetched, 0 if it is in the cache}. offline: of the files in the cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    if is_offline(offline):
        cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        ref = cache / "refs" / revision
        folder = cache / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
        return {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
    with hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    names = [file.rfilename for file in info.siblings if not {"", ".", ".."} & set(re.split(r"[/\\]", file.rfilename))]
    cached = {name for name in names if isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)}
    return {file.rfilename: 0 if file.rfilename in cached else file.size or 1
            for file in info.siblings if file.rfilename in names}


def choose(repo: str, revision: str, files: list[list[str]], offline: bool) -> dict[str, int]:
    """-> {file: bytes still to be fetched, 0 if it is in the cache}: of each inner list, the first that exists."""
    there = file_sizes(repo, revision, offline)
    chosen = {}
    for options in files:
        name = next((name for name in options if name in there), None)
        if name is not None:
            chosen[name] = there[name]
        elif Path(options[0]).name not in TOKENIZER_FILES:          # of a tokenizer's files, some are enough
            raise WeightsError(f"{repo}: {options[0]} is not in the cache {cache_folder()}, and --offline fetches "
                               f"nothing: run once without it" if is_offline(offline)
                               else f"{repo} at revision {revision} holds no {options[0]}")
    return chosen


def download(repo: str, revision: str, files: dict[str, int]) -> Path:
    """Fetches what is not in the cache -> the folder in it. A broken download resumes where it stopped."""
    from huggingface_hub import hf_hub_download
    with hub_errors(repo, revision):
        for name, new in files.items():
            path = hf_hub_download(repo, name, revision=revision, local_files_only=new == 0)
    return Path(path).parents[name.count("/")]


# ----- anyone's repositories -----------------------------------------------------------------------------------------

def is_reference(name) -> bool:
    """Whether weights, a part or a LoRA are named as hub:OWNER/NAME."""
    return str(name).startswith("hub:")


def hint(name) -> str:
    """What to add to "there is no such file" if it looks like a repository."""
    return f"; a repository of the Hugging Face hub is written hub:{name}" if re.fullmatch(
        r"[\w-][\w.-]*/[\w.-]+", str(name)) and Path(name).suffix not in (".safetensors", ".bin", ".pt") else ""


class Repository:
    """hub:OWNER/NAME, a repository, or hub:OWNER/NAME@REVISION/PATH, a folder or file in it. Its files are listed at
    once, and fetched by name: only those that are asked for, into the hub's cache.

    names: its files, from that folder on; of a file, itself. Raises WeightsError, in one line, like everything here.
    """
    def __init__(self, reference: str | Path, offline: bool = False, revision: str | None = None):
        match = REFERENCE.fullmatch(str(reference))
        if match is None or {".", "..", ""} & set((match[3] or "x").split("/")):
            raise WeightsError(f"{reference} does not name a repository of the hub: expected hub:OWNER/NAME, "
                               "hub:OWNER/NAME@REVISION, or one of them with /FOLDER or /FILE")
        self.reference, self.repo, self.path = str(reference), match[1], match[3] or ""
        self.revision = match[2] or revision_of(self.repo, revision)
        self.sizes = file_sizes(self.repo, self.revision, offline)
        self.is_file = self.path in self.sizes
        self.folder = self.path.rpartition("/")[0] if self.is_file else self.path        # its names start there
        start = f"{self.folder}/" if self.folder else ""
        self.names = [name.removeprefix(start) for name in self.sizes if name.startswith(start)]
        if not self.sizes and is_offline(offline):
            raise WeightsError(f"{reference} is not in the cache {cache_folder()}, and --offline fetches nothing: run "
                               "once without it")
        if not self.names:
            raise WeightsError(f"{self.repo} at revision {self.revision} holds no {self.path or 'files'}: "
                               f"found {some(self.sizes)}")

    def folders(self) -> set[str]:
        return {str(parent) for name in self.names for parent in Path(name).parents} - {"."}

    def files_of(self, place: str, half: bool = False) -> list[str]:
        """The files to fetch of a part that is in this folder, or is this file."""
        folder, _, file = place.rpartition("/") if place in self.names else (place, "", "")
        start = f"{folder}/" if folder else ""
        inside = [name.removeprefix(start) for name in self.names
                  if name.startswith(start) and "/" not in name.removeprefix(start)]
        best = file or pick_weights(inside, (STEM, "model", "pytorch_model"), half)
        small = ("config.json", "adapter_config.json") if file else SMALL_FILES
        return [start + name for name in inside if name == best or name in small]

    def fetch(self, names: list[str]) -> Path:
        """Fetches these files -> the folder in the cache that they are in. Of an index, also the files it names."""
        start = f"{self.folder}/" if self.folder else ""
        files = [start + name for name in dict.fromkeys(names)]
        if not files:
            raise WeightsError(f"{self.reference} holds nothing that is needed: found {some(self.names)}")
        if indexes := [file for file in files if ".index." in file]:
            snapshot = download(self.repo, self.revision, {file: self.sizes[file] for file in indexes})
            for index in indexes:
                others = [f"{index.rpartition('/')[0]}/{name}".lstrip("/") for name in shards(snapshot / index)]
                if missing := [name for name in others if name not in self.sizes]:
                    raise WeightsError(f"{self.reference}: {index} names files that are missing: {', '.join(missing)}")
                files += others
        announce([self.sizes[file] for file in files if file not in indexes])
        return download(self.repo, self.revision, {file: self.sizes[file] for file in files}) / self.folder


def fetch_part(reference: str | Path, folders: Iterable[str], more: Iterable[str] = (), half: bool = False,
               offline: bool = False, revision: str | None = None) -> Path:
    """One part of someone's repository -> its folder or file in the cache.

    folders: where it may be, the first with a config.json counts. more: folders of files that belong to it.
    """
    repo = Repository(reference, offline, revision)
    if repo.is_file:
        file = repo.path.rpartition("/")[2]
        return repo.fetch(repo.files_of(file)) / file
    for folder in folders:
        files = repo.files_of(folder, half)
        if f"{folder}/config.json".lstrip("/") in files:
            return repo.fetch(files + [file for other in more for file in repo.files_of(other)]) / folder
    raise WeightsError(f"{reference} holds no part of this kind: expected config.json and weights in "
                       f"{', '.join(folder + '/' if folder else 'the folder itself' for folder in folders)}; "
                       f"found {some(repo.names)}; write hub:OWNER/NAME/PATH for another place")


def fetch_lora(source: str | Path, offline: bool = False, revision: str | None = None) -> Path:
    """The LoRA file of someone's repository, in the cache. A source that is no reference stays what it is."""
    if not is_reference(source):
        if not Path(source).exists() and hint(source):
            raise WeightsError(f"{source}: there is no such file or folder{hint(source)}")
        return Path(source)
    repo = Repository(source, offline, revision)
    found = [name for name in LORA_FILES if name in repo.names][:1] \
        or [name for name in repo.names if "/" not in name and name.endswith(".safetensors")]
    if repo.is_file:
        found = [repo.path.rpartition("/")[2]]
    if len(found) != 1:
        raise WeightsError(f"{source} holds {'several files' if found else 'no file'} that may be a LoRA: expected "
                           f"{', '.join(LORA_FILES)}, or name the file, {source}/FILE; found {some(repo.names)}")
    return repo.fetch(repo.files_of(found[0])) / found[0]


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:12]) + ", ..." * (len(names) > 12) or "nothing"


# ----- errors, hashes, the cache --------------------------------------------------------------------------------------

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
        with contextlib.suppress(WeightsError):          # an image encoder that was not needed yet
            file = find_file(paths[part], (STEM, "model", "pytorch_model"))
            if file.suffix == ".json":                   # of several files
                several = [hash_of(file.parent / name, memory, memory_file) for name in shards(file)]
                result[part] = hashlib.sha256("".join(several).encode()).hexdigest()
            else:
                result[part] = hash_of(file, memory, memory_file)
    return result


def hash_of(path: Path, memory: dict[str, str], memory_file: Path) -> str:
    """The sha256 of a file, for `hashes`."""
    path = path.resolve()                                # the cache links to hashed names
    if re.fullmatch("[0-9a-f]{64}", path.name):
        return path.name
    state = path.stat()
    key = f"{path} {state.st_size} {state.st_mtime_ns}"
    if key not in memory:
        with open(path, "rb") as file:
            memory[key] = hashlib.file_digest(file, "sha256").hexdigest()
        if state.st_size > 100e6:                        # a second or more
            with contextlib.suppress(OSError):
                write_atomically(memory_file, lambda temporary: temporary.write_text(json.dumps(memory)))
    return memory[key]


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
