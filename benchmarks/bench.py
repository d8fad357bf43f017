"""Ours against the textbook's, in one run: `make bench`, or `python benchmarks/bench.py --quick`."""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from cases import ACDC, CASES, LA, Work
from launches import launch_line, launch_rows
from memory import memory_line, memory_rows
from scale import scale_line, scale_rows
from start import start_line, start_rows
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from workers import worker_line, worker_rows

from sdcl.networks import build_network
from sdcl.runs.config import run_script
from sdcl.runs.devices import computes_bf16, keep_freed_memory, set_arithmetic
from sdcl.runs.folder import environment, write_text
from sdcl.scoring.evaluation import STUDENTS
from sdcl.training import peak_memory_gib

SMALL = {
    "acdc": {"shape": (128, 128), "batch_size": 4, "volume": (4, 128, 108)},
    "la": {"shape": (48, 48, 32), "batch_size": 2, "volume": (66, 48, 32)},
}
FAST = ("losses", "labels", "streams", "metrics")  # of the published size with --quick too
Named = Literal[
    "losses", "labels", "step", "streams", "evaluation", "metrics", "start", "workers", "memory", "scale", "launches"
]  # fmt: skip
SHORTEST_SECONDS = 0.2  # a case that takes less is done several times in a repeat


@dataclass
class Config:
    """Time our losses, pseudo-labels, steps, streams, evaluation and metrics beside a textbook's.

    Each way runs in a process of its own, and their repeats take turns, so that both see the same machine.
    """

    quick: bool = False  # smaller networks' inputs, for a look in under 4 minutes
    only: tuple[Named, ...] = ()  # all
    device: Literal["cpu", "cuda"] = "cpu"  # where to compute
    repeats: int = 3  # that are timed, after one that is not
    output: Path = Path(__file__).parent / "results.json"  # the figures, as JSON


def main(config: Config) -> None:
    """Measure every case, print the table and write it."""
    device = torch.device(config.device)
    set_arithmetic(deterministic=False)
    facts = environment(device) | {"cpu": cpu_name(), "settings": {"quick": config.quick, "repeats": config.repeats}}
    peaks = {precision: matmul_peak(device, precision) for precision in ("fp32", "bf16")}
    facts["matmul_tflops"] = peaks
    bf16 = "no arithmetic" if peaks["bf16"] is None else f"{peaks['bf16']:.3f} TFLOP/s"
    print(f"{facts['cpu'] if config.device == 'cpu' else facts['device']}, {facts['threads']} threads, torch "
          f"{torch.__version__}, numpy {np.__version__}; matrix products: fp32 {peaks['fp32']:.3f} TFLOP/s, "
          f"bf16 {bf16}")  # fmt: skip
    print("case                                 ours [s] (min-max)         textbook [s] (min-max)     ratio  "
          "peak memory [GiB]      network FLOPs")  # fmt: skip
    rows = []
    for case, work in works(config):
        if work.precision == "bf16" and peaks["bf16"] is None:
            rows.append({"case": name_of(case, work), "not_measured": "this machine has no bf16 arithmetic"})
        else:
            rows.append(compare(case, work, config, peaks[work.precision]))
        print(line(rows[-1]), flush=True)
        write_text(config.output, json.dumps({"machine": facts, "cases": rows}, indent=1))
    more = (
        ("start", lambda: start_rows(config.repeats), start_line),
        ("workers", lambda: worker_rows(config.repeats), worker_line),
        ("memory", lambda: memory_rows(config.quick), memory_line),
        ("scale", lambda: scale_rows(config.repeats, is_quick=config.quick), scale_line),
        ("launches", launch_rows, launch_line),
    )
    for name, make, line_of in more:
        for row in make() if not config.only or name in config.only else ():
            rows.append(row)
            print(line_of(row), flush=True)
        write_text(config.output, json.dumps({"machine": facts, "cases": rows}, indent=1))
    print(f"written to {config.output}")


def works(config: Config) -> Iterator[tuple[str, Work]]:
    """Yield each case's name and its work."""
    for case in (case for case in config.only or CASES if case in CASES):
        for work in (ACDC, LA) if case != "metrics" else (LA,):
            sizes = SMALL[work.data_set] if config.quick and case not in FAST else {}
            for precision in ("fp32", "bf16") if case in ("step", "evaluation") else ("fp32",):
                yield case, dataclasses.replace(work, precision=precision, device=config.device, **sizes)


def compare(case: str, work: Work, config: Config, peak_tflops: float) -> dict[str, Any]:
    """Measure one case both ways, in turns, and return its row; the textbook always computes in fp32."""
    sides = {"ours": work, "textbook": dataclasses.replace(work, precision="fp32")}
    # A server that has imported everything forks a fresh process at once; Windows has none.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["cases"])
    children, results = {}, {side: [] for side in sides}
    for side, its_work in sides.items():
        ours, theirs = context.Pipe()
        child = context.Process(target=serve, args=(theirs, case, its_work, side == "ours"), daemon=True)
        child.start()
        children[side] = (child, ours)
    for _ in range(config.repeats + 1):
        for side, (_, connection) in children.items():
            connection.send("run")
            results[side].append(connection.recv())
    for child, connection in children.values():
        connection.send("stop")
        child.join()
    row: dict[str, Any] = {"case": name_of(case, work), "shape": work.shape, "batch_size": work.batch_size}
    for side, measured in results.items():
        seconds = [result["seconds"] for result in measured[1:]]
        row[side] = {
            "seconds": float(np.median(seconds)), "min": min(seconds), "max": max(seconds),
            "memory_gib": measured[-1]["memory_gib"], "figures": measured[0]["figures"],
        }  # fmt: skip
    row["ratio"] = row["textbook"]["seconds"] / row["ours"]["seconds"]
    if case == "step":
        row["tflop"] = step_tflop(work)
        for side, precision in (("ours", work.precision), ("textbook", "fp32")):
            row[side]["tflops"] = row["tflop"] / row[side]["seconds"]
            row[side]["of_peak"] = row[side]["tflops"] / peak_tflops if precision == work.precision else None
    return row


def serve(connection: Connection, case: str, work: Work, is_ours: bool) -> None:
    """Do one way of a case whenever asked to, in a process of its own, and answer with time, memory and figures."""
    set_arithmetic(deterministic=False, precision=work.precision)
    if is_ours:
        keep_freed_memory()  # as the scripts do
    run, calls = CASES[case](work, is_ours), 1
    before = resident_gib()
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved() / 2**30
    while connection.recv() == "run":
        begin = time.perf_counter()
        for _ in range(calls):
            figures = run()
        if work.device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / calls
        calls = max(calls, int(SHORTEST_SECONDS / seconds))
        peak = torch.cuda.max_memory_reserved() / 2**30 if work.device == "cuda" else peak_memory_gib()
        connection.send({"seconds": seconds, "memory_gib": peak - before, "figures": figures})


def resident_gib() -> float:
    """Return the memory that this process holds now, in GiB; nan where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def step_tflop(work: Work) -> float:
    """Count a self-training step's operations in the networks, in units of 10^12, on tensors without contents."""
    images = torch.empty(work.batch_size, 1, *work.shape, device="meta")
    total = 0
    for role, name in zip(STUDENTS, work.networks, strict=True):
        network = build_network(name, work.classes).to("meta")
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network(images)
        with FlopCounterMode(display=False) as both:
            network(images).sum().backward()
        total += 2 * both.get_total_flops()
        total += 2 * forward.get_total_flops() if role == STUDENTS[0] else 0  # the teacher
    return total / 1e12


def matmul_peak(device: torch.device, precision: str) -> float | None:
    """Return the fastest of many square matrix products in TFLOP/s, by BLAS or oneDNN; None without such arithmetic."""
    if precision == "bf16" and not computes_bf16(device):
        return None
    peak = 0.0
    for side in (8192,) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        products = [(torch.mm, a)]
        if device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available():
            products.append((F.linear, a.to_mkldnn()))  # what the convolutions run on; BLAS may be slower
        for product, factor in products:
            for _ in range(20):
                begin = time.perf_counter()
                product(factor, factor)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                peak = max(peak, 2 * side**3 / (time.perf_counter() - begin) / 1e12)
    return peak


def cpu_name() -> str:
    """Return the processor's name where the system tells it."""
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        return names[0].split(":")[1].strip()
    except (OSError, IndexError):
        return "unknown CPU"


def name_of(case: str, work: Work) -> str:
    """Name a row."""
    return f"{case} {work.data_set} {'x'.join(map(str, work.shape))} {work.precision}"


def line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    if "not_measured" in row:
        return f"{row['case']:36s} not measured: {row['not_measured']}"
    times = [f"{s['seconds']:9.4f} ({s['min']:.4f}-{s['max']:.4f})" for s in (row["ours"], row["textbook"])]
    ours, theirs = (row[side]["memory_gib"] for side in ("ours", "textbook"))
    text = f"{row['case']:36s} {times[0]:26s} {times[1]:26s} {row['ratio']:6.2f}  {ours:6.2f} of {theirs:6.2f}"
    if "tflop" in row:
        of_peak = [f"{row[side]['of_peak']:.0%}" for side in ("ours", "textbook") if row[side]["of_peak"] is not None]
        text += f"  {row['tflop']:.2f} T, {' and '.join(of_peak)} of the peak"
    return text


if __name__ == "__main__":
    run_script(main, Config)
