"""What a run writes: curves, the folder, its card, and the upload to a fake hub on this machine."""
import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train_c
from training import results

ROOT = Path(__file__).parents[1]


class Hub:
    """Accepts uploads as the hub does: small files inside the commit, others before it, to an address of its choice."""
    def __init__(self, refuse: bool = False):
        self.files, self.stored = {}, {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, values, status: int = 200):
                content = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_PUT(self):
                outer.stored[self.path.rpartition("/")[2]] = self.body()
                self.answer({})

            def do_GET(self):
                self.answer({"id": "me/unicorn", "sha": "0" * 40, "siblings": []})

            def do_POST(self):
                body, here = self.body(), f"http://127.0.0.1:{self.server.server_port}"
                if refuse:
                    return self.answer({"error": "no"}, 403)
                if self.path == "/api/repos/create":
                    return self.answer({"url": f"{here}/me/unicorn"})
                if "/preupload/" in self.path:
                    return self.answer({"files": [{"path": file["path"], "shouldIgnore": False, "oid": None,
                                                   "uploadMode": "lfs" if file["path"].endswith(".safetensors")
                                                   else "regular"}
                                                  for file in json.loads(body)["files"]]})
                if self.path.endswith("/objects/batch"):
                    return self.answer({"transfer": "basic", "objects": [
                        {**file, "actions": {"upload": {"href": f"{here}/store/{file['oid']}"}}}
                        for file in json.loads(body)["objects"]]})
                if "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            outer.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                        elif line["key"] == "lfsFile":
                            outer.files[line["value"]["path"]] = outer.stored[line["value"]["oid"]]
                    return self.answer({"commitUrl": f"{here}/me/unicorn/commit/1", "commitOid": "1" * 40,
                                        "hookOutput": ""})
                # whether the card's header is well-formed, and the like
                self.answer({"errors": [], "warnings": []})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def run(self, *arguments) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
                       "HF_TOKEN": "hf_secret",
                       "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True,
                              text=True, timeout=300)


RUN = ["train_c.py", "--weights", "tiny", "--data", "examples/unicorn", "--lora", "--rank", "1", "--batch", "1",
       "--steps", "1", "--workers", "0",
       "--val-every", "0", "--trigger", "a unicorn", "--push-to-hub", "me/unicorn", "--out"]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """In the folder there is also what others left: a service, a cache, an older part, drafts."""
    hub, out = Hub(), tmp_path_factory.mktemp("push") / "unicorn"
    for name in ("wandb/run/config.yaml", "cache/latents-1/00/x.npy", "events.out.tfevents.1", "samples/draft.png",
                 "text_encoder/config.json", "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(str(out))
    result = hub.run(*RUN, out, "--data", ROOT / "examples" / "unicorn", "--cache", out / "cache")
    assert result.returncode == 0, result.stderr
    return hub, out, result


def test_a_result_is_uploaded_completely_and_nothing_else(pushed):
    hub, out, _ = pushed
    assert hub.files.keys() == {"lora.safetensors", "base.json", "README.md", "log.jsonl"}
    assert all((out / name).read_bytes() == content for name, content in hub.files.items())
    assert any((out / "checkpoints").iterdir())


def test_the_card_says_what_it_is_and_how_to_use_it(pushed):
    """No licence is invented and no base model; prompts are captions, and the commands are those of hub:OWNER/NAME."""
    hub, out, _ = pushed
    card = hub.files["README.md"].decode()
    head = card.split("---")[1]
    assert "lora" in head and "license" not in head and "base_model" not in head and "`tiny`, the small model" in card
    for colour in ("white", "red", "yellow"):
        prompt = f"a unicorn on a {colour} background"
        assert f"python sample.py --weights tiny --lora hub:me/unicorn --prompt '{prompt}'\n" in card
    assert 'model = Wuerstchen.load("tiny", lora="hub:me/unicorn")\n' \
           'model("a unicorn on a white background", seed=0)[0].save("image.png")\n' in card
    assert "**Limits.**" in card and "**a unicorn**" in card and "| `--rank` | 1 |" in card
    assert "| `--data` | unicorn |" in card
    everything = "".join(content.decode("latin1") for content in hub.files.values())
    assert not any(secret in everything for secret in ("hf_secret", str(out.parent), str(ROOT)))


def result_of(tmp_path, *options, script=train_c, out="mine"):
    """The options of a run and its folder, whose result is a card."""
    (tmp_path / out).mkdir(exist_ok=True)
    (tmp_path / out / "base.json").write_text("{}")
    return script.parse_args(["--data", "/home/me/photos", "--out", str(tmp_path / out), *options])


@pytest.mark.parametrize("weights, repo", [("v2-base", "warp-ai/wuerstchen-prior-model-base"),
                                           ("v2", "warp-ai/wuerstchen-prior"), ("hub:me/x@main/deep", "me/x")])
def test_the_base_model_of_a_card_has_its_name_on_the_hub(tmp_path, weights, repo):
    args = result_of(tmp_path, "--weights", weights, "--push-to-hub", "me/mine")
    results.write_card_c(args, Captions(["a cat"]))
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"\nbase_model: {repo}\n" in card and f"from `{weights}`" in card
    assert "python sample.py --weights hub:me/mine --prompt 'a cat'" in card
    assert 'Wuerstchen.load("hub:me/mine")' in card and "base.json" in results.pushed_files(args)


class Captions(list):
    def captions(self, i):
        return [self[i]]


@pytest.mark.parametrize("lora", [["--lora"], []], ids=str)
def test_what_starts_from_a_local_folder_names_no_path(tmp_path, lora):
    """base.json would name the folder, so it is not uploaded, and the commands ask for it."""
    folder = tmp_path / "secret" / "prior"
    folder.mkdir(parents=True)
    prompts = tmp_path / "secret" / "prompts.txt"
    prompts.write_text("a dog and/or a cat\n")
    args = result_of(tmp_path, "--weights", str(tmp_path / "secret"), "--vqgan", str(folder), *lora, "--push-to-hub",
                     "me/mine", "--sample-prompts", str(prompts), "--data", f"pipe:cat {folder}/*.tar", "--targets",
                     "(key|value)")
    results.write_card_c(args, Captions(["", "it's a\ncat", "it's a cat", "a tree", "a moon"]))
    card = (tmp_path / "mine" / "README.md").read_text()
    own = "--lora hub:me/mine" if lora else "--prior hub:me/mine/prior"
    for prompt in ("'a dog and/or a cat'", """'it'"'"'s a cat'""", "'a tree'"):
        assert f"python sample.py --weights FOLDER --vqgan FOLDER {own} --prompt {prompt}\n" in card
    assert "moon" not in card and "base_model" not in card and "local folder" in card
    assert "secret" not in card.replace("| `--weights` | secret |", "") and str(tmp_path) not in card
    assert "| `--data` | pipe: |" in card and ("| `--targets` | (key\\|value) |" in card) == bool(lora)
    assert "base.json" not in results.pushed_files(args)


def test_a_result_that_is_pushed_later_gets_the_commands_of_the_hub(tmp_path):
    """The user's own words in the card stay, and so does the file."""
    args = result_of(tmp_path, "--weights", "tiny", "--lora")
    results.write_card_c(args, Captions(["a cat"]))
    card = tmp_path / "mine" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert "--weights tiny --lora ./mine/lora.safetensors --prompt 'a cat'" in card.read_text()
    args.push_to_hub = "me/other"
    text = results.pushed_card(args)
    assert text.endswith("My own words.\n") and "--lora hub:me/other --prompt" in text and "./mine" not in text
    assert "./mine" in card.read_text()


@pytest.mark.parametrize("script, value, shown", [
    ("data", "/home/me/photos/", "photos"), ("data", "hub:me/photos:train", "hub:me/photos:train"),
    ("data", "scenes:all:16:1", "scenes:all:16:1"), ("data", "C:\\me\\photos", "photos"),
    ("sample_prompt", ["cats and/or dogs"], ["cats and/or dogs"]), ("steps", 3, 3),
    ("weights", "warp-ai/wuerstchen-prior", "warp-ai/wuerstchen-prior"), ("data", ["/a/b", "c/d"], ["b", "d"])],
    ids=str)
def test_settings_are_shown_without_folders(script, value, shown):
    assert results.without_folders(script, value) == shown


def test_an_upload_that_fails_does_not_look_like_a_failed_training(tmp_path):
    """The training may have taken days. Its result stays, and one line says why it is not on the hub."""
    result = Hub(refuse=True).run(*RUN, tmp_path / "out")
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "the upload failed, the result is in" in result.stderr and (tmp_path / "out" / "lora.safetensors").is_file()
