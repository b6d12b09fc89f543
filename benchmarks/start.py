"""Compare how long a process takes to classify one photograph, side by side: this library's command and PyTorch.

A process imports its library, reads the weights, and prints the likeliest classes of a JPEG file. For PyTorch it is a
script with torchvision's network and preset. What the imports alone take is measured, too. The processes take turns in
random order. A first turn of each, which is not counted, compiles the network and fills the caches. The table has
medians over all rounds.

    pip install -e ".[benchmark]"
    python benchmarks/start.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from side_by_side import ORDER, machine, print_header, print_row, progress, scratch, write_network

PYTORCH = """
import json
import torch
from PIL import Image
from torchvision.models import GoogLeNet_Weights, googlenet

model = googlenet(init_weights=False)  # as for torchvision's own weights
model.load_state_dict(torch.load("weights.pth"))
preset = GoogLeNet_Weights.IMAGENET1K_V1.transforms()
with torch.inference_mode():
    logits = model.eval()(preset(Image.open("photograph.jpg").convert("RGB"))[None])
probabilities, indices = logits.softmax(1)[0].topk(5)
rows = zip(indices.tolist(), probabilities.tolist(), strict=True)
print(json.dumps({"predictions": [{"index": index, "probability": probability} for index, probability in rows]}))
"""

CLASSIFY = ["-m", "flax_googlenet", "classify", "photograph.jpg", "--weights", "weights.safetensors", "--json"]

ENGINES = {
    "PyTorch": ["-c", PYTORCH],
    "flax-googlenet classify": CLASSIFY,
    "import torch, torchvision": ["-c", "import torch, torchvision"],
    "import jax, flax": ["-c", "import jax, flax"],
}
"""Name -> arguments of Python."""
BASELINE = "PyTorch"


class Turn(NamedTuple):
    """What a process took, in seconds."""

    answer: float
    """Time from its start to its first line, or to the end of its output if it prints none."""
    end: float
    """Time from its start to its end."""
    cpu: float
    """CPU time of all its threads."""


def main() -> None:
    """Run the benchmark and print its table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each process (15)")
    parser.add_argument("--quick", action="store_true", help="one turn: only check that everything runs")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    with scratch() as folder:
        make_inputs(folder)
        predictions = {name: run(name, folder)[1] for name in ENGINES}
        if predictions["PyTorch"] != predictions["flax-googlenet classify"]:
            sys.exit(f"the answers differ: {predictions}")
        turns: dict[str, list[Turn]] = {name: [] for name in ENGINES}
        for number in range(rounds):
            for name in ORDER.sample(list(ENGINES), len(ENGINES)):
                turns[name].append(run(name, folder)[0])
            progress(f"round {number + 1} of {rounds}")
    report(turns)


def make_inputs(folder: Path) -> None:
    """Write a photograph, and the weights of a network for each library."""
    import reference
    import torch

    torch.save(write_network(folder).state_dict(), folder / "weights.pth")
    Image.fromarray(reference.photographs()[0]).save(folder / "photograph.jpg", quality=92)


def run(name: str, folder: Path) -> tuple[Turn, list[int]]:
    """Run a process, and return what it took and the indices of the classes that it printed, the likeliest first."""
    # The command keeps compiled programs in its own cache folder, and an installed package has its bytecode.
    unwanted = "JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"
    environment = {variable: value for variable, value in os.environ.items() if variable not in unwanted}
    environment["FLAX_GOOGLENET_CACHE"] = str(folder / "cache")
    with (folder / "errors.txt").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *ENGINES[name]], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        answer = time.perf_counter() - start
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        end = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{name} failed: {errors.read()}")
    predictions = json.loads(line)["predictions"] if line else []
    return Turn(answer, end, usage.ru_utime + usage.ru_stime), [prediction["index"] for prediction in predictions]


def report(turns: dict[str, list[Turn]]) -> None:
    """Print the table."""
    print(machine("jax", "jaxlib", "flax", "torch", "torchvision") + "\n")
    print_header("", "answer, s", "end, s", "CPU, s")
    medians = {name: [statistics.median(values) for values in zip(*turns[name], strict=True)] for name in turns}
    for name, seconds in medians.items():
        ratio = f" ({medians[BASELINE][1] / seconds[1]:.2f}x)"
        print_row(name, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}{ratio}", f"{seconds[2]:.2f}")
    print(f"\nIn brackets: how many times as fast as {BASELINE}.")


if __name__ == "__main__":
    main()
