//! What the operating system says of this process's memory.

/// The largest resident set that this process has had, in bytes; `None` where the system does not tell (it is read
/// from `/proc/self/status`, as Linux keeps it).
pub fn peak_resident_bytes() -> Option<u64> {
    kilobytes("VmHWM")
}

/// The resident set of this process now, in bytes; `None` where the system does not tell.
pub fn resident_bytes() -> Option<u64> {
    kilobytes("VmRSS")
}

/// The memory of this machine that can be had without swapping, in bytes; `None` where the system does not tell (it is
/// read from `/proc/meminfo`, as Linux keeps it).
pub fn available_bytes() -> Option<u64> {
    kilobytes_in("/proc/meminfo", "MemAvailable")
}

fn kilobytes(key: &str) -> Option<u64> {
    kilobytes_in("/proc/self/status", key)
}

fn kilobytes_in(file: &str, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(file).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_remembers_what_was_freed() {
        const BYTES: usize = 96 << 20;
        let before = resident_bytes().unwrap();
        // Written, so that the pages are there.
        let block = std::hint::black_box(vec![1_u8; BYTES]);
        drop(block);
        let peak = peak_resident_bytes().unwrap();
        assert!(peak >= before + BYTES as u64 * 9 / 10, "{before} then {peak}");
        assert!(resident_bytes().unwrap() <= peak);
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
