"""proxyset and PyTorch on the same work, in turn, in one run: `make bench-peers`, on a GPU `make bench-cuda`; see README.md
beside this file."""

import argparse
import datetime
import fnmatch
import functools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import diffusers
import torch
from cases import ROOT, Variant, cases, gpu_cases
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CPU_VARIANTS = [Variant(compiled, channels_last) for compiled in (False, True) for channels_last in (False, True)]
# Shorter work is repeated until a repetition lasts this long, after untimed runs of the second length; work longer
# than the third has no warm-up.
REPETITION_MS = 50
WARMUP_MS = 20
WARMUP_BELOW_MS = 1000
# Before each repetition: PyTorch's workers spin for milliseconds after their work.
PAUSE_S = 0.05
TOLERANCE = 1e-3


class Runner:
    """benches/peers, one engine of it."""

    def __init__(self, command, engine, threads):
        pools = {"RAYON_NUM_THREADS": str(threads), "CANDLE_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*shlex.split(command), engine],
            cwd=ROOT,
            env=os.environ | pools,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, op, **arguments):
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the runner ended with status {self.process.wait()} at '{op}'")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the runner says at '{op}': {answer['error']}")
        return answer

    def time(self, warmup, iterations):
        return self.ask("time", warmup=warmup, iterations=iterations)["ms"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Bench:
    """What PyTorch is run as on the device."""

    def __init__(self, device, precision):
        self.device, self.precision = device, precision
        if device == "cpu":
            # The oracle, and what tells how far rounding takes it.
            self.variants, self.oracles = CPU_VARIANTS, CPU_VARIANTS[:2]
            return
        torch.cuda.set_device(device)
        # Our side measures cuDNN's algorithms, too.
        torch.backends.cudnn.benchmark = True
        bf16 = precision == "bf16"
        self.variants = [Variant(compiled, True, device, bf16) for compiled in (False, True)]
        self.oracles = [Variant(False, False, device), self.variants[0]]

    def set_numbers(self):
        allow_tf32(self.precision != "f32")

    def matrix_tflops(self, n=8192, repetitions=20):
        """The rate of PyTorch's product of large matrices in this precision: what the device can do."""
        self.set_numbers()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(repetitions):
            synchronize()
            start = time.perf_counter()
            a @ b
            synchronize()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / statistics.median(times) / 1e12


class Timer:
    """Repetitions of one side's work; `measure(warmup, iterations)` is in ms an iteration."""

    def __init__(self, measure):
        self.measure = measure
        # The first runs are those that compile, allocate and choose algorithms.
        measure(0, 1)
        once = measure(0, 1)
        self.iterations = max(1, math.ceil(REPETITION_MS / once))
        self.warmup = math.ceil(WARMUP_MS / once) if once < WARMUP_BELOW_MS else 0
        self.times = []

    def repeat(self):
        time.sleep(PAUSE_S)
        self.times.append(self.measure(self.warmup, self.iterations))

    def median(self):
        return statistics.median(self.times)


def timer_of(run):
    def measure(warmup, iterations):
        for _ in range(warmup):
            run()
        synchronize()
        start = time.perf_counter()
        for _ in range(iterations):
            run()
        synchronize()
        return 1e3 * (time.perf_counter() - start) / iterations

    return Timer(measure)


def relative_errors(found, expected):
    """||found - expected|| / ||expected|| of each group, the tensors `group.name` taken together."""
    squares = {}
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise RuntimeError(f"'{name}' has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        group = name.split(".")[0]
        error, norm = squares.get(group, (0, 0))
        error += (found[name].double() - tensor.double()).square().sum().item()
        squares[group] = (error, norm + tensor.double().square().sum().item())
    # Not a number is the worst of all.
    return {group: math.inf if math.isnan(e) else math.sqrt(e / n) for group, (e, n) in squares.items()}


class Disagreement(Exception):
    """The sides computed different numbers, so that their times do not compare."""


class Oracle:
    """What PyTorch computes, and how far rounding takes it.

    Where the sign of a small number decides, as in ReLU and in PGD's steps, PyTorch's own two layouts differ
    by more than the tolerance: then three times their difference is the limit. On a GPU the expected numbers are f32's, and
    the other ones those of the measured precision.
    """

    def __init__(self, case, bench):
        of = lambda variant: {k: t.detach().float().cpu() for k, t in case.peer(variant).outputs().items()}
        allow_tf32(False)
        self.expected = of(bench.oracles[0])
        bench.set_numbers()
        self.own = relative_errors(of(bench.oracles[1]), self.expected)
        self.sizes = Counter()
        for name, tensor in self.expected.items():
            self.sizes[name.split(".")[0]] += tensor.numel()

    def error(self, side, found):
        """The largest error of the groups that a side found; fails if one is over its limit."""
        errors = relative_errors(found, {name: self.expected[name] for name in self.expected if name in found})
        for group, error in errors.items():
            # Of a single number the error may be small by chance.
            own = self.own[group] if self.sizes[group] > 1 else max(self.own.values())
            limit = max(TOLERANCE, 3 * own)
            if not error <= limit < math.inf:
                raise Disagreement(f"{side}: {group} differs by {error:.1e}, expected at most {limit:.1e}")
        return max(errors.values())


def outputs(runner, case, folder):
    """What a runner computes, after it has loaded the case."""
    path = folder / "output.safetensors"
    runner.ask("prepare", dir=str(folder), work=case.work)
    runner.ask("output", path=str(path))
    return load_file(path)


def stock_candle(runner, case, folder, oracle):
    """Its time, once, for the record: no warm-up unless the work is short."""
    error = oracle.error("candle", outputs(runner, case, folder))
    once = runner.time(0, 1)
    ms = once if once >= WARMUP_BELOW_MS else runner.time(1, max(1, math.ceil(REPETITION_MS / once)))
    return {"candle_ms": ms, "candle_relative_error": error}


class FlopCounter(TorchDispatchMode):
    """Multiplications and additions of products and convolutions, forward and backward. PyTorch's own FlopCounterMode fails
    where a gradient is asked for of a leaf alone, as in PGD."""

    flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def tflop_of(run):
    with FlopCounter() as counter:
        run()
    return counter.flop / 1e12


def measure(name, case, ours, start_candle, repetitions, scratch, bench):
    """One row of the table. candle's process is gone before the others are timed."""
    folder = Path(scratch) / name
    folder.mkdir()
    case.save(folder)
    oracle = Oracle(case, bench)
    found = outputs(ours, case, folder)
    if found.keys() != oracle.expected.keys():
        raise RuntimeError(f"only one side computed {sorted(found.keys() ^ oracle.expected.keys())}")
    row = {"name": name, "relative_error": oracle.error("ours", found)}
    row["torch_relative_error"] = max(oracle.own.values())
    row["candle_ms"] = None
    if start_candle and case.in_candle:
        with start_candle() as candle:
            row |= stock_candle(candle, case, folder, oracle)

    timers = {"ours": Timer(ours.time)}
    torch._dynamo.reset()
    for variant in bench.variants:
        try:
            timers[variant.name] = timer_of(case.peer(variant).run)
        except Exception:
            print(f"{name}: {variant.name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    for _ in range(repetitions):
        for timer in timers.values():
            timer.repeat()

    row["ours_ms"] = timers["ours"].median()
    row["variants_ms"] = {v.name: timers[v.name].median() if v.name in timers else None for v in bench.variants}
    for kind in ("eager", "compile"):
        times = [ms for variant, ms in row["variants_ms"].items() if variant.startswith(kind) and ms]
        row[f"torch_{kind}_ms"] = min(times, default=None)
        row[f"ratio_{kind}"] = min(times) / row["ours_ms"] if times else None
    if bench.device != "cpu":
        row["tflop"] = tflop_of(case.peer(bench.variants[0]).run)
        row["tflops"] = 1e3 * row["tflop"] / row["ours_ms"]
        timers.clear()
        torch.cuda.empty_cache()
    return row


def environment(ours, threads, bench):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    hello = ours.ask("hello")
    if hello["threads"] != threads:
        raise RuntimeError(f"the runner has {hello['threads']} threads, expected {threads}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    gpu = {}
    if bench.device != "cpu":
        gpu = {
            "gpu": torch.cuda.get_device_name(bench.device),
            "driver": driver_version(),
            "precision": bench.precision,
            "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()} (PyTorch's)",
            "matrix_tflops": bench.matrix_tflops(),
        }
    return gpu | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": threads,
        "proxyset": f"{hello['version']} ({commit.stdout.strip() or 'no commit'}), {hello['device_class']}",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def cell(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def line(row):
    numbers = [cell(row[key]) for key in ("ours_ms", "torch_eager_ms", "torch_compile_ms", "candle_ms")]
    ratios = [cell(row[key]) for key in ("ratio_eager", "ratio_compile")]
    text = " ".join([f"{row['name']:<32}", *(f"{n:>10}" for n in numbers + ratios), f"{row['relative_error']:>9.1e}"])
    if "tflops" in row:
        share = row["tflops"] / row["environment"]["matrix_tflops"]
        text += f" {row['tflops']:>10.1f} {100 * share:>7.1f} %"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose names match, such as 'conv*_fwd'")
    parser.add_argument("--repetitions", type=int, default=7, help="the median of so many (default: 7)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N for the GPU's cases (default: cpu)")
    parser.add_argument("--precision", choices=("f32", "tf32", "bf16"), default="f32", help="of every side, on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every side (default: PyTorch's)")
    parser.add_argument("--skip-candle", action="store_true", help="leave stock candle out")
    parser.add_argument("--out", type=Path, default=ROOT / "target" / "bench-peers.json", help="the JSON file")
    parser.add_argument("--runner", default="cargo bench --quiet --bench peers --", help="the command of the Rust side")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    if on_cpu and arguments.precision != "f32":
        parser.error(f"precision is {arguments.precision}, expected f32 on the CPU")
    bench, known = Bench(arguments.device, arguments.precision), cases() if on_cpu else gpu_cases()
    chosen = {name: make for name, make in known.items() if fnmatch.fnmatch(name, arguments.only)}
    if not chosen or arguments.repetitions < 1:
        parser.error(f"nothing to do; the cases are {', '.join(known)}")

    torch.set_num_threads(arguments.threads)
    runner = f"{arguments.runner} --device {arguments.device} --precision {arguments.precision}"
    start = functools.partial(Runner, runner, threads=arguments.threads)
    start_candle = functools.partial(start, "candle") if on_cpu and not arguments.skip_candle else None
    faults = []
    with start("ours") as ours, tempfile.TemporaryDirectory(prefix="bench-peers-") as scratch:
        settings = environment(ours, arguments.threads, bench) | {"repetitions": arguments.repetitions}
        print("\n".join(f"{key}: {value}" for key, value in settings.items()))
        print("medians in ms; ratios are PyTorch's time over ours, above 1 we are faster\n")
        heads = ("ours", "eager", "compile", "candle", "eager/ours", "comp./ours")
        more = "" if on_cpu else f" {'TFLOP/s':>10} {'of matrix':>9}"
        print(" ".join([f"{'case':<32}", *(f"{head:>10}" for head in heads), f"{'rel. err.':>9}"]) + more, flush=True)
        rows = []
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for name, make in chosen.items():
            torch.manual_seed(zlib.crc32(name.encode()))
            try:
                case = make(Path(scratch))
                row = measure(name, case, ours, start_candle, arguments.repetitions, scratch, bench)
            except Disagreement as fault:
                faults.append(f"{name}: {fault}")
                continue
            rows.append(row | {"environment": settings})
            print(line(rows[-1]), flush=True)
            # After every case: what was measured is kept if a later one fails.
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
