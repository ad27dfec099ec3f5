//! The instruction sets that kernels with registers of their own are compiled for, chosen at run time.
//!
//! Every set does the same arithmetic in the same order (one fused multiply-add an element and step), so a product
//! has the same bits whatever the width of the registers.

/// Rows that a tile may have at most.
pub(crate) const MAX_ROWS: usize = 8;
/// Vectors that a row of a tile may have at most.
pub(crate) const MAX_VECTORS: usize = 3;
/// Elements that a vector may have at most.
pub(crate) const MAX_LANES: usize = 16;

/// One instruction set.
pub(crate) trait Isa: Copy + 'static {
    /// A register of `LANES` f32.
    type Vector: Copy;
    /// Elements of a register.
    const LANES: usize;
    /// Rows of a tile of sums: as many as leave room for three vectors of each.
    const ROWS: usize;

    /// A register of zeros.
    fn zero() -> Self::Vector;
    /// A register of `x`.
    fn splat(x: f32) -> Self::Vector;
    /// # Safety
    /// `from` is readable for `LANES` elements.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// # Safety
    /// `to` is writable for `LANES` elements.
    unsafe fn store(to: *mut f32, value: Self::Vector);
    /// `a · b + c`, rounded once.
    fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Asks for the line at `from` to come into the first cache.
    fn prefetch(from: *const f32);
    /// Writes the transpose of an 8×8 block: `to[k · to_stride + i] = from[i · from_stride + k]`.
    ///
    /// # Safety
    /// Eight runs of eight elements are readable at `from` and writable at `to`.
    unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

/// Work that is compiled for every instruction set.
pub(crate) trait Vectorised {
    /// What it gives.
    type Output;
    /// The work; mark it `#[inline(always)]`.
    fn run<I: Isa>(self) -> Self::Output;
}

/// Runs the work with the widest registers that the processor has.
pub(crate) fn vectorised<W: Vectorised>(work: W) -> W::Output {
    #[cfg(test)]
    let work = match tests::forced(work) {
        Ok(output) => return output,
        Err(work) => work,
    };
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the processor has the instructions.
            return unsafe { x86::run_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instructions.
            return unsafe { x86::run_avx2(work) };
        }
    }
    #[cfg(target_arch = "aarch64")]
    return work.run::<neon::Neon>();
    #[cfg(not(target_arch = "aarch64"))]
    work.run::<Plain>()
}

/// Name of the instruction set that [`vectorised`] takes on this machine.
pub(crate) fn name() -> &'static str {
    struct Name;
    impl Vectorised for Name {
        type Output = &'static str;
        fn run<I: Isa>(self) -> &'static str {
            match I::LANES {
                16 => "AVX-512",
                8 => "AVX2",
                _ if cfg!(target_arch = "aarch64") => "NEON",
                _ => "plain",
            }
        }
    }
    vectorised(Name)
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("fma")
}

/// No registers of its own: what the compiler makes of arrays. Without a fused multiply-add in the instruction set
/// the two roundings stay apart.
#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(crate) struct Plain;

#[cfg(not(target_arch = "aarch64"))]
impl Isa for Plain {
    type Vector = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's promise; no alignment is asked for.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 4]) {
        // SAFETY: as above.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(value) }
    }
    #[inline(always)]
    fn multiply_add(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..8 {
            for k in 0..8 {
                // SAFETY: the caller's promise.
                unsafe { *to.add(k * to_stride + i) = *from.add(i * from_stride + k) };
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_f32, vst1q_f32};

    use super::Isa;

    /// The baseline of AArch64.
    #[derive(Clone, Copy)]
    pub(crate) struct Neon;

    impl Isa for Neon {
        type Vector = float32x4_t;
        const LANES: usize = 4;
        const ROWS: usize = 8;

        #[inline(always)]
        fn zero() -> float32x4_t {
            Self::splat(0.0)
        }
        #[inline(always)]
        fn splat(x: f32) -> float32x4_t {
            // SAFETY: every AArch64 processor has the instruction.
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> float32x4_t {
            // SAFETY: the caller's promise.
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: float32x4_t) {
            // SAFETY: the caller's promise.
            unsafe { vst1q_f32(to, value) }
        }
        #[inline(always)]
        fn multiply_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            // SAFETY: every AArch64 processor has the instruction.
            unsafe { vfmaq_f32(c, a, b) }
        }
        #[inline(always)]
        fn prefetch(_: *const f32) {}
        #[inline(always)]
        unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            for i in 0..8 {
                for k in 0..8 {
                    // SAFETY: the caller's promise.
                    unsafe { *to.add(k * to_stride + i) = *from.add(i * from_stride + k) };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _MM_HINT_T0, _mm_prefetch, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps,
        _mm256_set1_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{Isa, Vectorised};

    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    pub(super) fn run_avx512<W: Vectorised>(work: W) -> W::Output {
        work.run::<Avx512>()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn run_avx2<W: Vectorised>(work: W) -> W::Output {
        work.run::<Avx2>()
    }

    /// 32 registers of 16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    /// 16 registers of 8.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    // SAFETY of all blocks below: these types are only named inside `run_avx512` and `run_avx2`, which are entered
    // after the processor was asked; addresses are the caller's promise.

    impl Isa for Avx512 {
        type Vector = __m512;
        const LANES: usize = 16;
        const ROWS: usize = 8;

        #[inline(always)]
        fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m512) {
            unsafe { _mm512_storeu_ps(to, value) }
        }
        #[inline(always)]
        fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn prefetch(from: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
        }
        #[inline(always)]
        unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            unsafe { Avx2::transpose_8x8(from, from_stride, to, to_stride) }
        }
    }

    impl Isa for Avx2 {
        type Vector = __m256;
        const LANES: usize = 8;
        const ROWS: usize = 4;

        #[inline(always)]
        fn zero() -> __m256 {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m256) {
            unsafe { _mm256_storeu_ps(to, value) }
        }
        #[inline(always)]
        fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn prefetch(from: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
        }
        #[inline(always)]
        unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            unsafe {
                let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * from_stride)));
                // Pairs of rows, then fours, then halves.
                let lo: [__m256; 4] = std::array::from_fn(|i| _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]));
                let hi: [__m256; 4] = std::array::from_fn(|i| _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
                let quad = |x: [__m256; 4], base: usize| {
                    [
                        _mm256_shuffle_ps::<0x44>(x[base], x[base + 1]),
                        _mm256_shuffle_ps::<0xEE>(x[base], x[base + 1]),
                    ]
                };
                let (l0, l1) = (quad(lo, 0), quad(lo, 2));
                let (h0, h1) = (quad(hi, 0), quad(hi, 2));
                let top = [l0[0], l0[1], h0[0], h0[1]];
                let bottom = [l1[0], l1[1], h1[0], h1[1]];
                for k in 0..4 {
                    let first = _mm256_permute2f128_ps::<0x20>(top[k], bottom[k]);
                    let second = _mm256_permute2f128_ps::<0x31>(top[k], bottom[k]);
                    _mm256_storeu_ps(to.add(k * to_stride), first);
                    _mm256_storeu_ps(to.add((k + 4) * to_stride), second);
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static FORCED: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// The instruction sets that this machine can run.
    pub(crate) fn available() -> Vec<&'static str> {
        let mut names = vec![name()];
        if cfg!(not(target_arch = "aarch64")) {
            names.push("plain");
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            names.push("AVX2");
        }
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Runs `body` with the kernels of this thread compiled for the named set.
    pub(crate) fn with<R>(name: &'static str, body: impl FnOnce() -> R) -> R {
        inherit(Some(name), body)
    }

    /// The set that this thread was told to use.
    pub(crate) fn current() -> Option<&'static str> {
        FORCED.get()
    }

    /// Runs `body` with another thread's set.
    pub(crate) fn inherit<R>(name: Option<&'static str>, body: impl FnOnce() -> R) -> R {
        let before = FORCED.replace(name);
        let result = body();
        FORCED.set(before);
        result
    }

    pub(super) fn forced<W: Vectorised>(work: W) -> Result<W::Output, W> {
        match FORCED.get() {
            #[cfg(not(target_arch = "aarch64"))]
            Some("plain") => Ok(work.run::<Plain>()),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` lists the set only where the processor has it.
            Some("AVX2") => Ok(unsafe { x86::run_avx2(work) }),
            _ => Err(work),
        }
    }
}
