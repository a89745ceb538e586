"""The cache returns what was stored or nothing: never half an entry, never another encoder's, never a NaN."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from loading import files
from helpers import TINY
from loading.weights import load_text_encoder
from training.cache import Cache, CachedTexts, hash_of

ROOT = Path(__file__).parent.parent
SETTINGS = {"kind": "latents", "resolution": 1024}


def array(seed: int = 0, shape=(16, 24, 24)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ----- entries ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_array_comes_back_unchanged_in_the_dtype_of_the_cache(tmp_path, dtype):
    """float16 has half the size and 3 digits; the latents of an encoder that is accurate to 2 need no more."""
    cache = Cache(tmp_path, "encoder", {**SETTINGS, "dtype": dtype})
    assert cache.get("a") is None
    cache.put("a", array())
    found = Cache(tmp_path, "encoder", {**SETTINGS, "dtype": dtype}).get("a", shape=(16, 24, 24))
    assert found.dtype == dtype and found.flags.writeable
    np.testing.assert_array_equal(found, array().astype(dtype))
    np.testing.assert_array_equal(np.load(cache.path("a")), found)        # a plain .npy file to every other program
    cache.put("a", array(1))
    np.testing.assert_array_equal(cache.get("a"), array(1).astype(dtype))


@pytest.mark.parametrize("value", [np.array(3.5), np.zeros((0, 4)), np.arange(24.0).reshape(2, 3, 4).T,
                                   torch.ones(2, 3)])
def test_arrays_of_every_layout_keep_their_shape(tmp_path, value):
    cache = Cache(tmp_path, "encoder", {"dtype": "float32"})
    cache.put("x", value)
    np.testing.assert_array_equal(cache.get("x"), np.asarray(value))


def test_other_settings_another_encoder_or_type_never_meet(tmp_path):
    """Old latents under a new encoder would train Stage C on nonsense, without any error."""
    variants = [("encoder", SETTINGS), ("other", SETTINGS), ("encoder", {**SETTINGS, "resolution": 512}),
                ("encoder", {**SETTINGS, "dtype": "float32"}), ("encoder", {**SETTINGS, "kind": "text"}),
                ("encoder", {})]
    caches = [Cache(tmp_path, *variant) for variant in variants]
    for i, cache in enumerate(caches):
        assert cache.get("a") is None and cache.missing(["a"]) == ["a"]
        cache.put("a", array(i))
    assert len({cache.path("a") for cache in caches}) == len({cache.path("a").name for cache in caches}) == 6
    for i, cache in enumerate(caches):
        np.testing.assert_array_equal(cache.get("a"), array(i).astype(cache.dtype))
    # order and defaults do not count
    same = Cache(tmp_path, "encoder", {"resolution": 1024, "dtype": "float16", "kind": "latents"})
    assert same.path("a") == caches[0].path("a")


def test_a_folder_tells_people_what_it_contains(tmp_path):
    cache = Cache(tmp_path, "abc123", SETTINGS)
    info = json.loads((cache.folder / "info.json").read_text())
    assert cache.folder.name.startswith("latents-")
    assert info == {"encoder": "abc123", "settings": {**SETTINGS, "dtype": "float16"}}
    (cache.folder / "info.json").write_text("a note of mine")
    Cache(tmp_path, "abc123", SETTINGS)
    assert (cache.folder / "info.json").read_text() == "a note of mine"


def test_captions_are_kept_once_however_many_images_share_them(tmp_path):
    """Any text is a key, whatever its letters: they are hashed, and never part of a path."""
    cache, captions = Cache(tmp_path, "clip", {"kind": "text"}), ["", "a cat", "../../a/b\0c", "猫" * 5000,
                                                                  "a cat "] * 200
    todo = cache.missing(captions)
    assert todo == captions[:5]
    for i, caption in enumerate(todo):
        cache.put(caption, array(i, (7, 8)))
    assert not cache.missing(captions) and len(list(cache.folder.glob("??/*.npy"))) == 5
    assert cache.missing(["a dog", "a cat", "a dog"]) == ["a dog"]
    np.testing.assert_array_equal(cache.get("a cat "), array(4, (7, 8)).astype(np.float16))


def test_the_rest_of_the_work_is_shared_without_communication(tmp_path):
    """Every rank lists what is missing before any of them writes; their parts are all of it."""
    cache, keys = Cache(tmp_path, "encoder", SETTINGS), [f"image {i}" for i in range(100)]
    for key in keys[::7]:
        cache.put(key, array(0, (4,)))
    missing = cache.missing(keys)
    assert missing == [key for i, key in enumerate(keys) if i % 7]
    assert sorted(missing[0::3] + missing[1::3] + missing[2::3]) == sorted(missing)


# ----- rejected values -------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_nan_and_infinity_are_rejected(tmp_path, value):
    """Another trainer replaced NaN in latents by 0 and continued on garbage. 1e6 is beyond float16."""
    cache, bad = Cache(tmp_path, "encoder", SETTINGS), array()
    bad[3, 4, 5] = value
    with pytest.raises(ValueError, match="cannot store 'a': it contains numbers that are NaN or beyond float16"):
        cache.put("a", bad)
    assert cache.get("a") is None and not list(cache.folder.glob("??/*"))


@pytest.mark.parametrize("settings, error, message",
                         [({"dtype": "bfloat16"}, ValueError,
                           "a cache of bfloat16, expected float16, float32, int16 or int32"),
                                                      ({"x": {1, 2}}, TypeError, "JSON")])
def test_impossible_settings_are_rejected(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        Cache(tmp_path, "encoder", settings)


def damage(cache: Cache, kind: str) -> None:
    path = cache.path("a")
    content = bytearray(path.read_bytes())
    if kind == "cut off":
        content = content[:len(content) // 2]
    elif kind == "empty":
        content = b""
    elif kind == "zeros":                                  # left by a power cut if the file was not flushed
        content = bytes(len(content))
    elif kind == "one bit":
        content[1000] ^= 1
    elif kind == "of another key":
        content = cache.path("b").read_bytes()
    elif kind == "another's file":
        np.save(path, array())
        return
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut off", "empty", "zeros", "one bit", "of another key", "another's file"])
def test_a_damaged_entry_is_removed_with_a_warning_and_made_again(tmp_path, kind):
    cache = Cache(tmp_path, "encoder", SETTINGS)
    cache.put("a", array())
    cache.put("b", array(1))
    damage(cache, kind)
    with pytest.warns(UserWarning, match=r"a?.*\.npy is removed and computed again: its checksum does not match"):
        assert cache.get("a") is None
    assert cache.missing(["a", "b"]) == ["a"] and not cache.path("a").exists()
    cache.put("a", array())
    np.testing.assert_array_equal(cache.get("a"), array().astype(np.float16))


def test_an_entry_of_another_shape_is_removed_with_a_warning(tmp_path):
    """The key lacks something, such as the size an image was cut to."""
    cache = Cache(tmp_path, "encoder", SETTINGS)
    cache.put("a", array())
    with pytest.warns(UserWarning, match=r"it has shape \(16, 24, 24\), expected \(16, 18, 30\)"):
        assert cache.get("a", shape=(16, 18, 30)) is None


# ----- many at once ----------------------------------------------------------------------------------

def test_killed_runs_leave_no_torn_entry_and_their_leftovers_are_removed(tmp_path, monkeypatch):
    """An entry gets its name when it is complete."""
    cache = Cache(tmp_path, "encoder", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.put("a", array())
    assert cache.missing(["a"]) == ["a"] and not list((cache.folder / "writing").iterdir())
    with files.temporary_path(cache.folder / "writing" / "a.npy") as living:
        killed = living.with_name(living.name[:-12] + "00000000.npy")
        killed.write_text("torn")
        monkeypatch.setattr(files, "SWEPT", set())       # as in a new process
        Cache(tmp_path, "encoder", SETTINGS)
        assert living.exists() and not killed.exists()


WRITER = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from training.cache import Cache
cache = Cache({folder!r}, "encoder", {{"kind": "latents"}})
expected = np.random.default_rng(0).standard_normal((16, 24, 24)).astype(np.float16)
print("ready", flush=True)
sys.stdin.readline()
end, rounds = time.time() + 1, 0
while time.time() < end:
    for key in "ab":
        cache.put(key, expected)
        found = cache.get(key)
        assert found is not None and (found == expected).all()
    rounds += 1
print(rounds)
"""


def test_processes_that_write_the_same_key_at_once_never_see_a_torn_one(tmp_path):
    """Two ranks do that, or two runs that share a folder."""
    script = WRITER.format(root=str(ROOT), folder=str(tmp_path))
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", script], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        out, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0 and int(out) > 10, errors
    cache = Cache(tmp_path, "encoder", {"kind": "latents"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cache.get("a"), array().astype(np.float16))
    assert len(list(cache.folder.glob("??/*"))) == 2 and not list((cache.folder / "writing").iterdir())


# ----- the encoder's hash ----------------------------------------------------------------------------

def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4, bias=False))


def change(module: torch.nn.Module, kind: str) -> torch.nn.Module:
    if kind == "a weight":
        module[0].weight.data[0, 0, 0, 0] += 1e-6
    elif kind == "a buffer":
        module[1].running_mean[2] = 1e-3
    elif kind == "the type":
        module.half()
    elif kind == "a shape":
        module[2].weight.data = module[2].weight.data.reshape(2, 8)
    elif kind == "a name":
        module = torch.nn.ModuleDict({"0": module[0], "1": module[1], "3": module[2]})
    elif kind == "two weights, exchanged":
        module[1].weight.data, module[1].bias.data = module[1].bias.data, module[1].weight.data
    return module


def test_the_hash_covers_all_numbers_and_names():
    """One number of a million, changed by rounding, must give other entries."""
    kinds = ["a weight", "a buffer", "the type", "a shape", "a name", "two weights, exchanged"]
    hashes = [hash_of(model())] + [hash_of(change(model(), kind)) for kind in kinds]
    assert len(set(hashes)) == 7 and all(len(h) == 64 for h in hashes)


def test_the_hash_does_not_depend_on_how_the_model_lies_in_memory():
    """Nor on mode, gradients, or a loaded state."""
    expected, other = hash_of(model()), model().to(memory_format=torch.channels_last).train().requires_grad_(False)
    assert not other[0].weight.is_contiguous() and hash_of(other) == expected
    fresh = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4, bias=False))
    fresh.load_state_dict(model().state_dict())
    assert hash_of(fresh.eval()) == expected
    assert hash_of(model().bfloat16()) != expected         # a type that numpy does not know


# --- embeddings of captions ---------------------------------------------------------------------------

@pytest.mark.parametrize("on_disk", [False, True])
def test_missing_captions_are_encoded_together_and_no_neighbour_changes_one(tmp_path, on_disk):
    """To the bit: always 4 rows at a time. By themselves or in batches of 2 or 3, rows would round differently."""
    encoder, calls = load_text_encoder(TINY / "text_encoder", TINY / "tokenizer"), []

    def counted(captions):
        calls.append(captions)
        return encoder(captions)
    cat, dog, moon, key, fish = captions = [f"a {name} on a red background" for name in "cat dog moon key fish".split()]
    cache = Cache(tmp_path, "encoder", {"kind": "texts"}) if on_disk else None
    texts = CachedTexts(counted, torch.device("cpu"), cache, rows=4)
    together = dict(zip(captions, texts(captions)))
    assert calls == [[cat, dog, moon, key], [fish, "", "", ""]] and together[cat].dtype == torch.float32
    assert torch.equal(texts([fish, cat, fish]), torch.stack([together[name] for name in (fish, cat, fish)]))
    assert len(calls) == 2                                                # all were known
    torch.testing.assert_close(together[cat], encoder([cat])[0], rtol=0, atol=2e-3 if on_disk else 1e-5)
    for batch in ([cat], [fish, cat], [key, cat, moon], [moon, fish, dog, cat]):
        other = CachedTexts(encoder, torch.device("cpu"), None, rows=4)
        if on_disk:
            other.cache = Cache(tmp_path / "another", "encoder", {"kind": "texts"})
        with torch.autocast("cpu", torch.bfloat16):                       # as inside a validation
            assert all(torch.equal(row, together[name]) for row, name in zip(other(batch), batch))


def test_memory_holds_the_newest_captions(tmp_path):
    """Also with more in one batch than it holds."""
    encoder = lambda captions: torch.tensor([[[float(caption)]] for caption in captions])        # noqa: E731
    texts = CachedTexts(encoder, torch.device("cpu"), most=2)
    assert texts(["1", "2", "3", "1"]).flatten().tolist() == [1, 2, 3, 1] and [*texts.memory] == ["2", "3"]
    assert texts(["1", "3"]).flatten().tolist() == [1, 3] and [*texts.memory] == ["3", "1"]
