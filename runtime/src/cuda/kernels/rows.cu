// Ops over rows of the last axis, a warp a row, and the gated residual. A row is read once from memory; later passes
// find it in the first-level cache.

const u32 THREADS = 256;
const u32 WARPS = THREADS / WARP;
// Rows of one sample whose sums over tokens one block forms.
const u32 PART = 32;

DEVICE u32 lane() { return threadIdx.x % WARP; }
DEVICE u32 warp() { return threadIdx.x / WARP; }

// Whether rows of `width` elements from `at` on can be read V elements at a time.
template <class T> DEVICE bool rows_aligned(const T *at, u32 width) {
    return aligned(at) && width % Vector<T>::LANES == 0;
}

// Mean and 1 / sqrt(variance + epsilon) of a row, by two passes; the variance is the biased one.
template <u32 V, class T> DEVICE void moments(const T *x, u32 width, float epsilon, float &mean, float &r) {
    float sum = 0.0f;
    for (u32 i = lane() * V; i < width; i += WARP * V) {
        float xs[V];
        load(x + i, xs);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            sum += xs[j];
        }
    }
    mean = warp_sum(sum) / (float)width;
    float squares = 0.0f;
    for (u32 i = lane() * V; i < width; i += WARP * V) {
        float xs[V];
        load(x + i, xs);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            squares += (xs[j] - mean) * (xs[j] - mean);
        }
    }
    r = 1.0f / sqrtf(warp_sum(squares) / (float)width + epsilon);
}

template <u32 V, class T>
DEVICE void layer_norm_modulate(const T *x, const T *shift, const T *scale, T *y, u32 rows, u32 tokens, u32 width,
                                float epsilon) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width, condition = (u64)(row / tokens) * width;
        float mean, r;
        moments<V>(x + at, width, epsilon, mean, r);
        for (u32 i = lane() * V; i < width; i += WARP * V) {
            float xs[V], shifts[V], scales[V];
            load(x + at + i, xs);
            load(shift + condition + i, shifts);
            load(scale + condition + i, scales);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                xs[j] = ((xs[j] - mean) * r) * (1.0f + scales[j]) + shifts[j];
            }
            store(y + at + i, xs);
        }
    }
}

// The sums of a row that layer norm's gradient takes: mean(ct), mean(ct x^), the cotangent times 1 + scale where there
// is a scale.
template <u32 V, bool SCALED, class T>
DEVICE void projections(const T *x, const T *scale, const T *ct, u32 width, float mean, float r, float &ct_mean,
                        float &projection) {
    float sum = 0.0f, product = 0.0f;
    for (u32 i = lane() * V; i < width; i += WARP * V) {
        float xs[V], cts[V], scales[V] = {};
        load(x + i, xs);
        load(ct + i, cts);
        if constexpr (SCALED) {
            load(scale + i, scales);
        }
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            const float inner = SCALED ? cts[j] * (1.0f + scales[j]) : cts[j];
            sum += inner;
            product += inner * ((xs[j] - mean) * r);
        }
    }
    ct_mean = warp_sum(sum) / (float)width;
    projection = warp_sum(product) / (float)width;
}

// dx = r (inner - mean(inner) - x^ mean(inner x^)) of a row, plus the residual where there is one. Which of both is there is
// known to the compiler: it would cut the store up otherwise.
template <u32 V, bool SCALED, bool ADDED, class T>
DEVICE void layer_norm_grad_row(const T *x, const T *scale, const T *ct, const T *residual, T *dx, u32 width,
                                float mean, float r) {
    float ct_mean, projection;
    projections<V, SCALED>(x, scale, ct, width, mean, r, ct_mean, projection);
    for (u32 i = lane() * V; i < width; i += WARP * V) {
        float xs[V], cts[V], scales[V] = {}, rest[V] = {};
        load(x + i, xs);
        load(ct + i, cts);
        if constexpr (SCALED) {
            load(scale + i, scales);
        }
        if constexpr (ADDED) {
            load(residual + i, rest);
        }
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            const float inner = SCALED ? cts[j] * (1.0f + scales[j]) : cts[j];
            xs[j] = r * ((inner - ct_mean) - ((xs[j] - mean) * r) * projection);
            if constexpr (ADDED) {
                xs[j] += rest[j];
            }
        }
        store(dx + i, xs);
    }
}

template <u32 V, class T>
DEVICE void layer_norm_grad(const T *x, const T *ct, T *dx, u32 rows, u32 width, float epsilon) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width;
        float mean, r;
        moments<V>(x + at, width, epsilon, mean, r);
        const T *none = 0;
        layer_norm_grad_row<V, false, false>(x + at, none, ct + at, none, dx + at, width, mean, r);
    }
}

// Block (part, sample): PART rows of a sample. First a warp a row writes dx and leaves the row's moments; then a
// thread a column forms the part's share of dshift and dscale, row after row.
template <u32 V, class T>
DEVICE void layer_norm_modulate_grad(const T *x, const T *scale, const T *ct, const T *residual, T *dx, float *shares,
                                     u32 tokens, u32 width, float epsilon) {
    __shared__ float means[PART], rs[PART];
    const u32 first = blockIdx.x * PART, count = min(PART, tokens - first);
    const u64 start = ((u64)blockIdx.y * tokens + first) * width;
    scale += (u64)blockIdx.y * width;
    for (u32 row = warp(); row < count; row += WARPS) {
        const u64 at = start + (u64)row * width;
        float mean, r;
        moments<V>(x + at, width, epsilon, mean, r);
        if (residual) {
            layer_norm_grad_row<V, true, true>(x + at, scale, ct + at, residual + at, dx + at, width, mean, r);
        } else {
            layer_norm_grad_row<V, true, false>(x + at, scale, ct + at, residual, dx + at, width, mean, r);
        }
        if (lane() == 0) {
            means[row] = mean;
            rs[row] = r;
        }
    }
    __syncthreads();
    float *share = shares + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * width;
    for (u32 i = threadIdx.x * V; i < width; i += THREADS * V) {
        float dshift[V] = {}, dscale[V] = {};
        for (u32 row = 0; row < count; row++) {
            const u64 at = start + (u64)row * width + i;
            float xs[V], cts[V];
            load(x + at, xs);
            load(ct + at, cts);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                dshift[j] += cts[j];
                dscale[j] += cts[j] * ((xs[j] - means[row]) * rs[row]);
            }
        }
        store(share + i, dshift);
        store(share + width + i, dscale);
    }
}

template <u32 V, class T>
DEVICE void gate_residual(const T *x, const T *gate, const T *y, T *out, u32 rows, u32 tokens, u32 width) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width, condition = (u64)(row / tokens) * width;
        for (u32 i = lane() * V; i < width; i += WARP * V) {
            float xs[V], ys[V], gates[V];
            load(x + at + i, xs);
            load(y + at + i, ys);
            load(gate + condition + i, gates);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                xs[j] += gates[j] * ys[j];
            }
            store(out + at + i, xs);
        }
    }
}

// Block (part, sample), a thread a column.
template <u32 V, class T>
DEVICE void gate_residual_grad(const T *gate, const T *y, const T *ct, T *dy, float *shares, u32 tokens, u32 width) {
    const u32 first = blockIdx.x * PART, count = min(PART, tokens - first);
    const u64 start = ((u64)blockIdx.y * tokens + first) * width;
    float *share = shares + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * width;
    for (u32 i = threadIdx.x * V; i < width; i += THREADS * V) {
        float gates[V], dgate[V] = {};
        load(gate + (u64)blockIdx.y * width + i, gates);
        for (u32 row = 0; row < count; row++) {
            const u64 at = start + (u64)row * width + i;
            float ys[V], cts[V];
            load(y + at, ys);
            load(ct + at, cts);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                dgate[j] += cts[j] * ys[j];
                cts[j] *= gates[j];
            }
            store(dy + at, cts);
        }
        store(share + i, dgate);
    }
}

template <u32 V, class T> DEVICE void softmax_grad(const T *y, const T *ct, T *dx, u32 rows, u32 width) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width;
        float dot = 0.0f;
        for (u32 i = lane() * V; i < width; i += WARP * V) {
            float ys[V], cts[V];
            load(y + at + i, ys);
            load(ct + at + i, cts);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                dot += cts[j] * ys[j];
            }
        }
        dot = warp_sum(dot);
        for (u32 i = lane() * V; i < width; i += WARP * V) {
            float ys[V], cts[V];
            load(y + at + i, ys);
            load(ct + at + i, cts);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                ys[j] *= cts[j] - dot;
            }
            store(dx + at + i, ys);
        }
    }
}

// Sums over the rows of a matrix: block (columns, part) adds `part` rows up, one after the other.
template <u32 V, class T> DEVICE void column_sums(const T *x, float *shares, u64 rows, u32 width, u32 part) {
    const u32 i = (blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= width) {
        return;
    }
    const u64 first = (u64)blockIdx.y * part, last = min(first + part, rows);
    float sums[V] = {};
    for (u64 row = first; row < last; row++) {
        float xs[V];
        load(x + row * width + i, xs);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            sums[j] += xs[j];
        }
    }
    store(shares + (u64)blockIdx.y * width + i, sums);
}

// Adds up the parts' shares in order: `shares` is (groups, parts, kinds, width), `out` of each kind (groups, width).
template <class T> DEVICE void add_shares(const float *shares, T *first, T *second, u32 parts, u32 width) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x, kinds = second ? 2 : 1;
    if (i >= width) {
        return;
    }
    for (u32 kind = 0; kind < kinds; kind++) {
        float sum = 0.0f;
        for (u32 part = 0; part < parts; part++) {
            sum += shares[(((u64)blockIdx.y * parts + part) * kinds + kind) * width + i];
        }
        narrow(sum, (kind ? second : first)[(u64)blockIdx.y * width + i]);
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
// Calls FUNCTION with accesses of 16 bytes where every address allows them.
#define AS_WIDE_AS(CONDITION, T, FUNCTION, ...)                                                                        \
    if (CONDITION) {                                                                                                   \
        FUNCTION<Vector<T>::LANES>(__VA_ARGS__);                                                                       \
    } else {                                                                                                           \
        FUNCTION<1>(__VA_ARGS__);                                                                                      \
    }

#define ROWS(NAME, T)                                                                                                  \
    KERNEL layer_norm_modulate_##NAME(const T *x, const T *shift, const T *scale, T *y, u32 rows, u32 tokens,          \
                                      u32 width, float epsilon) {                                                      \
        AS_WIDE_AS(rows_aligned(x, width) && aligned(shift) && aligned(scale) && aligned(y), T, layer_norm_modulate,   \
                   x, shift, scale, y, rows, tokens, width, epsilon)                                                   \
    }                                                                                                                  \
    KERNEL layer_norm_grad_##NAME(const T *x, const T *ct, T *dx, u32 rows, u32 width, float epsilon) {                \
        AS_WIDE_AS(rows_aligned(x, width) && aligned(ct) && aligned(dx), T, layer_norm_grad, x, ct, dx, rows, width,   \
                   epsilon)                                                                                            \
    }                                                                                                                  \
    KERNEL layer_norm_modulate_grad_##NAME(const T *x, const T *scale, const T *ct, const T *residual, T *dx,          \
                                           float *shares, u32 tokens, u32 width, float epsilon) {                      \
        AS_WIDE_AS(rows_aligned(x, width) && aligned(scale) && aligned(ct) && aligned(residual) && aligned(dx), T,     \
                   layer_norm_modulate_grad, x, scale, ct, residual, dx, shares, tokens, width, epsilon)               \
    }                                                                                                                  \
    KERNEL gate_residual_##NAME(const T *x, const T *gate, const T *y, T *out, u32 rows, u32 tokens, u32 width) {      \
        AS_WIDE_AS(rows_aligned(x, width) && aligned(gate) && aligned(y) && aligned(out), T, gate_residual, x, gate,   \
                   y, out, rows, tokens, width)                                                                        \
    }                                                                                                                  \
    KERNEL gate_residual_grad_##NAME(const T *gate, const T *y, const T *ct, T *dy, float *shares, u32 tokens,         \
                                     u32 width) {                                                                      \
        AS_WIDE_AS(rows_aligned(gate, width) && aligned(y) && aligned(ct) && aligned(dy), T, gate_residual_grad,       \
                   gate, y, ct, dy, shares, tokens, width)                                                             \
    }                                                                                                                  \
    KERNEL softmax_grad_##NAME(const T *y, const T *ct, T *dx, u32 rows, u32 width) {                                  \
        AS_WIDE_AS(rows_aligned(y, width) && aligned(ct) && aligned(dx), T, softmax_grad, y, ct, dx, rows, width)      \
    }                                                                                                                  \
    KERNEL column_sums_##NAME(const T *x, float *shares, u64 rows, u32 width, u32 part) {                              \
        AS_WIDE_AS(rows_aligned(x, width), T, column_sums, x, shares, rows, width, part)                               \
    }                                                                                                                  \
    KERNEL add_shares_##NAME(const float *shares, T *first, T *second, u32 parts, u32 width) {                         \
        add_shares(shares, first, second, parts, width);                                                               \
    }
FOR_EACH_TYPE(ROWS)
