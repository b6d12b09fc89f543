"""Compare inference on a CPU, side by side: this library, PyTorch, ONNX Runtime and OpenVINO.

ONNX Runtime and OpenVINO run what ``torch.onnx.export`` writes. "ONNX Runtime, export" runs what this library writes.

Each engine has a process of its own, and they take turns in random order while the others are idle. In every round,
each engine computes the same images once without and then with measuring the time. Converting the input to the layout
that suits the engine best is not measured. The tables have medians over all rounds, ratios, the time to start, the peak
memory, and the error against float64.

    pip install -e ".[benchmark]"
    python benchmarks/inference.py
"""

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import (
    THREADS,
    Worker,
    is_quick,
    machine,
    parse_arguments,
    peak_memory,
    print_header,
    print_row,
    progress,
    scratch,
    take_turns,
    torch_model,
    write_network,
)

ERROR_BATCH = 2 if is_quick() else 8

Engine = tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]
"""A function from images NHWC to the engine's input, not measured, and one from there to the logits, measured."""


def pytorch(folder: Path, channels_last: bool = False, compiled: bool = False) -> Engine:
    import torch

    model, layout = torch_model(folder, channels_last)
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        # dynamic=False, because otherwise the second batch size would get a slower graph
        if is_quick():
            model.conv1 = torch.compile(model.conv1, dynamic=False)
        else:
            model = torch.compile(model, dynamic=False)
    mode = torch.no_grad if compiled else torch.inference_mode  # freezing refuses inference tensors

    def run(images: "torch.Tensor") -> np.ndarray:
        with mode():
            return model(images).numpy()

    return lambda images: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout), run


def onnxruntime(folder: Path, file: str = "model.onnx") -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    return _channels_first, lambda images: session.run(None, {"images": images})[0]


def openvino(folder: Path) -> Engine:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(folder / "model.onnx", "CPU", settings).create_infer_request()
    return _channels_first, lambda images: request.infer({"images": images})[0]


def flax(folder: Path, fast: bool = False) -> Engine:
    import jax

    import flax_googlenet

    model, variables = flax_googlenet.load(folder / "weights.safetensors")
    if fast:
        predict = flax_googlenet.make_predictor(model, variables)
        return lambda images: images, lambda images: np.asarray(predict(images))
    apply = jax.jit(model.apply)
    return lambda images: images, lambda images: np.asarray(apply(variables, images).logits)


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "ONNX Runtime": onnxruntime,
    "ONNX Runtime, export": lambda folder: onnxruntime(folder, "export.onnx"),
    "OpenVINO": openvino,
    "PyTorch": pytorch,
    "PyTorch channels_last": lambda folder: pytorch(folder, channels_last=True),
    "torch.compile, frozen": lambda folder: pytorch(folder, channels_last=True, compiled=True),
    "jax.jit(model.apply)": flax,
    "make_predictor": lambda folder: flax(folder, fast=True),
}
BASELINE = "ONNX Runtime"
READ_ONNX = {"ONNX Runtime", "OpenVINO"}
READ_EXPORT = "ONNX Runtime, export"


def main() -> None:
    """Run the benchmark and print its tables in Markdown."""
    arguments = parse_arguments(__doc__, ENGINES, batches=[1, 8, 32], rounds=15, variants=["torchvision", "bvlc"])
    with scratch() as folder, contextlib.ExitStack() as processes:
        make_inputs(folder, arguments.engines, arguments.size, arguments.variant)
        starts, workers = {}, {}
        for name in arguments.engines:
            with contextlib.ExitStack() as process:
                first, _ = start(name, folder, arguments.size, process)
            second, workers[name] = start(name, folder, arguments.size, processes)
            starts[name] = (first, second)
            progress(f"{name}: started twice")
        results = {
            batch: take_turns(workers, arguments.rounds, f"batch {batch}", batch=batch, calls=max(2, 8 // batch))
            for batch in sorted(arguments.batches)
        }
        errors = {name: error(worker, folder) for name, worker in workers.items()}
        report(starts, results, errors)


def make_inputs(folder: Path, engines: list[str], size: int, variant: str = "torchvision") -> None:
    """Write the network in each engine's format, and the true logits, computed in float64."""
    import torch

    import flax_googlenet

    model = write_network(folder, variant)
    if READ_ONNX & set(engines):
        example = (torch.zeros(2, 3, size, size),)
        shapes = ({0: torch.export.Dim("n", min=1, max=4096)},)
        with contextlib.redirect_stdout(sys.stderr):
            torch.onnx.export(model, example, folder / "model.onnx", input_names=["images"], dynamic_shapes=shapes)
    if READ_EXPORT in engines:
        flax_googlenet.export(
            folder / "export.onnx", *flax_googlenet.load(folder / "weights.safetensors"), layout="NCHW"
        )
    with torch.inference_mode():
        images = torch.from_numpy(random_images(ERROR_BATCH, size).astype(np.float64)).permute(0, 3, 1, 2)
        np.save(folder / "truth.npy", model.double()(images).numpy())


def load(name: str, folder: Path, size: int) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the engine on ``batch`` images and returns the seconds of each of ``calls`` calls.

    An additional call comes first and is not measured. The answer also has its logits and the peak memory.
    """
    to_input, run = ENGINES[name](folder)

    def answer(batch: int, calls: int) -> dict[str, Any]:
        images = to_input(random_images(batch, size))
        logits, seconds = run(images), []
        for _ in range(calls):
            start = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak": peak_memory(), "logits": logits}

    return answer


def error(worker: Worker, folder: Path) -> float:
    """Return the largest error of an engine's logits against float64, relative to the largest logit."""
    from proof import relative_error

    return relative_error(worker.ask(batch=ERROR_BATCH, calls=0)["logits"], np.load(folder / "truth.npy"))


def report(
    starts: dict[str, tuple[tuple[float, float], tuple[float, float]]],
    results: dict[int, dict[str, list[dict[str, Any]]]],
    errors: dict[str, float],
) -> None:
    """Print the tables."""
    print(machine("jax", "jaxlib", "flax", "torch", "torchvision", "onnxruntime", "openvino") + "\n")
    baseline = BASELINE if BASELINE in starts else next(iter(starts))
    print_header("milliseconds an image", *(f"batch {batch}" for batch in results))
    for name in starts:
        cells = []
        for batch, answers in results.items():
            median, baseline_median = (
                statistics.median(seconds for answer in answers[engine] for seconds in answer["seconds"])
                for engine in (name, baseline)
            )
            cells.append(f"{1000 * median / batch:.1f} ({baseline_median / median:.2f}x)")
        print_row(name, *cells)
    print(f"\nIn brackets: how many times as fast as {baseline}.\n")
    peaks = [f"peak MB, batch {batch}" for batch in results]
    print_header("", "import and load, s", "first call, s", "in a second process, s", *peaks, "error / largest logit")
    for name, (first, second) in starts.items():
        memory = [f"{answers[name][-1]['peak']:.0f}" for answers in results.values()]
        print_row(name, f"{first[0]:.1f}", f"{first[1]:.1f}", f"{second[1]:.1f}", *memory, f"{errors[name]:.1e}")


def start(name: str, folder: Path, size: int, processes: contextlib.ExitStack) -> tuple[tuple[float, float], Worker]:
    """Start a process, and return the seconds until it is loaded, the seconds of its first call, and the process."""
    begin = time.perf_counter()
    worker = processes.enter_context(Worker(name, folder, functools.partial(load, name, folder, size)))
    loaded = time.perf_counter()
    worker.ask(batch=1, calls=0)
    return (loaded - begin, time.perf_counter() - loaded), worker


def random_images(batch: int, size: int) -> np.ndarray:
    """Return float32 [batch, size, size, 3], normal."""
    return np.random.default_rng(batch).standard_normal((batch, size, size, 3)).astype(np.float32)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


if __name__ == "__main__":
    main()
