// Self-attention for elements of 16 bits on the matrix units; no matrix of tokens by tokens reaches memory.
//
// A block of four warps takes 64 rows of one head of one sample and walks over the columns in tiles of shared memory,
// the next one on its way while the present one is used. Head sizes below HEAD are padded with zeros there. Scores are
// kept in powers of two: scaled by log2(e), so that a weight is one exp2.

const u32 THREADS = 128;
const u32 ROWS = 64;
const float LOG2_E = 1.4426950408889634f;

// `samples` x `tokens` rows of q k v, features ordered (q k v, head, feature).
struct Heads {
    u32 tokens, heads, size;
    float scale;
};

// What the backward needs of a row of scores: the logarithm (base 2) of the sum of its exponentials, and the sum of
// weight times cotangent of the weight.
struct alignas(8) Row {
    float log_sum, delta;
};

// Tiles are named by their places in shared memory, in bytes: what differs between the accesses of an unrolled loop is
// then a constant of the instruction. Rows hold HEAD elements; 8 more keep the rows that one access names in different banks.
const u32 BYTES = 2;
template <u32 HEAD> struct Tile {
    static const u32 STRIDE = (HEAD + 8) * BYTES;
};

// Begins to copy rows of a head to a tile; rows from `present` on, and features from `size` on, become zero.
template <u32 HEAD, u32 COUNT, class T>
DEVICE void fill(u32 tile, const T *from, u64 stride, u32 present, u32 size) {
    // Lanes for a row, 8 elements each; of 16 ten have something to do.
    const u32 LANES = HEAD == 64 ? 8 : 16, AT_ONCE = THREADS / LANES;
    const u32 row = threadIdx.x / LANES, feature = threadIdx.x % LANES * 8;
    if (feature >= HEAD) {
        return;
    }
    from += row * stride + feature;
    tile += row * Tile<HEAD>::STRIDE + feature * BYTES;
    present = feature < size ? present : 0;
#pragma unroll
    for (u32 first = 0; first < COUNT; first += AT_ONCE) {
        copy_begin(tile + first * Tile<HEAD>::STRIDE, from, row + first < present);
        from += AT_ONCE * stride;
    }
}

// A warp's 16 rows of a tile as left operands, one for every 16 features.
template <u32 HEAD> DEVICE void left_operands(u32 (&to)[HEAD / 16][4], u32 tile) {
    const u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 8 % 2 * 8 + lane % 8;
    tile += row * Tile<HEAD>::STRIDE + lane / 16 * 16;
#pragma unroll
    for (u32 k = 0; k < HEAD / 16; k++) {
        load_matrices(to[k], tile + k * 32);
    }
}

// Changes the signs of operands.
template <u32 HEAD> DEVICE void negate(u32 (&operands)[HEAD / 16][4]) {
#pragma unroll
    for (u32 k = 0; k < HEAD / 16; k++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            operands[k][i] ^= 0x80008000u;
        }
    }
}

// Where a lane's part of right operands lies in a tile whose rows are columns, or whose rows are summed over.
template <u32 HEAD> DEVICE u32 of_columns() {
    const u32 lane = threadIdx.x % WARP;
    return (lane / 16 * 8 + lane % 8) * Tile<HEAD>::STRIDE + lane / 8 % 2 * 16;
}
template <u32 HEAD> DEVICE u32 of_terms() {
    const u32 lane = threadIdx.x % WARP;
    return (lane / 8 % 2 * 8 + lane % 8) * Tile<HEAD>::STRIDE + lane / 16 * 16;
}

// products[j] (16 rows, columns 8j..8j+8) = rows times the tile's rows, over the features; `tile` is of columns.
template <class T, u32 HEAD, u32 COLUMNS>
DEVICE void times_rows(float (&products)[COLUMNS / 8][4], const u32 (&rows)[HEAD / 16][4], u32 tile) {
#pragma unroll
    for (u32 j = 0; j < COLUMNS / 8; j += 2) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            products[j][i] = 0.0f;
            products[j + 1][i] = 0.0f;
        }
#pragma unroll
        for (u32 k = 0; k < HEAD / 16; k++) {
            u32 b[4];
            load_matrices(b, tile + j * 8 * Tile<HEAD>::STRIDE + k * 32);
            Half<T>::multiply(products[j], rows[k], b[0], b[1]);
            Half<T>::multiply(products[j + 1], rows[k], b[2], b[3]);
        }
    }
}

// sums[f] (16 rows, features 8f..8f+8) += weights (16 rows, COLUMNS) times the tile, which is of terms.
template <class T, u32 HEAD, u32 COLUMNS>
DEVICE void add_weighted(float (&sums)[HEAD / 8][4], const float (&weights)[COLUMNS / 8][4], u32 tile) {
#pragma unroll
    for (u32 j = 0; j < COLUMNS / 8; j += 2) {
        const u32 a[4] = {
            Half<T>::pack(weights[j][0], weights[j][1]), Half<T>::pack(weights[j][2], weights[j][3]),
            Half<T>::pack(weights[j + 1][0], weights[j + 1][1]), Half<T>::pack(weights[j + 1][2], weights[j + 1][3])};
#pragma unroll
        for (u32 f = 0; f < HEAD / 8; f += 2) {
            u32 b[4];
            load_matrices_transposed(b, tile + j * 8 * Tile<HEAD>::STRIDE + f * 16);
            Half<T>::multiply(sums[f], a, b[0], b[1]);
            Half<T>::multiply(sums[f + 1], a, b[2], b[3]);
        }
    }
}

// Sum and largest value over the four lanes that share a row.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// The scale of scores as powers of two, without its sign, which the rows take. Zero is taken as something small: it must
// not make a number of what is out of the softmax.
DEVICE float positive_scale(float scale) { return fmaxf(fabsf(scale), 1e-30f) * LOG2_E; }

// Takes columns from `present` on out of the softmax.
template <u32 COLUMNS> DEVICE void cut(float (&scores)[COLUMNS / 8][4], u32 present) {
    if (present >= COLUMNS) {
        return;
    }
    const u32 column = threadIdx.x % 4 * 2;
#pragma unroll
    for (u32 j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            scores[j][i] = j * 8 + column + i % 2 < present ? scores[j][i] : MINUS_INFINITY;
        }
    }
}

// Takes a tile's scores into running maxima (0: row g, 1: row g + 8), turns them into exponentials below the new
// maxima and gives the factors of what was summed before. Maxima are scaled.
template <u32 COLUMNS>
DEVICE void rise(float (&scores)[COLUMNS / 8][4], float scale, float (&maxima)[2], float (&factors)[2]) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float most = scores[0][2 * half];
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
            most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        }
        most = fmaxf(maxima[half], row_max(most) * scale);
        factors[half] = exp2_fast(maxima[half] - most);
        maxima[half] = most;
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
            scores[j][2 * half] = exp2_fast(scores[j][2 * half] * scale - most);
            scores[j][2 * half + 1] = exp2_fast(scores[j][2 * half + 1] * scale - most);
        }
    }
}

// Writes a warp's 16 rows of a head, times a factor for the rows g and g + 8.
template <u32 HEAD, class T>
DEVICE void write_rows(T *to, u64 stride, const float (&sums)[HEAD / 8][4], float first, float second, u32 row,
                       u32 tokens, u32 size) {
    const u32 lane = threadIdx.x % WARP, g = row + lane / 4;
#pragma unroll
    for (u32 f = 0; f < HEAD / 8; f++) {
        if (f * 8 >= size) {
            break;
        }
        T *at = to + g * stride + f * 8 + lane % 4 * 2;
        if (g < tokens) {
            *(u32 *)at = Half<T>::pack(sums[f][0] * first, sums[f][1] * first);
        }
        if (g + 8 < tokens) {
            *(u32 *)(at + 8 * stride) = Half<T>::pack(sums[f][2] * second, sums[f][3] * second);
        }
    }
}

// The tiles of two matrices of the same rows, two of each: one in use, one on its way.
template <u32 HEAD, u32 COLUMNS> struct Stages {
    static const u32 SIZE = COLUMNS * Tile<HEAD>::STRIDE;
    u32 first, second;

    DEVICE Stages(u32 shared) : first(shared), second(shared + 2 * SIZE) {}

    // Begins the tile of rows from `start` on of matrices of `tokens` rows, in the stage at `at`.
    template <class T>
    DEVICE void begin(u32 at, u32 start, const T *a, u64 stride_a, const T *b, u64 stride_b, u32 tokens, u32 size) const {
        if (tokens > start) {
            fill<HEAD, COLUMNS>(first + at, a + start * stride_a, stride_a, tokens - start, size);
            fill<HEAD, COLUMNS>(second + at, b + start * stride_b, stride_b, tokens - start, size);
        }
        copy_close();
    }
};

// out = softmax(q k^T scale) v. Block (rows, head, sample).
template <u32 HEAD, class T> DEVICE void forward(const T *qkv, T *out, const Heads &h) {
    const u32 COLUMNS = 64;
    SHARED_BYTES(shared);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS;
    const u64 stride = 3 * (u64)width;
    const T *q = qkv + blockIdx.z * h.tokens * stride + blockIdx.y * h.size, *k = q + width, *v = k + width;
    typedef Stages<HEAD, COLUMNS> Both;
    const Both stages(shared_address(shared));

    // The queries pass through the tile that the second tile of keys will take.
    fill<HEAD, ROWS>(stages.first + Both::SIZE, q + row * stride, stride, h.tokens - row, h.size);
    stages.begin(0, 0, k, stride, v, stride, h.tokens, h.size);
    copy_wait<0>();
    __syncthreads();
    u32 rows[HEAD / 16][4];
    left_operands<HEAD>(rows, stages.first + Both::SIZE);
    if (h.scale < 0.0f) {
        negate<HEAD>(rows);
    }

    const float scale = positive_scale(h.scale);
    const u32 keys = stages.first + of_columns<HEAD>(), values = stages.second + of_terms<HEAD>();
    float sums[HEAD / 8][4] = {}, maxima[2] = {MINUS_INFINITY, MINUS_INFINITY}, totals[2] = {};
    u32 at = 0;
    for (u32 start = 0; start < h.tokens; start += COLUMNS) {
        copy_wait<0>();
        // The tile has arrived for all, and nobody reads the other one any more.
        __syncthreads();
        stages.begin(Both::SIZE - at, start + COLUMNS, k, stride, v, stride, h.tokens, h.size);
        float scores[COLUMNS / 8][4], factors[2];
        times_rows<T, HEAD, COLUMNS>(scores, rows, keys + at);
        cut<COLUMNS>(scores, h.tokens - start);
        rise<COLUMNS>(scores, scale, maxima, factors);
        totals[0] *= factors[0];
        totals[1] *= factors[1];
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
            totals[0] += scores[j][0] + scores[j][1];
            totals[1] += scores[j][2] + scores[j][3];
        }
#pragma unroll
        for (u32 f = 0; f < HEAD / 8; f++) {
            sums[f][0] *= factors[0];
            sums[f][1] *= factors[0];
            sums[f][2] *= factors[1];
            sums[f][3] *= factors[1];
        }
        add_weighted<T, HEAD, COLUMNS>(sums, scores, values + at);
        at = Both::SIZE - at;
    }
    T *const to = out + (u64)blockIdx.z * h.tokens * width + blockIdx.y * h.size;
    const float first = 1.0f / row_sum(totals[0]), second = 1.0f / row_sum(totals[1]);
    write_rows<HEAD>(to, width, sums, first, second, row + threadIdx.x / WARP * 16, h.tokens, h.size);
}

// The part of the backward whose rows are queries: dq, and for each row what dk and dv need of it. The columns are
// walked over twice: for the sums of the rows, then for dq.
template <u32 HEAD, class T>
DEVICE void backward_queries(const T *qkv, const T *ct, T *dqkv, Row *all, const Heads &h) {
    const u32 COLUMNS = 32;
    SHARED_BYTES(shared);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS;
    const u64 stride = 3 * (u64)width, head = blockIdx.z * h.tokens * stride + blockIdx.y * h.size;
    const T *q = qkv + head, *k = q + width, *v = k + width;
    ct += (u64)blockIdx.z * h.tokens * width + blockIdx.y * h.size;
    typedef Stages<HEAD, COLUMNS> Both;
    const Both stages(shared_address(shared));

    // Queries and cotangents pass through the stages, which are as large.
    const u32 queries = stages.first, cotangents = queries + ROWS * Tile<HEAD>::STRIDE;
    fill<HEAD, ROWS>(queries, q + row * stride, stride, h.tokens - row, h.size);
    fill<HEAD, ROWS>(cotangents, ct + (u64)row * width, width, h.tokens - row, h.size);
    copy_close();
    copy_wait<0>();
    __syncthreads();
    u32 query_rows[HEAD / 16][4], ct_rows[HEAD / 16][4];
    left_operands<HEAD>(query_rows, queries);
    left_operands<HEAD>(ct_rows, cotangents);
    if (h.scale < 0.0f) {
        negate<HEAD>(query_rows);
    }
    __syncthreads();

    const float scale = positive_scale(h.scale);
    const u32 keys = stages.first + of_columns<HEAD>(), values = stages.second + of_columns<HEAD>();
    float maxima[2] = {MINUS_INFINITY, MINUS_INFINITY}, totals[2] = {}, deltas[2] = {};
    u32 at = 0;
    stages.begin(at, 0, k, stride, v, stride, h.tokens, h.size);
    for (u32 start = 0; start < h.tokens; start += COLUMNS) {
        copy_wait<0>();
        __syncthreads();
        // After the last tile comes the first one again.
        const u32 next = start + COLUMNS < h.tokens ? start + COLUMNS : 0;
        stages.begin(Both::SIZE - at, next, k, stride, v, stride, h.tokens, h.size);
        float scores[COLUMNS / 8][4], dweights[COLUMNS / 8][4], factors[2];
        times_rows<T, HEAD, COLUMNS>(scores, query_rows, keys + at);
        times_rows<T, HEAD, COLUMNS>(dweights, ct_rows, values + at);
        cut<COLUMNS>(scores, h.tokens - start);
        rise<COLUMNS>(scores, scale, maxima, factors);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            totals[half] *= factors[half];
            deltas[half] *= factors[half];
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; j++) {
                totals[half] += scores[j][2 * half] + scores[j][2 * half + 1];
                deltas[half] +=
                    scores[j][2 * half] * dweights[j][2 * half] + scores[j][2 * half + 1] * dweights[j][2 * half + 1];
            }
        }
        at = Both::SIZE - at;
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const float total = row_sum(totals[half]);
        deltas[half] = row_sum(deltas[half]) / total;
        maxima[half] += log2f(total);
    }

    const u32 terms = stages.first + of_terms<HEAD>();
    float sums[HEAD / 8][4] = {};
    for (u32 start = 0; start < h.tokens; start += COLUMNS) {
        copy_wait<0>();
        __syncthreads();
        stages.begin(Both::SIZE - at, start + COLUMNS, k, stride, v, stride, h.tokens, h.size);
        float scores[COLUMNS / 8][4], dweights[COLUMNS / 8][4];
        times_rows<T, HEAD, COLUMNS>(scores, query_rows, keys + at);
        times_rows<T, HEAD, COLUMNS>(dweights, ct_rows, values + at);
        cut<COLUMNS>(scores, h.tokens - start);
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                scores[j][i] = exp2_fast(scores[j][i] * scale - maxima[i / 2]) * (dweights[j][i] - deltas[i / 2]);
            }
        }
        add_weighted<T, HEAD, COLUMNS>(sums, scores, terms + at);
        at = Both::SIZE - at;
    }
    const u32 first = row + threadIdx.x / WARP * 16;
    write_rows<HEAD>(dqkv + head, stride, sums, h.scale, h.scale, first, h.tokens, h.size);
    Row *const rows = all + ((u64)blockIdx.z * h.heads + blockIdx.y) * h.tokens;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 token = first + threadIdx.x % WARP / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && token < h.tokens) {
            rows[token] = {maxima[half], deltas[half]};
        }
    }
}

// The part whose rows are keys: dk and dv.
template <u32 HEAD, class T>
DEVICE void backward_keys(const T *qkv, const T *ct, T *dqkv, const Row *all, const Heads &h) {
    const u32 COLUMNS = 32;
    SHARED_BYTES(shared);
    const u32 width = h.heads * h.size, row = blockIdx.x * ROWS;
    const u64 stride = 3 * (u64)width, head = blockIdx.z * h.tokens * stride + blockIdx.y * h.size;
    const T *q = qkv + head, *k = q + width, *v = k + width;
    ct += (u64)blockIdx.z * h.tokens * width + blockIdx.y * h.size;
    const Row *const rows = all + ((u64)blockIdx.z * h.heads + blockIdx.y) * h.tokens;
    typedef Stages<HEAD, COLUMNS> Both;
    const Both stages(shared_address(shared));

    const u32 keys = stages.first, values = keys + ROWS * Tile<HEAD>::STRIDE;
    fill<HEAD, ROWS>(keys, k + row * stride, stride, h.tokens - row, h.size);
    fill<HEAD, ROWS>(values, v + row * stride, stride, h.tokens - row, h.size);
    copy_close();
    copy_wait<0>();
    __syncthreads();
    u32 key_rows[HEAD / 16][4], value_rows[HEAD / 16][4];
    left_operands<HEAD>(key_rows, keys);
    left_operands<HEAD>(value_rows, values);
    if (h.scale < 0.0f) {
        negate<HEAD>(key_rows);
    }
    __syncthreads();

    const float scale = positive_scale(h.scale);
    const u32 columns = of_columns<HEAD>(), terms = of_terms<HEAD>(), column = threadIdx.x % 4 * 2;
    float dkeys[HEAD / 8][4] = {}, dvalues[HEAD / 8][4] = {};
    u32 at = 0;
    stages.begin(at, 0, q, stride, ct, width, h.tokens, h.size);
    for (u32 start = 0; start < h.tokens; start += COLUMNS) {
        copy_wait<0>();
        __syncthreads();
        stages.begin(Both::SIZE - at, start + COLUMNS, q, stride, ct, width, h.tokens, h.size);
        float weights[COLUMNS / 8][4], dweights[COLUMNS / 8][4];
        times_rows<T, HEAD, COLUMNS>(weights, key_rows, stages.first + columns + at);
        times_rows<T, HEAD, COLUMNS>(dweights, value_rows, stages.second + columns + at);
        Row of[COLUMNS / 8][2];
        const Row *const from = rows + start + column;
        if (start + COLUMNS <= h.tokens) {
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; j++) {
                of[j][0] = from[8 * j];
                of[j][1] = from[8 * j + 1];
            }
        } else {
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    // A row that is not there weighs nothing.
                    of[j][i] = {-MINUS_INFINITY, 0.0f};
                    if (start + column + 8 * j + i < h.tokens) {
                        of[j][i] = from[8 * j + i];
                    }
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const Row &row_of = of[j][i % 2];
                weights[j][i] = exp2_fast(weights[j][i] * scale - row_of.log_sum);
                dweights[j][i] = weights[j][i] * (dweights[j][i] - row_of.delta);
            }
        }
        add_weighted<T, HEAD, COLUMNS>(dvalues, weights, stages.second + terms + at);
        add_weighted<T, HEAD, COLUMNS>(dkeys, dweights, stages.first + terms + at);
        at = Both::SIZE - at;
    }
    const u32 first = row + threadIdx.x / WARP * 16;
    write_rows<HEAD>(dqkv + head + width, stride, dkeys, h.scale, h.scale, first, h.tokens, h.size);
    write_rows<HEAD>(dqkv + head + 2 * width, stride, dvalues, 1.0f, 1.0f, first, h.tokens, h.size);
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

#define ATTENTION(NAME, T, HEAD)                                                                                       \
    KERNEL attention_##NAME##_##HEAD(const T *qkv, T *out, Heads h) { forward<HEAD>(qkv, out, h); }                    \
    KERNEL attention_grad_queries_##NAME##_##HEAD(const T *qkv, const T *ct, T *dqkv, Row *rows, Heads h) {            \
        backward_queries<HEAD>(qkv, ct, dqkv, rows, h);                                                                \
    }                                                                                                                  \
    KERNEL attention_grad_keys_##NAME##_##HEAD(const T *qkv, const T *ct, T *dqkv, const Row *rows, Heads h) {         \
        backward_keys<HEAD>(qkv, ct, dqkv, rows, h);                                                                   \
    }
ATTENTION(bf16, bf16, 64)
ATTENTION(bf16, bf16, 80)
ATTENTION(f16, f16, 64)
ATTENTION(f16, f16, 80)
