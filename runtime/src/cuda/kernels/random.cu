// Counter-based normal draws: Philox4x32 with 10 rounds, Box-Muller in f64 rounded once, as on the host.

const u32 THREADS = 256;

// One stream: the seed, and what the counter holds beside the number of the block.
struct Stream {
    u32 key[2];
    u32 counter[3];
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

// The pair that two words give; the radius takes (0, 1], so that its logarithm is finite.
DEVICE void normal_pair(u32 first, u32 second, float &a, float &b) {
    const double unit = 1.0 / 4294967296.0;
    const double radius = sqrt(-2.0 * log(((double)first + 1.0) * unit));
    double sine, cosine;
    sincos(6.283185307179586 * ((double)second * unit), &sine, &cosine);
    a = (float)(radius * cosine);
    b = (float)(radius * sine);
}

// Row y of `out` holds the first `count` normal draws of stream y.
template <class T> DEVICE void normal(const Stream *streams, T *out, u64 count) {
    const Stream stream = streams[blockIdx.y];
    T *row = out + blockIdx.y * count;
    for (u64 block = (u64)blockIdx.x * THREADS + threadIdx.x; block * 4 < count; block += (u64)gridDim.x * THREADS) {
        u32 words[4];
        block_of(stream, (u32)block, words);
        float z[4];
        normal_pair(words[0], words[1], z[0], z[1]);
        normal_pair(words[2], words[3], z[2], z[3]);
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
