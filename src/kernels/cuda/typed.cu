// The kernels whose elements are of type T, and whose names NAME completes: kernels.cu includes this for each type.

// Sums over the rows of a chunk, for each channel: grid (chunks, any, channel tiles), block (LANES, ROWS).
// partial: [segment][chunk][2][c]. Forward: sums of x and x². Backward: of dz and dz · x̂, where z is what the activation
// gets.
template <bool BACKWARD>
__device__ void column_sums(const T* x, const T* dy, Norm norm, int segments, int rows, int rows_per_chunk,
                            double* partial) {
    __shared__ double sums[2][ROWS][LANES];
    int channel = blockIdx.z * LANES + threadIdx.x, chunk = blockIdx.x, c = norm.c;
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        double first = 0.0, second = 0.0;
        if (channel < c) {
            Channel with = {0.0f, 0.0f, 0.0f, 0.0f};
            if (BACKWARD) with = channel_of(norm, segment, channel);
            int end = min(rows, (chunk + 1) * rows_per_chunk);
            for (int row = chunk * rows_per_chunk + threadIdx.y; row < end; row += ROWS) {
                size_t at = ((size_t)segment * rows + row) * c + channel;
                float v = load(x, at);
                if (BACKWARD) {
                    float unit = normalized(with, v);
                    float dz = load(dy, at) * slope(norm.activation, unit * with.weight + with.bias);
                    first += dz;
                    second += (double)dz * unit;
                } else {
                    first += v;
                    second += (double)v * v;
                }
            }
        }
        sums[0][threadIdx.y][threadIdx.x] = first;
        sums[1][threadIdx.y][threadIdx.x] = second;
        __syncthreads();
        if (threadIdx.y < 2 && channel < c) {
            double total = 0.0;
            for (int row = 0; row < ROWS; row++) total += sums[threadIdx.y][row][threadIdx.x];
            partial[(((size_t)segment * gridDim.x + chunk) * 2 + threadIdx.y) * c + channel] = total;
        }
        __syncthreads();
    }
}

// The arguments of a kernel that make a Norm.
#define NORM const float *mean, const float *inverse, const float *weight, const float *bias, int own, int c, int groups, int kind
#define WITH_NORM Norm{mean, inverse, weight, bias, own, c, groups, kind}

extern "C" __global__ void NAME(norm_sums)(const T* x, int c, int segments, int rows, int rows_per_chunk, double* partial) {
    Norm norm = {};
    norm.c = c;
    column_sums<false>(x, nullptr, norm, segments, rows, rows_per_chunk, partial);
}

extern "C" __global__ void NAME(norm_backward_sums)(const T* x, const T* dy, NORM, int segments, int rows,
                                                    int rows_per_chunk, double* partial) {
    column_sums<true>(x, dy, WITH_NORM, segments, rows, rows_per_chunk, partial);
}

// y = activation(x̂ · weight + bias). `per_segment` = rows · c; grid (any, any).
extern "C" __global__ void NAME(norm_forward)(const T* x, NORM, int segments, unsigned per_segment, T* y) {
    Norm norm = WITH_NORM;
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        size_t base = (size_t)segment * per_segment;
        for (unsigned i = thread_index(); i < per_segment; i += thread_count()) {
            Channel with = channel_of(norm, segment, i % (unsigned)norm.c);
            float z = normalized(with, load(x, base + i)) * with.weight + with.bias;
            store(y, base + i, activate(norm.activation, z));
        }
    }
}

// dx = inverse · (weight · dz - mean(weight · dz) - x̂ · mean(weight · dz · x̂)); see norm_gradient_sums.
extern "C" __global__ void NAME(norm_backward)(const T* x, const T* dy, NORM, const float* means, int segments,
                                               unsigned per_segment, T* dx) {
    Norm norm = WITH_NORM;
    unsigned width = norm.c / norm.groups;
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        size_t base = (size_t)segment * per_segment;
        for (unsigned i = thread_index(); i < per_segment; i += thread_count()) {
            unsigned channel = i % (unsigned)norm.c;
            Channel with = channel_of(norm, segment, channel);
            const float* mean = means + 2 * ((size_t)segment * norm.groups + channel / width);
            float unit = normalized(with, load(x, base + i));
            float dz = load(dy, base + i) * slope(norm.activation, unit * with.weight + with.bias);
            store(dx, base + i, with.inverse * (with.weight * dz - mean[0] - unit * mean[1]));
        }
    }
}

// ---- y = x + shift of each channel or (`own` = c) of each segment and channel

extern "C" __global__ void NAME(add_channels)(const T* x, const float* shift, int own, int c, int segments,
                                              unsigned per_segment, T* y) {
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        size_t base = (size_t)segment * per_segment;
        const float* with = shift + (size_t)segment * own;
        for (unsigned i = thread_index(); i < per_segment; i += thread_count())
            store(y, base + i, load(x, base + i) + with[i % (unsigned)c]);
    }
}

// ---- Activations

extern "C" __global__ void NAME(activation_forward)(const T* x, int kind, size_t n, T* y) {
    for (size_t i = thread_index(); i < n; i += thread_count()) store(y, i, activate(kind, load(x, i)));
}

extern "C" __global__ void NAME(activation_backward)(const T* x, const T* dy, int kind, size_t n, T* dx) {
    for (size_t i = thread_index(); i < n; i += thread_count())
        store(dx, i, load(dy, i) * slope(kind, load(x, i)));
}

// ---- Softmax of scale · x over rows of `columns`, a warp each; block (32, warps).

extern "C" __global__ void NAME(softmax_forward)(const T* x, float scale, int rows, int columns, T* y) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    size_t base = (size_t)row * columns;
    float largest = -INFINITY;
    for (int i = threadIdx.x; i < columns; i += 32) largest = fmaxf(largest, load(x, base + i));
    largest = warp_max(largest);
    float total = 0.0f;
    for (int i = threadIdx.x; i < columns; i += 32) total += expf(scale * (load(x, base + i) - largest));
    float inverse = 1.0f / warp_sum(total);
    for (int i = threadIdx.x; i < columns; i += 32)
        store(y, base + i, expf(scale * (load(x, base + i) - largest)) * inverse);
}

// y: the softmax. dx = scale · y · (dy - Σ y · dy).
extern "C" __global__ void NAME(softmax_backward)(const T* y, const T* dy, float scale, int rows, int columns, T* dx) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    size_t base = (size_t)row * columns;
    float mean = 0.0f;
    for (int i = threadIdx.x; i < columns; i += 32) mean += load(y, base + i) * load(dy, base + i);
    mean = warp_sum(mean);
    for (int i = threadIdx.x; i < columns; i += 32)
        store(dx, base + i, scale * load(y, base + i) * (load(dy, base + i) - mean));
}

// ---- Upsampling by two, nearest: x: (b, h, w, c), y: (b, 2h, 2w, c).

extern "C" __global__ void NAME(upsample_forward)(const T* x, unsigned h, unsigned w, unsigned c, unsigned n, T* y) {
    for (unsigned i = thread_index(); i < n; i += thread_count()) {
        unsigned pixel = i / c;
        unsigned column = pixel % (2 * w), row = pixel / (2 * w) % (2 * h), image = pixel / (2 * w) / (2 * h);
        size_t from = (((size_t)image * h + row / 2) * w + column / 2) * c + i % c;
        y[i] = x[from];
    }
}

// n elements of dx.
extern "C" __global__ void NAME(upsample_backward)(const T* dy, unsigned h, unsigned w, unsigned c, unsigned n, T* dx) {
    for (unsigned i = thread_index(); i < n; i += thread_count()) {
        unsigned pixel = i / c, column = pixel % w, row = pixel / w % h, image = pixel / w / h;
        size_t first = (((size_t)image * 2 * h + 2 * row) * 2 * w + 2 * column) * c + i % c, below = first + (size_t)2 * w * c;
        store(dx, i, (load(dy, first) + load(dy, first + c)) + (load(dy, below) + load(dy, below + c)));
    }
}

#undef NORM
#undef WITH_NORM
