// The CUDA kernels: one for each memory-bound operation; convolutions and products are cuDNN's and cuBLAS's.
//
// Images are NHWC, rows one behind another; `c` is the innermost size. Elements are float or bf16, statistics float from
// sums in double. No kernel uses atomics, so that the same launch gives the same bits. To be compiled without fused
// multiply-adds (--fmad=false): where one is meant, fmaf says so, and the normals have the CPU's bits.
//
// Kernels of float elements alone are here; typed.cu has the others, for each type of element.

#ifndef __CUDACC__
#include "emulator.h"
#endif

struct bf16 {
    unsigned short bits;
};

__device__ inline float load(const float* p, size_t i) { return p[i]; }
__device__ inline float load(const bf16* p, size_t i) { return __uint_as_float((unsigned)p[i].bits << 16); }
__device__ inline void store(float* p, size_t i, float v) { p[i] = v; }

// To nearest, ties to even.
__device__ inline void store(bf16* p, size_t i, float v) {
    unsigned bits = __float_as_uint(v);
    unsigned rounded = v != v ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
    p[i].bits = (unsigned short)(rounded >> 16);
}

// The number of this thread, and that of all threads, for loops over elements. Loops that divide count in 32 bits, which
// is much faster: the caller sees to it that there are fewer than 2^31 elements.
__device__ inline size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline size_t thread_count() { return (size_t)gridDim.x * blockDim.x; }

enum Activation { NONE = 0, SILU = 1, RELU = 2 };

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

__device__ inline float activate(int activation, float z) {
    if (activation == SILU) return z * sigmoid(z);
    if (activation == RELU) return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    return z;
}

// The derivative at z.
__device__ inline float slope(int activation, float z) {
    if (activation == SILU) {
        float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
    if (activation == RELU) return z > 0.0f ? 1.0f : 0.0f;
    return 1.0f;
}

// ---- Normalisation: group norm over segments (samples) of `rows` rows in `groups` groups of channels; batch norm is one
// segment and a group for each channel.

// How the channels are normalised: moments of each segment and group, weight and bias of each channel, or (`own` = c)
// of each segment and channel.
struct Norm {
    const float* mean;
    const float* inverse;
    const float* weight;
    const float* bias;
    int own;
    int c;
    int groups;
    int activation;
};

// What one channel of one segment is normalised with.
struct Channel {
    float mean, inverse, weight, bias;
};

__device__ inline Channel channel_of(const Norm& norm, int segment, int channel) {
    int group = segment * norm.groups + channel / (norm.c / norm.groups);
    int own = segment * norm.own + channel;
    return Channel{norm.mean[group], norm.inverse[group], norm.weight[own], norm.bias[own]};
}

__device__ inline float normalized(const Channel& c, float x) { return (x - c.mean) * c.inverse; }

constexpr int LANES = 32;
constexpr int ROWS = 8;

// The sum, or the largest, of the values of a warp, in all its threads.
template <typename V>
__device__ inline V warp_sum(V v) {
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lane);
    return v;
}
__device__ inline float warp_max(float v) {
    for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, lane));
    return v;
}

// One of the two sums of a channel over all chunks, by a warp.
__device__ inline double chunk_sum(const double* partial, int chunks, int c, int segment, int which, int channel) {
    double total = 0.0;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += 32)
        total += partial[(((size_t)segment * chunks + chunk) * 2 + which) * c + channel];
    return warp_sum(total);
}

// From the sums of x and x² to the moments of each segment and group: mean, 1 / √(variance + ε), and the variance,
// biased. A warp a segment and group; block (32, warps).
extern "C" __global__ void norm_moments(const double* partial, int chunks, int segments, int c, int groups, int rows,
                                        double epsilon, float* mean, float* inverse, float* variance) {
    int i = blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= segments * groups) return;
    int segment = i / groups, group = i % groups, width = c / groups;
    double sum = 0.0, squares = 0.0;
    for (int channel = group * width; channel < (group + 1) * width; channel++) {
        sum += chunk_sum(partial, chunks, c, segment, 0, channel);
        squares += chunk_sum(partial, chunks, c, segment, 1, channel);
    }
    double count = (double)rows * width, centre = sum / count;
    double spread = squares / count - centre * centre;
    spread = spread > 0.0 ? spread : 0.0;
    if (threadIdx.x == 0) {
        mean[i] = (float)centre;
        inverse[i] = (float)(1.0 / sqrt(spread + epsilon));
        variance[i] = (float)spread;
    }
}

// From the sums of dz and dz · x̂ to what backward needs of each segment and group, `means`: [segment][group][2], the means
// of weight · dz and of weight · dz · x̂ (0 if the statistics are given, `fixed`), and to the gradients of bias and
// weight of each segment, `gradients`: [segment][2][c]. A warp a segment and group; block (32, warps).
extern "C" __global__ void norm_gradient_sums(const double* partial, int chunks, int segments, int c, int groups, int rows,
                                              const float* weight, int own, int fixed, float* means, float* gradients) {
    int i = blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= segments * groups) return;
    int segment = i / groups, group = i % groups, width = c / groups;
    double first = 0.0, second = 0.0;
    for (int channel = group * width; channel < (group + 1) * width; channel++) {
        double of_bias = chunk_sum(partial, chunks, c, segment, 0, channel);
        double of_weight = chunk_sum(partial, chunks, c, segment, 1, channel);
        if (threadIdx.x == 0) {
            gradients[((size_t)segment * 2 + 0) * c + channel] = (float)of_bias;
            gradients[((size_t)segment * 2 + 1) * c + channel] = (float)of_weight;
        }
        first += of_bias * weight[(size_t)segment * own + channel];
        second += of_weight * weight[(size_t)segment * own + channel];
    }
    double count = (double)rows * width;
    if (threadIdx.x == 0) {
        means[2 * i] = fixed ? 0.0f : (float)(first / count);
        means[2 * i + 1] = fixed ? 0.0f : (float)(second / count);
    }
}

// ---- The step of projected gradient ascent, of float images in [0, 1]

// Up by step · sign(gradient), into [x - epsilon, x + epsilon], into [0, 1].
extern "C" __global__ void pgd_step_linf(const float* x, const float* start, const float* gradient, float step,
                                         float epsilon, size_t n, float* out) {
    for (size_t i = thread_index(); i < n; i += thread_count()) {
        float g = gradient[i];
        float sign = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : 0.0f;
        float v = start[i] + sign * step;
        v = fminf(fmaxf(v, x[i] - epsilon), x[i] + epsilon);
        out[i] = fminf(fmaxf(v, 0.0f), 1.0f);
    }
}

constexpr int THREADS = 256;

// The sum, or the largest, of `v` over the threads of a block, in all of them.
__device__ inline double block_sum(double v, double* shared) {
    __syncthreads();
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

// Up by step · gradient / ‖gradient‖, back to a distance of epsilon of x, into [0, 1]: a block of THREADS an image.
extern "C" __global__ void pgd_step_l2(const float* x, const float* start, const float* gradient, float step,
                                       float epsilon, int per_image, float* out) {
    __shared__ double shared[THREADS];
    size_t base = (size_t)blockIdx.x * per_image;
    double squares = 0.0;
    for (int i = threadIdx.x; i < per_image; i += THREADS) squares += (double)gradient[base + i] * gradient[base + i];
    double length = sqrt(block_sum(squares, shared));
    double factor = length > 0.0 ? step / length : 0.0;
    squares = 0.0;
    for (int i = threadIdx.x; i < per_image; i += THREADS) {
        double moved = start[base + i] + factor * gradient[base + i] - x[base + i];
        squares += moved * moved;
    }
    double distance = sqrt(block_sum(squares, shared));
    double shrink = distance > epsilon ? epsilon / distance : 1.0;
    for (int i = threadIdx.x; i < per_image; i += THREADS) {
        double moved = start[base + i] + factor * gradient[base + i] - x[base + i];
        float v = (float)(x[base + i] + shrink * moved);
        out[base + i] = fminf(fmaxf(v, 0.0f), 1.0f);
    }
}

// ---- Optimisers, in place: see nn::optim for the formulas

extern "C" __global__ void sgd_step(float* weight, const float* gradient, float* buffer, float scale, float lr,
                                    float momentum, float decay, int nesterov, size_t n) {
    for (size_t i = thread_index(); i < n; i += thread_count()) {
        float g = scale * gradient[i] + decay * weight[i];
        float b = momentum * buffer[i] + g;
        buffer[i] = b;
        weight[i] -= lr * (nesterov ? g + momentum * b : b);
    }
}

extern "C" __global__ void adam_step(float* weight, const float* gradient, float* first, float* second, float scale,
                                     float keep, float step_size, float correction, float beta1, float rest1, float beta2,
                                     float rest2, float epsilon, size_t n) {
    for (size_t i = thread_index(); i < n; i += thread_count()) {
        float g = scale * gradient[i];
        float m = beta1 * first[i] + rest1 * g, v = beta2 * second[i] + rest2 * (g * g);
        first[i] = m;
        second[i] = v;
        weight[i] = weight[i] * keep - step_size * (m / (sqrtf(v) / correction + epsilon));
    }
}

extern "C" __global__ void average_step(float* average, const float* weight, float rate, size_t n) {
    for (size_t i = thread_index(); i < n; i += thread_count()) average[i] += rate * (weight[i] - average[i]);
}

// ---- Images

// Bytes to floats, `table` having the float of each byte, cropped from a black border and mirrored: `windows` has, for each
// image, top and left of the window in the padded image, and whether it is mirrored.
extern "C" __global__ void crop_images(const unsigned char* pixels, const int* windows, const float* table, int height,
                                       int width, int channels, int pad, unsigned n, float* out) {
    for (unsigned i = thread_index(); i < n; i += thread_count()) {
        unsigned pixel = i / (unsigned)channels, line = pixel / (unsigned)width;
        int channel = i % (unsigned)channels, x = pixel % (unsigned)width, y = line % (unsigned)height;
        size_t image = line / (unsigned)height;
        const int* window = windows + 3 * image;
        int from_y = y + window[0] - pad, from_x = (window[2] ? width - 1 - x : x) + window[1] - pad;
        bool inside = from_y >= 0 && from_y < height && from_x >= 0 && from_x < width;
        size_t from = ((image * height + from_y) * width + from_x) * channels + channel;
        out[i] = table[inside ? pixels[from] : 0];
    }
}

// ---- Random numbers: the CPU's, bit for bit; see rng.rs, which has the constants

__device__ inline void philox(unsigned counter[4], unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        unsigned long long a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
        counter[0] = (unsigned)(b >> 32) ^ counter[1] ^ k0;
        counter[1] = (unsigned)b;
        counter[2] = (unsigned)(a >> 32) ^ counter[3] ^ k1;
        counter[3] = (unsigned)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

__device__ inline void box_muller(unsigned for_radius, unsigned for_angle, float* first, float* second) {
    unsigned bits = __float_as_uint(fmaf((float)for_radius, 1.0f / 4294967296.0f, 1.0f / 8589934592.0f));
    int e = (int)(bits - 0x3F3504F3u) >> 23;
    float f = __uint_as_float(bits - ((unsigned)e << 23)) - 1.0f, exponent = (float)e, t = f * f;
    float p = -0.07634499f;
    p = fmaf(p, f, 0.12761578f);
    p = fmaf(p, f, -0.13160183f);
    p = fmaf(p, f, 0.14201757f);
    p = fmaf(p, f, -0.16623357f);
    p = fmaf(p, f, 0.20001227f);
    p = fmaf(p, f, -0.2500082f);
    p = fmaf(p, f, 0.3333333f);
    float ln = fmaf(t * f, p, t * -0.5f);
    ln = fmaf(exponent, 1.4286068e-6f, ln);
    ln = fmaf(exponent, 0.69314575f, f + ln);
    float radius = sqrtf(ln * -2.0f);

    unsigned quadrant = (for_angle + (1u << 29)) >> 30;
    float theta = (float)(int)(for_angle - (quadrant << 30)) * 1.4629181e-9f, y = theta * theta;
    float s = fmaf(fmaf(-1.9515282e-4f, y, 8.33216e-3f), y, -0.16666655f);
    float sine = fmaf(theta * y, s, theta);
    float q = fmaf(fmaf(2.4433157e-5f, y, -1.3887316e-3f), y, 0.041666646f);
    float cosine = fmaf(y * y, q, fmaf(y, -0.5f, 1.0f));
    if (quadrant & 1u) {
        float swap = sine;
        sine = cosine;
        cosine = swap;
    }
    cosine = __uint_as_float(__float_as_uint(cosine) ^ ((quadrant + 1u) & 2u) << 30);
    sine = __uint_as_float(__float_as_uint(sine) ^ (quadrant & 2u) << 30);
    *first = radius * cosine;
    *second = radius * sine;
}

// Standard normals for images (count, height, width, channels), each drawn in CHW order from (seed, its sample, step): a
// thread four of them; grid (any, any).
extern "C" __global__ void normal_images(unsigned seed_low, unsigned seed_high, const unsigned long long* samples,
                                         unsigned step, int images, unsigned positions, unsigned channels, float* out) {
    unsigned per_image = positions * channels;
    for (int number = blockIdx.y; number < images; number += gridDim.y) {
        unsigned long long sample = samples[number];
        float* image = out + (size_t)number * per_image;
        for (unsigned block = thread_index(); 4 * block < per_image; block += thread_count()) {
            unsigned words[4] = {(unsigned)sample, (unsigned)(sample >> 32), step, block};
            philox(words, seed_low, seed_high);
            float z[4];
            box_muller(words[0], words[1], z, z + 1);
            box_muller(words[2], words[3], z + 2, z + 3);
            for (int k = 0; k < 4; k++) {
                unsigned i = 4 * block + k;
                if (i < per_image) image[(size_t)(i % positions) * channels + i / positions] = z[k];
            }
        }
    }
}

// ---- Kernels of each type of element, under names with _f32 and _bf16

#define T float
#define NAME(kernel) kernel##_f32
#include "typed.cu"
#undef T
#undef NAME

#define T bf16
#define NAME(kernel) kernel##_bf16
#include "typed.cu"
