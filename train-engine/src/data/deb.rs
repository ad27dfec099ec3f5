//! Reads files out of a Debian package without any Debian tool.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Result, TrainError};

/// What an `ar` archive starts with.
const MAGIC: &[u8; 8] = b"!<arch>\n";
/// Bytes before each member: name (16), date, owner, group, mode, size (10, from byte 48), end mark.
const HEADER: usize = 60;
const HEADER_END: &[u8; 2] = b"`\n";
/// The member with the package's files.
const DATA: &str = "data.tar";

/// Reads the files of the wanted names (whatever their directory) out of a package and gives each to `keep`.
///
/// # Errors
/// [`TrainError::Io`]; [`TrainError::BadFile`] when the package is damaged or packed in a way not known here.
pub(super) fn extract(
    package: &Path,
    wanted: &[&str],
    mut keep: impl FnMut(&str, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let io = || TrainError::io("unpack", package);
    let mut archive = tar::Archive::new(open_data(package)?);
    for entry in archive.entries().map_err(io())? {
        let mut entry = entry.map_err(io())?;
        let path = entry.path().map_err(io())?.into_owned();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if entry.header().entry_type().is_file() && wanted.contains(&name) {
            keep(name, &mut entry)?;
        }
    }
    Ok(())
}

/// The decompressed tar stream of the package's files.
fn open_data(package: &Path) -> Result<Box<dyn Read>> {
    let io = || TrainError::io("read", package);
    let bad =
        |what: &str, expected: &str, got: String| Err(TrainError::bad_file(package, what, expected, got));
    let mut file = BufReader::new(File::open(package).map_err(TrainError::io("open", package))?);
    let mut magic = [0; 8];
    file.read_exact(&mut magic).map_err(io())?;
    if &magic != MAGIC {
        return bad("start", "an ar archive", format!("{magic:02x?}"));
    }
    loop {
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(io())?;
        let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim().to_owned();
        let size = text(48..58).parse::<u64>().ok().filter(|_| header.ends_with(HEADER_END));
        let Some(size) = size else {
            return bad("member header", "a decimal size and an end mark", format!("{header:02x?}"));
        };
        let name = text(0..16);
        let name = name.trim_end_matches('/');
        if let Some(packing) = name.strip_prefix(DATA) {
            let data = file.take(size);
            return match packing {
                "" => Ok(Box::new(data)),
                ".xz" => Ok(Box::new(xz2::read::XzDecoder::new(data))),
                ".gz" => Ok(Box::new(flate2::read::GzDecoder::new(data))),
                other => bad("packing of its files", "none, .xz or .gz", other.to_owned()),
            };
        }
        // Members start at even offsets.
        file.seek(SeekFrom::Current((size + size % 2) as i64)).map_err(io())?;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write as _;

    use super::*;

    /// A package with the given files, packed as `.xz`.
    pub(in crate::data) fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(xz2::write::XzEncoder::new(Vec::new(), 0));
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("./usr/share/x/{name}"), *bytes).unwrap();
        }
        let data = tar.into_inner().unwrap().finish().unwrap();
        let mut out = MAGIC.to_vec();
        for (name, bytes) in
            [("debian-binary", &b"2.0\n"[..]), ("control.tar.xz", b"odd"), ("data.tar.xz", &data)]
        {
            writeln!(out, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, "100644", bytes.len()).unwrap();
            out.extend(bytes);
            if bytes.len() % 2 == 1 {
                out.push(b'\n');
            }
        }
        out
    }

    fn unpack(package: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), package).unwrap();
        let mut found = Vec::new();
        extract(file.path(), &["a", "b"], |name, read| {
            let mut bytes = Vec::new();
            read.read_to_end(&mut bytes).map_err(TrainError::io("read", file.path()))?;
            found.push((name.to_owned(), bytes));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn wanted_files_come_out_whole() {
        let found = unpack(&package(&[("a", b"first"), ("other", b"no"), ("b", &[7; 3000])])).unwrap();
        assert_eq!(found, [("a".to_owned(), b"first".to_vec()), ("b".to_owned(), vec![7; 3000])]);
    }

    #[test]
    fn a_damaged_package_is_an_error() {
        let whole = package(&[("a", &[1; 500])]);
        assert!(unpack(&whole[..whole.len() - 40]).is_err());
        assert!(unpack(&whole[..100]).is_err());
        assert!(unpack(b"not an archive").unwrap_err().to_string().contains("an ar archive"));
        let mut odd = whole;
        odd[8 + 48] = b'x';
        assert!(unpack(&odd).unwrap_err().to_string().contains("member header"));
    }
}
