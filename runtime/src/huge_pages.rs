//! Pages of 2 MB for large buffers, where the kernel gives them on request (Linux, transparent huge pages).
//!
//! Matrix products walk rows that lie kilobytes apart; with pages of 4 KB the processor spends up to two thirds of an
//! attention's time on address translation, more or less by the luck of where pages lie. Everything here is a wish:
//! where it is not granted, results are the same and speed is as it was.
#![allow(unsafe_code, reason = "asks the kernel about memory that the process owns")]

/// Bytes of a huge page on the machines that have them.
pub(crate) const SIZE: usize = 2 << 20;
/// Smallest buffer that is worth asking for, in bytes.
pub(crate) const WORTHWHILE: usize = 4 * SIZE;

/// Asks for huge pages behind `bytes` bytes at `start`, best before they are first written.
#[cfg(target_os = "linux")]
pub(crate) fn advise(start: *mut u8, bytes: usize) {
    let (first, end) = ((start as usize).next_multiple_of(SIZE), (start as usize + bytes) / SIZE * SIZE);
    if first < end {
        // SAFETY: the advice changes how memory is mapped, never what it holds.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// No such pages on this system.
#[cfg(not(target_os = "linux"))]
pub(crate) fn advise(_: *mut u8, _: usize) {}

/// Moves the process's large private buffers onto huge pages: those of ONNX Runtime's arena, which nobody else can
/// advise on. Takes some hundred milliseconds a gigabyte; worth it once, after a session's first run.
#[cfg(target_os = "linux")]
pub(crate) fn collapse() {
    /// Collapse now what has been written already; Linux 6.1.
    const MADV_COLLAPSE: libc::c_int = 25;
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, end) in maps.lines().filter_map(anonymous) {
        let (first, end) = (start.next_multiple_of(SIZE), end / SIZE * SIZE);
        if end.saturating_sub(first) < WORTHWHILE {
            continue;
        }
        advise(first as *mut u8, end - first);
        // SAFETY: as in `advise`; a mapping that has gone meanwhile is refused by the kernel.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, MADV_COLLAPSE) };
    }
}

/// No such pages on this system.
#[cfg(not(target_os = "linux"))]
pub(crate) fn collapse() {}

/// Address range of a line of `/proc/self/maps` that is private, writable and without a file.
#[cfg(target_os = "linux")]
fn anonymous(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights, inode) = (fields.next()?, fields.next()?, fields.nth(2)?);
    let name = fields.next().unwrap_or("");
    if rights != "rw-p" || inode != "0" || !(name.is_empty() || name == "[heap]") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_private_writable_memory_without_a_file_is_taken() {
        let line = |rights: &str, inode: &str, name: &str| {
            format!("7f0000000000-7f0001000000 {rights} 0 00:00 {inode} {name}")
        };
        assert_eq!(anonymous(&line("rw-p", "0", "")), Some((0x7f00_0000_0000, 0x7f00_0100_0000)));
        assert!(anonymous(&line("rw-p", "0", "[heap]")).is_some());
        for (rights, inode, name) in
            [("r--p", "0", ""), ("rw-s", "0", ""), ("rw-p", "77", "/file"), ("rw-p", "0", "[stack]")]
        {
            assert_eq!(anonymous(&line(rights, inode, name)), None);
        }
        assert_eq!(anonymous(""), None);
    }

    #[test]
    fn what_memory_holds_stays() {
        let mut buffer = vec![0_u8; 3 * WORTHWHILE];
        advise(buffer.as_mut_ptr(), buffer.len());
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        collapse();
        assert!(buffer.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
    }
}
