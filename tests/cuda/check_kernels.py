"""The CUDA kernels without a GPU: compiled for the CPU with emulator.h and held against PyTorch in double precision.

    python check_kernels.py        # needs a C++17 compiler, torch and numpy

Fresh random inputs each time (the seed is printed), batches of at least 2, odd sizes, f32 within 1e-5 and bf16 within 1e-2
of the largest value. The normals are held against golden bits, those of src/rng.rs, and 40,001 against its recipe in numpy.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src" / "kernels" / "cuda" / "kernels.cu"
LANES, ROWS, THREADS = 32, 8, 256
KINDS = {"none": 0, "silu": 1, "relu": 2}


def build():
    names = re.findall(r"__global__ void (\w+)\(", SOURCE.read_text())
    typed = re.findall(r"__global__ void NAME\((\w+)\)\(", SOURCE.with_name("typed.cu").read_text())
    names += [f"{name}_{suffix}" for name in typed for suffix in ("f32", "bf16")]
    folder = Path(tempfile.mkdtemp())
    exports = "\n".join(f"EXPORT({name})" for name in names)
    (folder / "kernels.cpp").write_text(f'#include "{SOURCE}"\n{exports}\n')
    library = folder / "kernels.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-mfma", "-shared", "-fPIC", f"-I{HERE}", "-o", library,
         folder / "kernels.cpp"],
        check=True,
    )
    print(f"{len(names)} kernels")
    return ctypes.CDLL(str(library))


kernels = build()


def launch(name, grid, block, *args):
    """Arguments: arrays, ints (int), floats (float), or ctypes values."""
    values = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            assert arg.flags.c_contiguous
            arg = ctypes.c_void_p(arg.ctypes.data)
        elif isinstance(arg, int):
            arg = ctypes.c_int(arg)
        elif isinstance(arg, float):
            arg = ctypes.c_float(arg)
        values.append(arg)
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    getattr(kernels, f"run_{name}")((ctypes.c_int * 6)(*grid, *block), pointers)


size = ctypes.c_size_t


def to_bf16(x):
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()


def from_bf16(x):
    return torch.from_numpy(x).view(torch.bfloat16).to(torch.float32).numpy()


class Kind:
    """An element type: what the kernels get, and what PyTorch gets of it."""

    def __init__(self, suffix):
        self.suffix = suffix
        self.bound = 1e-5 if suffix == "f32" else 1e-2

    def pack(self, x):
        x = np.ascontiguousarray(x, np.float32)
        return x if self.suffix == "f32" else to_bf16(x)

    def unpack(self, x):
        return x if self.suffix == "f32" else from_bf16(x)

    def empty(self, shape):
        return np.zeros(shape, np.float32 if self.suffix == "f32" else np.uint16)


failures = 0


def close(what, found, expected, bound):
    global failures
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    off = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    if not off <= bound:
        failures += 1
        print(f"FAILED {what}: {off:.2e} of the largest value, expected at most {bound:.0e}")


seed = int(os.environ.get("SEED", int.from_bytes(os.urandom(4), "little")))
print("seed", seed)
rng = np.random.default_rng(seed)


def double(x):
    return torch.from_numpy(np.asarray(x, np.float64)).requires_grad_()


def norm_case(kind, segments, rows, c, groups, activation, own, given, reference):
    x = kind.pack(rng.standard_normal((segments, rows, c)) * 2 + 3)
    dy = kind.pack(rng.standard_normal((segments, rows, c)))
    shape = (segments, c) if own else (c,)
    weight = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    bias = rng.standard_normal(shape).astype(np.float32)
    per_chunk = 5
    chunks = -(-rows // per_chunk)
    grid, block = (chunks, max(1, segments - 1), -(-c // LANES)), (LANES, ROWS, 1)
    partial = np.zeros((segments, chunks, 2, c))
    moments = [np.zeros((segments, groups), np.float32) for _ in range(3)]
    few = (-(-segments * groups // 2), 1, 1), (32, 2, 1)
    suffix = kind.suffix
    if given is None:
        launch(f"norm_sums_{suffix}", grid, block, x, c, segments, rows, per_chunk, partial)
        launch("norm_moments", *few, partial, chunks, segments, c, groups, rows, ctypes.c_double(1e-5), *moments)
    else:
        moments[0][:], moments[2][:] = given
        moments[1][:] = 1 / np.sqrt(moments[2] + 1e-5)
    norm = (*moments[:2], weight, bias, c if own else 0, c, groups, KINDS[activation])
    any_grid, any_block = (3, max(1, segments - 1), 1), (64, 1, 1)
    y = kind.empty(x.shape)
    launch(f"norm_forward_{suffix}", any_grid, any_block, x, *norm, segments, rows * c, y)
    launch(f"norm_backward_sums_{suffix}", grid, block, x, dy, *norm, segments, rows, per_chunk, partial)
    means, gradients = np.zeros((segments, groups, 2), np.float32), np.zeros((segments, 2, c), np.float32)
    launch("norm_gradient_sums", *few, partial, chunks, segments, c, groups, rows, weight, c if own else 0,
           int(given is not None), means, gradients)
    dx = kind.empty(x.shape)
    launch(f"norm_backward_{suffix}", any_grid, any_block, x, dy, *norm, means, segments, rows * c, dx)

    tx, tw, tb = double(kind.unpack(x)), double(weight), double(bias)
    expected = reference(tx, tw, tb)
    act = {"none": lambda z: z, "silu": F.silu, "relu": F.relu}[activation]
    expected = act(expected)
    expected.backward(torch.from_numpy(np.asarray(kind.unpack(dy), np.float64)))
    what = f"norm {suffix} {segments} x {rows} x {c} in {groups}, {activation}, own {own}, given {given is not None}"
    close(what + ": y", kind.unpack(y), expected, kind.bound)
    close(what + ": dx", kind.unpack(dx), tx.grad, kind.bound)
    sums = gradients if own else gradients.sum(0, keepdims=True)
    close(what + ": bias", sums[:, 0].reshape(shape), tb.grad, kind.bound)
    close(what + ": weight", sums[:, 1].reshape(shape), tw.grad, kind.bound)
    return moments, x


def of_group_norm(groups, own):
    def reference(x, weight, bias):
        unit = F.group_norm(x.transpose(1, 2), groups, eps=1e-5).transpose(1, 2)
        spread = (lambda t: t[:, None]) if own else (lambda t: t)
        return unit * spread(weight) + spread(bias)

    return reference


def of_batch_norm(given):
    def reference(x, weight, bias):
        flat = x[0]
        if given is None:
            return F.batch_norm(flat, None, None, weight, bias, training=True, eps=1e-5)[None]
        mean, variance = (torch.from_numpy(np.asarray(v, np.float64)) for v in given)
        return F.batch_norm(flat, mean, variance, weight, bias, training=False, eps=1e-5)[None]

    return reference


for kind in (Kind("f32"), Kind("bf16")):
    for segments, rows, c, groups in [(2, 35, 8, 4), (3, 7, 33, 3), (2, 16, 70, 7)]:
        for activation in ("none", "silu"):
            for own in (False, True):
                norm_case(kind, segments, rows, c, groups, activation, own, None, of_group_norm(groups, own))
    for rows, c in [(41, 5), (12, 40)]:
        for activation in ("none", "relu"):
            moments, x = norm_case(kind, 1, rows, c, c, activation, False, None, of_batch_norm(None))
            exact = np.asarray(kind.unpack(x)[0], np.float64)
            close("batch norm: mean", moments[0][0], exact.mean(0), 1e-5)
            close("batch norm: variance", moments[2][0], exact.var(0), 1e-5)
            given = rng.standard_normal(c).astype(np.float32), rng.uniform(0.5, 2, c).astype(np.float32)
            norm_case(kind, 1, rows, c, c, activation, False, given, of_batch_norm(given))

    for segments, rows, c in [(1, 35, 8), (3, 11, 33)]:
        x, dy = (kind.pack(rng.standard_normal((segments, rows, c))) for _ in range(2))
        shift, y = rng.standard_normal((segments, c)).astype(np.float32), kind.empty(x.shape)
        # Images of 7 or 11 rows: where there is one segment, five of them share its numbers.
        images, own = (5, 0) if segments == 1 else (segments, c)
        launch(f"add_channels_{kind.suffix}", (3, images - 1, 1), (64, 1, 1), x, shift, own, c, images, x.size // images, y)
        tx, ts = double(kind.unpack(x)), double(shift)
        out = tx + ts[:, None]
        close(f"channels {kind.suffix} {segments}", kind.unpack(y), out, kind.bound)
        # The gradient of the shift is `rows` times the mean that norms begin with.
        partial, moments = np.zeros((segments, 3, 2, c)), [np.zeros((segments, c), np.float32) for _ in range(3)]
        per_chunk = -(-rows // 3)
        launch(f"norm_sums_{kind.suffix}", (3, segments, -(-c // LANES)), (LANES, ROWS, 1), dy, c, segments, rows, per_chunk,
               partial)
        launch("norm_moments", (-(-segments * c // 2), 1, 1), (32, 2, 1), partial, 3, segments, c, c, rows,
               ctypes.c_double(0), *moments)
        out.backward(torch.from_numpy(np.asarray(kind.unpack(dy), np.float64)))
        close(f"channels {kind.suffix} {segments}: shift", moments[0] * rows, ts.grad, 1e-5)

    n = 1003
    for name in ("silu", "relu"):
        x, dy = (kind.pack(rng.standard_normal(n) * 3) for _ in range(2))
        x[7] = 0
        y, dx = kind.empty(n), kind.empty(n)
        launch(f"activation_forward_{kind.suffix}", (3, 1, 1), (64, 1, 1), x, KINDS[name], size(n), y)
        launch(f"activation_backward_{kind.suffix}", (3, 1, 1), (64, 1, 1), x, dy, KINDS[name], size(n), dx)
        tx = double(kind.unpack(x))
        out = {"silu": F.silu, "relu": F.relu}[name](tx)
        out.backward(torch.from_numpy(np.asarray(kind.unpack(dy), np.float64)))
        close(f"{name} {kind.suffix}", kind.unpack(y), out, kind.bound)
        close(f"{name} {kind.suffix}: dx", kind.unpack(dx), tx.grad, kind.bound)

    for rows, columns in [(7, 5), (3, 32), (9, 77)]:
        scale = 0.7
        x, dy = (kind.pack(rng.standard_normal((rows, columns)) * 5) for _ in range(2))
        y, dx = kind.empty(x.shape), kind.empty(x.shape)
        grid, block = (-(-rows // 4), 1, 1), (32, 4, 1)
        launch(f"softmax_forward_{kind.suffix}", grid, block, x, scale, rows, columns, y)
        tx = double(kind.unpack(x))
        out = torch.softmax(tx * np.float32(scale).item(), -1)
        close(f"softmax {kind.suffix} {columns}", kind.unpack(y), out, kind.bound)
        launch(f"softmax_backward_{kind.suffix}", grid, block, y, dy, scale, rows, columns, dx)
        out.backward(torch.from_numpy(np.asarray(kind.unpack(dy), np.float64)))
        # Its operand is the rounded softmax.
        close(f"softmax {kind.suffix} {columns}: dx", kind.unpack(dx), tx.grad, 2 * kind.bound)

    b, h, w, c = 2, 13, 15, 7
    x, dy = kind.pack(rng.standard_normal((b, h, w, c))), kind.pack(rng.standard_normal((b, 2 * h, 2 * w, c)))
    y, dx = kind.empty(dy.shape), kind.empty(x.shape)
    launch(f"upsample_forward_{kind.suffix}", (3, 1, 1), (64, 1, 1), x, h, w, c, dy.size, y)
    launch(f"upsample_backward_{kind.suffix}", (3, 1, 1), (64, 1, 1), dy, h, w, c, x.size, dx)
    tx = double(kind.unpack(x))
    out = F.interpolate(tx.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)
    out.backward(torch.from_numpy(np.asarray(kind.unpack(dy), np.float64)))
    close(f"upsample {kind.suffix}", kind.unpack(y), out, 0)
    close(f"upsample {kind.suffix}: dx", kind.unpack(dx), tx.grad, kind.bound)
    # Rounding to bf16 is to nearest, ties to even, as PyTorch's.
    parts = kind.unpack(dy).reshape(b, h, 2, w, 2, c)
    sums = (parts[:, :, 0, :, 0] + parts[:, :, 0, :, 1]) + (parts[:, :, 1, :, 0] + parts[:, :, 1, :, 1])
    close(f"upsample {kind.suffix}: bits", kind.unpack(dx), kind.unpack(kind.pack(sums)), 0)

images, per_image, epsilon, step = 3, 75, 0.1, 0.04
x = rng.uniform(0, 1, (images, per_image)).astype(np.float32)
start = np.clip(x + rng.uniform(-epsilon, epsilon, x.shape), 0, 1).astype(np.float32)
gradient = rng.standard_normal(x.shape).astype(np.float32)
gradient[0, 3] = 0
out = np.zeros_like(x)
launch("pgd_step_linf", (3, 1, 1), (64, 1, 1), x, start, gradient, step, epsilon, size(x.size), out)
moved = start.astype(np.float64) + step * np.sign(gradient)
close("pgd linf", out, np.clip(np.clip(moved, x - epsilon, x + epsilon), 0, 1), 1e-6)
gradient[1] *= 1e-30
gradient[2] = 0
for epsilon in (0.3, 100.0):
    launch("pgd_step_l2", (images, 1, 1), (THREADS, 1, 1), x, start, gradient, 0.5, epsilon, per_image, out)
    wide = gradient.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    delta = start + 0.5 * np.divide(wide, length, out=np.zeros_like(wide), where=length > 0) - x.astype(np.float64)
    delta *= np.minimum(1, epsilon / np.linalg.norm(delta, axis=1, keepdims=True))
    close(f"pgd l2 {epsilon}", out, np.clip(x + delta, 0, 1), 1e-6)

n = 1003
draw = lambda: rng.standard_normal(n).astype(np.float32)
weights, gradients = draw(), [draw() for _ in range(3)]
for nesterov in (False, True):
    ours, buffer = weights.copy(), np.zeros(n, np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(weights.astype(np.float64)))
    optimizer = torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    for g in gradients:
        launch("sgd_step", (3, 1, 1), (64, 1, 1), ours, g, buffer, 0.5, 0.1, 0.9, 1e-2, int(nesterov), size(n))
        theirs.grad = torch.from_numpy(0.5 * g.astype(np.float64))
        optimizer.step()
    close(f"sgd, nesterov {nesterov}", ours, theirs, 1e-5)
ours, first, second = weights.copy(), np.zeros(n, np.float32), np.zeros(n, np.float32)
theirs = torch.nn.Parameter(torch.from_numpy(weights.astype(np.float64)))
optimizer = torch.optim.AdamW([theirs], 0.1, (0.9, 0.999), 1e-8, 1e-2)
for t, g in enumerate(gradients, 1):
    launch("adam_step", (3, 1, 1), (64, 1, 1), ours, g, first, second, 0.5, 1 - 0.1 * 1e-2, 0.1 / (1 - 0.9**t),
           (1 - 0.999**t) ** 0.5, 0.9, 1 - 0.9, 0.999, 1 - 0.999, 1e-8, size(n))
    theirs.grad = torch.from_numpy(0.5 * g.astype(np.float64))
    optimizer.step()
close("adam", ours, theirs, 1e-5)
average = draw()
expected = average + 0.01 * (weights.astype(np.float64) - average)
launch("average_step", (3, 1, 1), (64, 1, 1), average, weights, 0.01, size(n))
close("average", average, expected, 1e-6)

b, h, w, c, pad = 3, 5, 4, 3, 2
pixels = rng.integers(0, 256, (b, h, w, c), np.uint8)
windows = np.array([[0, 4, 0], [2, 2, 1], [3, 1, 1]], np.int32)
table = (np.arange(256) / 127.5 - 1).astype(np.float32)
out = np.zeros(pixels.shape, np.float32)
launch("crop_images", (3, 1, 1), (64, 1, 1), pixels, windows, table, h, w, c, pad, out.size, out)
padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
expected = np.stack([p[top : top + h, left : left + w] for p, (top, left, _) in zip(padded, windows)])
expected[1:] = expected[1:, :, ::-1]
close("crops", out, table[expected], 0)

GOLDEN = {
    (0, 0, 0): "3F7DBB31 BF6CB6B0 BF1E1B9F BEF6D1B2 3FD359CB 3F587C3B BDD11910 BDECD29A",
    (1, 2, 3): "BE1788FC 3EA5D4B5 BF029277 C000EEDC BD9E9EF9 40059D61 BFAF7DE7 3D57385E",
    (0x0123456789ABCDEF, 5_000_000_000, 0xFFFFFFFF):
        "3F7F6018 3D4450B6 3F9FCB4C BF4B9DD6 BF72F5EF BD1AFE94 3FA160B4 3EB28E80",
}


def normals(seed, samples, step, positions, channels):
    out = np.zeros((len(samples), positions, channels), np.float32)
    launch("normal_images", (2, max(1, len(samples) - 1), 1), (64, 1, 1), ctypes.c_uint(seed & 0xFFFFFFFF),
           ctypes.c_uint(seed >> 32), np.array(samples, np.uint64), ctypes.c_uint(step), len(samples), positions, channels, out)
    return out


for (seed, sample, step), bits in GOLDEN.items():
    found = normals(seed, [sample], step, 8, 1).view(np.uint32).ravel()
    if [f"{b:08X}" for b in found] != bits.split():
        failures += 1
        print(f"FAILED normals of ({seed}, {sample}, {step}): {[f'{b:08X}' for b in found]}")
images = normals(5, [7, 2**40 + 1], 9, 35, 3)
for image, sample in zip(images, [7, 2**40 + 1]):
    if not np.array_equal(image.T.ravel(), normals(5, [sample], 9, 105, 1).ravel()):
        failures += 1
        print("FAILED normals: images are not drawn in CHW order")


def recipe(seed, sample, step, n):
    """The normals of src/rng.rs in numpy: float32 throughout, fused multiply-adds by way of double."""
    f32, u32 = np.float32, np.uint32
    blocks = -(-n // 4)
    c = [np.full(blocks, v, np.uint64) for v in (sample & 0xFFFFFFFF, sample >> 32, step)] + [np.arange(blocks, dtype=np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(k0), b & mask, a >> np.uint64(32) ^ c[3] ^ np.uint64(k1), a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    fma = lambda x, y, z: (np.float64(x) * np.float64(y) + np.float64(z)).astype(f32)
    horner = lambda coefficients, x: coefficients[0] if len(coefficients) == 1 else fma(
        horner(coefficients[:-1], x), x, coefficients[-1])
    ln_p = f32([-0.07634499, 0.12761578, -0.13160183, 0.14201757, -0.16623357, 0.20001227, -0.2500082, 0.3333333])
    sin_p, cos_p = f32([-1.9515282e-4, 8.33216e-3, -0.16666655]), f32([2.4433157e-5, -1.3887316e-3, 0.041666646])
    out = np.zeros((blocks, 4), f32)
    for pair in (0, 2):
        bits = fma(c[pair].astype(f32), f32(2.0**-32), f32(2.0**-33)).view(u32)
        e = (bits - u32(0x3F3504F3)).view(np.int32) >> 23
        f = (bits - (e << 23).view(u32)).view(f32) - f32(1)
        e, t = e.astype(f32), f * f
        ln = fma(t * f, horner(ln_p, f), t * f32(-0.5))
        ln = fma(e, f32(1.4286068e-6), ln)
        ln = fma(e, f32(0.69314575), f + ln)
        radius = np.sqrt(ln * f32(-2))
        angle = c[pair + 1].astype(u32)
        quadrant = (angle + u32(1 << 29)) >> u32(30)
        theta = (angle - (quadrant << u32(30))).view(np.int32).astype(f32) * f32(1.4629181e-9)
        y = theta * theta
        sine = fma(theta * y, horner(sin_p, y), theta)
        cosine = fma(y * y, horner(cos_p, y), fma(y, f32(-0.5), f32(1)))
        odd = (quadrant & u32(1)) == 1
        sine, cosine = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
        cosine = (cosine.view(u32) ^ ((quadrant + u32(1)) & u32(2)) << u32(30)).view(f32)
        sine = (sine.view(u32) ^ (quadrant & u32(2)) << u32(30)).view(f32)
        out[:, pair], out[:, pair + 1] = radius * cosine, radius * sine
    return out.ravel()[:n]


if not np.array_equal(normals(1, [3], 4, 40_001, 1).ravel().view(np.uint32), recipe(1, 3, 4, 40_001).view(np.uint32)):
    failures += 1
    print("FAILED normals: not the bits of the recipe")
print("failures:", failures)
sys.exit(failures > 0)
