//! `mudit data`: fetch, check and look at data sets.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use runtime::file::check_writable;
use serde_json::json;
use train_engine::TrainError;
use train_engine::config::{DataKind, DataSection, Orient};
use train_engine::data::{self, Dataset, fashion_mnist};
use train_engine::random::{Purpose, Stream};

use crate::console;
use crate::faults::one_error;
use crate::render::grid::{Caption, Column, grid, save_png};

/// Arguments of `mudit data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Find Fashion-MNIST on this machine or fetch it, and say where it is.
    Fetch {
        /// A directory that already holds its four files.
        #[arg(long)]
        path: Option<PathBuf>,
        /// Fetch nothing.
        #[arg(long)]
        offline: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read every sample of a data set, count it, and optionally draw some.
    Check {
        /// What the data set is: fashion-mnist, idx, folder or latents.
        #[arg(long, default_value = "fashion-mnist", value_parser = data_kind)]
        kind: DataKind,
        /// Its file or directory.
        #[arg(long)]
        path: Option<PathBuf>,
        /// Labels of an idx file, where they do not lie beside it.
        #[arg(long)]
        labels: Option<PathBuf>,
        /// Side in pixels that the images of a folder are cropped to.
        #[arg(long)]
        image_size: Option<usize>,
        /// Whether images of a folder are turned by their EXIF data: off or apply.
        #[arg(long, default_value = "off", value_parser = orient)]
        orient: Orient,
        /// Draw the first images of each class into this PNG.
        #[arg(long)]
        grid: Option<PathBuf>,
        /// Rows of the drawing.
        #[arg(long, default_value_t = 8)]
        rows: usize,
        /// Fetch nothing.
        #[arg(long)]
        offline: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

fn data_kind(text: &str) -> Result<DataKind, String> {
    serde_json::from_value(json!(text))
        .map_err(|_| "expected fashion-mnist, idx, folder or latents".to_owned())
}

fn orient(text: &str) -> Result<Orient, String> {
    serde_json::from_value(json!(text)).map_err(|_| "expected off or apply".to_owned())
}

impl DataArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.action {
            Action::Fetch { path, offline, json } => fetch(path.as_deref(), offline, json),
            Action::Check { kind, path, labels, image_size, orient, grid, rows, offline, json } => {
                let section = DataSection {
                    kind,
                    path,
                    labels,
                    image_size,
                    orient,
                    flip: false,
                    ..DataSection::default()
                };
                let set = data::open(&section, offline, &console::note)?;
                grid.iter().try_for_each(check_writable)?;
                check(&set, kind, grid, rows, json)
            }
        }
    }
}

fn fetch(path: Option<&std::path::Path>, offline: bool, json: bool) -> anyhow::Result<()> {
    let files = fashion_mnist::locate(path, offline, &console::note)?;
    let all = [&files.train_images, &files.train_labels, &files.test_images, &files.test_labels];
    if json {
        return console::json(&json!({ "files": all }));
    }
    all.into_iter().try_for_each(|f| console::out(&f.display().to_string()))
}

fn check(
    set: &Arc<dyn Dataset>,
    kind: DataKind,
    picture: Option<PathBuf>,
    rows: usize,
    json: bool,
) -> anyhow::Result<()> {
    let (c, h, w) = (set.channels(), set.height(), set.width());
    let mut counts = vec![0_usize; set.num_classes()];
    let (mut sum, mut squares) = (0.0, 0.0);
    let (mut shown, mut labels) = (Vec::new(), Vec::new());
    let (mut sample, mut faults) = (vec![0.0; set.image_len()], Vec::new());
    for i in 0..set.len() {
        let draw = || Stream::new(0, Purpose::VaeDraw, 0, i as u64);
        // Mirrored latents are numbers of their own; a mirrored image is the same file again.
        if kind == DataKind::Latents && set.can_flip() {
            let mirrored = data::read_finite(set.as_ref(), i, true, &mut draw(), &mut sample);
            faults.extend(mirrored.err().map(anyhow::Error::from));
        }
        let label = match data::read_finite(set.as_ref(), i, false, &mut draw(), &mut sample) {
            Ok(label) => label,
            // One sample; the others are looked at all the same.
            Err(
                fault @ (TrainError::BadImage { .. }
                | TrainError::BadFile { .. }
                | TrainError::BadSample { .. }
                | TrainError::Io { .. }),
            ) => {
                faults.push(fault.into());
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let count = &mut counts[label as usize];
        *count += 1;
        if picture.is_some() && *count <= rows {
            shown.extend_from_slice(&sample);
            labels.push(label);
        }
        sum += sample.iter().map(|v| f64::from(*v)).sum::<f64>();
        squares += sample.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    set.remarks().iter().for_each(|line| console::note(line));
    one_error(faults, set.len() as u64)?;
    let values = (set.len() * set.image_len()) as f64;
    let mean = sum / values;
    let std = (squares / values - mean * mean).max(0.0).sqrt();
    if let Some(path) = &picture {
        let columns = Column::by_class(&labels, set.class_names(), rows);
        save_png(&grid(&shown, [labels.len(), c, h, w], &columns, &Caption::default())?, path)?;
    }
    if json {
        return console::json(&json!({
            "images": set.len(), "shape": [c, h, w], "classes": set.class_names(), "per_class": counts,
            "mean": mean, "std": std, "grid": picture,
        }));
    }
    console::out(&format!(
        "{} samples of {c}×{h}×{w}, mean {mean:.4}, standard deviation {std:.4}",
        set.len()
    ))?;
    for (name, count) in set.class_names().iter().zip(&counts) {
        console::out(&format!("  {count:>8}  {name}"))?;
    }
    picture.map_or(Ok(()), |path| console::out(&path.display().to_string()))
}
