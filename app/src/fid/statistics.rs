//! The statistics file of a reference set: an `.npz` that NumPy, ADM's evaluator and pytorch-fid read, too.
//!
//! | array | is |
//! |---|---|
//! | `mu`, `sigma` | mean (D) and covariance (D, D) of the pooled features, f64 |
//! | `mu_s`, `sigma_s` | the same of the spatial features, for sFID |
//! | `features` | pooled features (N, D) of the first images, f32, for precision, recall and KID |
//! | `about.json` | what the file is of |

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use npyz::WriterBuilder;
use runtime::file::{AtomicFile, sha256_file};
use serde::{Deserialize, Serialize};
use zip::write::{SimpleFileOptions, ZipWriter};
use zip::{CompressionMethod, ZipArchive};

use super::metrics::moments::{Gaussian, WIDEST};
use super::plan::Plan;
use super::source::npy;
use crate::Usage;

const ABOUT: &str = "about.json";
/// Longest `about.json`, in bytes.
const MAX_ABOUT: u64 = 1 << 22;
/// Most values of `features`.
pub const MAX_FEATURES: u64 = 1 << 29;

/// What a reference file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Version of the program.
    pub mudit: String,
    /// What was computed of which images.
    pub plan: Plan,
    /// Height and width of the first image.
    pub size: Option<[usize; 2]>,
    /// Images of other sizes.
    pub other_sizes: u64,
    /// Grey images given to a network of colours.
    pub grey: u64,
    /// SHA-256 of all sizes and pixels; of the other file where the moments are its.
    pub pixels_sha256: String,
    /// The file that mean and covariance were taken from, if they are not of the plan's images.
    pub moments_of: Option<MomentsOf>,
}

/// A file that moments were taken from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MomentsOf {
    /// Its name.
    pub path: PathBuf,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// A reference set.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Of the pooled features.
    pub pool: Gaussian,
    /// Of the spatial features.
    pub spatial: Option<Gaussian>,
    /// Pooled features of the first images, row after row; may be empty.
    pub features: Vec<f32>,
    /// What the file is of, if `mudit` wrote it.
    pub about: Option<About>,
}

impl Statistics {
    /// Writes the file, whole or not at all; equal statistics are equal bytes.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let failed = || format!("cannot write {}", path.display());
        let mut zip = ZipWriter::new(AtomicFile::create(path)?);
        for (names, gaussian) in
            [(["mu", "sigma"], Some(&self.pool)), (["mu_s", "sigma_s"], self.spatial.as_ref())]
        {
            let Some(Gaussian { mean, covariance }) = gaussian else { continue };
            let n = mean.len() as u64;
            // A covariance is symmetric: its columns are its rows.
            let rows: Vec<f64> =
                covariance.col_iter().flat_map(|c| c.iter().copied().collect::<Vec<_>>()).collect();
            array(&mut zip, names[0], &[n], mean).with_context(failed)?;
            array(&mut zip, names[1], &[n, n], &rows).with_context(failed)?;
        }
        if !self.features.is_empty() {
            let width = self.pool.mean.len();
            let shape = [(self.features.len() / width) as u64, width as u64];
            array(&mut zip, "features", &shape, &self.features).with_context(failed)?;
        }
        if let Some(about) = &self.about {
            zip.start_file(ABOUT, options(0)).with_context(failed)?;
            zip.write_all(&serde_json::to_vec_pretty(about)?).with_context(failed)?;
        }
        Ok(zip.finish().with_context(failed)?.commit()?)
    }

    /// Whether `path` is an `.npz` of statistics alone, without images.
    pub fn is_in(path: &Path) -> bool {
        let ending = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npz"));
        ending
            && npy::open_npz(path).is_ok_and(|archive| {
                archive.index_for_name("mu.npy").is_some() && archive.index_for_name("arr_0.npy").is_none()
            })
    }

    /// Reads a file of `mudit`, of ADM or of pytorch-fid.
    ///
    /// # Errors
    /// No `.npz`, one without statistics, shapes that do not agree, values that are not finite.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        refuse_images(path)?;
        let mut archive = npy::open_npz(path)?;
        let at = || path.display().to_string();
        let pool = gaussian(&mut archive, path, ["mu", "sigma"])?.with_context(|| {
            let images = archive.index_for_name("arr_0.npy").is_some();
            let hint = if images { "it holds images only".to_owned() } else { npy::contents(&archive) };
            format!("{} holds no statistics (`mu` and `sigma`): {hint}; make them with `mudit fid ref`", at())
        })?;
        let spatial = gaussian(&mut archive, path, ["mu_s", "sigma_s"])?;
        let width = pool.mean.len();
        let features = match npy::read_floats::<f32>(&mut archive, path, "features", MAX_FEATURES)? {
            Some((shape, values)) => {
                ensure!(
                    shape.len() == 2 && shape[1] == width,
                    "{}: `features` has shape {shape:?}, expected (N, {width})",
                    at()
                );
                ensure!(values.iter().all(|v| v.is_finite()), "{}: `features` are not finite", at());
                values
            }
            None => Vec::new(),
        };
        let about = match archive.index_for_name(ABOUT) {
            Some(index) => {
                let mut text = Vec::new();
                let entry = archive.by_index(index).with_context(at)?;
                entry.take(MAX_ABOUT).read_to_end(&mut text).with_context(at)?;
                Some(serde_json::from_slice(&text).with_context(|| {
                    format!("{}: `{ABOUT}` is of another version; make the file again", at())
                })?)
            }
            None => None,
        };
        Ok(Self { pool, spatial, features, about })
    }

    /// Identity of the set: of its pixels if they are known, else of the file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn identity(&self, path: &Path) -> anyhow::Result<String> {
        match &self.about {
            Some(about) => Ok(about.pixels_sha256.clone()),
            None => Ok(sha256_file(path)?),
        }
    }
}

/// Says what becomes of images, and of what cannot be read at all, where statistics are expected.
fn refuse_images(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let what = match ending.as_str() {
        _ if path.is_dir() => "a folder",
        "zip" | "tar" | "parquet" | "npy" | "png" | "jpg" | "jpeg" if path.is_file() => "a file of images",
        "pkl" | "pickle" | "pt" | "pth" if path.is_file() => {
            return Err(Usage(format!(
                "{name} is a pickle, which only Python can open: load it there and save its mean and covariance by \
                 numpy.savez(\"ref.npz\", mu=mu, sigma=sigma)"
            ))
            .into());
        }
        _ => return Ok(()),
    };
    Err(Usage(format!(
        "{name} is {what}, expected statistics: make them by `mudit fid ref {name} --out ref.npz` and give that file"
    ))
    .into())
}

fn gaussian(
    archive: &mut ZipArchive<std::fs::File>,
    path: &Path,
    [mean, covariance]: [&str; 2],
) -> anyhow::Result<Option<Gaussian>> {
    let Some((shape, values)) = npy::read_floats::<f64>(archive, path, mean, WIDEST as u64)? else {
        return Ok(None);
    };
    let n = values.len();
    // Some tools keep axes of 1.
    ensure!(
        n > 0 && shape.iter().all(|d| *d == 1 || *d == n),
        "{}: `{mean}` has shape {shape:?}, expected (D) or (1, D)",
        path.display()
    );
    let (found, matrix) = npy::read_floats::<f64>(archive, path, covariance, (n * n) as u64)?
        .with_context(|| format!("{} holds `{mean}` but no `{covariance}`", path.display()))?;
    let long: Vec<usize> = found.iter().copied().filter(|d| *d > 1).collect();
    ensure!(
        matrix.len() == n * n && long.iter().all(|d| *d == n),
        "{}: `{covariance}` has shape {found:?}, expected ({n}, {n}) as `{mean}` has {n}",
        path.display()
    );
    ensure!(
        values.iter().chain(&matrix).all(|v| v.is_finite()),
        "{}: `{mean}` or `{covariance}` holds values that are not finite",
        path.display()
    );
    Ok(Some(Gaussian::new(values, &matrix)?))
}

fn options(bytes: usize) -> SimpleFileOptions {
    let large = bytes >= u32::MAX as usize;
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(large)
}

fn array<T: npyz::AutoSerialize + Copy>(
    zip: &mut ZipWriter<AtomicFile>,
    name: &str,
    shape: &[u64],
    values: &[T],
) -> anyhow::Result<()> {
    zip.start_file(format!("{name}.npy"), options(size_of_val(values)))?;
    let buffered = std::io::BufWriter::with_capacity(1 << 20, zip);
    let mut writer =
        npyz::WriteOptions::<T>::new().default_dtype().shape(shape).writer(buffered).begin_nd()?;
    writer.extend(values.iter().copied())?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::super::plan::tests::plan;
    use super::*;

    fn some() -> Statistics {
        let gaussian = |n: usize| Gaussian {
            mean: (0..n).map(|i| i as f64 * 0.1).collect(),
            covariance: Mat::from_fn(n, n, |i, j| 1.0 / (1.0 + i as f64 + j as f64)),
        };
        let about = About {
            mudit: "0".into(),
            plan: plan(10, 2),
            size: Some([2, 2]),
            other_sizes: 0,
            grey: 0,
            pixels_sha256: "ab".into(),
            moments_of: None,
        };
        let features = vec![0.25; 8];
        Statistics { pool: gaussian(4), spatial: Some(gaussian(3)), features, about: Some(about) }
    }

    #[test]
    fn written_and_read_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (path, again) = (dir.path().join("a.npz"), dir.path().join("b.npz"));
        some().write(&path).unwrap();
        let read = Statistics::read(&path).unwrap();
        assert_eq!(read, some());
        read.write(&again).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap());
        assert_eq!(read.identity(&path).unwrap(), "ab");
        let plain = Statistics { about: None, spatial: None, features: Vec::new(), ..some() };
        plain.write(&path).unwrap();
        assert_eq!(Statistics::read(&path).unwrap(), plain);
        assert_eq!(plain.identity(&path).unwrap().len(), 64);
    }

    #[test]
    fn files_that_are_no_statistics_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npz");
        let write = |arrays: &[(&str, &[u64], &[f64])]| {
            let mut zip = ZipWriter::new(AtomicFile::create(&path).unwrap());
            for (name, shape, values) in arrays {
                array(&mut zip, name, shape, values).unwrap();
            }
            zip.finish().unwrap().commit().unwrap();
        };
        let refused = |part: &str| {
            let error = format!("{:#}", Statistics::read(&path).unwrap_err());
            assert!(error.contains(part) && error.contains("x.npz"), "{error}");
        };
        write(&[("arr_0", &[1], &[0.0])]);
        refused("`mudit fid ref`");
        write(&[("mu", &[2], &[0.0; 2])]);
        refused("no `sigma`");
        write(&[("mu", &[2], &[0.0; 2]), ("sigma", &[4], &[0.0; 4])]);
        refused("expected (2, 2)");
        write(&[("m", &[2], &[0.0; 2]), ("s", &[2, 2], &[0.0; 4])]);
        refused("it has m.npy, s.npy; an .npz holds images as `arr_0`");
        write(&[("mu", &[2, 3], &[0.0; 6]), ("sigma", &[6, 6], &[0.0; 36])]);
        refused("expected (D) or (1, D)");
        write(&[("mu", &[1], &[f64::NAN]), ("sigma", &[1, 1], &[1.0])]);
        refused("not finite");
        write(&[("mu", &[1], &[0.0]), ("sigma", &[1, 1], &[1.0]), ("features", &[2, 3], &[0.0; 6])]);
        refused("`features`");
        for (bytes, part) in [
            (&b"PK\x03\x04"[..], "no usable .npz"),
            (b"\x93NUMPY\x01\x00v\x00{", "a single array"),
            (b"\x80\x04\x95\x00", "it is a pickle"),
            (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            refused(part);
        }
        // Axes of 1, as some tools keep them, are of no matter.
        write(&[("mu", &[1, 2], &[1.0, 2.0]), ("sigma", &[1, 2, 2], &[4.0, 1.0, 1.0, 4.0])]);
        assert_eq!(Statistics::read(&path).unwrap().pool.mean, [1.0, 2.0]);
        let folder = format!("{:#}", Statistics::read(dir.path()).unwrap_err());
        assert!(folder.contains("is a folder") && folder.contains("mudit fid ref"), "{folder}");
        for (name, part) in [("r.pkl", "numpy.savez"), ("r.tar", "file of images"), ("r.pt", "only Python")] {
            let path = dir.path().join(name);
            std::fs::write(&path, b"x").unwrap();
            let error = format!("{:#}", Statistics::read(&path).unwrap_err());
            assert!(error.contains(name) && error.contains(part), "{error}");
        }
    }
}
