//! The files of `mudit sample`: found to be writable before the work, and whole when they appear.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use models::Model;
use runtime::{HostTensor, write_safetensors_file};

use crate::Usage;
use crate::render::arrays::SampleArchive;
use crate::render::grid::{Caption, Column, grid, save_png};
use crate::render::pixels;
use crate::sampler::Settings;

/// Where images and a trajectory go.
pub(super) struct Files {
    images: Vec<(PathBuf, Ending)>,
    trajectory: Option<PathBuf>,
}

#[derive(Clone, Copy)]
enum Ending {
    Png,
    Npz,
    Safetensors,
}

/// What was made.
pub(super) struct Made<'a> {
    pub(super) model: &'a Model,
    /// (N).
    pub(super) labels: &'a [i64],
    /// (N, C, H, W).
    pub(super) images: &'a [f32],
    /// (steps, N, C, H, W).
    pub(super) trajectory: Option<Vec<f32>>,
    pub(super) steps: usize,
    pub(super) settings: &'a Settings,
    pub(super) seed: u64,
}

impl Files {
    /// Refuses files of an unknown kind.
    pub(super) fn new(images: &[PathBuf], trajectory: Option<&Path>) -> anyhow::Result<Self> {
        let of_kind = |path: &PathBuf| match path.extension().and_then(|e| e.to_str()) {
            Some("png") => Ok((path.clone(), Ending::Png)),
            Some("npz") => Ok((path.clone(), Ending::Npz)),
            Some("safetensors") => Ok((path.clone(), Ending::Safetensors)),
            _ => Err(Usage(format!("`{}` must end in .png, .npz or .safetensors", path.display()))),
        };
        let images = images.iter().map(of_kind).collect::<Result<_, Usage>>()?;
        Ok(Self { images, trajectory: trajectory.map(Path::to_path_buf) })
    }

    /// Refuses places where nothing can be written.
    pub(super) fn check_writable(&self) -> anyhow::Result<()> {
        let paths = self.images.iter().map(|(path, _)| path).chain(&self.trajectory);
        Ok(paths.into_iter().try_for_each(runtime::file::check_writable)?)
    }

    pub(super) fn write(&self, made: Made<'_>) -> anyhow::Result<()> {
        let Made { model, labels, images, trajectory, steps, settings, seed } = made;
        let (n, latent) = (labels.len(), model.latent());
        let shape = latent.batch(n);
        let (solver, cfg) = (settings.solver.kind, settings.guidance);
        let meta = BTreeMap::from([
            ("sampler".to_owned(), solver.to_string()),
            ("cfg".to_owned(), cfg.to_string()),
            ("seed".to_owned(), seed.to_string()),
        ]);
        for (path, ending) in &self.images {
            match ending {
                Ending::Png => {
                    let names: Vec<String> = model.class_names.clone().unwrap_or_default();
                    let columns = Column::by_class(labels, &names, n);
                    let title = format!("{solver} {steps} steps, guidance {cfg}");
                    let caption = Caption { title: Some(title), note: None };
                    save_png(&grid(images, shape, &columns, &caption)?, path)?;
                }
                Ending::Npz => {
                    let mut archive =
                        SampleArchive::create(path, n, [latent.height, latent.width, latent.channels])?;
                    archive.push(&pixels::channels_last(images, shape)?)?;
                    archive.finish(labels)?;
                }
                Ending::Safetensors => {
                    let mut tensors = IndexMap::new();
                    tensors.insert("samples".to_owned(), HostTensor::f32(shape, images.to_vec())?);
                    tensors.insert("y".to_owned(), HostTensor::i64([n], labels.to_vec())?);
                    write_safetensors_file(path, &tensors, &meta)?;
                }
            }
        }
        if let (Some(path), Some(values)) = (&self.trajectory, trajectory) {
            let mut tensors = IndexMap::new();
            let tensor = HostTensor::f32([steps, n, latent.channels, latent.height, latent.width], values)?;
            tensors.insert("trajectory".to_owned(), tensor);
            write_safetensors_file(path, &tensors, &meta)?;
        }
        Ok(())
    }
}
