// Elementwise ops: GELU and its derivative, patches.

const u32 THREADS = 256;

// e^x by the fast power of two.
DEVICE float exp_fast(float x) { return exp2_fast(1.4426950408889634f * x); }

// sqrt(2 / pi), and the cubic's coefficient in the tanh form of GELU.
const float C = 0.7978845608028654f;
const float K = 0.044715f;

// x / (1 + e^(-2u)) with u the argument of tanh.
DEVICE float gelu(float x) {
    const float u = C * x * (1.0f + K * (x * x));
    return divide_fast(x, 1.0f + exp_fast(-2.0f * u));
}

// With s = 1 / (1 + e^(-2u)) the derivative is s + 2 x s (1 - s) u', where 1 - s = e^(-2u) s: no difference of nearly
// equal numbers. Outside +-20 it is 0 or 1 to the last bit.
DEVICE float gelu_slope(float x) {
    // Keeps what is no number, as minimum and maximum would not.
    x = x < -10.0f ? -10.0f : x > 10.0f ? 10.0f : x;
    const float square = x * x, u = C * x * (1.0f + K * square), e = exp_fast(-2.0f * u), s = divide_fast(1.0f, 1.0f + e);
    return s + 2.0f * x * s * (e * s) * (C * (1.0f + 3.0f * K * square));
}

struct Gelu {
    static DEVICE float of(float x, float) { return gelu(x); }
};
struct GeluGrad {
    static DEVICE float of(float x, float ct) { return ct * gelu_slope(x); }
};

// out = F(x, y); `y` may be absent. `out` may be `y`: each element is read before it is written.
template <class F, u32 V, class T> DEVICE void map(const T *x, const T *y, T *out, u64 count) {
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * V; i < count; i += (u64)gridDim.x * THREADS * V) {
        float xs[V], ys[V] = {};
        load(x + i, xs);
        if (y) {
            load(y + i, ys);
        }
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            xs[j] = F::of(xs[j], ys[j]);
        }
        store(out + i, xs);
    }
}

template <class F, class T> DEVICE void map_any(const T *x, const T *y, T *out, u64 count) {
    const u32 lanes = Vector<T>::LANES;
    if (count % lanes == 0 && aligned(x) && aligned(y) && aligned(out)) {
        map<F, lanes>(x, y, out, count);
    } else {
        map<F, 1>(x, y, out, count);
    }
}

// Images (N, channels, height, width) in square patches of side `patch`; a patch's features are ordered (channel, row,
// column) or, with `channels_last`, (row, column, channel).
struct Patches {
    u32 channels, height, width, patch, channels_last;
};

// Offset in the images of element n of the patches.
DEVICE u64 pixel(const Patches &p, u64 n) {
    const u32 features = p.channels * p.patch * p.patch, across = p.width / p.patch, down = p.height / p.patch;
    const u64 token = n / features;
    const u32 feature = (u32)(n - token * features);
    const u64 sample = token / (across * down);
    const u32 place = (u32)(token - sample * (across * down)), top = place / across, left = place % across;
    u32 channel, row, column;
    if (p.channels_last) {
        channel = feature % p.channels;
        column = feature / p.channels % p.patch;
        row = feature / p.channels / p.patch;
    } else {
        column = feature % p.patch;
        row = feature / p.patch % p.patch;
        channel = feature / p.patch / p.patch;
    }
    return ((sample * p.channels + channel) * p.height + top * p.patch + row) * p.width + left * p.patch + column;
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

#define ELEMENTS(NAME, T)                                                                                              \
    KERNEL gelu_##NAME(const T *x, T *out, u64 count) { map_any<Gelu>(x, (const T *)0, out, count); }                  \
    KERNEL gelu_grad_##NAME(const T *x, const T *ct, T *out, u64 count) { map_any<GeluGrad>(x, ct, out, count); }      \
    KERNEL patchify_##NAME(const T *images, T *patches, Patches p, u64 count) {                                        \
        for (u64 n = (u64)blockIdx.x * THREADS + threadIdx.x; n < count; n += (u64)gridDim.x * THREADS) {              \
            patches[n] = images[pixel(p, n)];                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    KERNEL unpatchify_##NAME(const T *patches, T *images, Patches p, u64 count) {                                      \
        for (u64 n = (u64)blockIdx.x * THREADS + threadIdx.x; n < count; n += (u64)gridDim.x * THREADS) {              \
            images[pixel(p, n)] = patches[n];                                                                          \
        }                                                                                                              \
    }
FOR_EACH_TYPE(ELEMENTS)
