"""Fetches the parts of a pipeline from the Hugging Face hub.

  fetch("v2", parts) -> {part: its folder or file in the hub's cache (HF_HOME)}

Text-to-image needs seven parts of two repositories; encoding an image needs only the image encoder. For each part,
only the configuration and one weight file are fetched: .safetensors rather than .bin, and float16 if it is requested
and exists. Files in the cache are not fetched again. offline=True (or HF_HUB_OFFLINE=1) fetches nothing.
We fetch files by their names and ignore the published model_index.json files. They contain the old name of a module
that diffusers has moved, so diffusers itself currently cannot open the folders.
Other repositories are written hub:OWNER/NAME or hub:OWNER/NAME@REVISION/FOLDER, see Repository.
Note: the cache is huggingface_hub's, which other programs share. But we download files ourselves (fetch_file), because
huggingface_hub restarts an interrupted download from the beginning in a new process, and compares no checksum.
Needs: huggingface_hub, which comes with transformers.

  python -m loading.hub v2                      # fetches v2 for text-to-image and prints where it is
  python -m loading.hub v2-base --parts prior   # one part only
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python loading/hub.py` finds our modules

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from loading.errors import WeightsError, exit_on_user_error, printable, tell
from loading.files import STEM, TOKENIZER_FILES, find_file, parsed, pick_weights, read_json, shards, write_atomically
from loading.options import Parser

# {repository: revision to fetch}: a commit's hash, or "main" if we could not look up the hash. main gives the same
# files, because they have not changed since 2023. --revision overrides these revisions.
REVISIONS = {
    "warp-ai/wuerstchen":                        "c3da41406ddd4d9c48c49aa93981a82354351b83",
    "warp-ai/wuerstchen-prior":                  "main",
    "warp-ai/wuerstchen-prior-model-base":       "3f9205c8c2e7cf103192954fe6f096e66f9d4efc",
    "warp-ai/wuerstchen-prior-model-finetuned":  "main",
    "warp-ai/EfficientNetEncoder":               "main",
    "dome272/wuerstchen":                        "6eb6cf5494fa67472afdbcfd78a31dcb091b0c05",
    # A commit that contains v1's files; other commits of this repository may lack them.
    "dome272/wuerstchen (v1)":                   "c9a8af033966c756941168f2a537595a15e0c1a8",
}

# {part: (repository, folder or file in it)}. The folder "" is the top folder of the repository.
V2 = {
    "prior":               ("warp-ai/wuerstchen-prior", "prior"),
    "prior_text_encoder":  ("warp-ai/wuerstchen-prior", "text_encoder"),                     # CLIP bigG
    "prior_tokenizer":     ("warp-ai/wuerstchen-prior", "tokenizer"),
    "decoder":             ("warp-ai/wuerstchen", "decoder"),
    "text_encoder":        ("warp-ai/wuerstchen", "text_encoder"),                           # CLIP H
    "tokenizer":           ("warp-ai/wuerstchen", "tokenizer"),
    "vqgan":               ("warp-ai/wuerstchen", "vqgan"),
}
# v1 as the authors published it. Its Stages C and B use the same text encoder, CLIP H, which is that of v2's Stage B.
V1 = {part: V2[part.removeprefix("prior_")] for part in V2} | {
    "prior":               ("dome272/wuerstchen", "model_stage_c_ema.pt"),
    "decoder":             ("dome272/wuerstchen", "model_stage_b.pt"),
    "vqgan":               ("dome272/wuerstchen", "vqgan_f4_v1_500k.pt"),
    "image_encoder":       ("dome272/wuerstchen", "model_stage_b.pt"),
}
NAMES = {
    "v1":           V1,                                      # for images of 512 px
    "v2":           V2,                                      # mean of v2-base and v2-aesthetic: best for most prompts
    "v2-base":      V2 | {"prior": ("warp-ai/wuerstchen-prior-model-base", "")},             # for fine-tuning
    "v2-aesthetic": V2 | {"prior": ("warp-ai/wuerstchen-prior-model-finetuned", "")},       # only for images of 1024 px
}
NAMES["v2-interpolated"] = NAMES["v2"]
# {repository: name of its weights, a key of NAMES}
OFFICIAL = {"warp-ai/wuerstchen": "v2", "warp-ai/wuerstchen-prior": "v2",
            "warp-ai/wuerstchen-prior-model-base": "v2-base",
            "warp-ai/wuerstchen-prior-model-finetuned": "v2-aesthetic"}
# The image encoder is fetched from its own repository (80 MB), or else extracted from a decoder file (6 GB).
IMAGE_ENCODER = ("warp-ai/EfficientNetEncoder", "")
IMAGE_ENCODER_INSIDE = ("dome272/wuerstchen", "model_v2_stage_b.pt")
# The files to read in a folder of weights, in addition to the weights.
SMALL_FILES = ("config.json", "scheduler_config.json", "words.json", *TOKENIZER_FILES)
# Names of LoRA files to look for in a folder, in this order: those of our own training, of peft, of diffusers.
LORA_FILES = ("lora.safetensors", *(f"{stem}{suffix}" for stem in ("adapter_model", "pytorch_lora_weights")
                                    for suffix in (".safetensors", ".bin")))
REFERENCE = re.compile(r"hub:([\w-][\w.-]*/[\w-][\w.-]*)(?:@(refs/\w+/\w+|[^/@]+))?(?:/(.*?))?/?")
# What is unsafe in file names: control characters, lone surrogates, and a Windows drive at the start.
UNSAFE = re.compile("[\\0-\\x1f\\x7f-\\x9f\\ud800-\\udfff]|^[A-Za-z]:")
NOT_CACHED = "is not in the cache {}, and --offline fetches nothing: run once without it"
WAITS = (1, 3, 9)                        # seconds to wait before each of three retries if the hub is busy
HASHES: dict[str, str] = {}              # {"PATH SIZE TIME" of a file: sha256}, filled by hash_of
LONGEST_WAIT = 300                       # seconds without a received byte until a request fails, see limit_waits
LONGEST_LIST = (2 ** 24, 60)             # most bytes and seconds for the hub's list of a repository's files
TEXT_TO_IMAGE = tuple(V2)                # the parts that text-to-image needs
RECONSTRUCTION = ("image_encoder", "decoder", "text_encoder", "tokenizer", "vqgan")     # to encode and decode images


def revision_of(repo: str, override: str | None, weights: str = "v2") -> str:
    """Returns the revision of a repository: the one in `override`, else the one in REVISIONS, else "main".
    override: "NAME" for all repositories, "REPO=NAME" for one, or None. weights: one of NAMES; v1 has its own entry."""
    which, _, name = (override or "").rpartition("=")
    return name if name and which in ("", repo) else REVISIONS.get(f"{repo} ({weights})", REVISIONS.get(repo, "main"))


def fetch(name: str, parts: tuple[str, ...] = TEXT_TO_IMAGE, half: bool = False, offline: bool = False,
          revision: str | None = None) -> dict[str, Path]:
    """Fetches parts of the weights `name`, a key of NAMES. Returns {part: its folder or file in the cache}.

    parts: keys of V2, or "image_encoder". half: prefer weight files in float16. revision: overrides REVISIONS, see
    revision_of. Raises WeightsError, in one line, for any problem.
    """
    sources, chosen = {part: NAMES[name][part] for part in parts if part in NAMES[name]}, {}
    opened = functools.cache(lambda repo: Repository(f"hub:{repo}", offline, revision_of(repo, revision, name)))

    def choose(repo: str, path: str, half: bool) -> None:
        names = opened(repo).files_of(path, half)
        if not any(file.endswith((".safetensors", ".bin", ".pt", "tokenizer.json", "vocab.json")) for file in names):
            raise WeightsError(f"{repo}: {path or STEM} {NOT_CACHED.format(cache_folder())}" if is_offline(offline)
                               else f"{repo} at revision {opened(repo).revision} holds no {path or STEM}")
        chosen.setdefault(repo, {}).update({file: opened(repo).files[file] for file in names})
    for repo, path in sources.values():
        choose(repo, path, half)
    extracted, extract = own_cache() / "image_encoder", False
    if "image_encoder" in parts and "image_encoder" not in sources and not (extracted / "config.json").is_file():
        try:
            choose(*IMAGE_ENCODER, half=False)
            sources["image_encoder"] = IMAGE_ENCODER
        except WeightsError:                 # no encoder's repository: extract the encoder from the decoder's file
            extract = True
            choose(*IMAGE_ENCODER_INSIDE, half=False)
    announce([file for files in chosen.values() for file in files.values()])
    snapshots = {repo: download(repo, opened(repo).revision, files) for repo, files in chosen.items()}
    if extract:
        from loading.weights import extract_image_encoder
        repo, file = IMAGE_ENCODER_INSIDE
        extract_image_encoder(snapshots[repo] / file, extracted)
        tell(f"The image encoder is now in {extracted}; {snapshots[repo] / file} is no longer needed")
    found = {part: snapshots[repo] / path for part, (repo, path) in sources.items()}
    return {"image_encoder": extracted} | found if "image_encoder" in parts else found


# ----- files of a repository ------------------------------------------------------------------------------------------

class File(NamedTuple):
    """A file in a repository's list of files. cached: whether it is on disk. size, digest: None if not in the list."""
    commit: str
    cached: bool
    size: int | None = None          # bytes
    digest: str | None = None        # sha256; for small files, git's blob sha1


def announce(files: list[File]) -> None:
    if new := [file.size or 0 for file in files if not file.cached]:
        tell(f"Fetching {len(new)} files, {sum(new) / 1e9:.2f} GB, into {cache_folder()}")


def is_offline(offline: bool) -> bool:
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_safe(name: str) -> bool:
    """Returns whether a relative path from an untrusted source, such as a/b.json, stays in its folder on any system."""
    return not (UNSAFE.search(name) or {"", ".", ".."} & set(re.split(r"[/\\]", name)))


def list_files(repo: str, revision: str, offline: bool) -> dict[str, File]:
    """Returns {name: File} of a repository's files on the hub or, if offline, in the cache. Omits files whose names,
    such as ../x, lead out of the cache, so that they are never fetched. Raises WeightsError if `revision` is not a
    valid name or the hub gives no usable list."""
    if not is_safe(revision):
        raise WeightsError(f"{revision!r} is not a revision of {repo}: expected a branch, tag or commit, such as main")
    snapshots, ref = repo_cache(repo) / "snapshots", repo_cache(repo) / "refs" / revision
    if is_offline(offline):
        commit = ref.read_text().strip() if ref.is_file() else revision
        paths = [path.relative_to(snapshots / commit) for path in (snapshots / commit).rglob("*") if path.is_file()]
        return {path.as_posix(): File(commit, True) for path in paths}
    info, files = ask_for_list(repo, revision), {}
    try:
        commit = re.fullmatch("[0-9a-f]{40}", info["sha"])[0]
        for entry in info["siblings"]:
            if is_safe(name := entry["rfilename"]):
                large = entry.get("lfs") or {}
                size, digest = large.get("size", entry.get("size")), large.get("sha256", entry.get("blobId"))
                files[name] = File(commit, os.path.isfile(snapshots / commit / name),
                                   size if type(size) is int and 0 <= size < 2 ** 63 else None,
                                   digest if isinstance(digest, str) else None)
    except (TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{repo}: the hub's list of files cannot be used: expected a commit and files with names; "
                           "check HF_ENDPOINT") from error
    with contextlib.suppress(OSError, ValueError):    # store the commit for offline=True, unless the cache is read-only
        if revision != commit and (not ref.is_file() or ref.read_text() != commit):
            write_atomically(ref, lambda temporary: temporary.write_text(commit))
    return files


def ask_for_list(repo: str, revision: str):
    """Returns the hub's list of a repository's files, as parsed JSON. Raises WeightsError if absent or endless."""
    from huggingface_hub import constants
    (most, seconds), path = LONGEST_LIST, f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"

    def ask() -> bytes:
        text, end = bytearray(), time.monotonic() + seconds
        with request(path, constants.HF_HUB_ETAG_TIMEOUT) as response:
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > most or time.monotonic() > end:
                    raise WeightsError(f"{repo}: the hub's list of files does not end: expected at most "
                                       f"{most // 2 ** 20} MB in {seconds} s; check HF_ENDPOINT")
        return bytes(text)
    with hub_errors(repo, revision):
        text = patiently(ask)
    try:
        return parsed(text)
    except ValueError:
        raise WeightsError(f"{constants.ENDPOINT} did not answer with a list of the files of {repo}, but with "
                           f"{text[:40]!r}: check HF_ENDPOINT, and whether this network asks for a login") from None


@contextlib.contextmanager
def request(path: str, timeout: float, **headers: str):
    """Context manager that sends a GET request to the hub and yields the response before its body is read. Raises
    huggingface_hub's errors. The library's own calls are not used, because they wait for a body without limit."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
    with get_session().stream("GET", constants.ENDPOINT + path, headers=build_hf_headers() | headers, timeout=timeout,
                              follow_redirects=True) as response:
        if response.status_code >= 400:          # the body may be huge, so raise the error of a copy without a body
            hf_raise_for_status(type(response)(response.status_code, headers=response.headers,
                                               request=response.request))
        yield response


def patiently(call: Callable, progress: Callable[[], int] | None = None):
    """Returns the result of call(). If the hub is busy or the connection breaks, waits and tries again, see WAITS.

    progress: for downloads that resume, a function that returns the number of bytes fetched so far. If this number has
    changed since the last failure, all retries are available again."""
    before, waits = None, list(WAITS)
    while True:
        try:
            return call()
        except Exception as error:  # compared by name, because huggingface_hub's versions use different HTTP libraries
            status, kind = getattr(getattr(error, "response", None), "status_code", None), type(error).__name__
            if not (status in (408, 429, 500, 502, 503, 504) or "Timeout" in kind or kind in (
                    "ReadError", "RemoteProtocolError", "EOFError", *["ConnectError"] * bool(progress))):
                raise
            if progress and progress() != before:
                before, waits = progress(), list(WAITS)
            if not waits:
                raise
            tell(f"{first_line(error)}: trying again in {waits[0]} s")
            time.sleep(waits.pop(0))


def download(repo: str, revision: str, files: dict[str, File]) -> Path:
    """Fetches the files of one commit that are not in the cache. Returns the commit's folder in the cache."""
    with hub_errors(repo, revision):
        for name, file in files.items():
            folder = repo_cache(repo) / "snapshots" / file.commit
            if not (folder / name).is_file():
                fetch_file(repo, name, file)
    return folder


def fetch_file(repo: str, name: str, file: File) -> None:
    """Fetches one file and stores it like huggingface_hub: in blobs/DIGEST, with a link to it in snapshots/.

    An interrupted download can resume in another process, because the name of the partial file depends only on the
    digest. The complete file is compared with the digest before it gets its final name."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.utils import WeakFileLock
    path = f"/{repo}/resolve/{file.commit}/{quote(name)}"
    if file.size is None or file.digest is None:
        head = patiently(lambda: get_hf_file_metadata(constants.ENDPOINT + path, timeout=constants.HF_HUB_ETAG_TIMEOUT))
        file = file._replace(size=head.size, digest=head.etag)
    if file.size is None or file.size < 0 or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest or ""):
        raise WeightsError(f"{repo}: {name} is not fetched, because the hub gives no size and checksum to compare it "
                           f"with: found {file.digest!r:.80}; check HF_ENDPOINT")
    cache = repo_cache(repo)
    blob, pointer, locks = cache / "blobs" / file.digest, cache / "snapshots" / file.commit / name, \
        cache.parent / ".locks" / cache.name
    partial = blob.with_name(f"{file.digest}.incomplete")
    for folder in (blob.parent, pointer.parent, locks):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(blob.parent, locks, keep=partial)
    with WeakFileLock(locks / f"{file.digest}.lock"):        # huggingface_hub's lock: one process fetches, others wait
        if pointer.is_file():
            return
        content = blob if blob.is_file() else partial        # the blob may be there from another commit or program
        try:
            if content is partial:
                if file.size - size_of(partial) > shutil.disk_usage(blob.parent).free:
                    raise OSError(errno.ENOSPC, "known before it is fetched")
                patiently(lambda: resume(path, partial, file, name), lambda: size_of(partial))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise WeightsError(f"the disk is full: {name} needs {file.size / 1e9:.3f} GB, of which "
                               f"{size_of(partial) / 1e9:.3f} GB are there and are kept: make room in "
                               f"{cache_folder()}, or set HF_HOME to another disk, and run this again") from error
        check_digest(content, file, f"{repo}: {name}")
        os.replace(content, blob)
        pointer.unlink(missing_ok=True)                      # pointer may be a broken link
        try:
            os.symlink(os.path.relpath(blob, pointer.parent), pointer)
        except OSError:                                      # without links in the file system, move the file itself
            os.replace(blob, pointer)
        hash_of(pointer, file.digest)


def resume(path: str, partial: Path, file: File, name: str) -> None:
    """Fetches the rest of a file from `path`, on the hub, and appends it to `partial`, which never gets more than
    file.size bytes. name: for the progress bar."""
    from huggingface_hub import constants
    from huggingface_hub.utils import tqdm
    start = size_of(partial)
    if start == file.size and partial.exists():
        return
    wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if 0 < start < file.size else {})
    with request(path, constants.HF_HUB_DOWNLOAD_TIMEOUT, **wanted) as response:
        start *= response.status_code == 206                 # unless the status is 206, the server sends the whole file
        with open(partial, "ab" if start else "wb") as out, tqdm(
                total=file.size, initial=start, unit="B", unit_scale=True, desc=name[-40:]) as bar:
            for chunk in response.iter_bytes():
                out.write(chunk[:file.size - out.tell()])
                out.flush()                                  # so that a killed process loses no data
                bar.update(len(chunk))
                if out.tell() == file.size:
                    return
    if size_of(partial) < file.size:
        raise EOFError(f"{name} ended after {size_of(partial)} of {file.size} bytes")


def check_digest(path: Path, file: File, label: str) -> None:
    """Removes a file and raises WeightsError, unless its content matches file.digest. label: its name for the error."""
    def git_sha1():
        return hashlib.sha1(f"blob {file.size}\0".encode())
    with open(path, "rb") as content:
        found = hashlib.file_digest(content, "sha256" if len(file.digest) == 64 else git_sha1).hexdigest()
        content.seek(0)
        page = content.read(100).lstrip()[:1] == b"<"
        os.fsync(content.fileno())               # the content must be on the disk before the file is renamed
    if found != file.digest:
        path.unlink()
        raise WeightsError(f"{label} was damaged on the way{' or is a web page' * page}: expected the checksum "
                           f"{file.digest}, found {found}; it was removed, run this again to fetch it again")


def sweep(blobs: Path, locks: Path, keep: Path) -> None:
    """Removes partial files of killed downloads: ours after a week, and those of huggingface_hub, which cannot be
    resumed (DIGEST.NUMBER.incomplete), after an hour. Keeps `keep`, and newer or locked files, which may be in use."""
    from huggingface_hub.utils import WeakFileLock
    for path in blobs.glob("*.incomplete"):
        digest, *number, _ = path.name.split(".")
        with contextlib.suppress(OSError):       # if the file is locked or already removed
            if path != keep and time.time() - path.stat().st_mtime > (3600 if number else 7 * 24 * 3600):
                with WeakFileLock(locks / f"{digest}.lock", timeout=0.1):
                    path.unlink()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ----- anyone's repositories -----------------------------------------------------------------------------------------

def is_reference(name) -> bool:
    """Returns whether `name`, of weights, a part or a LoRA, begins with hub:, as in hub:OWNER/NAME."""
    return str(name).startswith("hub:")


def hint(name) -> str:
    """Returns advice for the error "there is no such file" if the name looks like a repository's, else ""."""
    return f"; a repository of the Hugging Face hub is written hub:{name}" if re.fullmatch(
        r"[\w-][\w.-]*/[\w.-]+", str(name)) and Path(name).suffix not in (".safetensors", ".bin", ".pt") else ""


class Repository:
    """A repository of the hub, or a folder or file in it: hub:OWNER/NAME, then optionally @REVISION and /PATH. The
    constructor only lists the files. The method `fetch` fetches files into the hub's cache.

    names: paths, relative to the folder, of all files in it; for a file, in the file's folder. Raises WeightsError if
    there are no files."""
    def __init__(self, reference: str | Path, offline: bool = False, revision: str | None = None):
        match = REFERENCE.fullmatch(str(reference))
        if match is None or not is_safe(match[3] or "x") or re.search(r"--|\.\.", match[1]):
            raise WeightsError(f"{reference} does not name a repository of the hub: expected hub:OWNER/NAME, "
                               "hub:OWNER/NAME@REVISION, or one of them with /FOLDER or /FILE")
        self.reference, self.repo, self.path = str(reference), match[1], match[3] or ""
        self.revision = match[2] or revision_of(self.repo, revision)
        self.files = list_files(self.repo, self.revision, offline)
        self.is_file = self.path in self.files
        self.folder = self.path.rpartition("/")[0] if self.is_file else self.path   # self.names are relative to it
        self.start = f"{self.folder}/" if self.folder else ""
        self.names = [name.removeprefix(self.start) for name in self.files if name.startswith(self.start)]
        if not self.files and is_offline(offline):
            raise WeightsError(f"{reference} {NOT_CACHED.format(cache_folder())}")
        if not self.names:
            raise WeightsError(f"{self.repo} at revision {self.revision} holds no {self.path or 'files'}: "
                               f"found {some(self.files)}")

    def folders(self) -> set[str]:
        return {str(parent) for name in self.names for parent in Path(name).parents} - {"."}

    def files_of(self, place: str, half: bool = False) -> list[str]:
        """Returns names of files to fetch for a part. place: its folder or its weight file. half: prefer float16."""
        folder, _, file = place.rpartition("/") if place in self.names else (place, "", "")
        start = f"{folder}/" if folder else ""
        inside = [name.removeprefix(start) for name in self.names
                  if name.startswith(start) and "/" not in name.removeprefix(start)]
        best = file or pick_weights(inside, (STEM, "model", "pytorch_model"), half)
        small = ("config.json", "adapter_config.json") if file else SMALL_FILES
        return [start + name for name in inside if name == best or name in small]

    def fetch(self, names: list[str]) -> Path:
        """Fetches the files `names`, and the shards if one is an index of shards. Returns the folder in the cache."""
        files = [self.start + name for name in dict.fromkeys(names)]
        if not files:
            raise WeightsError(f"{self.reference} holds nothing that is needed: found {some(self.names)}")
        if indexes := [file for file in files if ".index." in file]:
            snapshot = download(self.repo, self.revision, {file: self.files[file] for file in indexes})
            for index in indexes:
                others = [f"{index.rpartition('/')[0]}/{name}".lstrip("/") for name in shards(snapshot / index)]
                if missing := [name for name in others if name not in self.files]:
                    raise WeightsError(f"{self.reference}: {index} names files that are missing: {', '.join(missing)}")
                files += others
        announce([self.files[file] for file in files if file not in indexes])
        return download(self.repo, self.revision, {file: self.files[file] for file in files}) / self.folder


def fetch_part(reference: str | Path, folders: Iterable[str], more: Iterable[str] = (), half: bool = False,
               offline: bool = False, revision: str | None = None) -> Path:
    """Fetches a part from any repository. Returns its path in the cache: a file if `reference` names one, or a folder.

    folders: where the part may be; the first folder with a config.json is used. more: folders to fetch in addition.
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
    """Fetches the LoRA file of a repository. Returns its path in the cache. Returns a local path unchanged."""
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

def limit_waits() -> None:
    """Limits how long huggingface_hub waits for answers, also for other packages. By default, it waits forever."""
    from huggingface_hub import get_session
    get_session().timeout = LONGEST_WAIT


@contextlib.contextmanager
def hub_errors(repo: str, revision: str, what: str = "read"):
    """Context manager that turns exceptions of huggingface_hub into a WeightsError that says what to do.
    what: "read" or "write", for the message."""
    from huggingface_hub import constants, errors
    limit_waits()
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason = first_line(error)
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
            refused = getattr(error.response, "status_code", 500) in (401, 403)
            advice = f"run `hf auth login` with a token that may {what} {repo}" if refused else "try again later"
            message = f"{constants.ENDPOINT} answered with an error: {reason}; {advice}"
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = f"the disk is full: make room in {cache_folder()}, or set HF_HOME to another disk"
        elif isinstance(error, OSError) and error.filename is not None:
            message = f"the cache cannot be used: {reason}; make it writable, or set HF_HOME to another folder"
        else:      # all other errors count as network errors, which cannot be listed: each HTTP library has its own
            message = f"{constants.ENDPOINT} cannot be reached ({reason}): check the network" + (
                ". With --offline, weights in the cache can be used" if what == "read" else "")
        raise WeightsError(message) from error


def first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0][:200]) or type(error).__name__


def hashes(paths: dict[str, Path | None]) -> dict[str, str]:
    """Returns {part: digest} of the weights in `paths`, to record which weights generated an image."""
    parts = ("prior", "decoder", "vqgan", "image_encoder", "prior_text_encoder", "text_encoder")
    found = {part: digest(paths[part]) for part in parts if paths.get(part) is not None}
    return {part: value for part, value in found.items() if value}       # digest() of a part not fetched yet is None


def digest(path: str | Path) -> str | None:
    """Returns the sha256 of a file or a folder's weight file; for shards, of their joined hashes; None if missing."""
    try:
        file = find_file(path, (STEM, "model", "pytorch_model"))
        several = [hash_of(file.parent / name) for name in shards(file)] if file.suffix == ".json" else []
        return hashlib.sha256("".join(several).encode()).hexdigest() if several else hash_of(file)
    except WeightsError:
        return None


def hash_of(path: Path, known: str = "") -> str:
    """Returns the sha256 of a file. Stores that of files of over 100 MB on disk, to compute it only once. known: the
    sha256 if it was just checked. Hashes in file names of the hub's cache are not trusted, so they are not used."""
    path, memory_file = path.resolve(), own_cache() / "hashes.json"
    state = path.stat()
    key = f"{path} {state.st_size} {state.st_mtime_ns}"
    if key not in HASHES:
        with contextlib.suppress(WeightsError):
            HASHES.update(read_json(memory_file))
    if not re.fullmatch("[0-9a-f]{64}", str(HASHES.get(key))):
        if len(known) != 64:
            with open(path, "rb") as file:
                known = hashlib.file_digest(file, "sha256").hexdigest()
        HASHES[key] = known
        if state.st_size > 100e6:
            with contextlib.suppress(OSError):
                write_atomically(memory_file, lambda temporary: temporary.write_text(json.dumps(HASHES)))
    return HASHES[key]


def repo_cache(repo: str) -> Path:
    return Path(cache_folder()) / f"models--{repo.replace('/', '--')}"


def cache_folder() -> str:
    from huggingface_hub import constants
    return constants.HF_HUB_CACHE


def own_cache() -> Path:
    """Returns the folder for files that we derive from fetched weights, next to the hub's own cache."""
    from huggingface_hub import constants
    return Path(constants.HF_HOME) / "wuerstchen"


def main() -> None:
    p = Parser(__doc__, prog="python -m loading.hub")
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
