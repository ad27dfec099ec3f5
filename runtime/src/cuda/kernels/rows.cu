// Ops over rows of the last axis, a warp a row, and the gated residual.

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

// Elements of a row that a lane holds at most.
const u32 HELD = 40;

// Calls `visit(i, chunk)` for a lane's chunks of V elements of a row, a warp's width apart, the first element of each being
// i; CHUNKS of them at most, or any number where that is 0.
template <u32 V, u32 CHUNKS, class Visit> DEVICE void each(u32 width, const Visit &visit) {
    if constexpr (CHUNKS == 0) {
        for (u32 i = lane() * V; i < width; i += WARP * V) {
            visit(i, 0);
        }
    } else {
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
            const u32 i = (chunk * WARP + lane()) * V;
            if (i < width) {
                visit(i, chunk);
            }
        }
    }
}

// A lane's chunks of a row, in registers where their number is known, else where they were.
template <u32 V, u32 CHUNKS, class T> struct Row {
    const T *at;
    float chunks[CHUNKS == 0 ? 1 : CHUNKS][V];

    DEVICE Row(const T *row, u32 width) : at(row) {
        if constexpr (CHUNKS > 0) {
            each<V, CHUNKS>(width, [&](u32 i, u32 chunk) { load(at + i, chunks[chunk]); });
        }
    }
    DEVICE void get(u32 i, u32 chunk, float (&to)[V]) const {
        if constexpr (CHUNKS == 0) {
            load(at + i, to);
        } else {
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                to[j] = chunks[chunk][j];
            }
        }
    }
};

// Mean and 1 / sqrt(variance + epsilon) of a row, by two passes; the variance is the biased one.
template <u32 V, u32 CHUNKS, class T>
DEVICE void moments(const Row<V, CHUNKS, T> &x, u32 width, float epsilon, float &mean, float &r) {
    float sum = 0.0f;
    each<V, CHUNKS>(width, [&](u32 i, u32 chunk) {
        float xs[V];
        x.get(i, chunk, xs);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            sum += xs[j];
        }
    });
    const float middle = warp_sum(sum) / (float)width;
    float squares = 0.0f;
    each<V, CHUNKS>(width, [&](u32 i, u32 chunk) {
        float xs[V];
        x.get(i, chunk, xs);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            squares += (xs[j] - middle) * (xs[j] - middle);
        }
    });
    mean = middle;
    r = 1.0f / sqrtf(warp_sum(squares) / (float)width + epsilon);
}

template <u32 V, u32 CHUNKS, class T>
DEVICE void layer_norm_modulate(const T *x, const T *shift, const T *scale, T *y, u32 rows, u32 tokens, u32 width,
                                float epsilon) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width, condition = (u64)(row / tokens) * width;
        const Row<V, CHUNKS, T> held(x + at, width);
        float mean, r;
        moments(held, width, epsilon, mean, r);
        each<V, CHUNKS>(width, [&](u32 i, u32 chunk) {
            float xs[V], shifts[V], scales[V];
            held.get(i, chunk, xs);
            load(shift + condition + i, shifts);
            load(scale + condition + i, scales);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                xs[j] = ((xs[j] - mean) * r) * (1.0f + scales[j]) + shifts[j];
            }
            store(y + at + i, xs);
        });
    }
}

// dx = r (inner - mean(inner) - x^ mean(inner x^)) of a row, where inner is the cotangent, times 1 + scale where there is a
// scale; plus the residual where there is one. Which of both is there is known to the compiler: it would cut the store up
// otherwise.
template <bool SCALED, bool ADDED, u32 V, u32 CHUNKS, class T>
DEVICE void layer_norm_grad_row(const Row<V, CHUNKS, T> &x, const T *scale, const T *ct, const T *residual, T *dx,
                                u32 width, float mean, float r) {
    // Held too, it would leave room for half as many warps.
    const auto inner = [&](u32 i, float (&to)[V]) {
        load(ct + i, to);
        if constexpr (SCALED) {
            float scales[V];
            load(scale + i, scales);
#pragma unroll
            for (u32 j = 0; j < V; j++) {
                to[j] *= 1.0f + scales[j];
            }
        }
    };
    float sum = 0.0f, product = 0.0f;
    each<V, CHUNKS>(width, [&](u32 i, u32 chunk) {
        float xs[V], inners[V];
        x.get(i, chunk, xs);
        inner(i, inners);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            sum += inners[j];
            product += inners[j] * ((xs[j] - mean) * r);
        }
    });
    const float ct_mean = warp_sum(sum) / (float)width, projection = warp_sum(product) / (float)width;
    each<V, CHUNKS>(width, [&](u32 i, u32 chunk) {
        float xs[V], inners[V], rest[V] = {};
        x.get(i, chunk, xs);
        inner(i, inners);
        if constexpr (ADDED) {
            load(residual + i, rest);
        }
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            xs[j] = r * ((inners[j] - ct_mean) - ((xs[j] - mean) * r) * projection);
            if constexpr (ADDED) {
                xs[j] += rest[j];
            }
        }
        store(dx + i, xs);
    });
}

template <u32 V, u32 CHUNKS, class T>
DEVICE void layer_norm_grad(const T *x, const T *ct, T *dx, u32 rows, u32 width, float epsilon) {
    for (u32 row = blockIdx.x * WARPS + warp(); row < rows; row += gridDim.x * WARPS) {
        const u64 at = (u64)row * width;
        const Row<V, CHUNKS, T> held(x + at, width);
        const T *none = 0;
        float mean, r;
        moments(held, width, epsilon, mean, r);
        layer_norm_grad_row<false, false>(held, none, ct + at, none, dx + at, width, mean, r);
    }
}

// Block (part, sample): PART rows of a sample. First a warp a row writes dx and leaves the row's moments; then a
// thread a column forms the part's share of dshift and dscale, row after row.
template <u32 V, u32 CHUNKS, class T>
DEVICE void layer_norm_modulate_grad(const T *x, const T *scale, const T *ct, const T *residual, T *dx, float *shares,
                                     u32 tokens, u32 width, float epsilon) {
    __shared__ float means[PART], rs[PART];
    const u32 first = blockIdx.x * PART, count = min(PART, tokens - first);
    const u64 start = ((u64)blockIdx.y * tokens + first) * width;
    scale += (u64)blockIdx.y * width;
    for (u32 row = warp(); row < count; row += WARPS) {
        const u64 at = start + (u64)row * width;
        const Row<V, CHUNKS, T> held(x + at, width);
        float mean, r;
        moments(held, width, epsilon, mean, r);
        if (residual) {
            layer_norm_grad_row<true, true>(held, scale, ct + at, residual + at, dx + at, width, mean, r);
        } else {
            layer_norm_grad_row<true, false>(held, scale, ct + at, residual, dx + at, width, mean, r);
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

// The same, with rows in registers where they fit.
#define AS_HELD_AS(CONDITION, T, FUNCTION, ...)                                                                        \
    if (!(CONDITION)) {                                                                                                \
        FUNCTION<1, 0>(__VA_ARGS__);                                                                                   \
    } else if (width <= WARP * HELD) {                                                                                 \
        FUNCTION<Vector<T>::LANES, HELD / Vector<T>::LANES>(__VA_ARGS__);                                              \
    } else {                                                                                                           \
        FUNCTION<Vector<T>::LANES, 0>(__VA_ARGS__);                                                                    \
    }

#define ROWS(NAME, T)                                                                                                  \
    KERNEL layer_norm_modulate_##NAME(const T *x, const T *shift, const T *scale, T *y, u32 rows, u32 tokens,          \
                                      u32 width, float epsilon) {                                                      \
        AS_HELD_AS(rows_aligned(x, width) && aligned(shift) && aligned(scale) && aligned(y), T, layer_norm_modulate,   \
                   x, shift, scale, y, rows, tokens, width, epsilon)                                                   \
    }                                                                                                                  \
    KERNEL layer_norm_grad_##NAME(const T *x, const T *ct, T *dx, u32 rows, u32 width, float epsilon) {                \
        AS_HELD_AS(rows_aligned(x, width) && aligned(ct) && aligned(dx), T, layer_norm_grad, x, ct, dx, rows, width,   \
                   epsilon)                                                                                            \
    }                                                                                                                  \
    KERNEL layer_norm_modulate_grad_##NAME(const T *x, const T *scale, const T *ct, const T *residual, T *dx,          \
                                           float *shares, u32 tokens, u32 width, float epsilon) {                      \
        AS_HELD_AS(rows_aligned(x, width) && aligned(scale) && aligned(ct) && aligned(residual) && aligned(dx), T,     \
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
