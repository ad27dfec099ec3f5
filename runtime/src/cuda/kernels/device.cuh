// What the kernels ask of the machine beyond plain CUDA C++: conversions, matrix products of a warp, copies that run
// beside the computation. The proofs that need no GPU replace this file by one for the host, so nothing else in the
// kernels may use inline assembly.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
// Shared memory whose size the launch gives.
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]

// Two values of 16 bits, rounded to nearest even; the first in the low half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE u32 pack_f16(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE float wide_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// 2^x to about 2 ulp; results below the smallest normal number are 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / y to 2 ulp, where y is not negative; 0 where y is larger than 2^126.
DEVICE float divide_fast(float x, float y) {
    float z;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Where something is in shared memory, as the instructions below take it.
DEVICE u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8i + j names row j of matrix i and receives of each
// matrix the elements (lane / 4, 2 (lane % 4) + {0, 1}).
DEVICE void load_matrices(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// c (16x8) += a (16x16) b (16x8), with f32 sums. Lane l, g = l / 4, t = l % 4, holds
// c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); a: pairs (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8);
// b: pairs down a column, (2t, g) and (2t+8, g).
DEVICE void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins a copy of 16 bytes to shared memory, of zeros where `present` is false: `from` is not read then. Both addresses are
// multiples of 16.
DEVICE void copy_begin(u32 to, const void *from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}

// Closes the group of the copies begun since the last one.
DEVICE void copy_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are still under way.
template <int pending> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory"); }
