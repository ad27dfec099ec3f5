// Self-attention in f32 for every element type and head size up to 128: a warp a row, columns in tiles of a warp's
// width. Where `attention.cu` does not fit.

const u32 THREADS = 256;
const u32 ROWS = THREADS / WARP;
// Features of a head that one lane sums.
const u32 SUMS = 4;

// `samples` x `tokens` rows of q k v, features ordered (q k v, head, feature).
struct Heads {
    u32 tokens, heads, size;
    float scale;
};

// The logarithm of the sum of a row's exponentials, and the sum of weight times cotangent of the weight.
struct Row {
    float log_sum, delta;
};

// Shared memory: two tiles of WARP rows of `size` + 1 values, two rows and two sets of weights a warp.
struct Shared {
    float *first, *second, *row, *other_row, *weights, *other_weights;

    DEVICE Shared(unsigned char *shared, u32 size) {
        const u32 warp = threadIdx.x / WARP;
        first = (float *)shared;
        second = first + WARP * (size + 1);
        row = second + WARP * (size + 1) + warp * 2 * (size + WARP);
        other_row = row + size;
        weights = other_row + size;
        other_weights = weights + WARP;
    }
};

// A tile of WARP rows from `start` on; rows behind the last one are zero.
template <class T> DEVICE void fill(float *tile, const T *from, u64 stride, u32 start, u32 tokens, u32 size) {
    for (u32 i = threadIdx.x; i < WARP * size; i += THREADS) {
        const u32 row = i / size, feature = i - row * size;
        tile[row * (size + 1) + feature] = start + row < tokens ? widen(from[(start + row) * stride + feature]) : 0.0f;
    }
}

// A warp's own row.
template <class T> DEVICE void fill_row(float *to, const T *from, u32 size) {
    for (u32 i = threadIdx.x % WARP; i < size; i += WARP) {
        to[i] = widen(from[i]);
    }
}

// The product of the warp's row with the lane's row of a tile.
DEVICE float times(const float *row, const float *tile, u32 size) {
    float sum = 0.0f;
    for (u32 i = 0; i < size; i++) {
        sum += row[i] * tile[threadIdx.x % WARP * (size + 1) + i];
    }
    return sum;
}

// sums[i], of feature `lane` + 32 i, += the weighted sum of a tile's rows.
DEVICE void add_weighted(float (&sums)[SUMS], const float *weights, const float *tile, u32 size) {
#pragma unroll
    for (u32 i = 0; i < SUMS; i++) {
        const u32 feature = threadIdx.x % WARP + i * WARP;
        if (feature < size) {
            for (u32 j = 0; j < WARP; j++) {
                sums[i] += weights[j] * tile[j * (size + 1) + feature];
            }
        }
    }
}

template <class T> DEVICE void write_row(T *to, const float (&sums)[SUMS], float factor, u32 size) {
#pragma unroll
    for (u32 i = 0; i < SUMS; i++) {
        const u32 feature = threadIdx.x % WARP + i * WARP;
        if (feature < size) {
            narrow(sums[i] * factor, to[feature]);
        }
    }
}

template <class T> DEVICE void forward(const T *qkv, T *out, const Heads &h) {
    SHARED_BYTES(bytes);
    const Shared s(bytes, h.size);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool there = row < h.tokens;
    const u64 stride = 3 * (u64)width;
    const T *q = qkv + blockIdx.z * h.tokens * stride + blockIdx.y * h.size, *k = q + width, *v = k + width;
    fill_row(s.row, q + (there ? row : 0) * stride, h.size);
    float sums[SUMS] = {}, most = MINUS_INFINITY, total = 0.0f;
    for (u32 start = 0; start < h.tokens; start += WARP) {
        __syncthreads();
        fill(s.first, k, stride, start, h.tokens, h.size);
        fill(s.second, v, stride, start, h.tokens, h.size);
        __syncthreads();
        const float score = start + lane < h.tokens ? times(s.row, s.first, h.size) * h.scale : MINUS_INFINITY;
        const float next = fmaxf(most, warp_max(score)), factor = expf(most - next), weight = expf(score - next);
        most = next;
        total = total * factor + warp_sum(weight);
        s.weights[lane] = weight;
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < SUMS; i++) {
            sums[i] *= factor;
        }
        add_weighted(sums, s.weights, s.second, h.size);
    }
    if (there) {
        write_row(out + ((u64)blockIdx.z * h.tokens + row) * width + blockIdx.y * h.size, sums, 1.0f / total, h.size);
    }
}

template <class T> DEVICE void backward_queries(const T *qkv, const T *ct, T *dqkv, Row *all, const Heads &h) {
    SHARED_BYTES(bytes);
    const Shared s(bytes, h.size);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool there = row < h.tokens;
    const u64 stride = 3 * (u64)width, head = blockIdx.z * h.tokens * stride + blockIdx.y * h.size;
    const T *q = qkv + head, *k = q + width, *v = k + width;
    fill_row(s.row, q + (there ? row : 0) * stride, h.size);
    fill_row(s.other_row, ct + ((u64)blockIdx.z * h.tokens + (there ? row : 0)) * width + blockIdx.y * h.size, h.size);
    float sums[SUMS] = {}, most = MINUS_INFINITY, total = 0.0f, delta = 0.0f;
    for (u32 pass = 0; pass < 2; pass++) {
        for (u32 start = 0; start < h.tokens; start += WARP) {
            __syncthreads();
            fill(s.first, k, stride, start, h.tokens, h.size);
            fill(s.second, v, stride, start, h.tokens, h.size);
            __syncthreads();
            const float score = start + lane < h.tokens ? times(s.row, s.first, h.size) * h.scale : MINUS_INFINITY;
            const float dweight = times(s.other_row, s.second, h.size);
            if (pass == 0) {
                const float next = fmaxf(most, warp_max(score)), factor = expf(most - next);
                const float weight = expf(score - next);
                most = next;
                total = total * factor + warp_sum(weight);
                delta = delta * factor + warp_sum(weight * dweight);
            } else {
                s.weights[lane] = expf(score - most) / total * (dweight - delta);
                __syncwarp();
                add_weighted(sums, s.weights, s.first, h.size);
            }
        }
        if (pass == 0) {
            delta /= total;
        }
    }
    if (there) {
        write_row(dqkv + head + row * stride, sums, h.scale, h.size);
        if (lane == 0) {
            Row &to = all[((u64)blockIdx.z * h.heads + blockIdx.y) * h.tokens + row];
            to.log_sum = most + logf(total);
            to.delta = delta;
        }
    }
}

template <class T> DEVICE void backward_keys(const T *qkv, const T *ct, T *dqkv, const Row *all, const Heads &h) {
    SHARED_BYTES(bytes);
    const Shared s(bytes, h.size);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool there = row < h.tokens;
    const u64 stride = 3 * (u64)width, head = blockIdx.z * h.tokens * stride + blockIdx.y * h.size;
    const T *q = qkv + head, *k = q + width, *v = k + width;
    ct += (u64)blockIdx.z * h.tokens * width + blockIdx.y * h.size;
    const Row *const rows = all + ((u64)blockIdx.z * h.heads + blockIdx.y) * h.tokens;
    fill_row(s.row, k + (there ? row : 0) * stride, h.size);
    fill_row(s.other_row, v + (there ? row : 0) * stride, h.size);
    float dkeys[SUMS] = {}, dvalues[SUMS] = {};
    for (u32 start = 0; start < h.tokens; start += WARP) {
        __syncthreads();
        fill(s.first, q, stride, start, h.tokens, h.size);
        fill(s.second, ct, width, start, h.tokens, h.size);
        __syncthreads();
        const float score = times(s.row, s.first, h.size) * h.scale, dweight = times(s.other_row, s.second, h.size);
        float weight = 0.0f, delta = 0.0f;
        if (start + lane < h.tokens) {
            weight = expf(score - rows[start + lane].log_sum);
            delta = rows[start + lane].delta;
        }
        s.weights[lane] = weight;
        s.other_weights[lane] = weight * (dweight - delta);
        __syncwarp();
        add_weighted(dvalues, s.weights, s.second, h.size);
        add_weighted(dkeys, s.other_weights, s.first, h.size);
    }
    if (there) {
        write_row(dqkv + head + row * stride + width, dkeys, h.scale, h.size);
        write_row(dqkv + head + row * stride + 2 * width, dvalues, 1.0f, h.size);
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

#define ATTENTION(NAME, T)                                                                                             \
    KERNEL attention_plain_##NAME(const T *qkv, T *out, Heads h) { forward(qkv, out, h); }                             \
    KERNEL attention_plain_grad_queries_##NAME(const T *qkv, const T *ct, T *dqkv, Row *rows, Heads h) {               \
        backward_queries(qkv, ct, dqkv, rows, h);                                                                      \
    }                                                                                                                  \
    KERNEL attention_plain_grad_keys_##NAME(const T *qkv, const T *ct, T *dqkv, const Row *rows, Heads h) {            \
        backward_keys(qkv, ct, dqkv, rows, h);                                                                         \
    }
FOR_EACH_TYPE(ATTENTION)
