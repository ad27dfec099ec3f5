//! Normal draws as a launch.

use bytemuck::NoUninit;

use super::RANDOM;
use super::queue::{Address, Arguments, Launch, Queue};
use crate::error::{Result, RuntimeError};

/// Threads of a block, and most blocks of a row: each thread walks on by itself.
const THREADS: usize = 256;
const BLOCKS: usize = 1 << 10;
/// Draws of one block of the counter.
const DRAWS: usize = 4;

/// Where the draws of one row come from; `Stream` of `random.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(C)]
pub struct NormalStream {
    key: [u32; 2],
    counter: [u32; 3],
    zeros: u32,
}

impl NormalStream {
    /// Zeros in place of draws.
    pub const ZEROS: Self = Self { key: [0; 2], counter: [0; 3], zeros: 1 };
    /// Most rows of one launch.
    pub const MOST: usize = 65_535;

    /// Philox4x32 with this key. A counter's first word is the number of the block of four words; these are the others.
    pub const fn new(key: [u32; 2], counter: [u32; 3]) -> Self {
        Self { key, counter, zeros: 0 }
    }
}

/// Enqueues filling `rows` rows of `count` f32 at `out` with the normal draws of the streams at `streams`, a
/// [`NormalStream`] each.
///
/// # Errors
/// [`RuntimeError::InvalidValue`] for more rows than [`NormalStream::MOST`], or rows longer than a counter counts; the
/// queue's.
pub fn draw_normal(
    queue: &dyn Queue,
    streams: Address,
    out: Address,
    (rows, count): (usize, usize),
) -> Result<()> {
    let wrong = |what: &str, most: usize, got: usize| RuntimeError::InvalidValue {
        what: what.to_owned(),
        expected: format!("at most {most}"),
        got: got.to_string(),
    };
    if rows > NormalStream::MOST {
        return Err(wrong("rows of noise", NormalStream::MOST, rows));
    }
    if count.div_ceil(DRAWS) > u32::MAX as usize {
        return Err(wrong("draws of one row", DRAWS * u32::MAX as usize, count));
    }
    if rows == 0 || count == 0 {
        return Ok(());
    }
    let arguments = Arguments::default().address(streams).address(out).with(count as u64);
    let blocks = count.div_ceil(DRAWS * THREADS).min(BLOCKS) as u32;
    queue.launch(Launch {
        source: &RANDOM,
        kernel: "random_normal_f32",
        grid: [blocks, rows as u32, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        arguments,
    })
}
