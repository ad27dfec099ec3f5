// Counter-based normal draws: Philox4x32 with 10 rounds, Box-Muller in f64 rounded once, with the host's bits: it is made of
// sums, products, quotients and roots, which are rounded the same everywhere, in the order of `random/normal.rs`.

const u32 THREADS = 256;

// One row: the seed and what the counter holds beside the number of the block; or zeros instead of draws.
struct Stream {
    u32 key[2];
    u32 counter[3];
    u32 zeros;
};

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
DEVICE void philox(u32 (&c)[4], u32 key0, u32 key1) {
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u64 a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        const u32 next0 = (u32)(b >> 32) ^ c[1] ^ key0, next2 = (u32)(a >> 32) ^ c[3] ^ key1;
        c[1] = (u32)b;
        c[3] = (u32)a;
        c[0] = next0;
        c[2] = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

DEVICE void block_of(const Stream &stream, u32 number, u32 (&words)[4]) {
    words[0] = number;
    words[1] = stream.counter[0];
    words[2] = stream.counter[1];
    words[3] = stream.counter[2];
    philox(words, stream.key[0], stream.key[1]);
}

// A polynomial by its coefficients, the constant one first.
DEVICE double polynomial(const double (&c)[8], double z) {
    const double z2 = z * z;
    const double low = (c[0] + c[1] * z) + (c[2] + c[3] * z) * z2;
    const double high = (c[4] + c[5] * z) + (c[6] + c[7] * z) * z2;
    return low + high * (z2 * z2);
}

// Natural logarithm of (k + 1) / 2^32.
DEVICE double ln(u32 k) {
    // k + 1 = f 2^e with f from sqrt(1/2) to sqrt(2).
    u64 whole = (u64)k + 1;
    u32 exponent = 0;
    double f = (double)k + 1.0;
#pragma unroll
    for (u32 step = 32; step; step >>= 1) {
        if (whole >> step) {
            whole >>= step;
            exponent += step;
            f *= 1.0 / (double)(1ull << step);
        }
    }
    if (f > 1.41421356237309504880) {
        f *= 0.5;
        exponent++;
    }
    const double terms[8] = {1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,
                             1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0};
    const double s = (f - 1.0) / (f + 1.0), z = s * s;
    return ((double)exponent - 32.0) * 0.693147180559945309417 + (2.0 * s + 2.0 * s * (z * polynomial(terms, z)));
}

// Sine and cosine of k / 2^32 of a full turn.
DEVICE void sin_cos(u32 k, double &sine, double &cosine) {
    const double sines[8] = {-1.0 / 6.0,        1.0 / 120.0,        -1.0 / 5040.0,          1.0 / 362880.0,
                             -1.0 / 39916800.0, 1.0 / 6227020800.0, -1.0 / 1307674368000.0, 1.0 / 355687428096000.0};
    const double cosines[8] = {-1.0 / 2.0,       1.0 / 24.0,        -1.0 / 720.0,         1.0 / 40320.0,
                               -1.0 / 3628800.0, 1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};
    // The nearest quarter turn, and what is left: an eighth of a turn at most, without an error.
    const u32 quarter = (k + (1u << 29)) >> 30;
    const double x = (double)(int)(k - (quarter << 30)) * (6.28318530717958647692 * (1.0 / 4294967296.0));
    const double z = x * x;
    const double s = x + x * (z * polynomial(sines, z)), c = 1.0 + z * polynomial(cosines, z);
    sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

// The pair that two words give; the radius takes (0, 1], so that its logarithm is finite.
DEVICE void normal_pair(u32 first, u32 second, float &a, float &b) {
    const double radius = sqrt(-2.0 * ln(first));
    double sine, cosine;
    sin_cos(second, sine, cosine);
    a = (float)(radius * cosine);
    b = (float)(radius * sine);
}

// Row y of `out` holds the first `count` normal draws of stream y, or zeros.
template <class T> DEVICE void normal(const Stream *streams, T *out, u64 count) {
    const Stream stream = streams[blockIdx.y];
    T *row = out + blockIdx.y * count;
    for (u64 block = (u64)blockIdx.x * THREADS + threadIdx.x; block * 4 < count; block += (u64)gridDim.x * THREADS) {
        float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!stream.zeros) {
            u32 words[4];
            block_of(stream, (u32)block, words);
            normal_pair(words[0], words[1], z[0], z[1]);
            normal_pair(words[2], words[3], z[2], z[3]);
        }
        for (u32 i = 0; i < 4 && block * 4 + i < count; i++) {
            narrow(z[i], row[block * 4 + i]);
        }
    }
}

// Row y of `out` holds the first `count` words of stream y.
extern "C" __global__ void __launch_bounds__(THREADS) random_words(const Stream *streams, u32 *out, u64 count) {
    const Stream stream = streams[blockIdx.y];
    u32 *row = out + blockIdx.y * count;
    for (u64 block = (u64)blockIdx.x * THREADS + threadIdx.x; block * 4 < count; block += (u64)gridDim.x * THREADS) {
        u32 words[4];
        block_of(stream, (u32)block, words);
        for (u32 i = 0; i < 4 && block * 4 + i < count; i++) {
            row[block * 4 + i] = words[i];
        }
    }
}

#define NORMAL(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        random_normal_##NAME(const Stream *streams, T *out, u64 count) {                                               \
        normal(streams, out, count);                                                                                   \
    }
FOR_EACH_TYPE(NORMAL)
