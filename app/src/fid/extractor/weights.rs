//! The weights of the FID network: where they come from, and how they become the graph's parameters.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use graph_builder::{Graph, Shape};
use models::inception::{self, CheckpointTensor, checkpoint_names, fold, pytorch_fid_name};
use runtime::RuntimeError;
use runtime::file::{AtomicFile, hexadecimal, sha256_file};
use runtime::safetensors_file::SafetensorsReader;
use sha2::{Digest, Sha256};

use crate::torch_file::TorchFile;

/// A file that has one content everywhere.
struct Published {
    name: &'static str,
    address: &'static str,
    /// Size in bytes.
    size: u64,
    /// SHA-256 in hex; its first eight digits are in the name.
    sha256: &'static str,
}

/// The network of 2015-12-05 as pytorch-fid ported it; torch-fidelity publishes the same bytes under another name.
const INCEPTION: Published = Published {
    name: "pt_inception-2015-12-05-6726825d.pth",
    address: "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    size: 95_628_359,
    sha256: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
};
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const DOWNLOAD_TIMEOUT: Duration = Duration::from_mins(30);
/// Most names that an error lists.
const LISTED: usize = 4;

/// The published weights in the user's cache, if they are there whole.
pub fn cached() -> Option<PathBuf> {
    let path = directory().ok()?.join(INCEPTION.name);
    let length = fs::metadata(&path).ok()?.len();
    (length == INCEPTION.size).then_some(path)
}

/// The published weights: from the user's cache, else from their public address, checked by size and SHA-256.
///
/// `progress` gets one line when something is fetched.
///
/// # Errors
/// `offline` is set and they are not in the cache; the address cannot be reached; what came is not what was published; the
/// cache cannot be written.
pub fn fetch(offline: bool, progress: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
    INCEPTION.find(&directory()?, offline, progress)
}

/// Where weights are kept.
fn directory() -> anyhow::Result<PathBuf> {
    let cache = runtime::library::cache_directory()
        .context("there is no home directory to keep weights in: set MUDIT_CACHE to a directory")?;
    Ok(cache.join("fid"))
}

impl Published {
    fn by_hand(&self, directory: &Path) -> String {
        format!(
            "download {} elsewhere and put it into {} (or give its path with --network)",
            self.address,
            directory.display()
        )
    }

    fn find(&self, directory: &Path, offline: bool, progress: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
        let path = directory.join(self.name);
        if path.is_file() {
            let got = sha256_file(&path)?;
            ensure!(
                got == self.sha256,
                RuntimeError::WrongHash {
                    path,
                    expected: self.sha256.to_owned(),
                    got,
                    remedy: "delete it and fetch it again".to_owned()
                }
            );
            return Ok(path);
        }
        if offline {
            bail!(RuntimeError::Offline {
                what: "the FID network's weights".to_owned(),
                from: self.address.to_owned(),
                remedy: self.by_hand(directory),
            });
        }
        let megabytes = self.size.div_ceil(1_000_000);
        progress(&format!("fetching {} ({megabytes} MB): {}", self.name, self.address));
        self.download(&path).with_context(|| {
            format!("cannot fetch the FID network's weights; {}", self.by_hand(directory))
        })?;
        progress(&format!("checked: {}", path.display()));
        Ok(path)
    }

    /// Writes the file beside its place while it is hashed, and renames it when every byte is right.
    fn download(&self, path: &Path) -> anyhow::Result<()> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(DOWNLOAD_TIMEOUT))
            .build()
            .into();
        let response =
            agent.get(self.address).call().map_err(|e| anyhow::anyhow!("{}: {e}", self.address))?;
        // Room for one byte more than expected, which tells a longer file from the right one.
        let mut body = response.into_body().into_with_config().limit(self.size + 2).reader();
        let mut file = AtomicFile::create(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut length = 0;
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => bail!("{}: after {length} of {} bytes: {e}", self.address, self.size),
            };
            length += n as u64;
            hash.update(&buffer[..n]);
            io::Write::write_all(&mut file, &buffer[..n]).map_err(|e| RuntimeError::io("write", path, e))?;
        }
        ensure!(length == self.size, "{}: {length} bytes came, expected {}", self.address, self.size);
        let got = hexadecimal(&hash.finalize());
        ensure!(got == self.sha256, "{}: sha256 is {got}, expected {}", self.address, self.sha256);
        Ok(file.commit()?)
    }
}

/// A file of named tensors.
enum Checkpoint {
    Torch(TorchFile),
    Safetensors(SafetensorsReader),
}

impl Checkpoint {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let safetensors = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"));
        Ok(if safetensors {
            Self::Safetensors(SafetensorsReader::open(path)?)
        } else {
            Self::Torch(TorchFile::open(path)?)
        })
    }

    fn tensors(&self) -> anyhow::Result<Vec<(String, Shape)>> {
        match self {
            Self::Torch(file) => Ok(file.tensors().map(|(n, _, s)| (n.to_owned(), s.into())).collect()),
            Self::Safetensors(file) => file.names().map(|n| Ok((n.to_owned(), file.shape(n)?))).collect(),
        }
    }

    fn read(&mut self, name: &str) -> anyhow::Result<Vec<f32>> {
        match self {
            Self::Torch(file) => Ok(file.read_f32(name)?),
            Self::Safetensors(file) => {
                let mut values = vec![0.0; file.shape(name)?.numel()];
                file.read_f32_into(name, &mut values)?;
                Ok(values)
            }
        }
    }
}

/// Values of the parameters of `graph`, one of [`inception::features`], in order, from a `.pth`, `.pt` or `.safetensors`
/// file with the names of torch-fidelity (and of the published file) or of pytorch-fid.
///
/// # Errors
/// The file is damaged or no state dict; tensors are missing, unexpected, of another shape, or not finite: all are named.
pub(super) fn parameters(path: &Path, graph: &Graph) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut checkpoint = Checkpoint::open(path)?;
    let found = checkpoint.tensors()?;
    let numbered = found.iter().any(|(name, _)| name.starts_with("blocks."));
    let in_file = |name: &str| if numbered { pytorch_fid_name(name) } else { Some(name.to_owned()) };
    check(path, graph, &found, &in_file)?;
    fold(graph, |name| {
        let own = in_file(name).unwrap_or_else(|| name.to_owned());
        let values = checkpoint.read(&own)?;
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            bail!("tensor `{own}` of {} holds {value}", path.display());
        }
        Ok(values)
    })
}

/// Names everything about a file that does not fit the network.
fn check(
    path: &Path,
    graph: &Graph,
    found: &[(String, Shape)],
    in_file: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<()> {
    let needed = checkpoint_names(graph);
    let (mut missing, mut misshaped) = (Vec::new(), Vec::new());
    for CheckpointTensor { name, shape } in &needed {
        match in_file(name).and_then(|own| found.iter().find(|(n, _)| *n == own)) {
            None => missing.push(in_file(name).unwrap_or_else(|| name.clone())),
            Some((own, got)) if got != shape => misshaped.push(format!("{own} {got} instead of {shape}")),
            Some(_) => {}
        }
    }
    // What only other taps need, or training, is no stranger.
    let all = inception::Taps { spatial: true, logits: true };
    let all = checkpoint_names(&inception::features(1, inception::MIN_SIDE, all)?);
    let mut known: Vec<String> = all.iter().filter_map(|t| in_file(&t.name)).collect();
    known.push("fc.bias".to_owned());
    let unexpected: Vec<String> = found
        .iter()
        .map(|(name, _)| name)
        .filter(|name| !known.contains(name) && !name.ends_with(".num_batches_tracked"))
        .cloned()
        .collect();
    let mut problems = Vec::new();
    for (what, names) in [("missing", missing), ("of another shape", misshaped), ("unexpected", unexpected)] {
        if !names.is_empty() {
            let more = names.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            problems.push(format!("{what}: {}{more}", names[..names.len().min(LISTED)].join(", ")));
        }
    }
    ensure!(
        problems.is_empty(),
        "{} does not hold the FID Inception network (2015-12-05): {}",
        path.display(),
        problems.join("; ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A server of one file for `requests` requests; gives its address.
    fn serve(body: &'static [u8], claimed: usize, requests: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().take(requests) {
                let mut stream = stream.unwrap();
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).unwrap();
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {claimed}\r\nConnection: close\r\n\r\n")
                    .unwrap();
                stream.write_all(body).unwrap();
            }
        });
        format!("http://{address}/weights.pth")
    }

    fn published(address: String) -> Published {
        // "abc", the standard vector of SHA-256.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        Published { name: "weights-ba7816bf.pth", address: address.leak(), size: 3, sha256 }
    }

    #[test]
    fn the_published_hash_is_the_one_in_the_files_name() {
        let digits = INCEPTION.name.trim_end_matches(".pth").rsplit('-').next().unwrap();
        assert!(INCEPTION.sha256.starts_with(digits) && digits.len() == 8);
        assert!(INCEPTION.address.ends_with(INCEPTION.name));
    }

    #[test]
    fn what_is_fetched_is_checked_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let told = std::cell::RefCell::new(Vec::new());
        let progress = |line: &str| told.borrow_mut().push(line.to_owned());
        let file = published(serve(b"abc", 3, 1));
        let path = file.find(dir.path(), false, &progress).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert!(told.borrow()[0].contains("127.0.0.1"), "{:?}", told.borrow());
        // The server answers once: the second time it comes from the cache.
        assert_eq!(file.find(dir.path(), true, &|_| panic!("fetched again")).unwrap(), path);
        fs::write(&path, "abd").unwrap();
        let text = file.find(dir.path(), true, &|_| ()).unwrap_err().to_string();
        assert!(text.contains("delete it") && text.contains(file.sha256), "{text}");
    }

    #[test]
    fn wrong_bytes_leave_nothing_behind() {
        let cases: [(&'static [u8], usize, &str); 4] = [
            (b"abd", 3, "sha256 is"),
            (b"ab", 2, "2 bytes came, expected 3"),
            (b"abcd", 4, "4 bytes came, expected 3"),
            (b"ab", 3, "of 3 bytes"),
        ];
        for (body, claimed, reason) in cases {
            let dir = tempfile::tempdir().unwrap();
            let error = published(serve(body, claimed, 1)).find(dir.path(), false, &|_| ()).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains("download") && text.contains(reason), "{body:?}: {text}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        let dir = tempfile::tempdir().unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let unreachable = published(format!("http://{closed}/weights.pth"));
        assert!(unreachable.find(dir.path(), false, &|_| ()).is_err());
        let text = unreachable.find(dir.path(), true, &|_| ()).unwrap_err().to_string();
        assert!(text.contains("--offline is set") && text.contains(&closed.to_string()), "{text}");
    }
}
