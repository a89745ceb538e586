"""Fetches weights from a local stand-in for the hub: which files are requested, and the errors of failed downloads.

The stand-in serves the tiny weights under the official names, so the whole way from "v2" to an image is tested.
Every call runs in a process of its own, as huggingface_hub reads its settings once, when it is imported.
"""
import contextlib
import hashlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from loading import hub
from loading.files import pick_weights

ROOT = Path(hub.__file__).parents[1]
TINY = ROOT / "models" / "tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def official_files() -> dict[str, dict[str, bytes]]:
    """repository -> {file: content}, including files nobody needs: pickles, float32 next to float16, an image, ..."""
    def folder(name, inside):
        return {f"{inside}/{path.name}" if inside else path.name: path.read_bytes() for path in (TINY / name).iterdir()
                if path.name != "words.json"}                      # which the released weights do not have
    text = folder("text_encoder", "text_encoder") | folder("tokenizer", "tokenizer")
    unused = {"README.md": b"# hello", "model_index.json": b'{"prior": ["wuerstchen", "WuerstchenPrior"]}',
              "collage.jpg": b"\xff\xd8"}
    prior = folder("prior", "")
    return {
        "warp-ai/wuerstchen-prior": text | folder("prior", "prior") | unused | {
            "prior/diffusion_pytorch_model.bin": b"pickle", "text_encoder/pytorch_model.bin": b"pickle"},
        "warp-ai/wuerstchen": text | folder("decoder", "decoder") | folder("vqgan", "vqgan") | unused,
        "warp-ai/wuerstchen-prior-model-base": prior,
    }


def digest_of(name: str, data: bytes) -> str:
    """The hub keeps weights as large files, by their sha256, and all others in git."""
    large = Path(name).suffix in (".safetensors", ".bin", ".pt")
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry_of(name: str, data: bytes) -> dict:
    """A file in the hub's answer about a repository."""
    digest = digest_of(name, data)
    large = {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}} if len(digest) == 64 else {}
    return {"rfilename": name, "size": len(data), "blobId": "0" * 40 if large else digest} | large


class Hub:
    """A web server that answers like the hub. `asked`: the files whose content was requested, with the first byte.
    fault(handler): may answer instead, and then returns True."""
    def __init__(self, files):
        self.files, self.asked, self.cut, self.status, self.fault = files, [], None, None, None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {"Content_Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                if outer.status:
                    return self.answer(outer.status[0], b"{}", **outer.status[1])
                if outer.fault and outer.fault(self):
                    return None
                # a branch stands for one
                commit = (re.findall(r"/([0-9a-f]{40})(?:/|\?|$)", self.path) or [COMMIT])[0]
                if api := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
                    files = outer.files.get(api[1])
                    if files is None:
                        return self.answer(401, b"{}", X_Error_Code="RepoNotFound",
                                           X_Error_Message="Repository not found")
                    siblings = [entry_of(name, data) for name, data in files.items()]
                    return self.answer(200, json.dumps({"id": api[1], "sha": commit, "siblings": siblings}).encode())
                place = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
                if place is None:
                    return self.answer(404)
                data = outer.files[place[1]][place[2]]
                headers = dict(X_Repo_Commit=commit, ETag=f'"{digest_of(place[2], data)}"', Accept_Ranges="bytes")
                if self.command == "HEAD":
                    return self.answer(200, **headers, Content_Length=str(len(data)))
                first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
                outer.asked.append((f"{place[1]}/{place[2]}", first))
                if outer.cut and place[2].endswith(outer.cut[0]) and first < outer.cut[1]:
                    # A connection that breaks once: fewer bytes than promised.
                    self.answer(200, data[first:outer.cut[1]], **headers, Content_Length=str(len(data) - first))
                    self.close_connection, outer.cut = True, None
                    return
                partly = {}
                if "Range" in self.headers:
                    partly["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                self.answer(206 if partly else 200, data[first:], **headers, **partly)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture()
def served():
    server = Hub(official_files())
    yield server
    server.close()


def command(served, home: Path, *arguments: str, **environment) -> tuple[list[str], dict]:
    settings = dict(HF_ENDPOINT=served.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
                    **environment)
    return [sys.executable, *arguments], dict(text=True, cwd=home, env={**os.environ, **settings,
                                                                        "PYTHONPATH": str(ROOT)})


def run(served, home: Path, script: str, *arguments: str, **environment) -> subprocess.CompletedProcess:
    program = {"-c": ["-c"], "hub.py": ["-m", "loading.hub"]}.get(script, [str(ROOT / script)])
    line, options = command(served, home, *program, *arguments, **environment)
    return subprocess.run(line, capture_output=True, **options)


def error_of(result: subprocess.CompletedProcess) -> str:
    """The one line of a user error."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


NEEDED = {f"warp-ai/wuerstchen-prior/{name}" for name in ("prior/config.json",
                                                          "prior/diffusion_pytorch_model.safetensors")} \
    | {f"warp-ai/wuerstchen/{part}/{name}" for part in ("decoder", "vqgan")
       for name in ("config.json", "diffusion_pytorch_model.safetensors")} \
    | {f"warp-ai/{repo}/{name}" for repo in ("wuerstchen", "wuerstchen-prior")
       for name in ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
                    "tokenizer/tokenizer_config.json")}


def test_text_to_image_fetches_what_it_needs_once_and_nothing_else(served, tmp_path):
    """Seven parts, one weight file each, .safetensors before .bin, no image encoder. The second time, not a byte."""
    result = run(served, tmp_path, "hub.py", "v2")
    assert result.returncode == 0, result.stderr
    assert {name for name, _ in served.asked} == NEEDED
    size = sum(len(served.files["/".join(name.split("/")[:2])]["/".join(name.split("/")[2:])]) for name in NEEDED)
    assert f"Fetching {len(NEEDED)} files, {size / 1e9:.2f} GB" in result.stderr
    served.asked.clear()
    assert run(served, tmp_path, "hub.py", "v2").stdout == result.stdout and served.asked == []


def test_reconstruction_never_fetches_stage_c(served, tmp_path):
    """Encoding and decoding an image takes the image encoder, Stage B with its text encoder, and Stage A."""
    from safetensors.torch import save
    from stage_b import EfficientNetEncoder
    from loading.names import to_diffusers
    model = EfficientNetEncoder()
    served.files["warp-ai/EfficientNetEncoder"] = {"config.json": b'{"_class_name": "EfficientNetEncoder"}',
                                                   "diffusion_pytorch_model.safetensors": save(
        {name: tensor.contiguous() for name, tensor in to_diffusers(model.state_dict(), model).items()})}
    result = run(served, tmp_path, "-c",
                 "from wuerstchen import Wuerstchen; from loading import hub; "
                 "Wuerstchen.load('v2', 'cpu', parts=hub.RECONSTRUCTION)")
    assert result.returncode == 0, result.stderr
    asked = {name for name, _ in served.asked}
    assert "warp-ai/EfficientNetEncoder/diffusion_pytorch_model.safetensors" in asked
    assert asked - {name for name in asked
                    if "EfficientNetEncoder" in name} == {name for name in NEEDED if "wuerstchen-prior" not in name}


def test_fetched_weights_work_without_a_network(served, tmp_path):
    run(served, tmp_path, "hub.py", "v2")
    served.close()
    online = run(served, tmp_path, "hub.py", "v2", "--offline")
    assert online.returncode == 0, online.stderr
    assert run(served, tmp_path, "hub.py", "v2", HF_HUB_OFFLINE="1").stdout == online.stdout
    assert "prior" in error_of(run(served, tmp_path, "hub.py", "v2-base", "--offline"))


def test_v2_gives_the_same_image_from_the_hub_and_from_a_folder(served, tmp_path):
    """From the name to the image."""
    from PIL import Image
    from wuerstchen import Wuerstchen
    import numpy as np
    prompt, settings = "a cat on a red background", ("--steps-c", "2", "--steps-b", "2", "--seed", "3", "--width",
                                                     "128", "--height", "128")
    result = run(served, tmp_path, "sample.py", "--weights", "v2", "--prompt", prompt, *settings, "--out", "cat.png",
                 "--device", "cpu")
    assert result.returncode == 0, result.stderr
    here = Wuerstchen.load("tiny", "cpu")(prompt, seed=3, steps_c=2, steps_b=2, guidance_c=4.0,
                                          guidance_b=1.0)[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "cat.png"), int) - np.asarray(here, int)).max() <= 1


def test_a_broken_download_resumes_where_it_stopped(served, tmp_path):
    """The connection breaks after 15 of 30 MB. huggingface_hub writes pieces of 10 MB, so it loses at most the last."""
    name, content = "decoder/diffusion_pytorch_model.safetensors", bytes(range(256)) * 120_000
    served.files["warp-ai/wuerstchen"][name] = content
    served.cut = (name, len(content) // 2)
    result = run(served, tmp_path, "hub.py", "v2", "--parts", "decoder")
    assert result.returncode == 0, result.stderr
    starts = [first for asked, first in served.asked if asked.endswith(name)]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 10_000_000
    folder = Path(result.stdout.split(maxsplit=1)[1].strip())
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == content


def serve_v1(served, folder: Path) -> set[str]:
    """The authors' repository and the text encoder that v1 takes from v2's, small -> the files that v1 needs."""
    from helpers import small_v1
    folder.mkdir()
    small_v1(folder)
    served.files["dome272/wuerstchen"] = {path.name: path.read_bytes() for path in folder.glob("*.pt")} | {
        name: b"unused" for name in ("model_v2_stage_b.pt", "model_stage_c.pt", "README.md")}
    for part in ("text_encoder", "tokenizer"):
        served.files["warp-ai/wuerstchen"] = {name: data for name, data in served.files["warp-ai/wuerstchen"].items()
                                              if not name.startswith(part)} | {
            f"{part}/{path.name}": path.read_bytes() for path in (folder / part).iterdir()}
    return {f"dome272/wuerstchen/{name}" for name in ("vqgan_f4_v1_500k.pt", "model_stage_b.pt",
                                                      "model_stage_c_ema.pt")} \
        | {name for name in NEEDED
           if name.startswith(("warp-ai/wuerstchen/text_encoder", "warp-ai/wuerstchen/tokenizer"))}


# Without config.json, sizes are the official ones: here they are small.
SMALL = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; " \
        "import sample; from loading import weights; from helpers import SMALL_V1; " \
        "weights.official_sizes = lambda stage, shapes: SMALL_V1[stage]; sample.main(sys.argv[1:])"


def test_v1_is_fetched_by_the_names_of_its_files_and_generates(served, tmp_path):
    """From the name to the image, first with and then without a network: three files of the authors, at the revision
    that has them, and CLIP-H once for both stages. Nothing else is fetched.
    """
    from PIL import Image
    needed = serve_v1(served, tmp_path / "v1")
    result = run(served, tmp_path, "hub.py", "v1")
    assert result.returncode == 0, result.stderr
    assert {name for name, _ in served.asked} == needed and len(served.asked) == len(needed)
    places = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    for part, file in (("prior", "model_stage_c_ema.pt"), ("decoder", "model_stage_b.pt"),
                       ("vqgan", "vqgan_f4_v1_500k.pt")):
        assert places[part].endswith(f"/snapshots/{hub.REVISIONS['dome272/wuerstchen (v1)']}/{file}")
    assert places["text_encoder"] == places["prior_text_encoder"] and places["tokenizer"] == places["prior_tokenizer"]
    served.asked.clear()
    # The image encoder is in Stage B's file, which is already there.
    assert run(served, tmp_path, "hub.py", "v1", "--parts",
               "image_encoder").stdout.split() == ["image_encoder", places["decoder"]]
    served.close()
    settings = ("--steps-c", "2", "--steps-b", "2", "--seed", "3", "--width", "128", "--height", "64")
    result = run(served, tmp_path, "-c", SMALL, "--weights", "v1", "--offline", "--prompt", "a cat", *settings, "--out",
                 "cat.png", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert served.asked == [] and Image.open(tmp_path / "cat.png").size == (128, 64)
    assert "128 x 64 px is not what these weights were trained on (512 px only)" in result.stderr


def test_a_folder_of_v1_s_files_fetches_only_the_text_encoder(served, tmp_path):
    """CLIP-H for both stages, not v2's bigG: the authors published no text encoder with their files."""
    import shutil
    needed = serve_v1(served, tmp_path / "v1")
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "v1" / part)
    result = run(served, tmp_path / "v1", "-c", SMALL, "--weights", ".", "--steps-c", "1", "--steps-b", "1", "--width",
                 "64", "--height", "64", "--prompt", "a cat",
                 "--out", "cat.png", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert {name for name, _ in served.asked} == {name for name in needed if name.startswith("warp-ai")}


def test_a_missing_file_of_v1_is_explained_in_one_line(served, tmp_path):
    """With the revision, so that --revision can change it."""
    serve_v1(served, tmp_path / "v1")
    del served.files["dome272/wuerstchen"]["model_stage_c_ema.pt"]
    revision = hub.REVISIONS["dome272/wuerstchen (v1)"]
    assert error_of(run(served, tmp_path, "hub.py", "v1")) == \
        f"error: dome272/wuerstchen at revision {revision} holds no model_stage_c_ema.pt"
    assert "at revision main holds no" in error_of(run(served, tmp_path, "hub.py", "v1", "--revision",
                                                       "dome272/wuerstchen=main"))


def test_a_pointer_instead_of_a_file_of_v1_is_recognised(served, tmp_path):
    """The authors' notebook fetched the VQGAN by /raw/, which gives the pointer instead of the file."""
    serve_v1(served, tmp_path / "v1")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    served.files["dome272/wuerstchen"]["vqgan_f4_v1_500k.pt"] = pointer
    assert "vqgan_f4_v1_500k.pt is a Git LFS pointer" in error_of(run(served, tmp_path, "-c", SMALL, "--weights", "v1",
                                                                      "--prompt", "a cat"))


@pytest.mark.parametrize("status, headers, message", [
    (401, {"X_Error_Code": "RepoNotFound"}, "has no warp-ai/wuerstchen"),
    (404, {"X_Error_Code": "RepoNotFound"}, "has no warp-ai/wuerstchen"),
    (403, {"X_Error_Code": "GatedRepo"}, "asks for its terms to be accepted"),
    (404, {"X_Error_Code": "RevisionNotFound"}, "has no revision"),
    (403, {}, "answered with an error: .* run `hf auth login` with a token that may read"),
    (500, {}, "answered with an error: .* try again later")])
def test_a_refusal_by_the_hub_is_explained_in_one_line(status, headers, message, here):
    from loading.errors import WeightsError
    here.status = (status, headers)
    with pytest.raises(WeightsError, match=message) as error:
        hub.fetch("v2", ("vqgan",))
    assert "\n" not in str(error.value)


def test_a_missing_network_is_explained_in_one_line(served, tmp_path):
    served.close()
    message = error_of(run(served, tmp_path, "hub.py", "v2", "--parts", "vqgan"))
    assert "cannot be reached" in message and "--offline" in message


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "is a Git LFS pointer"),
    (b"<!DOCTYPE html><html>rate limited</html>", "is a web page, not weights")])
def test_files_that_are_not_weights_are_recognised(content, message, served, tmp_path):
    served.files["warp-ai/wuerstchen"]["vqgan/diffusion_pytorch_model.safetensors"] = content
    assert message in error_of(run(served, tmp_path, "sample.py", "--weights", "v2", "--prompt", "a cat"))


def test_the_image_encoder_is_taken_out_of_the_big_file_once(served, tmp_path):
    """80 MB of 6 GB: fetched and read once, then kept as a small file with the same bits."""
    import io
    from stage_b import EfficientNetEncoder
    from loading.names import to_diffusers
    from loading.weights import load_image_encoder
    torch.manual_seed(0)
    model = EfficientNetEncoder().eval()
    file = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(1)}, "effnet_state_dict": to_diffusers(model.state_dict(), model)},
               file)
    served.files["dome272/wuerstchen"] = {"model_v2_stage_b.pt": file.getvalue()}
    result = run(served, tmp_path, "hub.py", "v2", "--parts", "image_encoder")
    assert result.returncode == 0, result.stderr
    loaded = load_image_encoder(result.stdout.split(maxsplit=1)[1].strip()).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert "is no longer needed" in result.stderr
    served.asked.clear()
    assert run(served, tmp_path, "hub.py", "v2", "--parts", "image_encoder").returncode == 0 and served.asked == []


def test_the_image_encoder_s_own_repository_replaces_the_big_file(served, tmp_path):
    """80 MB instead of 6 GB if the hub has it, in the form diffusers' training code gave it."""
    from safetensors.torch import save
    from stage_b import EfficientNetEncoder
    from loading.names import to_diffusers
    from loading.weights import load_image_encoder
    torch.manual_seed(0)
    model = EfficientNetEncoder().eval()
    config = {"_class_name": "EfficientNetEncoder", "_diffusers_version": "0.24.0", "c_cond": 1280, "c_latent": 16,
              "effnet": "efficientnet_v2_s"}
    served.files["warp-ai/EfficientNetEncoder"] = {"config.json": json.dumps(config).encode(),
                                                   "diffusion_pytorch_model.safetensors": save(
        {name: tensor.contiguous() for name, tensor in to_diffusers(model.state_dict(), model).items()})}
    result = run(served, tmp_path, "hub.py", "v2", "--parts", "image_encoder")
    assert result.returncode == 0, result.stderr
    assert {name for name, _ in served.asked} == {f"warp-ai/EfficientNetEncoder/{name}"
                                                  for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    loaded = load_image_encoder(result.stdout.split(maxsplit=1)[1].strip()).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("half, offered, taken", [
    (True, ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
    (False, ["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
    (True, ["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
    (True, ["pytorch_model.bin", "pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
    (False, ["pytorch_model.bin"], "pytorch_model.bin")])
def test_one_of_the_offered_weight_files_is_taken(half, offered, taken):
    """.safetensors before .bin; half precision where it is wanted and there."""
    assert pick_weights(offered, ("model", "pytorch_model"), half) == taken


def test_a_revision_is_for_all_repositories_or_for_one():
    repo = "warp-ai/wuerstchen"
    assert hub.revision_of(repo, None) == hub.REVISIONS[repo]
    assert hub.revision_of(repo, "refs/pr/1") == hub.revision_of(repo, f"{repo}=refs/pr/1") == "refs/pr/1"
    assert hub.revision_of(repo, "warp-ai/wuerstchen-prior=refs/pr/1") == hub.REVISIONS[repo]
    authors = "dome272/wuerstchen"
    assert hub.revision_of(authors, None) == hub.REVISIONS[authors] != hub.REVISIONS[f"{authors} (v1)"]
    assert hub.revision_of(authors, None, "v1") == hub.REVISIONS[f"{authors} (v1)"]
    assert hub.revision_of(authors, "main", "v1") == "main" and hub.revision_of(repo, None, "v1") == hub.REVISIONS[repo]


# --- anyone's repositories ---------------------------------------------------------------------------

def tiny_files(*parts: str) -> dict[str, bytes]:
    return {f"{part}/{path.name}": path.read_bytes() for part in parts for path in (TINY / part).iterdir()}


def served_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Prints sums over Stage C's and Stage B's outputs on fixed inputs. In float64: equal weights give equal numbers.
PROBE = """
import sys, torch
from wuerstchen import Wuerstchen
from loading.errors import exit_on_user_error
def probe(*arguments, **options):
    model = Wuerstchen.load(*arguments, device="cpu", fast=False, low_memory=False, **options)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    with torch.no_grad():
        c = model.part("stage_c")(draw(1, 16, 3, 3), torch.tensor([0.5]), draw(1, 7, 128)).double().abs().sum().item()
        b = model.part("stage_b")(draw(1, 4, 32, 32), torch.tensor([0.5]), draw(1, 16, 3, 3), draw(1, 7, 128))
    print(model.size, c, b.double().abs().sum().item())
    return model
with exit_on_user_error():
"""


def probe(served, home: Path, *calls: str, **environment) -> list[str]:
    result = run(served, home, "-c", PROBE + "".join(f"    {call}\n" for call in calls), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def pushed(folder: Path, monkeypatch, lora: bool) -> dict[str, bytes]:
    """What `train_c.py --weights tiny --push-to-hub me/unicorn` uploads, with or without --lora."""
    from argparse import Namespace
    from loading.weights import load_stage_c
    from lora import add_lora
    from training import results
    torch.manual_seed(0)
    prior = load_stage_c(TINY / "prior")
    if lora:
        for name in add_lora(prior, rank=2):
            torch.nn.init.normal_(prior.get_submodule(name).adapters["default"].up)
    else:
        with torch.no_grad():
            prior.head.bias += 0.5
    for name in ("push", "write_card_c"):                    # the card is text for people
        monkeypatch.setattr(results, name, lambda *_: None)
    args = Namespace(weights="tiny", out=str(folder), data="photos", init=None, lora=lora, steps=3, trigger="a zorp",
                     train_text=False, push_to_hub="me/unicorn", **dict.fromkeys(results.FILES_C))
    weights = {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}
    results.write_files_c(args, prior, weights, None, ["one image", "another"])
    (folder / "samples").mkdir()
    (folder / "samples" / "0.png").write_bytes(b"a sheet")
    return served_folder(folder)


def test_a_lora_that_was_pushed_loads_back(served, tmp_path, monkeypatch):
    """As weights, through base.json, and as a LoRA: both the same model as the local file. Offline as well."""
    served.files["me/unicorn"] = pushed(tmp_path / "out", monkeypatch, lora=True)
    local, plain, as_weights, as_lora, named = probe(
        served, tmp_path, f"probe('tiny', lora={{{str(tmp_path / 'out/lora.safetensors')!r}: 1.0}})", "probe('tiny')",
        "probe('hub:me/unicorn')", "probe('tiny', lora='hub:me/unicorn')",
        "probe('tiny', lora={'hub:me/unicorn@main/lora.safetensors': 1.0})")
    assert local == as_weights == as_lora == named != plain
    assert {name for name, _ in served.asked} == {f"me/unicorn/{name}" for name in ("base.json", "lora.safetensors")}
    served.close()
    assert probe(served, tmp_path, "probe('hub:me/unicorn', offline=True)", HF_HUB_OFFLINE="") == [local]
    assert probe(served, tmp_path, "probe('tiny', lora='hub:me/unicorn')", HF_HUB_OFFLINE="1") == [local]


def test_a_fine_tune_that_was_pushed_loads_back(served, tmp_path, monkeypatch):
    """prior/ and base.json: as weights, or only its Stage C. A branch or commit of it is named after @."""
    served.files["me/unicorn"] = pushed(tmp_path / "out", monkeypatch, lora=False)
    local, plain, *others = probe(
        served, tmp_path, f"probe({str(tmp_path / 'out')!r})", "probe('tiny')", "probe('hub:me/unicorn')",
        "probe('tiny', prior='hub:me/unicorn')", f"probe('tiny', prior='hub:me/unicorn@{COMMIT}')",
        "probe('tiny', prior='hub:me/unicorn/prior')",
        "probe('tiny', prior='hub:me/unicorn/prior/diffusion_pytorch_model.safetensors')")
    assert local != plain and others == [local] * 5
    asked = [name.removeprefix("me/unicorn/") for name, _ in served.asked]
    assert {*asked} == {"base.json", "prior/config.json", "prior/diffusion_pytorch_model.safetensors"}
    from training import results
    card = results.usage(["a cat on a red background"], results.place(None, "me/unicorn")).splitlines()
    (command,) = (shlex.split(line) for line in card if line.startswith("python "))
    result = run(served, tmp_path, *command[1:], "--steps-c", "1", "--steps-b", "1", "--out", "a.png")
    assert result.returncode == 0 and Image.open(tmp_path / "a.png").size == (128, 128), result.stderr


def test_of_a_whole_pipeline_only_what_is_needed_is_fetched(served, tmp_path):
    """The image encoder's weights only to encode an image; its configuration always, since it tells the size. Of the
    parts that are given otherwise, or not wanted, nothing."""
    everything = ("prior", "decoder", "vqgan", "text_encoder", "tokenizer", "image_encoder")
    served.files["me/whole"] = tiny_files(*everything) | {"notes.pdf": b"", "prior/old.bin": b"", "README.md": b""}
    local, repo = probe(served, tmp_path, "probe('tiny')", "probe('hub:me/whole')")
    assert local == repo and local.startswith("128 ")
    asked = {name.removeprefix("me/whole/") for name, _ in served.asked}
    weights = "diffusion_pytorch_model.safetensors"
    assert asked >= {f"{part}/{name}" for part in ("prior", "decoder", "vqgan") for name in ("config.json", weights)}
    assert "image_encoder/config.json" in asked and f"image_encoder/{weights}" not in asked
    assert not asked & {"notes.pdf", "prior/old.bin", "README.md"}
    served.asked.clear()
    out = run(served, tmp_path, "-c", "from wuerstchen import Wuerstchen; "
              "m = Wuerstchen.load('hub:me/whole', 'cpu'); print(m.part('image_encoder').config)")
    assert "'c_semantic'" in out.stdout, out.stderr
    assert [name for name, _ in served.asked] == [f"me/whole/image_encoder/{weights}"]
    served.asked.clear()
    other = tmp_path / "other"
    other.mkdir()
    out = run(served, other, "-c", "from wuerstchen import Wuerstchen; m = Wuerstchen.load('hub:me/whole', 'cpu', "
              f"parts=('prior', 'prior_text_encoder', 'prior_tokenizer'), prior={str(TINY / 'prior')!r}); "
              "print(sorted(m.networks))")
    assert "stage_c" in out.stdout and "stage_b'" not in out.stdout, out.stderr
    assert {name.split("/")[2] for name, _ in served.asked} == {"text_encoder", "tokenizer", "image_encoder"}


def test_sample_py_takes_repositories_for_weights_parts_and_loras(served, tmp_path, monkeypatch):
    """On the command line, with a scale after the LoRA. The PNG keeps the names, so --like makes it again."""
    from PIL import Image
    import numpy as np
    from extras.metadata import read_settings
    served.files["me/unicorn"] = pushed(tmp_path / "out", monkeypatch, lora=True)
    served.files["me/b"] = tiny_files("decoder", "text_encoder", "tokenizer")
    few = ("--steps-c", "2", "--steps-b", "1", "--seed", "3", "--prompt", "a cat", "--device", "cpu")
    result = run(served, tmp_path, "sample.py", "--weights", "tiny", "--decoder", "hub:me/b", "--text-encoder",
                 "hub:me/b", "--lora", "hub:me/unicorn:0.5", *few, "--out", "a.png")
    assert result.returncode == 0, result.stderr
    settings = read_settings(tmp_path / "a.png")
    assert settings["decoder"] == "hub:me/b" and settings["lora"] == "hub:me/unicorn:0.5"
    served.close()
    for name, options in (("b.png", ("--like", "a.png", "--offline")), ("c.png", (
            "--lora", f"{tmp_path / 'out/lora.safetensors'}:0.5", *few)), ("d.png", few)):
        result = run(served, tmp_path, "sample.py", "--device", "cpu", *options, "--out", name)
        assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    a, b, c, d = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abcd")
    assert np.array_equal(a, b) and np.array_equal(a, c) and not np.array_equal(a, d)


def test_a_repository_of_diffusers_prior_pipeline_is_completed_by_v2(served, tmp_path):
    """So most fine-tunes are published: prior/, text_encoder/, tokenizer/ and model_index.json."""
    served.files["me/prior"] = tiny_files("prior", "text_encoder", "tokenizer") | {
        "model_index.json": b'{"_class_name": "WuerstchenPriorPipeline"}'}
    result = run(served, tmp_path, "-c", "from loading.layouts import locate\n"
                 "for part, path in locate('hub:me/prior').items(): print(part, path)")
    assert result.returncode == 0, result.stderr
    paths = dict(line.split() for line in result.stdout.splitlines())
    assert {part: re.search("models--(.*?)/", path)[1] for part, path in paths.items() if path != "None"} == {
        **dict.fromkeys(("prior", "prior_text_encoder", "prior_tokenizer"), "me--prior"),
        **dict.fromkeys(("decoder", "vqgan", "text_encoder", "tokenizer"), "warp-ai--wuerstchen")}
    assert not any(name.startswith("warp-ai/wuerstchen-prior") for name, _ in served.asked)


def test_shards_of_a_repository_are_fetched_with_their_index(served, tmp_path):
    """And a hostile index is refused before any of its names is asked for."""
    from safetensors.torch import load, save
    stem = "diffusion_pytorch_model"
    files = tiny_files("prior")
    tensors = load(files.pop(f"prior/{stem}.safetensors"))
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index = {name: file for file, some in shards.items() for name in some}
    served.files["me/large"] = files | {f"prior/{file}": save({name: tensors[name] for name in some})
                                        for file, some in shards.items()} | {
        f"prior/{stem}.safetensors.index.json": json.dumps({"weight_map": index}).encode(), "prior/x.fp16.bin": b""}
    local, repo = probe(served, tmp_path, "probe('tiny')", "probe('tiny', prior='hub:me/large')")
    assert local == repo and {name for name, _ in served.asked} == {f"me/large/prior/{name}" for name in (
        *shards, f"{stem}.safetensors.index.json", "config.json", *(f for f in ("words.json",) if (
            TINY / "prior" / f).is_file()))}
    for i, (name, message) in enumerate((("../../../secret.safetensors", "only .safetensors or .bin files in the same"),
                                         ("lost.safetensors", "names files that are missing: prior/lost.safetensors"))):
        index[names[0]] = name
        served.files[f"me/large{i}"] = served.files["me/large"] | {
            f"prior/{stem}.safetensors.index.json": json.dumps({"weight_map": index}).encode()}
        served.asked.clear()
        assert message in error_of(run(served, tmp_path, "sample.py", "--prompt", "a cat", "--weights", "tiny",
                                       "--prior", f"hub:me/large{i}"))
        assert [name for name, _ in served.asked] == [f"me/large{i}/prior/{stem}.safetensors.index.json"]


REPOSITORIES = {"me/base": {"base.json": b'{"weights": "/home/me/weights"}', "prior/config.json": b"{}"},
                "me/escape": {"base.json": b'{"weights": "tiny", "lora": "../../x.safetensors"}'},
                "me/files": {"base.json": b'{"weights": "tiny", "files": {"vqgan": "/etc/passwd"}}'},
                "me/circle": {"base.json": b'{"weights": "hub:me/circle"}'},
                "me/broken": {"base.json": b'{"weights": 3}'},
                "me/photos": {"cat.jpg": b"", "dog.jpg": b""},
                "me/two": {"a.safetensors": b"", "b.safetensors": b""}}


@pytest.mark.parametrize("weights, message", [
    ("hub:me/base", "hub:me/base: its base.json names /home/me/weights, on the machine where it was trained: name its"),
    ("hub:me/escape", "expected a file that train_b.py or train_c.py wrote"),
    ("hub:me/files", "its base.json names /etc/passwd, on the machine where it was trained"),
    ("hub:me/circle", "names hub:me/circle, which names it again"),
    ("hub:me/broken", "expected a file that train_b.py or train_c.py wrote"),
    ("hub:me/photos", "hub:me/photos does not hold weights in a known layout: looked for prior/, decoder/, vqgan/"),
    ("hub:me/nothing", "has no me/nothing, or shows it only to its members"),
    ("hub:me/photos/nowhere", "me/photos at revision main holds no nowhere: found cat.jpg, dog.jpg")])
def test_repositories_without_usable_weights_are_explained(weights, message, served, tmp_path, monkeypatch):
    """A base.json of a stranger can name no files of this machine, and nothing is written outside the cache."""
    served.files |= REPOSITORIES
    assert message in error_of(run(served, tmp_path, "sample.py", "--prompt", "a cat", "--weights", weights))


def test_parts_and_loras_that_a_repository_lacks_are_explained(served, tmp_path):
    served.files |= REPOSITORIES
    script = """
from loading import hub
from loading.errors import WeightsError
from loading.layouts import locate
for call in (lambda: locate("tiny", {"prior": "hub:me/photos"}), lambda: hub.fetch_lora("hub:me/two"),
             lambda: hub.fetch_lora("hub:me/photos"), lambda: hub.fetch_lora("hub:me/two", offline=True),
             lambda: hub.fetch_lora("hub:me/two@0123", offline=True), lambda: hub.fetch_lora("hub:me"),
             lambda: hub.fetch_lora("hub:me/../two"), lambda: hub.fetch_lora("hub:me/two/../../x")):
    try:
        call()
    except WeightsError as error:
        print(error)
"""
    result = run(served, tmp_path, "-c", script)
    lines = result.stdout.splitlines()
    parts = "expected config.json and weights in prior_prior/, prior/, the folder itself; found cat.jpg, dog.jpg"
    assert parts in lines[0] and "hub:me/two holds several files that may be a LoRA" in lines[1]
    assert "hub:me/photos holds no file that may be a LoRA" in lines[2]
    assert all("is not in the cache" in line and "--offline fetches nothing" in line for line in lines[3:5])
    assert all("expected hub:OWNER/NAME, hub:OWNER/NAME@REVISION" in line for line in lines[5:]) and len(lines) == 8


@pytest.mark.parametrize("weights, message", [
    ("dome272/wuerstchen", "dome272/wuerstchen holds both v1 and v2: write v1 or v2 instead"),
    ("hub:dome272/wuerstchen", "holds both v1 and v2"),
    ("someone/pictures", "no such folder: .*; a repository of the Hugging Face hub is written hub:someone/pictures"),
    ("nowhere", "or a folder$"), ("a/b/c", "or a folder$")])
def test_names_that_are_no_weights_get_a_hint(weights, message, tmp_path, monkeypatch):
    from loading.errors import WeightsError
    from loading.layouts import locate
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        locate(weights)
    assert "\n" not in str(error.value)
    if message.startswith("no such folder"):
        for call in (lambda: locate("tiny", {"decoder": weights}), lambda: hub.fetch_lora(weights)):
            with pytest.raises(WeightsError, match=f"there is no such file or folder; a .* is written hub:{weights}"):
                call()
        Path(weights).mkdir(parents=True)
        with pytest.raises(WeightsError, match="does not hold weights in a known layout"):
            locate(weights)


@pytest.mark.parametrize("repo, name", hub.OFFICIAL.items())
def test_the_official_repositories_stand_for_their_weights(repo, name):
    from loading.layouts import official_name
    assert official_name(repo) == official_name(f"hub:{repo}") == name and official_name("me/x") == "me/x"
    assert any(repo == source for source, _ in hub.NAMES[name].values())


def test_unknown_parts_are_refused_and_some_parts_are_enough():
    from loading.errors import WeightsError
    from wuerstchen import Wuerstchen
    with pytest.raises(WeightsError, match="no part called 'foo': expected some of prior, prior_text_encoder, .*vqgan"):
        Wuerstchen.load("tiny", "cpu", parts=("foo",))
    with pytest.raises(WeightsError, match="parts is empty: expected some of prior, "):
        Wuerstchen.load("tiny", "cpu", parts=())
    model = Wuerstchen.load("tiny", "cpu", parts=("prior", "prior_text_encoder", "prior_tokenizer"))
    assert {"stage_c", "text_encoder_c"} <= model.networks.keys()
    assert model.networks.keys().isdisjoint({"stage_a", "stage_b"})


# --- a hub that is slow, broken or hostile -----------------------------------------------------------

REPO, NAME = "me/lora", "lora.safetensors"
CONTENT = bytes(range(256)) * 4000                           # 1 MB


@pytest.fixture()
def here(tmp_path, monkeypatch):
    """A stand-in with one small repository, for calls in this process. Nothing waits for long."""
    from huggingface_hub import constants
    served = Hub({REPO: {NAME: CONTENT}})
    for name, value in dict(ENDPOINT=served.url, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME=str(tmp_path),
                            HF_HUB_ETAG_TIMEOUT=0.2, HF_HUB_DOWNLOAD_TIMEOUT=0.2).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    monkeypatch.setattr(hub, "HASHES", {})
    yield served
    served.close()


def fetch_here() -> Path:
    return hub.fetch_lora(f"hub:{REPO}")


def left_in(home: Path) -> list[str]:
    """What is in the cache except for locks."""
    return sorted(path.relative_to(home / "hub/models--me--lora").as_posix() for path in home.rglob("*")
                  if not path.is_dir() and ".locks" not in path.parts)


def is_list(handler) -> bool:
    return handler.path.startswith("/api/")


def answering(body: bytes = b"", status: int = 200, times: int = 99, of=is_list, **headers):
    """A fault: this answer instead of the right one, so many times."""
    left = [times]

    def fault(handler):
        if not of(handler) or left[0] == 0:
            return False
        left[0] -= 1
        handler.answer(status, body, **headers)
        return True
    return fault


def is_file(handler) -> bool:
    return not is_list(handler)


def raw(body: bytes, of=is_file, before: float = 0):
    """A fault: these bytes, after so many seconds, then the connection is closed."""
    def fault(handler):
        if of(handler):
            time.sleep(before)
            with contextlib.suppress(OSError):
                handler.wfile.write(body)
            handler.close_connection = True
        return of(handler)
    return fault


def stalled(handler) -> bool:
    """A fault: half of a file, then nothing more, though the connection stays open."""
    if is_file(handler):
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT[:500_000])
            handler.wfile.flush()
            time.sleep(0.5)
    return is_file(handler)


def endless(start: bytes, of=is_list, pause: float = 0):
    """A fault: a body without end. Here it has one, after 64 MB, so that a mistake does not fill the disk."""
    def fault(handler):
        if of(handler):
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + start)
                for _ in range(1000):
                    handler.wfile.write(b"x" * 2 ** 16)
                    time.sleep(pause)
        return of(handler)
    return fault


def list_with(*siblings: dict, sha: str = COMMIT) -> bytes:
    return json.dumps({"sha": sha, "siblings": [entry_of(NAME, CONTENT), *siblings]}).encode()


PAGE = b"<!DOCTYPE html><html>Please log in</html>"
FLIPPED = CONTENT[:5000] + b"\x00" + CONTENT[5001:]
LISTS = "the hub's list of files cannot be used"
FAULTS = {
    # the list of files
    "silent": (raw(b"", is_list, before=0.5), "cannot be reached .*timed out"),
    "closed at once": (raw(b"", is_list), "cannot be reached .*disconnected"),
    "busy": (answering(b"{}", 503), "answered with an error: .*503"),
    "asked too often": (answering(b"{}", 429), "answered with an error: .*429"),
    "empty": (answering(), "did not answer with a list of the files of me/lora, but with b''"),
    "a page": (answering(PAGE), "but with b'<!DOCTYPE html>.*check HF_ENDPOINT, and whether this network asks for"),
    "cut off": (answering(list_with()[:90]), "did not answer with a list of the files"),
    "fewer bytes than promised": (answering(list_with(), Content_Length="100000"), "cannot be reached"),
    "deep": (answering(b"[" * 200_000), "did not answer with a list of the files"),
    "a list": (answering(b"[]"), LISTS),
    "no commit": (answering(b'{"siblings": []}'), LISTS),
    "commit outside": (answering(list_with(sha="../../../../outside")), LISTS),
    "commit a number": (answering(list_with(sha=3)), LISTS),
    "names that are none": (answering(list_with({"rfilename": 3})), LISTS),
    "no end": (endless(b'{"siblings": ['), "the hub's list of files does not end: expected at most 0 MB"),
    "redirected in a circle": (lambda handler: handler.answer(302, Location=handler.path) or True,
                               "cannot be reached .*redirects"),
    "forbidden": (answering(b"{}", 403), "answered with an error: .*403"),
    "not a token": (answering(b"{}", 401, X_Error_Message="Invalid credentials in Authorization header"),
                    "answered with an error: .*401"),
    # a file
    "a flipped byte": (answering(FLIPPED, of=is_file), f"me/lora: {NAME} was damaged on the way: expected the checksum "
                       f"{digest_of(NAME, CONTENT)}, found {digest_of(NAME, FLIPPED)}; it was removed, run this again"),
    "a page of the right length": (answering(PAGE.ljust(len(CONTENT)), of=is_file),
                                   "was damaged on the way or is a web page: expected the checksum"),
    "a page that is too long": (endless(PAGE, of=is_file), "was damaged on the way or is a web page"),
    "an empty file": (answering(of=is_file), f"{NAME} ended after 0 of {len(CONTENT)} bytes"),
    "a file that is gone": (answering(status=404, of=is_file, X_Error_Code="EntryNotFound"),
                            "lost a file while it was being fetched"),
    "a busy store": (answering(status=503, of=is_file), "answered with an error: .*503"),
    "a silent store": (raw(b"", before=0.5), "cannot be reached .*timed out"),
    "a store that stalls": (stalled, "cannot be reached .*timed out"),
    "redirected nowhere": (answering(status=302, of=is_file, Location="http://127.0.0.1:1/x"), "cannot be reached"),
    "redirected to a file": (answering(status=302, of=is_file, Location="file:///etc/passwd"), "cannot be reached"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_that_fails_is_explained_in_one_line(name, here, tmp_path, monkeypatch):
    """Within seconds, and nothing stays in the cache but what a later run can use."""
    from loading.errors import WeightsError
    here.fault, message = FAULTS[name]
    monkeypatch.setattr(hub, "LONGEST_LIST", (2 ** 19, 600))
    with pytest.raises(WeightsError, match=message) as error:
        fetch_here()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert {*left_in(tmp_path)} <= {"refs/main", f"blobs/{digest_of(NAME, CONTENT)}.incomplete"}
    here.fault = None
    assert fetch_here().read_bytes() == CONTENT


def test_a_list_that_goes_on_for_ever_is_given_up(here, monkeypatch):
    from loading.errors import WeightsError
    monkeypatch.setattr(hub, "LONGEST_LIST", (2 ** 60, 0.1))
    here.fault = endless(b"[", pause=0.01)
    with pytest.raises(WeightsError, match="the hub's list of files does not end: expected at most .* MB in 0.1 s"):
        fetch_here()


def test_a_connection_that_breaks_again_and_again_still_brings_the_file(here):
    """More often than a hub that sends nothing is asked again; each time only for the rest."""
    starts = []

    def cut(handler):
        if is_file(handler):
            start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
            starts.append(start)
            handler.send_response(206 if start else 200)
            handler.end_headers()                                # without a length: it ends with the connection
            handler.wfile.write(CONTENT[start:start + 200_000])
            handler.close_connection = True
        return is_file(handler)
    here.fault = cut
    assert fetch_here().read_bytes() == CONTENT and starts == [*range(0, len(CONTENT), 200_000)]


@pytest.mark.parametrize("size", [-5, 2 ** 70, 10 ** 400, True, "9", None, 1.5])
def test_a_size_that_is_none_is_asked_for_again(size, here):
    entry = {"rfilename": NAME, "size": size, "blobId": digest_of(NAME, CONTENT)}
    here.fault = answering(json.dumps({"sha": COMMIT, "siblings": [entry]}).encode())
    assert fetch_here().read_bytes() == CONTENT


def test_a_busy_hub_is_asked_again_and_waits_grow(here, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(hub, "WAITS", (1, 3, 9))
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    lists, files = answering(status=503, times=2), answering(status=429, of=is_file, times=3)
    here.fault = lambda handler: lists(handler) or files(handler)
    assert fetch_here().read_bytes() == CONTENT
    assert waited == [1, 3, 1, 3, 9] and "trying again in 3 s" in capsys.readouterr().err


OUTSIDE = ["../../../../../outside", "/{0}/outside", "a/../../../../../../outside", "..\\..\\outside", "C:/outside",
           "C:outside", "a//outside", "./outside", "outside\x1b]0;x\x07", "outside\0", "\ud83d", "x" * 300,
           f"{NAME}/outside"]


def test_names_that_lead_out_of_the_cache_do_not_exist(here, tmp_path):
    """Neither in the list nor for those who ask for them by name."""
    from loading.errors import WeightsError
    names = [name.format(tmp_path) for name in OUTSIDE]
    here.fault = answering(list_with(*({"rfilename": name, "size": 1} for name in names)))
    repo = hub.Repository(f"hub:{REPO}")
    assert {*repo.names} == {NAME, "x" * 300, f"{NAME}/outside"}
    for name in names:
        with pytest.raises(WeightsError):
            hub.fetch_lora(f"hub:{REPO}/{name}")
    assert fetch_here().read_bytes() == CONTENT
    assert not [path for path in [*tmp_path.rglob("*"), *tmp_path.parent.glob("*")] if "outside" in path.name]


@pytest.mark.parametrize("digest", ["../../../../outside", "a" * 40 + "/../../../outside", "/outside", "..", "a" * 39,
                                    "A" * 64, "", "W/x\x1b]0;x\x07"])
def test_checksums_and_etags_that_are_none_become_no_paths(digest, here, tmp_path):
    """In the list, where large and small files have theirs, and in the header ETag, if the list has none."""
    from loading.errors import WeightsError
    lists = [{"rfilename": NAME, "size": 9, **of} for of in ({"lfs": {"sha256": digest}}, {"blobId": digest})]
    etags = [{"rfilename": NAME}]
    for entry in lists + etags:
        listed = json.dumps({"sha": COMMIT, "siblings": [entry]}).encode()
        here.fault = lambda handler: answering(listed)(handler) or answering(
            of=is_file, X_Repo_Commit=COMMIT, ETag="x", X_Linked_ETag=f'"{digest}"', X_Linked_Size="9")(handler)
        with pytest.raises(WeightsError, match="gives no size and checksum to compare it with: found '.*'; check") as e:
            fetch_here()
        assert str(e.value).isprintable()
    assert left_in(tmp_path) == ["refs/main"] and [*tmp_path.iterdir()] == [tmp_path / "hub"]


def test_without_checksums_in_the_list_the_etag_counts(here, tmp_path):
    """As for hubs of other makers."""
    here.fault = answering(json.dumps({"sha": COMMIT, "siblings": [{"rfilename": NAME}]}).encode())
    assert fetch_here().read_bytes() == CONTENT


def test_a_download_that_was_killed_resumes_in_a_new_process(served, tmp_path):
    """Three processes are killed on the way. Each asks for what the ones before it lack, and not for a byte more."""
    served.files[REPO] = {NAME: CONTENT}
    stops, script = [200_000, 200_001, 900_000], f"from loading import hub; print(hub.fetch_lora('hub:{REPO}'))"
    partial = tmp_path / f"hub/models--me--lora/blobs/{digest_of(NAME, CONTENT)}.incomplete"

    def stall(handler):
        if is_list(handler):
            return False
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        starts.append(start)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(CONTENT) - start))
        handler.end_headers()
        handler.wfile.write(CONTENT[start:stops[len(starts) - 1]])
        handler.close_connection = True
        killed.wait(60)
        return True
    served.fault, starts = stall, []
    for stop in stops:
        killed = threading.Event()
        line, options = command(served, tmp_path, "-c", script)
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        while hub.size_of(partial) < stop and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        killed.set()
        assert hub.size_of(partial) == stop
    served.fault = None
    result = run(served, tmp_path, "-c", script)
    assert Path(result.stdout.strip()).read_bytes() == CONTENT, result.stderr
    assert starts == [0, *stops[:2]] and served.asked == [(f"{REPO}/{NAME}", stops[2])]
    assert left_in(tmp_path) == [f"blobs/{digest_of(NAME, CONTENT)}", "refs/main", f"snapshots/{COMMIT}/{NAME}"]


@pytest.mark.parametrize("there, asked", [
    (CONTENT, []), (CONTENT + b"x", [0]), (CONTENT[:-1], [len(CONTENT) - 1]), (b"", [0]), (b"y" + CONTENT[1:9], [9])])
def test_what_a_killed_process_left_is_checked_like_all_the_rest(there, asked, here, tmp_path):
    """It may be whole, too long, or wrong; and a hub that knows no ranges sends everything."""
    from loading.errors import WeightsError
    partial = tmp_path / f"hub/models--me--lora/blobs/{digest_of(NAME, CONTENT)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(there)
    if there.startswith(b"y"):
        with pytest.raises(WeightsError, match="was damaged on the way: expected"):
            fetch_here()
        asked = [*asked, 0]
    assert fetch_here().read_bytes() == CONTENT and [first for _, first in here.asked] == asked
    partial.with_suffix("").unlink()                         # the link to it stays
    partial.write_bytes(CONTENT[:100])
    here.fault = answering(CONTENT + b"more than it promised", of=is_file)
    assert fetch_here().read_bytes() == CONTENT and fetch_here().is_symlink()


def test_a_file_that_is_there_under_another_name_is_compared_but_not_fetched(here):
    """As after a new commit. Of the small file beside it, the hub gives git's hash."""
    from loading.errors import WeightsError
    here.files[REPO] |= {"b.safetensors": CONTENT, "config.json": b"{}"}
    blob = fetch_here().resolve()
    assert [name for name, _ in here.asked] == [f"{REPO}/{NAME}", f"{REPO}/config.json"]
    blob.write_bytes(FLIPPED)
    with pytest.raises(WeightsError, match="me/lora: b.safetensors was damaged on the way: expected"):
        hub.fetch_lora(f"hub:{REPO}/b.safetensors")
    for name in (NAME, "b.safetensors"):
        assert hub.fetch_lora(f"hub:{REPO}/{name}").resolve() == blob and blob.read_bytes() == CONTENT
    assert len(here.asked) == 3


@pytest.mark.parametrize("reference, message", [
    (f"{REPO}@..", "'..' is not a revision of me/lora: expected a branch, tag or commit, such as main"),
    ("me--x/lora", "does not name a repository of the hub"), ("me/..x", "does not name a repository of the hub")])
def test_repositories_and_revisions_become_no_other_paths_either(reference, message, here, tmp_path):
    from loading.errors import WeightsError
    with pytest.raises(WeightsError, match=message):
        hub.fetch_lora(f"hub:{reference}")
    assert [*tmp_path.iterdir()] == []


def test_leftovers_of_other_programs_are_swept_but_not_what_is_in_use(here, tmp_path):
    """huggingface_hub's files have a name of their own per download, so nothing resumes them."""
    from huggingface_hub.utils import WeakFileLock
    cache, old = tmp_path / "hub/models--me--lora", time.time() - 4000
    ages = {"a" * 64 + ".12345678.incomplete": old, "b" * 64 + ".12345678.incomplete": old,
            "c" * 64 + ".12345678.incomplete": time.time(), "d" * 64 + ".incomplete": old,
            "e" * 64 + ".incomplete": time.time() - 8 * 24 * 3600, f"{digest_of(NAME, CONTENT)}.incomplete": 0}
    (cache / "blobs").mkdir(parents=True)
    (tmp_path / "hub/.locks/models--me--lora").mkdir(parents=True)
    for name, changed in ages.items():
        (cache / "blobs" / name).write_bytes(CONTENT[:9])
        os.utime(cache / "blobs" / name, (changed, changed))
    with WeakFileLock(tmp_path / f"hub/.locks/models--me--lora/{'b' * 64}.lock"):
        fetch_here()
    kept = [path.name[0] for path in (cache / "blobs").glob("*.incomplete")]
    assert sorted(kept) == ["b", "c", "d"] and here.asked == [(f"{REPO}/{NAME}", 9)]


def test_a_full_disk_names_the_file_its_size_and_what_is_kept(here, tmp_path, monkeypatch):
    """Also a full quota, a file that is too large for the file system, and a disk of which it is known before."""
    import errno
    from collections import namedtuple
    from loading.errors import WeightsError
    full = f"the disk is full: {NAME} needs 0.001 GB, of which 0.000 GB are there and are kept: make room in .*, or set"
    partial = tmp_path / f"hub/models--me--lora/blobs/{digest_of(NAME, CONTENT)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(WeightsError, match=full):
        fetch_here()
    with monkeypatch.context() as patched:
        for number in (errno.EDQUOT, errno.EFBIG):
            def resume(*_, number=number):
                raise OSError(number, "no")
            patched.setattr(hub, "resume", resume)
            with pytest.raises(WeightsError, match=full):
                fetch_here()
    here.asked.clear()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(WeightsError, match=full):
        fetch_here()
    assert here.asked == []
    (tmp_path / "file").write_bytes(b"")
    from huggingface_hub import constants
    constants.HF_HUB_CACHE = str(tmp_path / "file")
    with pytest.raises(WeightsError, match="the cache cannot be used: .*set HF_HOME to another folder"):
        fetch_here()


def test_file_systems_without_links_hold_the_file_itself(here, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")
    monkeypatch.setattr(os, "symlink", refuse)
    assert fetch_here().read_bytes() == CONTENT and fetch_here().read_bytes() == CONTENT and len(here.asked) == 1
    assert left_in(tmp_path) == ["refs/main", f"snapshots/{COMMIT}/{NAME}"]


def test_two_processes_fetch_a_file_once_and_a_redirect_carries_no_token(here, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    store, seen = Hub(here.files), []

    def redirect(handler):
        seen.append(handler.headers["Authorization"])
        return is_file(handler) and (handler.answer(302, Location=store.url + handler.path) or True)
    here.fault = redirect
    store.fault = lambda handler: time.sleep(0.1) or seen.append(handler.headers["Authorization"])
    with ThreadPoolExecutor(2) as pool:
        assert [path.read_bytes() for path in pool.map(lambda _: fetch_here(), range(2))] == [CONTENT] * 2
    assert len(store.asked) == 1 and seen.count(None) == 1 and {*seen} == {"Bearer hf_secret", None}
    store.close()


def test_hashes_are_those_of_the_content(here, tmp_path, monkeypatch):
    """Not the name that a file has in the cache. Large ones are read once, and again when they changed."""
    path = fetch_here()
    assert hub.hash_of(path) == hashlib.sha256(CONTENT).hexdigest() == path.resolve().name
    path.resolve().write_bytes(FLIPPED)
    assert hub.hashes({"prior": path}) == {"prior": hashlib.sha256(FLIPPED).hexdigest()}
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(101_000_000)
    first, digest = hub.hash_of(large), hashlib.file_digest
    hub.HASHES.clear()
    monkeypatch.setattr(hashlib, "file_digest", None)        # now nothing can be read
    assert hub.hash_of(large) == first
    monkeypatch.setattr(hashlib, "file_digest", digest)
    with open(large, "r+b") as file:
        file.write(b"x")
    assert hub.hash_of(large) not in (first, "")
    for broken in ("[" * 100_000, "[]", "3", json.dumps({key: "../x" for key in hub.HASHES})):
        hub.HASHES.clear()
        (tmp_path / "wuerstchen/hashes.json").write_text(broken)
        assert re.fullmatch("[0-9a-f]{64}", hub.hash_of(path))


def test_what_was_verified_is_not_read_again(here, monkeypatch):
    """An image of fetched weights costs no second reading."""
    path = fetch_here()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert hub.hashes({"prior": path}) == {"prior": hashlib.sha256(CONTENT).hexdigest()}


def test_an_upload_to_a_hub_that_does_not_answer_ends(here, monkeypatch, capsys):
    """The training before it was not in vain, and ends with a line that names its result."""
    import socket
    from argparse import Namespace
    from huggingface_hub import constants
    from training import results
    monkeypatch.setattr(results, "pushed_files", lambda _: {})
    monkeypatch.setattr(results, "pushed_card", lambda _: "")
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        results.push(Namespace(push_to_hub="me/x", hub_token="hf_x", out="runs/x", steps=3))
    assert re.search("the upload failed, the result is in runs/x: .* cannot be reached", capsys.readouterr().err)
