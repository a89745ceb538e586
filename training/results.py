"""Writes the result of a finished run: a folder that sample.py and diffusers open, and its model card. Uploads both.

Needs: torch; loading/; huggingface_hub for the upload.
"""
import contextlib
import json
import re
import shlex
from pathlib import Path

import torch

from loading import lora_formats
from loading.errors import WeightsError, tell
from loading.files import STEM, to_half, write_atomically, write_files
from loading.hub import NAMES, REVISIONS, hub_errors
from loading.layouts import SHIPPED, locate
from loading.names import config_to_diffusers, to_diffusers
from loading.weights import NoStartValues, save_model, save_scheduler, save_text_encoder
from loading.words import FILE, read_words
from training.checkpoints import PRIVATE, check_finite, full_weights
from training.data import read_prompts
from training.scenes import CAPTIONED, UNCAPTIONED, vocabulary


def files_given(args, parts: tuple[str, ...]) -> dict[str, str]:
    """Returns {part: value of its option}, such as {"vqgan": path}, for `parts` that do not come from --weights."""
    return {part: getattr(args, part) for part in parts if getattr(args, part) not in (None, "none")}


def is_local(name: str) -> bool:
    """Returns whether `name`, a value of --weights or of a part's option, is a path, not a known name or repository."""
    return name not in (*SHIPPED, *NAMES) and (
        Path(name).exists() or name not in REVISIONS and not name.startswith("hub:"))


def write_base(args, parts: tuple[str, ...], **more) -> None:
    """Writes base.json for sample.py --weights OUT. It has --weights, the options of `parts`, and entries `more`."""
    def path(name: str) -> str:
        return str(Path(name).resolve()) if is_local(name) else name
    base = dict(weights=path(args.weights), files={part: path(file) for part, file in files_given(args, parts).items()})
    text = json.dumps(base | more, indent=2) + "\n"
    write_atomically(Path(args.out) / "base.json", lambda file: file.write_text(text))


def finished(args) -> None:
    """Tells the user that a resumed run was finished already. With --push-to-hub, uploads its result."""
    tell(f"{args.steps} steps are done and the result is in {args.out}: raise --steps to continue")
    if args.push_to_hub:
        push(args)


# ----- the model card, which is published and therefore contains no path of this machine ---------------

TEXTS = ("trigger", "targets", "sample_prompt", "project")           # options whose values are texts, never paths


def without_folders(name: str, value):
    """Returns the value of option `name` for the model card, without folders of paths and the command of "pipe:"."""
    if isinstance(value, list | tuple):
        return type(value)(without_folders(name, each) for each in value)
    if not isinstance(value, str) or name in TEXTS or value.startswith("hub:") or value in REVISIONS:
        return value
    return "pipe:" if value.startswith("pipe:") else re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "."


def settings_table(args) -> str:
    """Returns the settings of a run as rows of a Markdown table, without those that concern only this machine."""
    rows = {name: str(without_folders(name, value)).replace("|", "\\|").replace("\n", " ")
            for name, value in vars(args).items()
            if value not in (None, False, [], "") and name not in (*PRIVATE, "cache")
            and (name not in ("rank", "alpha", "targets") or args.lora)}
    return "\n".join(f"| `--{name.replace('_', '-')}` | {value} |" for name, value in rows.items())


def described(name: str) -> str:
    """Returns a description of the weights `name` for the model card."""
    if is_local(name):
        return "weights in a local folder that is not published"
    return f"`{name}`, the small model that comes with the code" if name in SHIPPED else f"`{name}`"


def base_model(args, part: str) -> str:
    """Returns the card's line "base_model: REPO", or "" if `part` did not start from weights in a repository REPO."""
    name = getattr(args, part) or args.weights
    repo = NAMES[name][part][0] if name in NAMES else "/".join(name.removeprefix("hub:").split("@")[0].split("/")[:2])
    return "" if args.init == "random" or name in SHIPPED or is_local(name) else f"base_model: {repo}\n"


def place(args, repo: str | None) -> str:
    """Returns the result's name for the model card: "hub:REPO" or, if repo is None, "./" and the last part of --out."""
    return f"hub:{repo}" if repo else f"./{Path(args.out).resolve().name}"


def is_portable(args, parts: tuple[str, ...]) -> bool:
    """Returns whether --weights and the options of `parts` name no local files, so that base.json works elsewhere."""
    return not any(map(is_local, (args.weights, *files_given(args, parts).values())))


def three_prompts(args, dataset) -> list[str]:
    """Returns up to three prompts for the model card: first those of the sample sheets, then captions of `dataset`."""
    prompts = list(getattr(args, "sample_prompt", []))
    if getattr(args, "sample_prompts", None):
        with contextlib.suppress(ValueError):                        # if the file is missing, write the card without it
            prompts += read_prompts(args.sample_prompts)
    prompts += [dataset.captions(i)[0] for i in range(min(len(dataset), 100))]
    return [prompt for prompt in dict.fromkeys(" ".join(prompt.split()) for prompt in prompts) if prompt][:3]


def usage(prompts: list[str], weights: str, **parts: str) -> str:
    """Returns the card's commands and Python code for generating images or, without prompts, reconstructing an image.
    weights, parts: values of sample.py's options --weights and, for example, decoder="FOLDER", lora="FILE"."""
    options = "".join(f" --{part.replace('_', '-')} {file}" for part, file in dict(weights=weights, **parts).items())
    load = ", ".join([f'"{weights}"', *(f'{part}="{file}"' for part, file in parts.items())])
    tasks = [f"--prompt {shlex.quote(prompt)}" for prompt in prompts] or ["--reconstruct photo.png"]
    python = ["from wuerstchen import Wuerstchen", "", f"model = Wuerstchen.load({load})"]
    if prompts:
        python.append(f'model({json.dumps(prompts[0], ensure_ascii=False)}, seed=0)[0].save("image.png")')
    else:
        python = ["from PIL import Image", "from extras.editing import reconstruct", *python,
                  'reconstruct(model, Image.open("photo.png"))[0].save("image.png")']
    commands = [f"python sample.py{options} {task}" for task in tasks]
    return "\n".join(["With the Würstchen code that trained it:", "",
                      "```", *commands, "```", "", "```python", *python, "```"])


def write_card(args, head: str, *paragraphs: str) -> None:
    """Writes the model card README.md: head (YAML), the non-empty paragraphs, the newest sample sheet, the settings."""
    out = Path(args.out)
    sheets = sample_sheets(args)
    parts = [f"---\n{head}\n---\n# {place(args, args.push_to_hub).rpartition('/')[2]}", *paragraphs,
             f"![samples](samples/{sheets[-1].name})" if sheets else "",
             "No licence is stated here: whoever publishes this chooses one that those of the base model and of the "
             "images allow.", f"| setting | value |\n|---|---|\n{settings_table(args)}"]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def sample_sheets(args) -> list[Path]:
    return sorted((Path(args.out) / "samples").glob("step_*.png"))


def diffusers_tensors(model: torch.nn.Module, tensors: dict | None = None) -> dict[str, torch.Tensor]:
    """Returns {diffusers' name: tensor on the CPU} for `tensors`, {our name: tensor}, by default model's state dict."""
    named = to_diffusers(model.state_dict() if tensors is None else tensors, model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


# ----- Stage C -----------------------------------------------------------------------------------------

LIMITS = ("Expect what the images of the training show, in their style; anything else may have become worse than "
          "before. Nothing was measured apart from what stands here and in `log.jsonl`.")
FILES_C = ("prior", "prior_text_encoder", "image_encoder", "decoder", "vqgan", "text_encoder")


def write_stage_c(args, model, text_encoder, dataset, processes) -> None:
    """Writes prior/ (with --lora, lora.safetensors instead), base.json, README.md. With --push-to-hub, uploads them.

    All processes must call this. model.prior: Stage C. text_encoder: a TextEncoder, written if --train-text is given.
    """
    weights = full_weights(model)
    processes.on_main(write_files_c, args, model.prior, weights, text_encoder, dataset)


def write_files_c(args, prior, weights: dict, text_encoder, dataset) -> None:
    check_finite(weights, "the result")
    out, more = Path(args.out), {}
    (out / "README.md").unlink(missing_ok=True)      # the card is written last: if it exists, the result is complete
    if args.lora:
        write_lora(args, prior, args.steps, len(dataset), out / "lora.safetensors")
        more["lora"] = "lora.safetensors"
    else:
        learned = {name.removeprefix("prior."): tensor for name, tensor in weights.items() if name.startswith("prior.")}
        write_files(config_to_diffusers(prior), diffusers_tensors(prior, learned), out / "prior", STEM)
        save_scheduler(out / "scheduler")
        write_words(args)
    if args.train_text:
        save_text_encoder(text_encoder, out / "text_encoder", out / "tokenizer")
    write_base(args, FILES_C, **more)
    write_card_c(args, dataset)
    if args.push_to_hub:
        push(args)


def write_card_c(args, dataset) -> None:
    start = args.prior or args.weights
    what = "A LoRA for Würstchen's Stage C, trained on" if args.lora else "A fine-tune of Würstchen's Stage C, from"
    prompts, where, learned = three_prompts(args, dataset), place(args, args.push_to_hub), {}
    if args.lora:
        learned["lora"] = where if args.push_to_hub else f"{where}/lora.safetensors"
    elif not is_portable(args, FILES_C):
        learned["prior"] = f"{where}/prior"
        if args.train_text:
            learned["prior_text_encoder"] = f"{where}/text_encoder"
    given = {part: "FOLDER" if is_local(file) else file for part, file in files_given(args, FILES_C).items()
             if part != "image_encoder" and part not in learned}
    weights = "FOLDER" if is_local(args.weights) else args.weights
    how = usage(prompts, where) if not learned else usage(prompts, weights, **given | learned)
    write_card(args, f"{base_model(args, 'prior')}tags: [text-to-image, wuerstchen{', lora' * args.lora}]",
               f"{what} {described(start)}: {args.steps} steps on {len(dataset)} images." if args.init == "weights" else
               f"Würstchen's Stage C, trained from random weights: {args.steps} steps on {len(dataset)} images.",
               f"Trigger words: **{args.trigger}**." if args.trigger else "",
               # FOLDER must not have a LoRA of its own, because both LoRAs would be added.
               how, "FOLDER stands for parts that are not published, without any LoRA." * ("FOLDER" in how),
               f"**Limits.** {LIMITS}" + " The LoRA fits only the weights above and their variants." * args.lora)


def write_lora(args, prior, steps: int, images: int, path: Path | None = None) -> None:
    """With --lora, writes prior's LoRA after `steps` steps on `images` images to `path`, by default to checkpoints/."""
    if not args.lora:
        return
    metadata = dict(base="local" if is_local(args.weights) else args.weights,
                    base_hash=lora_formats.base_hash(prior), steps=steps, images=images,
                    trigger_words=args.trigger)
    path = path or Path(args.out) / "checkpoints" / f"step_{steps:08d}.safetensors"
    lora_formats.save_lora(prior, path, metadata=metadata)


def write_words(args) -> None:
    """Writes prior/words.json, the words of emoji scenes that Stage C knows, if all training data were such scenes."""
    kind, _, rest = args.data.partition(":")
    known, folder = {}, Path(args.out) / "prior"
    if args.init == "weights" and kind == "scenes":
        with contextlib.suppress(WeightsError):                    # if the base model's words are unreadable, omit them
            known = read_words(locate(args.weights, files_given(args, FILES_C), parts=("prior",))["prior"])
    if kind == "scenes" and (known or args.init == "random"):
        learned = vocabulary(UNCAPTIONED if rest.startswith("uncaptioned") else CAPTIONED)
        words = {name: list(dict.fromkeys([*known.get(name, []), *phrases])) for name, phrases in learned.items()}
        write_atomically(folder / FILE, lambda path: path.write_text(json.dumps(words, indent=1) + "\n"))
    else:
        (folder / FILE).unlink(missing_ok=True)


# ----- Stage B -----------------------------------------------------------------------------------------

FILES_B = ("decoder", "image_encoder", "vqgan", "text_encoder")


def stage_c_fits(args) -> bool:
    """Returns whether Stage C of --weights fits this run's encoder: the encoder was frozen and came from --weights."""
    if args.image_encoder is None or not args.freeze_encoder or args.weights in NAMES:
        return args.freeze_encoder and args.image_encoder is None
    own = locate(args.weights, parts=("image_encoder",))["image_encoder"]
    return own is not None and own.resolve() == Path(args.image_encoder).resolve()


def save_encoder(encoder: torch.nn.Module, folder: Path, frozen: bool) -> None:
    """Writes an image encoder in float16, or in float32 if it is frozen and float16 would change its weights."""
    tensors = diffusers_tensors(encoder)
    half = to_half(tensors)
    exact = all(torch.equal(half[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
    write_files(config_to_diffusers(encoder), half if exact or not frozen else tensors, folder, STEM)


def write_stage_b(args, model, encoder, dataset, log_lines: list[dict], processes) -> None:
    """Writes decoder/, image_encoder/, README.md and, if Stage C still fits, base.json. --push-to-hub uploads them.
    All processes must call this. model.decoder: Stage B. log_lines: lines of the log; the card quotes their last PSNR.
    """
    weights = full_weights(model)
    processes.on_main(write_files_b, args, model.decoder, encoder, weights, dataset, log_lines)


def write_files_b(args, decoder, encoder, weights: dict, dataset, log_lines: list[dict]) -> None:
    check_finite(weights, "the result")
    out = Path(args.out)
    (out / "README.md").unlink(missing_ok=True)      # the card is written last: if it exists, the result is complete

    def filled(network: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """Returns a copy of the network with full tensors, those of `weights` whose names begin with `prefix`. Under
        FSDP, the network itself has only a part of each tensor."""
        with torch.device("meta"), NoStartValues():
            new = type(network)(**network.config)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        new.load_state_dict(tensors, assign=True)
        return new
    save_model(filled(decoder, "decoder."), out / "decoder")
    save_encoder(encoder if args.freeze_encoder else filled(encoder, "encoder."), out / "image_encoder",
                 args.freeze_encoder)
    if stage_c_fits(args):
        write_base(args, FILES_B)
    write_card_b(args, dataset, log_lines)
    if args.push_to_hub:
        push(args)


def write_card_b(args, dataset, log_lines: list[dict]) -> None:
    last = next((line for line in reversed(log_lines) if "psnr_a" in line), {})
    psnr = [f"| {'Stage A only' if key == 'psnr_a' else key[5:].replace('_', ' ')} | {value:.2f} |"
            for key, value in last.items() if key.startswith("psnr")]
    fits, where = stage_c_fits(args), place(args, args.push_to_hub)
    if fits and is_portable(args, FILES_B):
        how = usage(three_prompts(args, dataset), where)
    else:
        given = {part: "FOLDER" if is_local(file) else file for part, file in files_given(args, FILES_B).items()}
        learned = dict(decoder=f"{where}/decoder", image_encoder=f"{where}/image_encoder")
        how = usage(three_prompts(args, dataset) if fits else [],
                    "FOLDER" if is_local(args.weights) else args.weights, **given | learned)
    write_card(args, f"{base_model(args, 'decoder')}tags: [wuerstchen, diffusion-autoencoder]",
               f"Würstchen's Stage B{' of v1' * args.v1}{' and its image encoder' * (not args.freeze_encoder)}, from "
               f"{'random weights' if args.init == 'random' else described(args.decoder or args.weights)}: "
               f"{args.steps} steps on {len(dataset)} images.",
               "" if args.freeze_encoder else "Stage C only works with the encoder it was trained on: train it again.",
               how, "FOLDER stands for parts that are not published." * ("FOLDER" in how), f"**Limits.** {LIMITS}",
               "\n".join([f"| PSNR of {args.val_count} images | dB |", "|---|---:|", *psnr]) if psnr else "")


# ----- Stage A -----------------------------------------------------------------------------------------

@torch.no_grad()
def write_stage_a(args, model, fixed: torch.Tensor, values: dict, images: int) -> None:
    """Writes vqgan/ and README.md. With --push-to-hub, uploads them. fixed: the validation's images, (N,3,H,W) uint8.
    values: {name in the log: result of the validation}. images: number of images trained on."""
    check_finite(model.state_dict(), "the result")
    (Path(args.out) / "README.md").unlink(missing_ok=True)       # the card is written last: it marks a complete result
    if not args.freeze_encoder:          # set the factor that scales the latents to unit variance for Stage B
        device = model.codebook.codes.device
        z = [model.encode_raw(part.to(device).float() / 255) for part in fixed.split(args.batch)]
        model.scale_factor = model.config["scale_factor"] = round(torch.cat(z).std().item(), 4)
    psnr = f"not quantised {values['val_psnr']:.2f} dB, quantised {values['val_psnr_quantised']:.2f} dB"
    unseen = " that were not trained on" if args.val_data or args.data.startswith("scenes") else ""
    print(f"PSNR on {len(fixed)} images{unseen}: {psnr}")
    frozen = [p for p in model.parameters() if not p.requires_grad] if args.freeze_encoder else []
    if all(torch.equal(p.half().float(), p) for p in frozen):
        save_model(model, Path(args.out) / "vqgan")
    else:
        write_files(config_to_diffusers(model), diffusers_tensors(model), Path(args.out) / "vqgan", STEM)
    start = f", from {described(args.init)}" if args.init else ""
    unseen = f" of `{without_folders('val_data', args.val_data)}`" if args.val_data else unseen
    write_card(args, "tags: [vqgan, wuerstchen]",
               f"Würstchen's Stage A{start}: {args.steps} steps on {images} images.\n"
               f"PSNR on {len(fixed)} images{unseen}: {psnr}.",
               usage([], "tiny", vqgan=f"{place(args, args.push_to_hub)}/vqgan"), f"**Limits.** {LIMITS}")
    if args.push_to_hub:
        push(args)


# ----- the upload ----------------------------------------------------------------------------------------

def pushed_files(args) -> dict[str, Path]:
    """Returns {path in the repository: file} for the files of the result, without other files in --out, such as
    caches, logs of services and parts of other runs."""
    out, names = Path(args.out), ["README.md", "log.jsonl", "curves.png"]
    if hasattr(args, "lora"):                            # only train_c.py has this option
        names += ["lora.safetensors"] if args.lora else ["prior", "scheduler"]
        names += ["text_encoder", "tokenizer"] if args.train_text else []
        names += ["base.json"] if is_portable(args, FILES_C) else []
    elif hasattr(args, "v1"):                            # only train_b.py has this option
        names += ["decoder", "image_encoder"]
        names += ["base.json"] if stage_c_fits(args) and is_portable(args, FILES_B) else []
    else:
        names += ["vqgan"]
    found = [path for name in names for path in sorted([out / name, *(out / name).glob("[!.]*")])
             if path.is_file() and path.suffix in (".md", ".jsonl", ".png", ".json", ".safetensors", ".txt")]
    return {path.relative_to(out).as_posix(): path for path in found + sample_sheets(args)[-1:]}


def pushed_card(args) -> str:
    """Returns the text of README.md for the hub, with the repository's name instead of the local folder."""
    folder, card = place(args, None), (Path(args.out) / "README.md").read_text(encoding="utf-8")
    for name in (f"{folder}/lora.safetensors", folder):
        card = card.replace(name, place(args, args.push_to_hub))
    return card


def push(args) -> None:
    """Uploads the result to the hub. A failed upload is only reported, because the training has not failed."""
    from huggingface_hub import CommitOperationAdd, HfApi
    files = pushed_files(args) | {"README.md": pushed_card(args).encode()}
    try:
        with hub_errors(args.push_to_hub, "main", "write"):
            api = HfApi(token=args.hub_token)
            api.create_repo(args.push_to_hub, exist_ok=True)
            api.create_commit(args.push_to_hub, [CommitOperationAdd(name, file) for name, file in files.items()],
                              commit_message=f"Result of {args.steps} steps")
    except WeightsError as error:
        tell(f"the upload failed, the result is in {args.out}: {error}")
