"""Times whole programs: `python sample.py` for an image, its lower bound (a process that only imports), `--help`."""
import subprocess
import sys
import tempfile
from statistics import median

from tools.bench.measure import in_turns, ratio
from tools.bench.report import PROMPT, ROOT, Row


def measure(args) -> tuple[str, list[Row]]:
    def program(*argv: str):
        subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    script, size = str(ROOT / "sample.py"), ["--width", f"{args.side}", "--height", f"{args.side}"] * bool(args.side)
    with tempfile.TemporaryDirectory() as folder:
        command = [script, "--prompt", PROMPT, "--seed", "1", "--weights", args.weights, "--device", args.device,
                   "--out", folder, *size]
        ours, imports, help = in_turns({"ours": lambda: program(*command),
                                        "imports": lambda: program("-c", "import torch, tokenizers"),
                                        "help": lambda: program(script, "--help")}, args.repeats).values()
    return "Start", [Row("start to PNG", f"{median(ours):.2f} s", f"{median(imports):.2f} s, imports only",
                         ratio(ours, imports)),
                     Row("`--help`, seconds", f"{median(help):.2f} s", "", median(help))]
