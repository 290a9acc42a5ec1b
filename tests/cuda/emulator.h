// Enough of CUDA to run src/kernels/cuda/kernels.cu on a CPU, slowly: the threads of a block are fibers, which take turns
// where they wait for each other. Blocks run one after another. For tests: see check_kernels.py.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

using std::min;

struct Index {
    int x, y, z;
};

static Index blockIdx, threadIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline unsigned __float_as_uint(float f) {
    unsigned bits;
    memcpy(&bits, &f, 4);
    return bits;
}

namespace emulator {

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index;
    bool waits, done;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static double lanes[1024];
static void (*body)(void**);
static void** arguments;

static void yield() { swapcontext(&fibers[current].context, &scheduler); }

static void run() {
    body(arguments);
    fibers[current].done = true;
}

static void block() {
    int threads = blockDim.x * blockDim.y * blockDim.z;
    fibers.resize(threads);
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[1 << 16]);
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.waits = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 16;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        bool moved = false;
        for (int i = 0; i < threads; i++) {
            if (fibers[i].done || fibers[i].waits) {
                alive |= !fibers[i].done;
                continue;
            }
            current = i;
            threadIdx = fibers[i].index;
            swapcontext(&scheduler, &fibers[i].context);
            alive = moved = true;
        }
        // All that still run wait at the barrier.
        if (!moved)
            for (Fiber& fiber : fibers) fiber.waits = false;
    }
}

template <typename... A, size_t... I>
static void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A>*)args[I]...);
}

template <auto KERNEL>
struct Launch;

template <typename... A, void (*KERNEL)(A...)>
struct Launch<KERNEL> {
    static void unpack(void** args) { call(KERNEL, args, std::index_sequence_for<A...>{}); }
    // dims: the grid's three, then the block's.
    static void launch(const int* dims, void** args) {
        gridDim = {dims[0], dims[1], dims[2]};
        blockDim = {dims[3], dims[4], dims[5]};
        body = unpack;
        arguments = args;
        for (int z = 0; z < dims[2]; z++)
            for (int y = 0; y < dims[1]; y++)
                for (int x = 0; x < dims[0]; x++) {
                    blockIdx = {x, y, z};
                    block();
                }
    }
};

}  // namespace emulator

static inline void __syncthreads() {
    emulator::fibers[emulator::current].waits = true;
    emulator::yield();
}

// The threads of a warp take the same turns, so that all have written when the first reads.
template <typename V>
static V __shfl_xor_sync(unsigned, V v, int mask) {
    using namespace emulator;
    int mine = current;
    lanes[mine] = v;
    yield();
    V other = lanes[mine ^ mask];
    yield();
    return other;
}

#define EXPORT(name) \
    extern "C" void run_##name(const int* dims, void** args) { emulator::Launch<name>::launch(dims, args); }
