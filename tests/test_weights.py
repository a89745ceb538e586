"""Weights load into the right tensors and are saved unchanged; each unusable file is one clear line."""
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loading import files
from loading import weights
from loading.layouts import check_scheduler, find_parts
from loading.names import config_to_diffusers, config_to_ours, original_to_diffusers, to_diffusers, to_original
from loading.text_encoder import CLIPTextModel
from tools.weights import convert, main
from loading.errors import UserError, WeightsError, as_user_error, exit_on_user_error
from helpers import COMBINED, MANIFESTS, PUBLISHED, SMALL_V1, build, golden, manifest, rel, small_v1, under
from stage_a import StageA
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder
from v1.stage_b import StageBV1
from stage_c import StageC

CONFIGS = MANIFESTS / "diffusers_configs"
PARTS = {StageA: ("vqgan", weights.load_stage_a, weights.save_model),
         StageB: ("decoder", weights.load_stage_b, weights.save_model),
         StageC: ("prior_prior", weights.load_stage_c, weights.save_model)}
STAGES = list(PARTS)
FILE = "diffusion_pytorch_model.safetensors"


def small_tiny_encoder():
    return TinyImageEncoder(c_hidden=(4, 8, 8, 8), blocks=(1, 1, 1, 1))


# --- names and shapes --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, build_model, translate", [
    ("stage_a_vqgan", lambda: StageA(), to_original),
    ("stage_b_v1", lambda: StageBV1(), to_original),
    ("stage_b_v2", lambda: StageB(), to_original),
    ("stage_c_v2", lambda: StageC(), to_original),
    ("stage_c_v1", lambda: StageC(c_cond=1024), to_original),
    ("effnet_v1", lambda: EfficientNetEncoder(network="efficientnet_v2_l"), to_original),
    ("effnet_v2", lambda: EfficientNetEncoder(), to_original),
    ("diffusers_vqgan", lambda: StageA(), to_diffusers),
    ("diffusers_decoder_v2", lambda: StageB(), to_diffusers),
    ("diffusers_prior_v2", lambda: StageC(), to_diffusers)])
def test_official_sizes_have_the_official_names_and_shapes(name, build_model, translate):
    """The defaults of our classes are the released sizes: all names and shapes match the manifests. Takes no memory."""
    with torch.device("meta"):
        model = build_model()
    found = {key: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
             for key, t in translate(model.state_dict(), model).items()}
    assert found == manifest(name)


@pytest.mark.parametrize("name, stage", [
    ("prior", StageC), ("prior_edges", StageC), ("diffnext", StageB), ("diffnext_three_levels", StageB),
    ("vqgan", StageA), ("vqgan_three_levels", StageA)])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_names_go_to_ours_and_back_unchanged(name, stage, naming):
    """Both namings, bit by bit: a file loaded and saved is the same file."""
    data, config = golden(name)
    source = under(f"sd/{naming}/", data)
    model = build(stage, config["model"], source)
    for back, other in ((to_original, "original"), (to_diffusers, "diffusers")):
        found, wanted = back(model.state_dict(), model), under(f"sd/{other}/", data)
        assert found.keys() == wanted.keys()
        assert all(found[key].shape == wanted[key].shape and torch.equal(found[key], wanted[key]) for key in wanted)


def test_attention_thirds_are_query_key_value_in_this_order():
    """Swapped thirds have the same shapes, so only the order itself can be checked."""
    fused = {"attention.attn.in_proj_bias": torch.arange(6.0)}
    split = original_to_diffusers(fused)
    assert {name: t.tolist() for name, t in split.items()} == {
        "attention.to_q.bias": [0, 1], "attention.to_k.bias": [2, 3], "attention.to_v.bias": [4, 5]}


# --- config.json -------------------------------------------------------------------------------------

@pytest.mark.parametrize("place, stage", [
    ("combined/vqgan", StageA), ("combined/decoder", StageB), ("combined/prior_prior", StageC),
    ("wuerstchen/vqgan", StageA), ("wuerstchen/decoder", StageB), ("wuerstchen-prior/prior", StageC)])
def test_published_configs_are_our_defaults(place, stage):
    """And are written back unchanged, except for diffusers' version number."""
    config = json.loads((CONFIGS / place / "config.json").read_text())
    arguments = config_to_ours(config, stage)
    with torch.device("meta"):
        written, default = config_to_diffusers(stage(**arguments)), stage()
    del config["_diffusers_version"]
    assert written == config and default.config == arguments


def test_missing_keys_mean_diffusers_defaults():
    """diffusers leaves such keys to its classes, whose defaults for Stage C are not the released sizes."""
    assert config_to_ours({}, StageC) == dict(c_in=16, c=1280, c_cond=1024, c_timestep=64, depth=16, heads=16,
                                                      dropout=0.1)
    with torch.device("meta"):
        official_a, official_b = StageA().config, StageB().config
    assert config_to_ours({}, StageB) == official_b
    with torch.device("meta"):
        assert config_to_ours({}, StageBV1) == StageBV1().config
    assert config_to_ours({"scale_factor": 1}, StageA) == official_a | {"scale_factor": 1}


@pytest.mark.parametrize("stage, change, message", [
    (StageC, {"_class_name": "WuerstchenDiffNeXt"}, "describes a WuerstchenDiffNeXt, expected a WuerstchenPrior"),
    (StageC, {"depth": "two"}, "depth is 'two', expected something like 16"),
    (StageB, {"dropout": [0.1, 0.1]}, "dropout is .*expected something like 0.1, or 4 of them, one for each level"),
    (StageB, {"dropout": [0.1, 0.1, 0.1, "x"]}, "dropout is .*expected something like 0.1, or 4 of them"),
    (StageC, {"dropout": [0.1, 0.1]}, "dropout is .*expected something like 0.1$"),
    (StageB, {"level_config": ["CT", "CTF", "CTA", "CTA"]}, "'CTF' has an unknown letter 'F'"),
    (StageB, {"blocks": [1]}, "cannot be used"),
    (StageA, {"in_channels": 4}, "in_channels is 4, only 3 is supported"),
    (StageB, {"_class_name": "Paella"}, "describes a Paella, expected a WuerstchenDiffNeXt"),
    (StageC, {"c": -8}, "cannot be used")])
def test_impossible_configs_are_explained(stage, change, message, tmp_path):
    place, load, _ = PARTS[stage]
    shutil.copytree(COMBINED / place, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=message) as error:
        load(tmp_path / "x")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_dropout_may_be_one_number_for_each_level():
    """As diffusers' own constructor allows; written back unchanged."""
    config = {"dropout": [0.1, 0, 0.2, 0.3]}
    assert config_to_ours(config, StageB)["dropout"] == (0.1, 0, 0.2, 0.3)
    with torch.device("meta"):
        written = config_to_diffusers(StageB(**config_to_ours(config, StageB)))
    assert written["dropout"] == config["dropout"]


def test_unknown_options_are_a_warning():
    """Later versions of diffusers may add some. An option that changes a tensor is found by its shape."""
    with pytest.warns(UserWarning, match="not used here: flavour"):
        config_to_ours({"flavour": "ham", "_diffusers_version": "9"}, StageC)


# --- loading -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_loading_gives_a_model_ready_to_use(stage):
    """Eval mode, float32, trainable, every buffer filled. No random number was drawn only to be overwritten."""
    place, load, _ = PARTS[stage]
    state = torch.get_rng_state()
    model = load(COMBINED / place)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    found, wanted = to_diffusers(model.state_dict(), model), load_file(COMBINED / place / FILE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_dtype_reaches_all_but_counters():
    model = weights.load_stage_a(COMBINED / "vqgan", torch.bfloat16)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert dtypes.pop("norm_latent.num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {torch.bfloat16}


def test_bin_files_are_a_fallback(tmp_path):
    """Older folders hold a pickle instead; it is read without running its code."""
    shutil.copy(COMBINED / "vqgan/config.json", tmp_path)
    tensors = load_file(COMBINED / "vqgan" / FILE)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    a, b = weights.load_stage_a(tmp_path), weights.load_stage_a(COMBINED / "vqgan")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))
    torch.save({"x": Evil()}, tmp_path / "diffusion_pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load_stage_a(tmp_path)
    assert not (tmp_path / "was_here").exists()


def shard(folder, index, name, change=lambda weight_map: None):
    """Splits a Stage C into two files and an index, as save_pretrained(max_shard_size=...) does."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = name.format(i)
        some = {key: tensors[key] for key in part}
        save_file(some, folder / file) if file.endswith("safetensors") else torch.save(some, folder / file)
        weight_map |= dict.fromkeys(part, file)
    change(weight_map)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("index, name", [
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00002.safetensors"),
    ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors"),
    ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-0000{}-of-00002.bin")])
def test_sharded_weights_are_one_model(index, name, tmp_path):
    """Large models are saved in several files. The same tensors, for loading, for converting and for their names."""
    folder = tmp_path / "prior"
    shutil.copytree(COMBINED / "prior_prior", folder)
    wanted = weights.load_stage_c(folder).state_dict()
    shard(folder, index, name)
    loaded = weights.load_stage_c(folder).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in wanted.items())
    assert convert(folder, tmp_path / "one", "diffusers") == len(wanted)
    loaded = weights.load_stage_c(tmp_path / "one").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in wanted.items())


def set_all(value):
    return lambda weight_map: weight_map.update(dict.fromkeys(weight_map, value))


@pytest.mark.parametrize("change, message", [
    (set_all("../secret.safetensors"), r"names '../secret.safetensors': expected only .* in the same folder"),
    (set_all("/etc/secret.safetensors"), "names '/etc/secret.safetensors'"),
    (set_all(".."), r"names '..'"),
    (set_all("x.safetensors.index.json"), "expected only .safetensors or .bin files"),
    (set_all(3), "expected a weight_map from tensors to files"),
    (lambda weight_map: weight_map.clear(), "expected a weight_map from tensors to files"),
    (lambda weight_map: weight_map.update(a="lost-1.safetensors", b="lost-2.safetensors"),
     r"names files that are missing: lost-1.safetensors, lost-2.safetensors$"),
    (set_all("model-1.safetensors"), r"missing tensors: \d+ \(")])
def test_an_index_that_cannot_be_used_is_explained_in_one_line(change, message, tmp_path):
    """Names that leave the folder are refused even if the file is there: an index may come from a stranger."""
    folder = tmp_path / "prior"
    shutil.copytree(COMBINED / "prior_prior", folder)
    shutil.copy(folder / FILE, tmp_path / "secret.safetensors")
    shard(folder, "diffusion_pytorch_model.safetensors.index.json", "model-{}.safetensors", change)
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_stage_c(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    """Either of the two could be the right one."""
    folder = tmp_path / "prior"
    shutil.copytree(COMBINED / "prior_prior", folder)
    shard(folder, "diffusion_pytorch_model.safetensors.index.json", "model-{}.safetensors")
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
    with pytest.raises(WeightsError, match="index.json holds .* twice"):
        weights.load_stage_c(folder)


@pytest.mark.parametrize("half, offered, taken", [
    (False, ["m.safetensors", "m.fp16.safetensors", "m.bin"], "m.safetensors"),
    (True, ["m.safetensors", "m.fp16.safetensors"], "m.fp16.safetensors"),
    (False, ["m.bf16.safetensors", "m.bin"], "m.bf16.safetensors"),
    (False, ["m.non_ema.safetensors", "m.ema.safetensors", "notes.txt"], "m.ema.safetensors"),
    (False, ["m.fp16.bin"], "m.fp16.bin"),
    (False, ["m-00001-of-00002.safetensors", "m.safetensors.index.json"], "m.safetensors.index.json"),
    (True, ["m.safetensors.index.json", "m.safetensors.index.fp16.json"], "m.safetensors.index.fp16.json"),
    (True, ["m.fp16.safetensors.index.json", "m.bin"], "m.fp16.safetensors.index.json"),
    (False, ["m.safetensors", "m.safetensors.index.json"], "m.safetensors"),
    (False, ["m-00001-of-00002.safetensors", "m.fp16-00001-of-00002.safetensors", "other.safetensors"], None)])
def test_one_weight_file_of_a_folder_is_taken(half, offered, taken):
    """.safetensors before .bin, then the variant, then one file before shards. A lone shard is not a model."""
    options = dict(half=True) if half else {}              # unless asked otherwise, the full precision
    assert files.pick_weights(offered, ("m", "pytorch_m"), **options) == taken


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_prefixes_of_compiled_and_distributed_models_are_removed(prefix, ending, tmp_path):
    """torch.compile and DistributedDataParallel put them before every name of a state dict."""
    shutil.copy(COMBINED / "vqgan/config.json", tmp_path)
    tensors = {prefix + name: tensor for name, tensor in load_file(COMBINED / "vqgan" / FILE).items()}
    path = tmp_path / f"diffusion_pytorch_model{ending}"
    save_file(tensors, path) if ending == ".safetensors" else torch.save({"state_dict": tensors}, path)
    a, b = weights.load_stage_a(tmp_path).state_dict(), weights.load_stage_a(COMBINED / "vqgan").state_dict()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    first = next(iter(tensors))
    torch.save(tensors | {first.removeprefix(prefix): tensors[first]}, tmp_path / "twice.pt")
    with pytest.raises(WeightsError, match=f"twice.pt holds {first.removeprefix(prefix)} twice"):
        weights.load_stage_a(tmp_path / "twice.pt")


def test_a_header_that_begins_like_a_web_page_is_one_of_safetensors(tmp_path):
    """The first bytes are the header's length: 15392 is " <" and some zeros."""
    path = tmp_path / "a.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(15392)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    assert files.TensorFile(path).shapes == {"x": (1,)}


def test_a_safetensors_file_is_known_by_its_content(tmp_path):
    """People rename downloads."""
    for name in ("config.json", FILE):
        shutil.copy(COMBINED / "vqgan" / name, tmp_path / name.replace(FILE, "a.pt"))
    codes = weights.load_stage_a(COMBINED / "vqgan").codebook.codes
    assert torch.equal(weights.load_stage_a(tmp_path / "a.pt").codebook.codes, codes)


def test_an_image_as_weights_is_one_plain_line(tmp_path):
    """torch's advice would be to load the file with weights_only=False, which executes what is in it."""
    from PIL import Image
    for name, ends in (("a.png", "not a file of weights but an image: expected a .safetensors, .bin or .pt file"),
                       ("a.jpg", "not a file of weights but an image: expected a .safetensors, .bin or .pt file")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(WeightsError) as error:
            weights.load_stage_a(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name} is {ends}"
    (tmp_path / "notes.bin").write_text("what I did on my holidays")
    with pytest.raises(WeightsError, match="notes.bin is not a file of weights: expected a .safetensors, .bin or .pt"):
        weights.load_stage_a(tmp_path / "notes.bin")
    torch.save({"args": shutil.copy}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match="it holds more than tensors and plain values, and nothing in a"):
        weights.load_stage_a(tmp_path / "more.pt")


def damage(folder, how):
    """Damages a Stage C folder in the named way."""
    path = folder / FILE
    tensors = load_file(path)
    if how == "config missing":
        (folder / "config.json").unlink()
    elif how == "config broken":
        (folder / "config.json").write_text('{"c": 32,')
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "weights missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "html":
        path.write_text("\n<!DOCTYPE html><html><body>404</body></html>")
    elif how == "tensor missing":
        del tensors["projection.weight"], tensors["blocks.0.depthwise.bias"]
        save_file(tensors, path)
    elif how == "tensor unknown":
        save_file({**tensors, "blocks.6.mapper.weight": torch.zeros(1)}, path)
    elif how == "shape":
        save_file({**tensors, "projection.weight": torch.zeros(32, 16)}, path)
    elif how == "nan":
        tensors["blocks.1.mapper.weight"][3, 3] = float("nan")
        save_file(tensors, path)
    elif how == "infinity":
        tensors["blocks.1.mapper.weight"][3, 3] = float("-inf")
        save_file(tensors, path)


@pytest.mark.parametrize("how, message", [
    ("config missing", "config.json is missing: found diffusion_pytorch_model.safetensors"),
    ("config broken", "config.json cannot be read"),
    ("config is a list", "does not hold a JSON object"),
    ("weights missing", "safetensors is missing: found config.json"),
    ("cut off", "cannot be read, presumably it is cut off"),
    ("empty", "cannot be read, presumably it is cut off"),
    ("lfs", "is a Git LFS pointer, not the weights: fetch the file itself"),
    ("html", "is a web page, not weights"),
    ("tensor missing", r"missing tensors: 2 \(projection.weight, blocks.0.depthwise.bias\)"),
    ("tensor unknown", r"unknown tensors: 1 \(blocks.6.mapper.weight\)"),
    ("shape", r"wrong shapes: 1 \(projection.weight is \(32, 16\), expected \(32, 16, 1, 1\)\)"),
    ("nan", "timestep_blocks.0.mapper.weight contains NaN or infinity"),
    ("infinity", "timestep_blocks.0.mapper.weight contains NaN or infinity")])
def test_damaged_folders_are_explained_in_one_line(how, message, tmp_path):
    """Never a traceback from a library, never a model that loads and generates badly."""
    folder = tmp_path / "prior"
    shutil.copytree(COMBINED / "prior_prior", folder)
    damage(folder, how)
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_stage_c(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_is_explained(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: there is no such file or folder"):
        weights.load_stage_b(tmp_path / "nowhere")


def test_weights_of_another_size_name_the_first_few():
    """One line even if hundreds of tensors differ."""
    data, config = golden("diffnext")
    with pytest.raises(WeightsError, match="missing tensors: .*unknown tensors: .*wrong shapes: ") as error:
        build(StageB, {**config["model"], "c_cond": 16, "blocks": [1, 2, 1, 1]}, under("sd/original/", data))
    assert len(str(error.value)) < 1000


def test_overflow_in_half_precision_is_found():
    """70000 is fine in float32 and infinite in float16."""
    data, config = golden("prior")
    state_dict = under("sd/diffusers/", data)
    state_dict["projection.bias"] = state_dict["projection.bias"] + 70000
    build(StageC, config["model"], state_dict)
    with pytest.raises(WeightsError, match="embed.bias contains NaN or infinity in torch.float16"):
        build(StageC, config["model"], state_dict, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_at_any_position(dtype, wrong):
    """At the ends and in the middle, inside and outside the part that vector instructions read.

    Integers and empty tensors are finite.
    """
    for n in (1, 7, 64, 1000, 100_000):
        for position in {0, n // 2, n - 1}:
            tensor = torch.randn(n).to(dtype)
            assert files.is_finite(tensor)
            tensor[position] = wrong
            assert not files.is_finite(tensor)
    assert files.is_finite(torch.empty(0, 3, dtype=dtype)) and files.is_finite(torch.tensor(7))
    assert files.is_finite(torch.tensor(-1, dtype=torch.int8))


# --- saving ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_saved_models_are_as_diffusers_writes_them(stage, tmp_path):
    """Same names, shapes and config.json; float16; saving what was loaded gives the same bytes again."""
    place, load, save = PARTS[stage]
    save(load(COMBINED / place), tmp_path / "1")
    found, wanted = load_file(tmp_path / "1" / FILE), load_file(COMBINED / place / FILE)
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype))
        assert tensor.dtype == torch.float16 or name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    text = (COMBINED / place / "config.json").read_text()
    assert (tmp_path / "1/config.json").read_text().strip() == "\n".join(
        line for line in text.splitlines() if "_diffusers_version" not in line)
    save(load(tmp_path / "1"), tmp_path / "2")
    assert (tmp_path / "1" / FILE).read_bytes() == (tmp_path / "2" / FILE).read_bytes()
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["config.json", FILE]      # no temporary files


def test_scale_factor_of_training_is_saved(tmp_path):
    """It is measured at the end of training, long after the model was built."""
    model = StageA(2, 1, 16, 4, 32, scale_factor=1.0)
    model.scale_factor = model.config["scale_factor"] = 0.4321
    weights.save_model(model, tmp_path)
    assert weights.load_stage_a(tmp_path).scale_factor == 0.4321
    model.scale_factor = 2.0
    with pytest.raises(AssertionError, match="in one place only"):
        weights.save_model(model, tmp_path)


@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_numbers_float16_cannot_hold_are_not_saved(value, tmp_path):
    """An infinity would be written silently. The old file stays unchanged."""
    model = weights.load_stage_c(COMBINED / "prior_prior")
    weights.save_model(model, tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with torch.no_grad():
        model.head.bias[0] = value
    with pytest.raises(WeightsError, match="out.1.bias cannot be saved in float16"):
        weights.save_model(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


@torch.no_grad()
def test_image_encoders_are_saved_and_loaded(tmp_path):
    """Ours keeps its scale of 42 fixed; running statistics are equal bit by bit, since encoding divides by them."""
    model = small_tiny_encoder()
    model(torch.randn(4, 3, 64, 64))                         # train mode: moves the running statistics
    weights.save_model(model, tmp_path)
    loaded = weights.load_image_encoder(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded.norm.running_var, model.norm.running_var)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    x = torch.randn(1, 3, 64, 64)
    assert rel(loaded(x), model.eval()(x)) < 1e-2             # float16 weights
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "_class_name": "TinyImageEncoder", "c_semantic": 16, "c_hidden": [4, 8, 8, 8], "blocks": [1, 1, 1, 1]}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="describes a None, expected one of EfficientNetEncoder, TinyImageEncoder"):
        weights.load_image_encoder(tmp_path)


def test_efficientnet_is_saved_with_the_official_names(tmp_path):
    """So that other programs can use the file."""
    pytest.importorskip("torchvision", reason="the official image encoder is torchvision's EfficientNetV2-S")
    model = EfficientNetEncoder()
    weights.save_model(model, tmp_path)
    assert {name: tuple(t.shape)
            for name, t in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items()} == \
        {name: shape for name, (shape, _) in manifest("effnet_v2").items()}
    assert type(weights.load_image_encoder(tmp_path)) is EfficientNetEncoder


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Power cuts and full disks happen at the end of long training runs."""
    path = tmp_path / "new" / "file.txt"
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("hard_links", [True, False], ids=["hard links", "no hard links, as on FAT"])
def test_of_two_writers_of_one_new_file_one_succeeds(hard_links, tmp_path, monkeypatch):
    """The name is free when both begin. What the first has written stays, and the other gets an error."""
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")
    if not hard_links:
        monkeypatch.setattr(files.os, "link", no_links)
    path = tmp_path / "file.txt"

    def slowly(temporary):
        files.write_atomically(path, lambda other: other.write_text("first"), overwrite=False)
        temporary.write_text("second")
    with pytest.raises(FileExistsError, match="file.txt exists already and will not be overwritten: choose another"):
        files.write_atomically(path, slowly, overwrite=False)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    assert files.write_unused(path, lambda temporary: temporary.write_text("third")) == tmp_path / "file_2.txt"
    files.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file.txt": "new", "file_2.txt": "third"}


# --- errors ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [UserError("a folder is missing"), WeightsError("a folder is missing"),
                                   OSError("a folder is missing")])
def test_what_a_user_can_repair_ends_a_script_with_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a folder is missing\n"


def test_other_errors_are_bugs_unless_a_call_checks_the_user_s_values():
    """A WeightsError stays one; a ValueError becomes a UserError only inside as_user_error."""
    with pytest.raises(ValueError) as bug, exit_on_user_error():
        raise ValueError("shapes differ")
    assert type(bug.value) is ValueError
    for error, kind in ((ValueError("no such column"), UserError), (WeightsError("no such tensor"), WeightsError)):
        with pytest.raises(kind, match=str(error)) as found, as_user_error():
            raise error
        assert type(found.value) is kind


# --- text encoders -----------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [COMBINED, PUBLISHED], ids=["combined", "published"])
@pytest.mark.parametrize("side", ["prior", "decoder"])
@torch.no_grad()
def test_text_encoders_equal_the_reference(folder, side):
    """Both layouts: names with and without "text_model.". Six prompts: one empty, one too long, one beyond ASCII."""
    data, _ = golden("pipeline_text")
    texts = metadata_texts()
    parts = find_parts(folder)
    names = ("prior_text_encoder", "prior_tokenizer") if side == "prior" else ("text_encoder", "tokenizer")
    encoder = weights.load_text_encoder(*(parts[name] for name in names))
    with pytest.warns(UserWarning, match="is longer than the 20 tokens"):
        ids, mask = encoder.tokens(texts)
    assert torch.equal(ids, data[f"text/{side}/input_ids"])
    assert torch.equal(mask, data[f"text/{side}/attention_mask"])
    assert not encoder.training
    assert rel(encoder.model(ids, mask), data[f"text/{side}/last_hidden_state"]) < 1e-5


def metadata_texts():
    from safetensors import safe_open
    from helpers import GOLDEN
    with safe_open(GOLDEN / "pipeline_text.safetensors", "pt") as file:
        return json.loads(file.metadata()["texts"])


@torch.no_grad()
def test_text_encoder_survives_saving(tmp_path):
    """float16 on disk, float32 in memory; transformers itself also reads the folder, with the same result."""
    from transformers import CLIPTextModel, CLIPTokenizer
    encoder = weights.load_text_encoder(COMBINED / "text_encoder", COMBINED / "tokenizer")
    weights.save_text_encoder(encoder, tmp_path / "text_encoder", tmp_path / "tokenizer")
    tensors = load_file(tmp_path / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") and t.dtype == torch.float16 for name, t in tensors.items())
    again = weights.load_text_encoder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    ids, mask = again.tokens(["a red house"])
    assert torch.equal(ids, encoder.tokens(["a red house"])[0])
    assert next(again.parameters()).dtype == torch.float32
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")(["a red house"], padding="max_length",
                                                                   return_tensors="pt")
    assert torch.equal(tokens["input_ids"], ids) and torch.equal(tokens["attention_mask"], mask)
    assert rel(again(["a red house"]), encoder(["a red house"])) < 1e-2
    assert rel(again(["a red house"]), theirs(**tokens).last_hidden_state) < 1e-6


def test_text_encoder_loading_is_strict_but_for_position_ids(tmp_path):
    """transformers would fill a missing tensor with random numbers and mention it in a log line."""
    shutil.copytree(COMBINED / "text_encoder", tmp_path / "e")
    path = tmp_path / "e/model.safetensors"
    tensors = load_file(path)
    length = json.loads((tmp_path / "e/config.json").read_text())["max_position_embeddings"]
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    save_file({**prefixed, "text_model.embeddings.position_ids": torch.arange(length)[None]}, path)
    weights.load_text_encoder(tmp_path / "e", COMBINED / "tokenizer")
    first = next(iter(tensors))
    for spoilt, message in (({name: t for name, t in tensors.items() if name != first}, "missing tensors: 1"),
                            ({**tensors, first: torch.full_like(tensors[first], float("nan"))}, "contains NaN"),
                            ({**tensors, "more": torch.zeros(1)}, r"unknown tensors: 1 \(more\)")):
        save_file(spoilt, path)
        with pytest.raises(WeightsError, match=message):
            weights.load_text_encoder(tmp_path / "e", COMBINED / "tokenizer")


def test_missing_tokenizer_is_explained(tmp_path):
    """transformers would make an empty tokenizer of an empty folder: all prompts would mean the same."""
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        weights.load_text_encoder(COMBINED / "text_encoder", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load_text_encoder(COMBINED / "text_encoder", tmp_path)


@pytest.mark.parametrize("name, sizes", [
    ("text_encoder_h", dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
    ("text_encoder_bigg", dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
                               intermediate_size=5120))])
def test_official_text_encoders_have_the_published_names(name, sizes):
    """save_text_encoder writes the names of the published folders."""
    with torch.device("meta"):
        model = CLIPTextModel(hidden_act="gelu", **sizes)
    found = {f"text_model.{key.removeprefix('text_model.')}": tuple(t.shape) for key, t in model.state_dict().items()}
    assert found == {key: shape for key, (shape, _) in manifest(name).items()}


# --- folders -----------------------------------------------------------------------------------------

def test_all_three_layouts_are_recognised(tmp_path):
    """Ours, diffusers' combined pipeline, and the two published folders side by side."""
    parts = find_parts(COMBINED)
    assert parts["prior"] == COMBINED / "prior_prior" and parts["image_encoder"] is None
    assert parts["prior_scheduler"] == COMBINED / "prior_scheduler"
    parts = find_parts(PUBLISHED)
    assert parts["prior"] == PUBLISHED / "wuerstchen-prior/prior" and parts["vqgan"] == PUBLISHED / "wuerstchen/vqgan"
    assert parts["text_encoder"] != parts["prior_text_encoder"]
    for name in ("prior", "text_encoder", "tokenizer", "decoder", "vqgan", "image_encoder"):
        (tmp_path / name).mkdir()
    parts = find_parts(tmp_path)
    assert parts["text_encoder"] == parts["prior_text_encoder"] == tmp_path / "text_encoder"
    assert parts["image_encoder"] == tmp_path / "image_encoder" and parts["scheduler"] is None


def test_unknown_layouts_are_explained(tmp_path):
    """The message lists what was looked for and what was found."""
    with pytest.raises(WeightsError, match="there is no such folder"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="looked for prior/, decoder/, vqgan/; or prior_prior/.*found nothing"):
        find_parts(tmp_path)
    with pytest.raises(WeightsError, match="found decoder/, .*vqgan/"):
        find_parts(PUBLISHED / "wuerstchen")
    for name in ("prior", "decoder", "vqgan", "tokenizer"):
        (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match="looks like the layout 'one folder' but lacks text_encoder$"):
        find_parts(tmp_path)


def test_only_the_released_noise_schedule_is_accepted(tmp_path):
    """Sampled with another schedule than in training, weights give grey noise, and nothing else would tell why."""
    check_scheduler(None)
    check_scheduler(COMBINED / "scheduler")
    check_scheduler(PUBLISHED / "wuerstchen-prior/scheduler")
    weights.save_scheduler(tmp_path)
    check_scheduler(tmp_path)
    path = tmp_path / "scheduler_config.json"
    for text, message in (('{"s": 0.01}', "only s = 0.008 and scaler = 1"),
                          ('{"scaler": 2.0}', "only s = 0.008 and scaler = 1"),
                          ("[]", "does not hold a JSON object"), ("{", "cannot be read")):
        path.write_text(text)
        with pytest.raises(WeightsError, match=message):
            check_scheduler(tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        check_scheduler(tmp_path)


# --- single files, the authors' own, and conversion ----------------------------------------------------

def tiny_official(stage):
    """A small model of a stage, in eval mode, and its folder among the goldens."""
    part, load, _ = PARTS[stage]
    return load(COMBINED / part), COMBINED / part


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("naming", ["ours", "diffusers", "original"])
def test_conversion_there_and_back_changes_no_bit(naming, ending, stage, tmp_path):
    """Three namings, four kinds of files: nothing is rounded, and a converted model loads as the same model."""
    model, folder = tiny_official(stage)
    shutil.copy(folder / "config.json", tmp_path)
    there, back = tmp_path / f"there{ending}", tmp_path / "back"
    assert convert(folder, there, naming) > 0
    convert(there, back, "diffusers")
    before, after = load_file(folder / FILE), load_file(back / FILE)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = PARTS[stage][1](there).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("naming", ["ours", "diffusers", "original"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_lone_file_carries_its_sizes_or_says_what_is_missing(stage, naming, ending, tmp_path):
    """Without config.json next to it, and even next to that of another part. A .bin file holds only tensors."""
    model, folder = tiny_official(stage)
    path = tmp_path / f"there{ending}"
    convert(folder, path, naming)
    if ending == ".bin":
        with pytest.raises(WeightsError, match="without a config.json next to it, the official sizes are expected$"):
            PARTS[stage][1](path)
        return
    (tmp_path / "config.json").write_text('{"_class_name": "CLIPTextModel"}')
    loaded = PARTS[stage][1](path)
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_in_our_names_has_our_arguments(stage, tmp_path):
    """So that Stage(**config) is the model; see test_standalone for the file alone. We load it as well."""
    model, folder = tiny_official(stage)
    convert(folder, tmp_path / "ours", "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert stage(**config).config == model.config
    assert load_file(tmp_path / "ours" / FILE).keys() == model.state_dict().keys()
    loaded = PARTS[stage][1](tmp_path / "ours")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {next(iter(config)): "x"}))
    with pytest.raises(WeightsError, match=f"{next(iter(config))} is 'x', expected something like "):
        PARTS[stage][1](tmp_path / "ours")


def test_the_kind_of_a_model_in_our_names_is_found(tmp_path):
    """There is no class name in our config.json: v1's Stage B and image encoders are known by their arguments."""
    v1 = StageBV1(**SMALL_V1[StageBV1])
    weights.save_model(v1, tmp_path / "v1")
    convert(tmp_path / "v1", tmp_path / "v1_ours", "ours")
    assert weights.stage_b_of(tmp_path / "v1_ours") is StageBV1
    convert(COMBINED / "decoder", tmp_path / "b", "ours")
    assert weights.stage_b_of(tmp_path / "b") is StageB
    encoder = small_tiny_encoder()
    weights.save_model(encoder, tmp_path / "e")
    (tmp_path / "e/config.json").write_text(json.dumps(encoder.config))
    assert weights.is_tiny(tmp_path / "e") and weights.load_image_encoder(tmp_path / "e").config == encoder.config


def test_conversion_overwrites_nothing(tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already and will not be overwritten"):
        convert(COMBINED / "vqgan", tmp_path / "out.safetensors", "ours")
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"


def test_convert_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["weights.py", "convert", str(COMBINED / "vqgan"), str(tmp_path / "a.pt"), "--to",
                                     "original"])
    main()
    content = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    assert "vquantizer.codebook.weight" in content
    assert capsys.readouterr().out == f"{len(content)} tensors written to {tmp_path / 'a.pt'}\n"
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {tmp_path / 'a.pt'} exists already")


def test_the_authors_files_hold_several_tables(tmp_path):
    """model_v2_stage_b.pt holds decoder and image encoder, Stage C's file EMA and plain weights: each finds its own."""
    model, folder = tiny_official(StageC)
    shutil.copy(folder / "config.json", tmp_path)
    right = to_original(model.state_dict(), model)
    torch.save({"ema_state_dict": right, "state_dict": {name: t * 2 for name, t in right.items()}, "step": 7},
               tmp_path / "c.pt")
    loaded = weights.load_stage_c(tmp_path / "c.pt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "c.pt")
    with pytest.raises(WeightsError,
                       match="does not hold a table of tensors, nor one called ema_state_dict or state_dict"):
        weights.load_stage_c(tmp_path / "c.pt")


@pytest.mark.parametrize("load, name, looks", [
    (weights.load_stage_b, "stage_b_v1", r"a v1 Stage B \(Paella, a model of tokens\)"),
    (weights.load_stage_b_v1, "stage_b_v2", r"a Stage B \(DiffNeXt\)"),
    (weights.load_stage_b_v1, "stage_c_v1", r"a v1 Stage C \(text width 1024\)"),
    (weights.load_stage_c, "stage_b_v2", r"a Stage B \(DiffNeXt\)"),
    (weights.load_stage_b, "stage_c_v2", r"a v2 Stage C \(text width 1280\)"),
    (weights.load_stage_b, "stage_a_vqgan", r"a Stage A \(VQGAN\)"),
    (weights.load_stage_a, "effnet_v2", r"an image encoder \(EfficientNet\)")])
def test_a_file_in_the_wrong_place_is_named_for_what_it_is(load, name, looks, tmp_path, monkeypatch):
    """Official names and shapes without the gigabytes: only they are checked before a value is read."""
    shapes = {key: shape for key, (shape, _) in manifest(name).items()}

    class Names:
        def __init__(self, path, sections):
            self.path, self.shapes = path, shapes
    (tmp_path / "file.pt").write_bytes(b"")
    monkeypatch.setattr(weights, "TensorFile", Names)
    with pytest.raises(WeightsError, match=f"This looks like {looks}") as error:
        load(tmp_path / "file.pt")
    assert "\n" not in str(error.value)


def test_a_folder_of_the_authors_files_is_recognised(tmp_path):
    """The authors published no text encoders with them, so these may be missing."""
    for name in ("vqgan_f4_v1_500k.pt", "model_v2_stage_b.pt", "model_v2_stage_c_finetune_interpolation.pt"):
        (tmp_path / name).write_bytes(b"")
    parts = find_parts(tmp_path)
    assert parts["prior"].name == "model_v2_stage_c_finetune_interpolation.pt"
    assert parts["decoder"] == parts["image_encoder"] == tmp_path / "model_v2_stage_b.pt"
    assert parts["text_encoder"] is None


@pytest.mark.parametrize("name, stage, sizes", [
    ("stage_c_v1", StageC, dict(c_cond=1024)), ("stage_c_v2", StageC, {}), ("stage_b_v1", StageBV1, {}),
    ("stage_b_v2", StageB, {}),
    ("effnet_v1", EfficientNetEncoder, dict(network="efficientnet_v2_l")), ("effnet_v2", EfficientNetEncoder, {}),
    ("stage_a_vqgan", StageA, {})])
def test_the_authors_files_tell_v1_from_v2_by_their_shapes(name, stage, sizes, tmp_path, monkeypatch):
    """There is no config.json next to them. The empty model has exactly the tensors of the manifest."""
    shapes = {key: shape for key, (shape, _) in manifest(name).items()}
    assert weights.official_sizes(stage, shapes) == sizes

    class Names:
        def __init__(self, path, sections):
            self.path, self.shapes = path, shapes
    (tmp_path / "file.pt").write_bytes(b"")
    monkeypatch.setattr(weights, "TensorFile", Names)
    model, _ = weights.build_empty(stage, tmp_path / "file.pt")
    assert model.config == stage(**sizes).config if name.startswith("effnet") else {**model.config,
                                                                                    **sizes} == model.config
    if stage in (StageB, StageBV1):
        assert weights.stage_b_of(tmp_path / "file.pt") is stage


def test_an_image_encoder_of_another_kind_is_explained(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "EfficientNetEncoder", "effnet": "efficientnet_b7"}')
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(WeightsError,
                       match="cannot be used: the image encoder is 'efficientnet_b7', expected efficientnet_v2_s or, "
                             "for v1, efficientnet_v2_l"):
        weights.load_image_encoder(tmp_path)


@pytest.mark.parametrize("naming", ["ours", "diffusers", "original"])
def test_v1_s_stage_b_goes_through_all_namings_unchanged(naming, tmp_path):
    """From the authors' file to our names, or to names as diffusers would split them, and back: the same table."""
    data, config = golden("paella_v1")
    source = under("sd/original/", data)
    del config["model"]["c_out"]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Paella", **config["model"]}))
    torch.save({"state_dict": source, "effnet_state_dict": {"x": torch.zeros(1)}, "iter": 7},
               tmp_path / "model_stage_b.pt")
    assert weights.stage_b_of(tmp_path / "model_stage_b.pt") is weights.stage_b_of(tmp_path) is StageBV1
    convert(tmp_path / "model_stage_b.pt", tmp_path / "there", naming)
    loaded = weights.load_stage_b_v1(tmp_path / "there")
    back = to_original(loaded.state_dict(), loaded)
    assert back.keys() == source.keys() and all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize("change, message", [
    (lambda table: table.pop("byt5_mapper.bias"), r"missing tensors: 1 \(byt5_mapper.bias\)"),
    (lambda table: table.update(more=torch.zeros(1)), r"unknown tensors: 1 \(more\)"),
    (lambda table: table.update({"out_mapper.1.weight": torch.zeros(32, 8, 1, 1)}),
     r"out_mapper.1.weight is \(32, 8, 1, 1\), expected \(32, 4, 1, 1\)"),
    (lambda table: table["in_mapper.0.weight"].fill_(float("nan")), "embed_token.weight contains NaN or infinity"),
    (lambda table: table["up_blocks.1.0.depthwise.weight"].resize_(8, 1, 3, 3),
     r"up_blocks.1.0.depthwise.weight is \(8, 1, 3, 3\), expected \(8, 2, 3, 3\)")])
def test_v1_files_are_loaded_strictly(change, message, tmp_path, monkeypatch):
    """One line says what was expected, in the authors' names."""
    monkeypatch.setattr(weights, "official_sizes", lambda stage, shapes: SMALL_V1[stage])
    path = small_v1(tmp_path) / "model_stage_b.pt"
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_stage_b_v1(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_v1_s_files_is_recognised(tmp_path):
    """Of Stage C's two files, the one with EMA weights is taken. If v2's files are there as well, v2 is meant."""
    for name in ("vqgan_f4_v1_500k.pt", "model_stage_b.pt", "model_stage_c.pt", "model_stage_c_ema.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="holds several files model_stage_c.*: taking model_stage_c_ema.pt"):
        parts = find_parts(tmp_path)
    assert parts["prior"] == tmp_path / "model_stage_c_ema.pt" and parts["text_encoder"] is None
    assert parts["decoder"] == parts["image_encoder"] == tmp_path / "model_stage_b.pt"
    for name in ("model_v2_stage_b.pt", "model_v2_stage_c_finetune_interpolation.pt"):
        (tmp_path / name).write_bytes(b"")
    assert find_parts(tmp_path)["decoder"] == tmp_path / "model_v2_stage_b.pt"


def test_parts_given_separately_may_be_missing_in_the_folder(tmp_path):
    """So a folder written by train_c.py, which has no decoder, can generate images."""
    (tmp_path / "prior").mkdir()
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    assert find_parts(tmp_path, ("decoder", "vqgan"))["prior"] == tmp_path / "prior"
    with pytest.raises(WeightsError, match="does not hold weights in a known layout"):
        find_parts(tmp_path, ("decoder",))


def test_a_text_encoder_of_another_width_is_found_before_sampling():
    with pytest.raises(WeightsError, match="Stage C takes texts of width 1280, the text encoder .* gives 128"):
        weights.check_widths(1280, weights.Path(weights.__file__).parents[1] / "models/tiny/text_encoder", "Stage C")


def test_our_safetensors_file_is_theirs_byte_for_byte(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.arange(4), "ä": torch.zeros(2, 2).half(), "c": torch.tensor(1.0)}
    files.write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
