//! Noise of the device against the host's: the same words, and the same normal draws.

use std::sync::Arc;

use runtime::cuda::Gpu;
use runtime::cuda::kernels::{
    Address, Arguments, GpuQueue, Launch, NormalStream, Queue as _, RANDOM, draw_normal,
};
use train_engine::random::{Purpose, Stream};

use super::memory::Buffer;

/// Samples of different steps, as a server's batch has them; beyond 32 bits too.
const SAMPLES: [(u64, u64); 3] = [(0, 0), (249, 17), (0x12_0000_0005, 0x3456_0000_0007)];
/// No multiple of a block of four, and more than one launch has threads for.
const COUNT: usize = 66_563;
const SEED: u64 = 0x0123_4567_89ab_cdef;

fn stream((step, sample): (u64, u64)) -> Stream {
    Stream::new(SEED, Purpose::SampleNoise, step, sample)
}

/// Words and normal draws are the host's, bit by bit; a row without a stream is zero.
pub(crate) fn noise_is_the_hosts(gpu: &Arc<Gpu>) {
    let mut streams = SAMPLES.map(|sample| stream(sample).on_device()).to_vec();
    streams.push(NormalStream::ZEROS);
    let rows = streams.len();
    let streams = Buffer::of(gpu, &streams);
    let words = Buffer::new(gpu, rows * COUNT * 4);
    let launch = Launch {
        source: &RANDOM,
        kernel: "random_words",
        grid: [2, rows as u32, 1],
        threads: 256,
        shared_bytes: 0,
        arguments: Arguments::default().address(streams.at()).address(words.at()).with(COUNT as u64),
    };
    let normals = Buffer::new(gpu, rows * COUNT * 4);
    let queue = GpuQueue::new(gpu).unwrap();
    queue.launch(launch).unwrap();
    draw_normal(&queue, streams.at(), normals.at(), (rows, COUNT)).unwrap();
    gpu.synchronize().unwrap();
    let (words, normals) = (words.read::<u32>(rows * COUNT), normals.read::<f32>(rows * COUNT));
    for (i, &sample) in SAMPLES.iter().enumerate() {
        let (mut bits, mut draws) = (stream(sample), stream(sample));
        for j in i * COUNT..(i + 1) * COUNT {
            assert_eq!(words[j], bits.u32(), "word {j}");
            assert_eq!(normals[j].to_bits(), draws.normal().to_bits(), "draw {j}");
        }
    }
    assert!(normals[SAMPLES.len() * COUNT..].iter().all(|z| z.to_bits() == 0));
    let many = draw_normal(&queue, streams.at(), Address::NONE, (NormalStream::MOST + 1, 1));
    assert!(many.unwrap_err().to_string().contains("at most 65535"));
}
