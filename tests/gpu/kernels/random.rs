//! Noise of the device against the host's: the same words, and the same normal draws.

use std::sync::Arc;

use runtime::cuda::Gpu;
use runtime::cuda::kernels::{Address, Arguments, GpuQueue, Launch, Queue as _, RANDOM};
use train_engine::random::{Purpose, Stream};

use super::memory::Buffer;

/// Samples of different steps, as a server's batch has them; beyond 32 bits too.
const SAMPLES: [(u64, u64); 3] = [(0, 0), (249, 17), (0x12_0000_0005, 0x3456_0000_0007)];
/// No multiple of a block of four.
const COUNT: usize = 1027;
const SEED: u64 = 0x0123_4567_89ab_cdef;

fn launch(gpu: &Arc<Gpu>, kernel: &str, out: Address) {
    // `Stream` of the kernels: the key, and the counter without its first word.
    let streams: Vec<[u32; 5]> = SAMPLES
        .iter()
        .map(|&(step, sample)| {
            let (key, [_, counter @ ..]) = Stream::new(SEED, Purpose::SampleNoise, step, sample).start();
            [key[0], key[1], counter[0], counter[1], counter[2]]
        })
        .collect();
    let streams = Buffer::of(gpu, &streams);
    let arguments = Arguments::default().address(streams.at()).address(out).with(COUNT as u64);
    let grid = [2, SAMPLES.len() as u32, 1];
    let launch = Launch { source: &RANDOM, kernel, grid, threads: 256, shared_bytes: 0, arguments };
    GpuQueue::new(gpu).unwrap().launch(launch).unwrap();
    gpu.synchronize().unwrap();
}

/// Words and normal draws are the host's, bit by bit.
pub(crate) fn noise_is_the_hosts(gpu: &Arc<Gpu>) {
    let words = Buffer::new(gpu, SAMPLES.len() * COUNT * 4);
    launch(gpu, "random_words", words.at());
    let normals = Buffer::new(gpu, SAMPLES.len() * COUNT * 4);
    launch(gpu, "random_normal_f32", normals.at());
    let (words, normals) =
        (words.read::<u32>(SAMPLES.len() * COUNT), normals.read::<f32>(SAMPLES.len() * COUNT));
    for (i, &(step, sample)) in SAMPLES.iter().enumerate() {
        let stream = || Stream::new(SEED, Purpose::SampleNoise, step, sample);
        let (mut bits, mut draws) = (stream(), stream());
        for j in i * COUNT..(i + 1) * COUNT {
            assert_eq!(words[j], bits.u32(), "word {j}");
            assert_eq!(normals[j].to_bits(), draws.normal().to_bits(), "draw {j}");
        }
    }
}
