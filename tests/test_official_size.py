"""The official architectures at their real size: files in each layout they are published in, loaded and run.

No weight is downloaded: files with the official names and shapes are made here, from random numbers. The
original layout is held against recorded outputs of the original code, the diffusers layout against diffusers
itself, text encoders against transformers. One at a time, each file is written, loaded strictly and deleted.
"""
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loading import weights
from helpers import capture, draw, golden, manifest, rel, weights_from_names
from stage_b import channels_first
from test_diffusers import theirs

pytestmark = pytest.mark.slow
TINY = weights.Path(weights.__file__).parents[1] / "models" / "tiny"


def check_facts(found, name, data, tolerance):
    """Full-size outputs are stored as shape, mean, standard deviation, smallest and largest value, and 512 values."""
    assert tuple(found.shape) == tuple(data[f"out/{name}/shape"].tolist())
    facts = torch.stack([found.mean(), found.std(), found.min(), found.max()])
    deviations = rel(facts, data[f"out/{name}/mean_std_min_max"]), rel(found.flatten()[:512],
                                                                       data[f"out/{name}/first_512"])
    print(f"{name}: rel {deviations[0]:.1e} (mean, std, min, max), {deviations[1]:.1e} (first 512)")
    assert max(deviations) < tolerance, name


def original_file(folder, name: str, section: str):
    """A .pt file as the authors saved theirs: one table among others."""
    torch.save({section: weights_from_names(manifest(name)), "step": 7}, folder / "original.pt")
    return folder / "original.pt"


@torch.no_grad()
def test_stage_c_from_the_original_file(tmp_path):
    """994 M parameters, 96 blocks deep: rounding must not add up."""
    data, _ = golden("fullsize")
    model = weights.load_stage_c(original_file(tmp_path, "stage_c_v2", "ema_state_dict"))
    outputs = capture(dict(block0=model.res_blocks[0], block2=model.attention_blocks[0],
                           block95=model.attention_blocks[31],
                           out_ab=model.head))
    eps = model(draw("fullsize.stage_c.x", 1, 16, 5, 7), torch.tensor([0.4]), draw("fullsize.stage_c.c", 1, 77, 1280))
    shutil.rmtree(tmp_path)
    for name, output in outputs.items():
        check_facts(channels_first(output), f"stage_c_v2/{name}", data, 1e-5)
    check_facts(eps, "stage_c_v2/noise", data, 1e-3)       # a quotient, and some of its divisors are small


@torch.no_grad()
def test_stage_b_from_the_original_file(tmp_path):
    """1055 M parameters, four levels."""
    data, _ = golden("fullsize")
    model = weights.load_stage_b(original_file(tmp_path, "stage_b_v2", "state_dict"))
    outputs = capture({f"down{i}": blocks[-1] for i, blocks in enumerate(model.down_blocks)})
    eps = model(draw("fullsize.stage_b.x", 1, 4, 32, 48), torch.tensor([0.7]),
                draw("fullsize.stage_b.effnet", 1, 16, 3, 5),
                draw("fullsize.stage_b.clip", 1, 77, 1024))
    shutil.rmtree(tmp_path)
    for name, output in outputs.items():
        check_facts(channels_first(output), f"stage_b_v2/{name}", data, 1e-4)
    check_facts(eps, "stage_b_v2/noise", data, 1e-4)


@torch.no_grad()
def test_stage_a_from_the_original_file(tmp_path):
    """18 M parameters; with all 8192 codes, where near ties are common, the indices must still be the same."""
    data, _ = golden("fullsize")
    model = weights.load_stage_a(original_file(tmp_path, "stage_a_vqgan", "state_dict"))
    image = draw("fullsize.vqgan.image", 1, 3, 96, 128) * 0.25 + 0.5
    check_facts(model.encode(image), "vqgan/encode_x", data, 1e-4)
    check_facts(model.decode(draw("fullsize.vqgan.latents", 1, 4, 24, 32)), "vqgan/decode", data, 1e-4)
    assert torch.equal(model.encode_indices(image), data["out/vqgan/indices"])


@pytest.mark.parametrize("part, load, file, name, config, inputs", [
    ("prior", weights.load_stage_c, "modeling_wuerstchen_prior", "WuerstchenPrior",
     dict(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24), [(2, 16, 24, 24), 0.7, (2, 77, 1280)]),
    ("decoder", weights.load_stage_b, "modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt",
     {}, [(1, 4, 64, 32), 0.3, (1, 16, 6, 3), (1, 77, 1024)]),
    ("vqgan", weights.load_stage_a, "modeling_paella_vq_model", "PaellaVQModel", {}, [(1, 4, 32, 48)])])
@torch.no_grad()
def test_the_diffusers_folder_gives_what_diffusers_gives(part, load, file, name, config, inputs, tmp_path):
    """Written by diffusers' own save_pretrained, read by us, the same forward in both."""
    model = theirs(file, name)
    with torch.device("meta"):
        model = model(**config)
    tensors = weights_from_names(manifest({"prior": "diffusers_prior_v2", "decoder": "diffusers_decoder_v2",
                                           "vqgan": "diffusers_vqgan"}[part]))
    if part == "prior":        # keeps |1 - b|, by which is divided, away from zero
        tensors["out.1.weight"][16:] *= 0.2
        tensors["out.1.bias"][16:] = -0.3
    model.load_state_dict(tensors, assign=True)
    del tensors
    model.eval().save_pretrained(tmp_path / part)
    x = [draw(f"input {i}", *shape) if isinstance(shape, tuple) else torch.full((inputs[0][0],), shape)
         for i, shape in enumerate(inputs)]
    reference = model(*x) if part != "vqgan" else model.decode(x[0] * model.config.scale_factor).sample
    del model
    ours = load(tmp_path / part)
    shutil.rmtree(tmp_path)
    deviation = rel(ours(*x) if part != "vqgan" else ours.decode(x[0]), reference)
    print(f"{part}: rel {deviation:.1e}")
    assert deviation < 1e-4


@pytest.mark.parametrize("name, width, layers, heads, mlp", [("text_encoder_h", 1024, 24, 16, 4096),
                                                             ("text_encoder_bigg", 1280, 32, 20, 5120)])
@torch.no_grad()
def test_text_encoders_as_published_and_as_transformers_writes_them(name, width, layers, heads, mlp, tmp_path):
    """With and without text_model. in front, with the stray position_ids: the same embeddings as transformers' own."""
    from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(vocab_size=49408, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                            intermediate_size=mlp,
                            max_position_embeddings=77, hidden_act="gelu", pad_token_id=1, bos_token_id=0,
                            eos_token_id=2)
    model = CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path / "now")
    ids = torch.randint(0, 49408, (2, 77))
    mask = (torch.arange(77) < torch.tensor([[9], [50]])).long()
    reference = model(ids, attention_mask=mask).last_hidden_state
    names = {tensor: shape for tensor, (shape, _) in manifest(name).items()}
    published = {"text_model." + key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in published.items() if not key.endswith("position_ids")} == names
    published["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "published").mkdir()
    save_file({key: tensor.contiguous() for key, tensor in published.items()},
              tmp_path / "published" / "model.safetensors")
    shutil.copy(tmp_path / "now" / "config.json", tmp_path / "published")
    del model, published
    for folder in ("now", "published"):
        ours = weights.load_text_encoder(tmp_path / folder, TINY / "tokenizer").model
        assert rel(ours(ids, mask), reference) < 1e-6
        del ours
        shutil.rmtree(tmp_path / folder)
