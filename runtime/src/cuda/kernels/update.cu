// The parameter update in one pass over memory: unscale, clip, AdamW, moving average, copy for the compute type.
//
// Compiled without fused multiply-add, in the order of operations of the host's update: the same bits come out.

const u32 THREADS = 256;
// Of one access of a thread: those of a warp lie side by side in f32, and no sector of memory is asked for twice.
const u32 ELEMENTS = 4;

// One parameter, in elements of the arenas; rates as the host rounds them.
struct Segment {
    u64 parameter, gradient, length;
    // 1 - lr wd, lr / (1 - beta1^t), epsilon
    float decay, step, epsilon, unused;
};

// A part of a segment, one block's work.
struct Piece {
    u64 start;
    u32 segment, count;
};

struct Constants {
    // 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t)
    float one_minus_beta1, beta2, one_minus_beta2, correction2;
    // Decay of the average, and one minus it.
    float keep, take;
};

// What the update decided for all segments.
struct Control {
    // Norm of the unscaled gradients.
    double norm;
    // Factor of the gradients: unscaling and clip.
    float scale;
    // 0 when the norm is not a number or infinite: nothing is updated.
    u32 finite;
};

// Sum over a block, in an order that depends on nothing.
DEVICE double block_sum(double x, double *lanes) {
    lanes[threadIdx.x] = x;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            lanes[threadIdx.x] += lanes[threadIdx.x + half];
        }
        __syncthreads();
    }
    return lanes[0];
}

template <class G> DEVICE void squares(const Segment *segments, const Piece *pieces, const G *gradients, double *sums) {
    __shared__ double lanes[THREADS];
    const Piece piece = pieces[blockIdx.x];
    const G *g = gradients + segments[piece.segment].gradient + piece.start;
    double sum = 0.0;
    const u32 LANES = Vector<G>::LANES, whole = aligned(g) ? piece.count / LANES * LANES : 0;
    for (u32 i = threadIdx.x * LANES; i < whole; i += THREADS * LANES) {
        float values[LANES];
        load(g + i, values);
#pragma unroll
        for (u32 j = 0; j < LANES; j++) {
            sum += (double)values[j] * (double)values[j];
        }
    }
    for (u32 i = whole + threadIdx.x; i < piece.count; i += THREADS) {
        const double value = (double)widen(g[i]);
        sum += value * value;
    }
    sum = block_sum(sum, lanes);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
    }
}

// One block adds the pieces up and decides; `clip` of 0 clips nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
    update_decide(const double *sums, u32 count, double clip, double unscale, Control *control) {
    __shared__ double lanes[THREADS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        sum += sums[i];
    }
    sum = block_sum(sum, lanes);
    if (threadIdx.x == 0) {
        const double norm = sqrt(sum) * unscale;
        double scale = 1.0;
        if (clip > 0.0) {
            const double needed = clip / (norm + 1e-6);
            scale = needed < 1.0 ? needed : 1.0;
        }
        control->norm = norm;
        control->scale = (float)(scale * unscale);
        // Infinity minus itself is not a number, and that differs from 0.
        control->finite = norm - norm == 0.0;
    }
}

// One element.
DEVICE void step(const Segment &s, const Constants &c, float scale, float g, float &p, float &m, float &v) {
    g *= scale;
    m += c.one_minus_beta1 * (g - m);
    v = v * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = sqrtf(v) / c.correction2 + s.epsilon;
    p = p * s.decay - (s.step * m) / denominator;
}

template <class G, class C>
DEVICE void update(const Segment *segments, const Piece *pieces, const Control *control, const Constants &c,
                   float *parameters, const G *gradients, float *first, float *second, float *average, C *copy) {
    if (!control->finite) {
        return;
    }
    const float scale = control->scale;
    const Piece piece = pieces[blockIdx.x];
    const Segment s = segments[piece.segment];
    const u64 at = s.parameter + piece.start, from = s.gradient + piece.start;
    float *p = parameters + at, *m = first + from, *v = second + from;
    const G *g = gradients + from;
    float *e = average ? average + at : average;
    C *out = copy ? copy + at : copy;
    const bool wide = aligned(p) && aligned(m) && aligned(v) && aligned(g) && aligned(e) && aligned(out);
    const u32 whole = wide ? piece.count / ELEMENTS * ELEMENTS : 0;
    for (u32 i = threadIdx.x * ELEMENTS; i < whole; i += THREADS * ELEMENTS) {
        float ps[ELEMENTS], gs[ELEMENTS], ms[ELEMENTS], vs[ELEMENTS], es[ELEMENTS];
        load(p + i, ps);
        load(g + i, gs);
        load(m + i, ms);
        load(v + i, vs);
        if (e) {
            load(e + i, es);
        }
#pragma unroll
        for (u32 j = 0; j < ELEMENTS; j++) {
            step(s, c, scale, gs[j], ps[j], ms[j], vs[j]);
        }
        store(p + i, ps);
        store(m + i, ms);
        store(v + i, vs);
        if (e) {
#pragma unroll
            for (u32 j = 0; j < ELEMENTS; j++) {
                es[j] = es[j] * c.keep + c.take * ps[j];
            }
            store(e + i, es);
        }
        if (out) {
            store(out + i, ps);
        }
    }
    for (u32 i = whole + threadIdx.x; i < piece.count; i += THREADS) {
        step(s, c, scale, widen(g[i]), p[i], m[i], v[i]);
        if (e) {
            e[i] = e[i] * c.keep + c.take * p[i];
        }
        if (out) {
            narrow(p[i], out[i]);
        }
    }
}

#define SQUARES(NAME, G)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        update_squares_##NAME(const Segment *segments, const Piece *pieces, const G *gradients, double *sums) {        \
        squares(segments, pieces, gradients, sums);                                                                    \
    }
FOR_EACH_TYPE(SQUARES)

// The copy is of 16 bits, or absent.
#define UPDATE(NAME, G, COPY_NAME, C)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) update_##NAME##_##COPY_NAME(                                 \
        const Segment *segments, const Piece *pieces, const Control *control, Constants c, float *parameters,          \
        const G *gradients, float *first, float *second, float *average, C *copy) {                                    \
        update(segments, pieces, control, c, parameters, gradients, first, second, average, copy);                     \
    }
UPDATE(f32, float, bf16, bf16)
UPDATE(bf16, bf16, bf16, bf16)
UPDATE(f16, f16, bf16, bf16)
UPDATE(f32, float, f16, f16)
UPDATE(bf16, bf16, f16, f16)
UPDATE(f16, f16, f16, f16)

// Sum over micro-batches, in f32.
template <class G> DEVICE void accumulate(const G *gradients, float *sum, float scale, u32 first, u64 count) {
    const u64 whole = aligned(gradients) && aligned(sum) ? count / ELEMENTS * ELEMENTS : 0;
    const u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x, threads = (u64)gridDim.x * THREADS;
    for (u64 i = thread * ELEMENTS; i < whole; i += threads * ELEMENTS) {
        float gs[ELEMENTS], sums[ELEMENTS] = {};
        load(gradients + i, gs);
        if (!first) {
            load(sum + i, sums);
        }
#pragma unroll
        for (u32 j = 0; j < ELEMENTS; j++) {
            sums[j] += scale * gs[j];
        }
        store(sum + i, sums);
    }
    for (u64 i = whole + thread; i < count; i += threads) {
        sum[i] = (first ? 0.0f : sum[i]) + scale * widen(gradients[i]);
    }
}

#define ACCUMULATE(NAME, G)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        accumulate_##NAME(const G *gradients, float *sum, float scale, u32 first, u64 count) {                         \
        accumulate(gradients, sum, scale, first, count);                                                               \
    }
FOR_EACH_TYPE(ACCUMULATE)
