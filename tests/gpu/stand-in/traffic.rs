//! What the kernels ask of memory, counted by the machine that runs PTX.

use std::collections::BTreeMap;
use std::path::Path;

use graph_builder::DType;
use runtime::cuda::Gpu;

use crate::kernels;

/// Where the machine writes what it counted, a line a launch.
pub(super) const REPORT: &str = "MUDIT_STAND_IN_TRAFFIC";

/// Sums over the launches of a kernel.
#[derive(Default)]
struct Traffic {
    /// Instructions of warps.
    instructions: u64,
    /// Turns that shared memory takes, and those that it would without conflicts of banks.
    turns: (u64, u64),
    /// Sectors of 32 bytes of global memory, and those that the bytes asked for would fill.
    sectors: (u64, u64),
}

fn counted(report: &Path) -> BTreeMap<String, Traffic> {
    let mut all = BTreeMap::<String, Traffic>::new();
    for line in std::fs::read_to_string(report).unwrap().lines() {
        let (name, numbers) = line.split_once(' ').unwrap();
        let numbers: Vec<u64> = numbers.split(' ').map(|n| n.parse().unwrap()).collect();
        let [instructions, turns, least_turns, sectors, least_sectors] = numbers[..] else {
            panic!("{line}")
        };
        let sum = all.entry(name.to_owned()).or_default();
        sum.instructions += instructions;
        sum.turns = (sum.turns.0 + turns, sum.turns.1 + least_turns);
        sum.sectors = (sum.sectors.0 + sectors, sum.sectors.1 + least_sectors);
    }
    all
}

/// No kernel waits for banks of shared memory or takes sectors of which it uses little.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
#[allow(clippy::print_stdout, reason = "a proof tells its figures")]
fn no_more_than_needed() {
    let report = std::env::var(REPORT).unwrap();
    let report = Path::new(&report);
    drop(std::fs::remove_file(report));
    let gpu = Gpu::open(0).unwrap();
    for dtype in [DType::Bf16, DType::F32] {
        kernels::ops::of_published_shapes(&gpu, dtype, false);
    }
    kernels::update::update_is_the_hosts(&gpu, &|_| ());
    println!("| kernel | instructions of warps | shared memory: turns / least | global: sectors / least |");
    println!("|---|---|---|---|");
    for (kernel, sum) in counted(report) {
        let ratio = |(taken, least): (u64, u64)| if least == 0 { 1.0 } else { taken as f64 / least as f64 };
        println!(
            "| `{kernel}` | {} | {} / {} = {:.2} | {} / {} = {:.2} |",
            sum.instructions,
            sum.turns.0,
            sum.turns.1,
            ratio(sum.turns),
            sum.sectors.0,
            sum.sectors.1,
            ratio(sum.sectors)
        );
        // A head's 144 bytes begin in the middle of a sector, which it shares with its neighbour.
        let most = if kernel.starts_with("attention") { 1.35 } else { 1.1 };
        assert!(
            ratio(sum.sectors) <= most,
            "{kernel} takes {:.2} times the sectors it needs",
            ratio(sum.sectors)
        );
        assert!(ratio(sum.turns) <= 1.1, "{kernel} waits for banks of shared memory");
    }
}
