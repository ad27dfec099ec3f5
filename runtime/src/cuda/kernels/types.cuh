// Element types, accesses of 16 bytes, sums over a warp. All arithmetic is in f32.

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

const u32 WARP = 32;
const u32 ALL_LANES = 0xFFFFFFFFu;
#define MINUS_INFINITY (-__int_as_float(0x7F800000))

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float widen(f16 x) { return wide_f16(x.bits); }

DEVICE void narrow(float x, float &to) { to = x; }
DEVICE void narrow(float x, bf16 &to) { to.bits = (u16)pack_bf16(x, 0.0f); }
DEVICE void narrow(float x, f16 &to) { to.bits = (u16)pack_f16(x, 0.0f); }

// Two elements of 16 bits in a word, the first in the low half.
template <class T> struct Half;
template <> struct Half<bf16> {
    static DEVICE u32 pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE float low(u32 bits) { return __uint_as_float(bits << 16); }
    static DEVICE float high(u32 bits) { return __uint_as_float(bits & 0xFFFF0000u); }
    static DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_bf16(c, a, b0, b1); }
};
template <> struct Half<f16> {
    static DEVICE u32 pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE float low(u32 bits) { return wide_f16((u16)bits); }
    static DEVICE float high(u32 bits) { return wide_f16((u16)(bits >> 16)); }
    static DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_f16(c, a, b0, b1); }
};

// Elements of one access of 16 bytes.
template <class T> struct Vector {
    static const u32 LANES = 16 / sizeof(T);
};

// V elements: 1, or a multiple of 4; addresses fit the accesses.
template <u32 V> DEVICE void load(const float *from, float (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = from[0];
    } else {
#pragma unroll
        for (u32 i = 0; i + 4 <= V; i += 4) {
            const float4 four = *(const float4 *)(from + i);
            to[i] = four.x;
            to[i + 1] = four.y;
            to[i + 2] = four.z;
            to[i + 3] = four.w;
        }
    }
}

// To global memory; the compiler cuts a plain store of 16 bytes up in some places, and each piece would take its sectors.
template <u32 V> DEVICE void store(float *to, const float (&from)[V]) {
    if constexpr (V == 1) {
        to[0] = from[0];
    } else {
#pragma unroll
        for (u32 i = 0; i + 4 <= V; i += 4) {
            __stcg((float4 *)(to + i), make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
        }
    }
}

template <class T, u32 V> DEVICE void load(const T *from, float (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = widen(from[0]);
    } else if constexpr (V == 4) {
        const uint2 words = *(const uint2 *)from;
        to[0] = Half<T>::low(words.x);
        to[1] = Half<T>::high(words.x);
        to[2] = Half<T>::low(words.y);
        to[3] = Half<T>::high(words.y);
    } else {
#pragma unroll
        for (u32 i = 0; i + 8 <= V; i += 8) {
            const uint4 words = *(const uint4 *)(from + i);
            const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                to[i + 2 * j] = Half<T>::low(word[j]);
                to[i + 2 * j + 1] = Half<T>::high(word[j]);
            }
        }
    }
}

template <class T, u32 V> DEVICE void store(T *to, const float (&from)[V]) {
    if constexpr (V == 1) {
        narrow(from[0], to[0]);
    } else if constexpr (V == 4) {
        __stcg((uint2 *)to, make_uint2(Half<T>::pack(from[0], from[1]), Half<T>::pack(from[2], from[3])));
    } else {
#pragma unroll
        for (u32 i = 0; i + 8 <= V; i += 8) {
            u32 word[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                word[j] = Half<T>::pack(from[i + 2 * j], from[i + 2 * j + 1]);
            }
            __stcg((uint4 *)(to + i), make_uint4(word[0], word[1], word[2], word[3]));
        }
    }
}

DEVICE bool aligned(const void *at) { return ((u64)at & 15) == 0; }

// The sum over a warp, the same in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    }
    return x;
}

// The kernel NAME for each element type, as NAME_f32, NAME_bf16 and NAME_f16.
#define FOR_EACH_TYPE(KERNEL) KERNEL(f32, float) KERNEL(bf16, bf16) KERNEL(f16, f16)
