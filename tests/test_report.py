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
    hub, out = Hub(), tmp_path_factory.mktemp("push") / "unicorn"
    result = hub.run(*RUN, out)
    assert result.returncode == 0, result.stderr
    return hub, out, result


def test_a_result_is_uploaded_completely_and_without_checkpoints(pushed):
    hub, out, _ = pushed
    assert hub.files.keys() == {"lora.safetensors", "base.json", "README.md", "log.jsonl"}
    assert all((out / name).read_bytes() == content for name, content in hub.files.items())
    assert any((out / "checkpoints").iterdir())


def test_the_card_says_what_it_is_and_how_to_use_it(pushed):
    hub, out, _ = pushed
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n") and "lora" in card.split("---")[1]
    assert "hf download me/unicorn" in card and "--weights" in card and "**a unicorn**" in card
    assert "| `--rank` | 1 |" in card
    assert "hf_secret" not in card and str(out.parent) not in "".join(content.decode("latin1")
                                                                      for content in hub.files.values())


def test_an_upload_that_fails_does_not_look_like_a_failed_training(tmp_path):
    """The training may have taken days. Its result stays, and one line says why it is not on the hub."""
    result = Hub(refuse=True).run(*RUN, tmp_path / "out")
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "the upload failed, the result is in" in result.stderr and (tmp_path / "out" / "lora.safetensors").is_file()
