"""Generates images on the command line and saves them as PNG, JPEG or WebP files.

  python sample.py --prompt "a red apple on a blue background"
  python sample.py --prompt "a cat left of a red apple" --num-images 4 --seed 7 --out cats
  python sample.py --prompt "an astronaut on a horse" --weights v2 --sampler-c dpm++ --steps-c 14
  python sample.py --prompt "a cat on a blue background" --init apple.png --strength 0.9
  python sample.py --prompt "a rose on a blue background" --init apple.png --mask white-is-new.png
  python sample.py --init apple.png --num-images 4                     # no prompt: variations
  python sample.py --reconstruct photo.png                             # encoded and decoded again
  python sample.py --prompt "a dog" --interpolate-to "a cat" --frames 12 --out morph.gif
  python sample.py --prompt "a dog" --grid 1,2,4,8 --num-images 3      # seeds x guidance
  python sample.py --prompt-file prompts.txt --batch 8
  python sample.py --like out/image.png --seed 8                       # that image's settings

For readers: `main` turns the options into jobs, one per image, loads the model, generates the
images and saves them. extras/cli.py has options, checks and paths; extras/like.py the settings
stored in each file; extras/jobs.py prompt files and the handling of errors; extras/modes.py
grids, interpolation and latents. From Python, use wuerstchen.py and extras/editing.py.
Note: importing torch takes seconds, so it happens only after the options were checked.
Needs: the packages that wuerstchen.py needs.
"""
import argparse
import functools
import sys

from extras import cli
from extras.cli import comma_list, steps
from extras.jobs import exit_on_error
from loading.options import BATCH, IMAGES, SEED, SIDE, Number, unit_float

USAGE = """usage:   python sample.py --prompt "..." [options]
example: python sample.py --prompt "a red apple on a blue background" --seed 1
All options: python sample.py --help"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser with all options. Many of their defaults depend on the weights."""
    p = argparse.ArgumentParser(usage='python sample.py --prompt "..." [options]',
                                description=__doc__.partition("\nFor readers")[0],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = cli.error                # unlike argparse's error(), it does not print the usage

    add = p.add_argument_group("used most").add_argument
    add("--prompt", metavar="TEXT", help="a description of the image")
    add("--negative-prompt", metavar="TEXT", default="",
        help="what to steer away from; has no effect if guidance is 1 (default: nothing)")
    add("--num-images", metavar="N", type=IMAGES, default=1,
        help="images of each prompt, each with its own seed (default: 1)")
    add("--seed", metavar="N", type=SEED,
        help="the same seed and settings always give the same image; of several images, each next "
             "one has the next seed (default: random, and printed)")
    add("--out", metavar="PATH", default="out",
        help="a .png, .jpg or .webp file (.gif for an interpolation), or a folder in which PNG "
             "files are named after prompt and seed; of several images, FILE.png becomes "
             "FILE_SEED.png (default: out)")
    add("--width", metavar="PX", type=SIDE,
        help="any from 64; far from the size the weights were trained on, images get worse "
             "(default: 128 for the tiny weights, 512 for v1, 1024 for others; with --init: its "
             "shape, at most 4 : 1, the shorter side that long)")
    add("--height", metavar="PX", type=SIDE, help="any from 64 (default: see --width)")
    add("--init", metavar="IMAGE",
        help="start from this image instead of noise; without --prompt: variations of it")
    add("--strength", metavar="X", type=unit_float,
        help="how much of --init is replaced by noise: 0 nothing, 1 all of it (default: 0.6, with "
             "a mask 1, without a prompt 0.3)")
    add("--weights", metavar="NAME",
        help='"tiny" and "tiny-v1", which ship with the code; "v2", "v2-base" or "v2-aesthetic", '
             '12 GB fetched once, half of it if float16 is wanted and offered; "v1", for 512 px; '
             "a folder, in diffusers' layout or with the original .pt files; or someone's "
             "repository, hub:OWNER/NAME, hub:OWNER/NAME@REVISION, hub:OWNER/NAME/FOLDER (default: "
             "tiny; v2 if a part is given below)")
    add("--steps-c", metavar="STEPS", type=steps,
        help="steps of Stage C, which decides what is in the image: more are slower and finer "
             "(default: 29; for v1 60); other forms: see --steps-b")
    add("--guidance-c", metavar="SCALE", type=comma_list(Number(), 1, 2),
        help="how strongly Stage C follows the prompt: 1 is no guidance, in half the time; raise "
             "it if the prompt is ignored, lower it if colours glare; two numbers, 8,2: at noise "
             "level 1 and at 0 (default: 4; for v1 6; for tiny and tiny-v1 2)")
    cli.add_input_options(p)
    add = p.add_argument_group("sampling", "Stage C (-c) decides what is in the image, Stage B "
                               "(-b) adds detail. Both take the same values.").add_argument
    add("--steps-b", metavar="STEPS", type=steps,
        help="a number; or segments, 2/3:20,0:10 for 20 steps from noise level 1 down to 2/3 and "
             "10 to 0; or the levels themselves, 1,0.6,0.3,0; or "
             f"{cli.PUBLISHED_STEPS}, 29 steps (default: 12; for v1 8)")
    add("--guidance-b", metavar="SCALE", type=comma_list(Number(), 1, 2),
        help="default: 1; for v1 and tiny-v1 2; for tiny 4,1")
    add("--sampler-c", choices=cli.SAMPLERS["c"],
        help="ddpm, the original's; ddim, deterministic; or dpm++, of second order, which needs "
             "half as many steps (default: ddpm)")
    add("--sampler-b", choices=cli.SAMPLERS["b"],
        help="for v1, whose Stage B generates tokens: multinomial draws them, argmax takes the "
             "likeliest, quant the nearest to their mean (default: ddpm; for v1 multinomial)")
    cli.add_sampling_options(p)

    add = p.add_argument_group("device and speed").add_argument
    add("--device", help="cuda, cuda:1, cpu, mps (default: cuda if there is one, else cpu)")
    add("--dtype", choices=[*cli.DTYPES, "auto"],
        help="precision: fp32 is exact, the others need half the memory; bf16 is also faster where "
             "the processor has instructions for it, and auto chooses it there: official weights "
             "then take about half the time on a CPU, and images differ a little (default: bf16 on "
             "a GPU; fp32 on a CPU, so that a seed gives the same image on every machine)")
    add("--batch", metavar="N", type=BATCH, default=1,
        help="images computed at a time: more is faster on a GPU, and rounds differently "
             "(default: 1)")
    cli.add_output_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the script. Exit code: 0 success, 1 some prompts failed, 2 user error, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return print(USAGE)
    with exit_on_error() as run:
        jobs = cli.parse_jobs(parser(), argv, run)     # one job per image, with seed and path
        import torch
        from wuerstchen import Wuerstchen
        args = jobs[0]                                 # all jobs load the same model
        dtype = getattr(torch, cli.DTYPES.get(args.dtype, ""), args.dtype)   # dtype, "auto" or None
        model = Wuerstchen.load(args.weights, args.device, dtype, lora=args.lora,
                                **cli.load_options(jobs))
        if args.allow_tf32:
            from loading.arguments import set_tf32
            set_tf32(True)
        if args.tile:
            from speed.memory import tile
            tile(model, args.tile)
        for batch in run.progress(cli.batches(jobs)):
            for job, image in run.attempt(functools.partial(make_images, model), batch):
                run.finished(job, cli.save(image, job, model))   # save also stores the settings


def make_images(model, jobs: list[argparse.Namespace]) -> list:
    """Generates one batch of images: those of jobs that differ only in prompts and seed."""
    job = jobs[0]
    options = dict(progress=True, **cli.sampling_options(job, model))
    if job.given & cli.SPECIAL:                        # options that extras/modes.py handles
        from extras import modes
        return modes.make_images(model, jobs, options)
    if len(jobs) == 1 and not job.given & {"init", "width", "height"}:
        return model(job.prompt, job.negative_prompt, seed=job.seed, **options)
    # `generate` is like model(...), but also takes a seed per prompt and an image to start from.
    from extras.editing import InitImage, generate
    edit = InitImage(job.init, job.strength, job.mask or None) if job.init else None
    return generate(model, [job.prompt for job in jobs], [job.negative_prompt for job in jobs],
                    seed=[job.seed for job in jobs], width=job.width, height=job.height, edit=edit,
                    **options)


if __name__ == "__main__":
    main()
