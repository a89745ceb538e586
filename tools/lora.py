"""Shows, converts, merges and extracts LoRA files.

  python -m tools.lora info FILE                               # ranks, alphas, layers, and the file's metadata
  python -m tools.lora convert IN OUT --to kohya               # or diffusers, comfy, original, ours
  python -m tools.lora merge PRIOR LORA OUT --scale 0.8        # adds the LoRA to the weights of the prior
  python -m tools.lora extract BASE TUNED OUT --rank 16        # the LoRA closest to a full fine-tuning

Needs: torch, safetensors, numpy.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tools/lora.py` finds our modules

from pathlib import Path

from loading.errors import UserError, as_user_error, exit_on_user_error, printable
from loading.files import check_output
from loading.options import Number, Parser, integer


def info(file: str) -> str:
    """Describes the content of a LoRA file as text."""
    from loading.lora_formats import describe, open_lora, read_lora
    weights, metadata = read_lora(file, lora_partial=True)       # True: unknown tensors cause only a warning
    tensors, (one, *_) = open_lora(file)[0], weights.values()
    dtype = tensors[max(tensors)].dtype
    metadata |= describe(weights) | dict(tensors=f"{len(tensors)}, {dtype}, for example {max(tensors)}",
                                         layers=len(weights), dora=one.magnitude is not None)
    return "\n".join(printable(f"{key}: {value}") for key, value in sorted(metadata.items()))


def convert(source: str, target: Path, to: str, lora_partial: bool = False) -> str:
    """Converts a LoRA file of Stage C to the format `to`, without changing its effect. Returns a report as text."""
    from loading.lora_formats import read_lora, write_lora
    from lora import diffusers_name
    check_output(target, ".safetensors")
    weights, metadata = read_lora(source, lora_partial)
    metadata.pop("lora_adapter_metadata", None)          # only for diffusers: write_lora adds it again if needed
    count = write_lora(target, weights, {name: diffusers_name(name) for name in weights}, to, metadata,
                       overwrite=False)
    return f"{count} tensors for {len(weights)} layers written to {target}"


def load_prior(path: str):
    """Loads a prior, in any naming. Returns Stage C in float32, and the dtypes in the file, {tensor's name: dtype}."""
    import torch
    from loading.names import translate
    from loading.weights import build_empty, fill
    from stage_c import StageC
    model, file = build_empty(StageC, path)
    dtypes = {}

    def noting_dtypes():
        for name, tensor in translate(file, file.shapes.keys(), model):
            dtypes[name] = tensor.dtype
            yield name, tensor
    return fill(model, noting_dtypes(), torch.float32), dtypes


def merge(prior: str, lora: str, out: Path, scale: float, lora_partial: bool = False) -> str:
    """Writes a prior with a LoRA merged. Adds in float32 and rounds once, to the prior's dtype. Returns a report."""
    from loading.files import STEM, write_atomically, write_files, write_tensors
    from loading.lora_formats import base_hash, load_lora, read_lora
    from loading.names import config_to_diffusers, to_diffusers
    from lora import merge_and_unload
    check_output(out, ".safetensors", "")
    model, dtypes = load_prior(prior)
    trained_on = read_lora(lora, lora_partial)[1].get("base_hash")
    other = trained_on not in (None, base_hash(model))
    names = load_lora(model, lora, scale=scale, lora_partial=lora_partial)
    merge_and_unload(model)
    merged = {name: tensor.to(dtypes[name], copy=True) for name, tensor in model.state_dict().items()}
    too_large = [f"{name} in {tensor.dtype}" for name, tensor in merged.items() if not tensor.isfinite().all()]
    if too_large:
        raise UserError(f"{too_large[0]} cannot hold the sum: use a smaller --scale, or a prior in float32")
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(merged, model).items()}
    if out.suffix == ".safetensors":
        write_tensors(out, tensors, overwrite=False)
    else:
        config = config_to_diffusers(model)
        write_atomically(out, lambda folder: write_files(config, tensors, folder, STEM), folder=True)
    note = "\nnote: the LoRA was trained on other weights than these" if other else ""
    return f"{len(names)} layers merged at scale {scale:g}, {len(tensors)} tensors written to {out}{note}"


def nearest_lora(base, tuned, rank: int, targets: str) -> tuple[dict, str]:
    """Returns the LoRA that best approximates tuned - base, {layer: LoRAWeights}, and a text about its quality.

    The best approximation of a matrix by a matrix of rank r consists of its r largest singular values and their vectors
    (Eckart and Young, 1936). The quality is the share of the energy (sum of squares) of the difference that the LoRA
    keeps. Raises ValueError if the two models do not differ in the target layers.
    """
    import torch
    from loading.lora_formats import LoRAWeights
    from lora import find_targets, summary
    after = tuned.state_dict()
    energy = {name: (after[name].double() - before.double()).square().sum().item()
              for name, before in base.state_dict().items()}
    weights, kept = {}, {}                                           # kept: {tensor's name: energy that the LoRA keeps}
    for path, layer in find_targets(base, targets).items():
        name, shape = f"{path}.weight", layer.weight.shape                               # (out, in) or (out, in, k, k)
        if energy[name]:
            difference = (after[name] - layer.weight.detach()).flatten(1)
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], v[:rank]                        # (out, rank), (rank,), (rank, in)
            kept[name] = s.double().square().sum().item()
            # Each factor is multiplied by sqrt(s), so that both have the same norm.
            weights[path] = LoRAWeights((s.sqrt()[:, None] * v).view(-1, *shape[1:]),
                                        (u * s.sqrt()).view(*u.shape, *(1,) * (len(shape) - 2)), float(len(s)))
    left = [name for name in energy if energy[name] and name not in kept]
    if not weights:
        raise ValueError(f"the two models do not differ in any layer of {targets!r}"
                         + f", only in {summary(left)}" * bool(left))
    worst = min(kept, key=lambda name: kept[name] / energy[name])
    total = sum(kept.values())
    share = total / sum(energy[name] for name in kept)
    text = (f"energy of the difference kept in {len(weights)} layers: {share:.4f}; "
            f"in the worst, {worst}: {kept[worst] / energy[worst]:.4f}")
    if left:
        text += (f"\nof the whole difference: {total / sum(energy.values()):.4f}. Also {len(left)} tensors differ that "
                 f"the LoRA does not cover: {summary(left)}")
    return weights, text


def extract(base: str, tuned: str, out: Path, rank: int, targets: str) -> str:
    """Writes the LoRA of nearest_lora for two priors. At official size, the SVDs take ten minutes on two cores."""
    from loading.lora_formats import base_hash, write_lora
    from lora import diffusers_name
    check_output(out, ".safetensors")
    (base, _), (tuned, _) = load_prior(base), load_prior(tuned)
    if base.config != tuned.config:
        raise UserError(f"the two priors have different sizes: {base.config} and {tuned.config}")
    weights, text = nearest_lora(base, tuned, rank, targets)
    write_lora(out, weights, {name: diffusers_name(name) for name in weights}, "diffusers",
               dict(base_hash=base_hash(base), made_by="extract"), overwrite=False)
    return f"{text}\nwritten to {out}"


def add_partial(command: Parser) -> None:
    command.add_argument("--lora-partial", action="store_true", help="leave out what belongs to no layer of Stage C, "
                         "such as the part of a text encoder, and list it, instead of refusing the file")


def parser() -> Parser:
    p = Parser(__doc__, prog="python -m tools.lora")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("info", help="what is inside a LoRA file")
    c.add_argument("file", help=".safetensors, .bin or .pt file; or a folder of diffusers, peft or train_c.py")
    c = commands.add_parser("convert", help="write a LoRA with the same effect for another program")
    c.add_argument("source", help="the LoRA, in any format")
    c.add_argument("target", type=Path, help=".safetensors file to write; must not exist yet")
    c.add_argument("--to", required=True, choices=["diffusers", "kohya", "comfy", "original", "ours"],
                   help="diffusers: also peft; kohya: also OneTrainer; comfy: ComfyUI; original: the authors' code; "
                        "ours: this repository's names")
    add_partial(c)
    c = commands.add_parser("merge", help="add a LoRA to a prior for good")
    c.add_argument("prior", help="folder with config.json, or a file, as for python -m tools.weights")
    c.add_argument("lora", help="the LoRA, in any format")
    c.add_argument("out", type=Path, help="folder or .safetensors file to write, in diffusers' names; must not exist "
                                          "yet")
    c.add_argument("--scale", type=Number(), default=1.0, help="strength of the LoRA (default 1: as trained)")
    add_partial(c)
    c = commands.add_parser("extract", help="the LoRA nearest to the difference of two priors, and how near it is")
    c.add_argument("base", help="the prior before fine-tuning, folder or file")
    c.add_argument("tuned", help="the prior after it")
    c.add_argument("out", type=Path, help=".safetensors file to write; must not exist yet")
    c.add_argument("--rank", type=integer(1, 8192), default=16,
                   help="of every layer (default 16): more keeps more, in a larger file")
    c.add_argument("--targets", default="all", help="attention, attention+mlp, all, or a regular expression for our "
                                                    "names (default all)")
    return p


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error(), as_user_error():
        args = vars(parser().parse_args(argv))
        run = dict(info=info, convert=convert, merge=merge, extract=extract)[args.pop("command")]
        print(run(**args))


if __name__ == "__main__":
    main()
