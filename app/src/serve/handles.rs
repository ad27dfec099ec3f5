//! File handles: every connection is one, and a server that has none left cannot even say so.

/// Beside connections: files that are read and written on the way.
const SPARE: u64 = 16;
/// Open from the start, where the system does not tell.
const ASSUMED: u64 = 48;

/// So many connections can be had at a time, `wanted` at most; the limit of the process is raised where it may be, and
/// what could not be had is told.
pub(super) fn connections(wanted: usize) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").map_or(ASSUMED, |all| all.count() as u64);
    let beside = open + SPARE;
    let needed = beside + (wanted + super::http::waiting(wanted)) as u64;
    // Where the system has no such limit, none is in the way.
    let Ok(limit) = rlimit::increase_nofile_limit(needed) else { return wanted };
    if limit >= needed {
        return wanted;
    }
    let places = fitting(limit.saturating_sub(beside) as usize);
    crate::console::note(&format!(
        "serve: --max-connections {wanted} needs {needed} file handles and the system allows {limit}: {places} \
         connections at a time; `ulimit -n` or LimitNOFILE raises it"
    ));
    places
}

/// Places for which there are handles, those that wait counted too; one at least.
fn fitting(handles: usize) -> usize {
    let all = handles.saturating_sub(super::http::waiting(usize::MAX));
    all.max(handles / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_those_who_wait_fit_into_the_handles() {
        for handles in [2, 3, 17, 100, 128, 129, 1000, 1 << 20] {
            let places = fitting(handles);
            let all = places + super::super::http::waiting(places);
            assert!(all <= handles && all + 2 > handles, "{places} of {handles}");
        }
        assert_eq!(fitting(0), 1);
        assert_eq!(connections(5), 5);
    }
}
