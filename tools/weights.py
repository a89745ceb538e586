"""Converts the weights of one model between the three namings: ours, diffusers' and the authors' original.

  python -m tools.weights convert models/tiny/prior prior.pt --to original

Values do not change, only names and shapes, see loading/names.py. After --to ours, no other file than stage_c.py is
needed to load Stage C: StageC(**config).load_state_dict(load_file(...)). The same holds for the other stages.
Needs: torch, safetensors.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tools/weights.py` finds our modules

import json
from pathlib import Path

from loading.errors import WeightsError, exit_on_user_error
from loading.options import Parser


def convert(source: str | Path, target: str | Path, to: str) -> int:
    """Writes one model in the naming `to`: "ours", "diffusers" or "original". Returns the number of tensors.

    source, target: a folder with config.json, or a file. A .pt file has the state dict under a key, like the authors'
    files. A .bin file has only tensors; .pt and .safetensors files also have the configuration.
    """
    from loading.files import (OWN_CONFIG, STEM, TensorFile, check_output, find_file, write_atomically, write_files,
                               write_tensors)
    from loading.names import (FORMATS, config_to_diffusers, describe, recognise, to_diffusers, to_original, translate)
    from loading.weights import build_empty
    target = Path(target)
    check_output(target, ".safetensors", ".bin", ".pt", "")
    file = TensorFile(find_file(source, (STEM, "model")), sum((form.sections for form in FORMATS.values()), ()))
    stage = recognise(file.shapes)
    if stage is None:
        looks = describe(file.shapes)
        raise WeightsError(f"{file.path} holds none of the models that can be converted: Stage A, B, C or the image "
                           f"encoder" + (f". This looks like {looks}" if looks else ""))
    model, file = build_empty(stage, source)
    tensors = {name: tensor.clone() for name, tensor in translate(file, file.shapes.keys(), model)}
    if to != "ours":
        tensors = {"diffusers": to_diffusers, "original": to_original}[to](tensors, model)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    config = json.loads(json.dumps(model.config if to == "ours" else config_to_diffusers(model)))  # tuples become lists
    if target.suffix == ".pt":
        write_tensors(target, {FORMATS[stage].sections[0]: tensors, OWN_CONFIG: config}, overwrite=False)
    elif target.suffix in (".bin", ".safetensors"):
        write_tensors(target, tensors, {"format": "pt", OWN_CONFIG: json.dumps(config)}, overwrite=False)
    else:
        write_atomically(target, lambda folder: write_files(config, tensors, folder, STEM), folder=True)
    return len(tensors)


def main() -> None:
    p = Parser(__doc__, prog="python -m tools.weights")
    command = p.add_subparsers(dest="command", required=True).add_parser(
        "convert", help="write a model in another naming, values unchanged")
    command.add_argument("source", help="folder with config.json, or a .safetensors, .bin or .pt file")
    command.add_argument("target", help="folder, .safetensors, .bin or .pt; must not exist yet")
    command.add_argument("--to", required=True, choices=["ours", "diffusers", "original"], help="the naming to write")
    args = p.parse_args()
    print(f"{convert(args.source, args.target, args.to)} tensors written to {args.target}" + (
        ", which cannot hold the sizes: copy config.json next to it" if args.target.endswith(".bin") else ""))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
