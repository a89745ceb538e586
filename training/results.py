"""What a finished run leaves: the folder that sample.py and diffusers open, its model card, the upload to the hub.

Needs: torch; loading/; huggingface_hub for the upload.
"""
import json
import sys
from pathlib import Path

import torch

from loading import lora_formats
from loading.errors import WeightsError
from loading.files import STEM, to_half, write_atomically, write_files
from loading.hub import NAMES, hub_errors
from loading.layouts import SHIPPED, locate
from loading.names import config_to_diffusers, to_diffusers
from loading.weights import save_model, save_scheduler, save_text_encoder
from loading.words import FILE, read_words
from training.checkpoints import PRIVATE, check_finite, full_weights
from training.scenes import CAPTIONED, UNCAPTIONED, vocabulary


def files_given(args, parts: tuple[str, ...]) -> dict[str, str]:
    """The parts that come from elsewhere than --weights: {"vqgan": path, ...}."""
    return {part: getattr(args, part) for part in parts if getattr(args, part) not in (None, "none")}


def write_base(args, parts: tuple[str, ...], **more) -> None:
    """base.json, which tells sample.py --weights OUT where the parts are that this run did not write."""
    def path(name: str) -> str:
        return str(Path(name).resolve()) if name not in (*SHIPPED, *NAMES) and Path(name).exists() else name
    base = dict(weights=path(args.weights), files={part: path(file) for part, file in files_given(args, parts).items()})
    text = json.dumps(base | more, indent=2) + "\n"
    write_atomically(Path(args.out) / "base.json", lambda file: file.write_text(text))


def finished(args) -> None:
    """For a run that is resumed after its end: says so and leaves the result as it is. --push-to-hub uploads it."""
    print(f"{args.steps} steps are done and the result is in {args.out}: raise --steps to continue", file=sys.stderr)
    if args.push_to_hub:
        push(args)


def settings_table(args) -> str:
    """The settings of a run as rows of a Markdown table, without those that concern only this machine."""
    return "\n".join(f"| `--{name.replace('_', '-')}` | {value} |" for name, value in vars(args).items()
                     if value not in (None, False, []) and name not in (*PRIVATE, "cache"))


def write_card(args, tags: str, *paragraphs: str) -> None:
    """README.md: tags, paragraphs (empty ones are skipped), the newest sample sheet, the settings."""
    out = Path(args.out)
    sheets = sorted((out / "samples").glob("*.png"))
    parts = [f"---\nlicense: mit\n{tags}\n---\n# {out.name}", *paragraphs,
             f"![samples](samples/{sheets[-1].name})" if sheets else "",
             f"| setting | value |\n|---|---|\n{settings_table(args)}"]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def diffusers_tensors(model: torch.nn.Module, tensors: dict | None = None) -> dict[str, torch.Tensor]:
    """A model's tensors under diffusers' names, ready to be written."""
    named = to_diffusers(model.state_dict() if tensors is None else tensors, model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


# ----- Stage C -----------------------------------------------------------------------------------------

FILES_C = ("prior", "prior_text_encoder", "image_encoder", "decoder", "vqgan", "text_encoder")


def write_stage_c(args, model, text_encoder, images: int, processes) -> None:
    """prior/ or lora.safetensors, base.json, README.md, and --push-to-hub. All processes must call this.

    model: has Stage C as model.prior. text_encoder: a TextEncoder, with --train-text the one that was trained.
    """
    weights = full_weights(model)
    processes.on_main(write_files_c, args, model.prior, weights, text_encoder, images)


def write_files_c(args, prior, weights: dict, text_encoder, images: int) -> None:
    check_finite(weights, "the result")
    out, more = Path(args.out), {}
    (out / "README.md").unlink(missing_ok=True)      # written last: where it is, the result is complete
    if args.lora:
        write_lora(args, prior, args.steps, images, out / "lora.safetensors")
        more["lora"] = "lora.safetensors"
    else:
        learned = {name.removeprefix("prior."): tensor for name, tensor in weights.items() if name.startswith("prior.")}
        write_files(config_to_diffusers(prior), diffusers_tensors(prior, learned), out / "prior", STEM)
        save_scheduler(out / "scheduler")
        write_words(args)
    if args.train_text:
        save_text_encoder(text_encoder.tokenizer, text_encoder.model, out / "text_encoder", out / "tokenizer")
    write_base(args, FILES_C, **more)
    base = "warp-ai/wuerstchen-prior" if args.weights.startswith("v2") else args.weights
    commands = [f"    hf download {args.push_to_hub} --local-dir {out.name}"] * bool(args.push_to_hub)
    commands.append(f'    python sample.py --weights {out.name} --prompt "..."')
    stacked = (Path(args.weights) / "lora.safetensors").is_file()        # --lora would add to the LoRA in --weights
    alone = f'    python sample.py --weights {args.weights} --lora {out.name}/lora.safetensors --prompt "..."'
    write_card(args, f"base_model: {base}\ntags: [text-to-image, wuerstchen{', lora' * args.lora}]",
               f"{'A LoRA for' if args.lora else 'A fine-tune of'} Würstchen's Stage C, from `{args.weights}`, "
               f"{args.steps} steps on {images} images.",
               f"Trigger words: **{args.trigger}**." if args.trigger else "",
               "\n".join(commands), alone if args.lora and not stacked else "")
    if args.push_to_hub:
        push(args)


def write_lora(args, prior, steps: int, images: int, path: Path | None = None) -> None:
    """The LoRA of Stage C, if there is one, as it is after `steps` steps. Without a path, next to that checkpoint."""
    if not args.lora:
        return
    metadata = dict(base=args.weights, base_hash=lora_formats.base_hash(prior), steps=steps, images=images,
                    trigger_words=args.trigger)
    path = path or Path(args.out) / "checkpoints" / f"step_{steps:08d}.safetensors"
    lora_formats.save_lora(prior, path, metadata=metadata)


def write_words(args) -> None:
    """prior/words.json, if all captions were those of emoji scenes: the base's words, if there is one, and theirs."""
    kind, _, rest = args.data.partition(":")
    known, folder = {}, Path(args.out) / "prior"
    if args.init == "weights" and kind == "scenes":
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
    """Has the frozen image encoder a Stage C, in --weights? It comes from there, or --image-encoder is that one."""
    if not args.freeze_encoder or args.init == "weights" or args.weights in NAMES:
        return args.freeze_encoder and args.init == "weights"
    own = locate(args.weights, parts=("image_encoder",))["image_encoder"]
    return own is not None and own.resolve() == Path(args.image_encoder).resolve()


def save_encoder(encoder: torch.nn.Module, folder: Path, frozen: bool) -> None:
    """An image encoder in float16, as released; a frozen one only if rounding does not change it."""
    tensors = diffusers_tensors(encoder)
    half = to_half(tensors)
    exact = all(torch.equal(half[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
    write_files(config_to_diffusers(encoder), half if exact or not frozen else tensors, folder, STEM)


def write_stage_b(args, model, encoder, images: int, log_lines: list[dict], processes) -> None:
    """decoder/, image_encoder/, README.md, base.json if Stage C still fits, --push-to-hub.

    model: has Stage B as model.decoder; encoder: the image encoder; log_lines: have the PSNR. All processes must call
    this.
    """
    weights = full_weights(model)
    processes.on_main(write_files_b, args, model.decoder, encoder, weights, images, log_lines)


def write_files_b(args, decoder, encoder, weights: dict, images: int, log_lines: list[dict]) -> None:
    check_finite(weights, "the result")
    out = Path(args.out)
    (out / "README.md").unlink(missing_ok=True)      # written last: where it is, the result is complete

    def filled(network: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """A new one, because under FSDP the network itself holds a part of each tensor."""
        with torch.device("meta"):
            new = type(network)(**network.config)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        new.load_state_dict(tensors, assign=True)
        return new
    save_model(filled(decoder, "decoder."), out / "decoder")
    save_encoder(encoder if args.freeze_encoder else filled(encoder, "encoder."), out / "image_encoder",
                 args.freeze_encoder)
    fits = stage_c_fits(args)
    if fits:
        write_base(args, FILES_B)
    last = next((line for line in reversed(log_lines) if "psnr_a" in line), {})
    psnr = [f"| {'Stage A only' if key == 'psnr_a' else key[5:].replace('_', ' ')} | {value:.2f} |"
            for key, value in last.items() if key.startswith("psnr")]
    use = f'--weights {out.name} --prompt "..."' if fits else (
        f"--weights {args.weights} --decoder {out.name}/decoder --image-encoder {out.name}/image_encoder "
        f"--reconstruct photo.png")
    write_card(args, "tags: [wuerstchen, diffusion-autoencoder]",
               f"Würstchen's Stage B{' of v1' * args.v1}{' and its image encoder' * (not args.freeze_encoder)}, "
               f"from {'random weights' if args.init == 'random' else f'`{args.weights}`'}, "
               f"{args.steps} steps on {images} images.",
               "" if args.freeze_encoder else "Stage C only works with the encoder it was trained on: train it again.",
               f"    python sample.py {use}",
               "\n".join([f"| PSNR of {args.val_count} images | dB |", "|---|---:|", *psnr]) if psnr else "")
    if args.push_to_hub:
        push(args)


# ----- Stage A -----------------------------------------------------------------------------------------

@torch.no_grad()
def write_stage_a(args, model, fixed: torch.Tensor, values: dict, images: int) -> None:
    """vqgan/, README.md, and --push-to-hub. fixed: images of the validation, (N,3,H,W) uint8; values: what it found."""
    check_finite(model.state_dict(), "the result")
    (Path(args.out) / "README.md").unlink(missing_ok=True)       # written last: where it is, the result is complete
    if not args.freeze_encoder:          # the scale of the latents, so that Stage B sees unit variance
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
    write_card(args, "tags: [vqgan, wuerstchen]",
               f"Würstchen's Stage A, {f'from `{args.init}`, ' if args.init else ''}{args.steps} steps on {images} "
               "images.\n"
               f"PSNR on {len(fixed)} images{f' of `{args.val_data}`' if args.val_data else unseen}: {psnr}.",
               f"    python sample.py --weights tiny --vqgan {Path(args.out).name}/vqgan --reconstruct photo.png")
    if args.push_to_hub:
        push(args)


# ----- the upload ----------------------------------------------------------------------------------------

def push(args) -> None:
    """Uploads the result to the hub, without checkpoints. A failure here must not look like a failed training."""
    from huggingface_hub import HfApi
    try:
        with hub_errors(args.push_to_hub, "main"):
            api = HfApi(token=args.hub_token)
            api.create_repo(args.push_to_hub, exist_ok=True)
            api.upload_folder(repo_id=args.push_to_hub, folder_path=args.out,
                                  ignore_patterns=["checkpoints/*", "index/*", ".*"])
    except WeightsError as error:
        print(f"the upload failed, the result is in {args.out}: {error}", file=sys.stderr)
