//! Hundreds of spoiled files: each is refused in words that name it, and none makes the reader crash or swell.

use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, ImageFormat, RgbImage};
use mudit::fid::metrics::numpy_random::Mt19937;
use mudit::fid::source::{OpenOptions, open};
use mudit::fid::statistics::Statistics;
use mudit::torch_file::{ElementType, TorchFile};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use crate::process::mudit;
use crate::scene::fixture;

/// Fewest refusals that count as a proof.
const REFUSALS: usize = 200;
/// Most memory that reading any of the files may take, in bytes; the program and its libraries included.
const MEMORY: u64 = 600 << 20;
/// Spoiled copies of each file.
const COPIES: u32 = 48;

/// Kinds of files, with an ending and the bytes of a good one.
fn good() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let picture =
        |seed: u8| RgbImage::from_fn(12, 10, |x, y| image::Rgb([x as u8 * 20, y as u8 * seed, seed]));
    let encoded = |seed, format| {
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::from(picture(seed)).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let pixels: Vec<u8> = (0..4).flat_map(|i| picture(i).into_raw()).collect();
    let images = npy("|u1", "(4, 10, 12, 3)", &pixels);
    let doubles = |n: usize| -> Vec<u8> {
        (0..n * n).flat_map(|i| f64::from(u8::from(i % (n + 1) == 0)).to_le_bytes()).collect()
    };
    let statistics =
        [("mu.npy", npy("<f8", "(3,)", &doubles(3)[..24])), ("sigma.npy", npy("<f8", "(3, 3)", &doubles(3)))];
    let pictures: Vec<(String, Vec<u8>)> =
        (0..4).map(|i| (format!("{i}.png"), encoded(i, ImageFormat::Png))).collect();
    vec![
        ("stored array", "npz", zipped(&[("arr_0.npy", images.clone())], CompressionMethod::Stored)),
        ("packed array", "npz", zipped(&[("arr_0.npy", images)], CompressionMethod::Deflated)),
        ("statistics", "npz", zipped(&statistics, CompressionMethod::Stored)),
        ("pictures", "zip", zipped(&pictures, CompressionMethod::Deflated)),
        ("pictures", "tar", tarred(&pictures)),
        ("pictures", "parquet", table(&pictures)),
        ("picture", "png", encoded(3, ImageFormat::Png)),
        ("picture", "jpg", encoded(3, ImageFormat::Jpeg)),
        ("state dict", "pth", fs::read(fixture("torch-files", "zip.pth")).unwrap()),
    ]
}

pub(crate) fn npy(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
    let text = format!("{text}{}\n", " ".repeat(64 - (11 + text.len()) % 64));
    [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), data].concat()
}

pub(crate) fn zipped(entries: &[(impl AsRef<str>, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(name.as_ref(), SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn tarred(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn table(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type("message m { required binary image; }").unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = entries.iter().map(|(_, b)| b.clone().into()).collect();
    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

/// A spoiled copy: cut, with bytes of the head or the tail changed, or with a number there made huge.
fn spoiled(bytes: &[u8], random: &mut Mt19937) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    let mut below = |n: usize| random.u32() as usize % n.max(1);
    let edge = 160.min(bytes.len());
    let place = if below(2) == 0 { below(edge) } else { bytes.len() - 1 - below(edge) };
    match below(4) {
        0 => copy.truncate(below(bytes.len())),
        1 => copy[place] ^= 1 << below(8),
        2 => (place..(place + 4).min(bytes.len())).for_each(|i| copy[i] = 0xFF),
        _ => (place..(place + 8).min(bytes.len())).for_each(|i| copy[i] = below(256) as u8),
    }
    copy
}

/// Reads a file as the commands would, to its last picture.
fn read(path: &Path, ending: &str, kind: &str) -> anyhow::Result<()> {
    if kind == "statistics" {
        return Statistics::read(path).map(drop);
    }
    if ending == "pth" {
        let mut file = TorchFile::open(path)?;
        let real = file.tensors().filter(|(_, element, _)| *element != ElementType::I64);
        let names: Vec<String> = real.map(|(name, ..)| name.to_owned()).collect();
        return Ok(names.iter().try_for_each(|name| file.read_f32(name).map(drop))?);
    }
    let place = if ending == "png" || ending == "jpg" { path.parent().unwrap() } else { path };
    let mut source = open(&[place.display().to_string()], &OpenOptions::default(), &|_| {})?;
    let all = 0..source.count().min(1000);
    source.pictures(all).try_for_each(|p| p.map(drop))
}

/// The body of the proof; it runs in a process of its own, whose memory is then known.
#[test]
#[ignore = "run by `spoiled_files_are_refused` in a process of its own"]
fn spoiled_files() {
    let folder = TempDir::new().unwrap();
    let mut random = Mt19937::new(1);
    let mut refused = 0;
    for (kind, ending, bytes) in good() {
        let own = folder.path().join(format!("{}-{ending}", kind.replace(' ', "-")));
        fs::create_dir(&own).unwrap();
        let path: PathBuf = own.join(format!("x.{ending}"));
        fs::write(&path, &bytes).unwrap();
        read(&path, ending, kind).unwrap_or_else(|e| panic!("good {kind} {ending}: {e:#}"));
        let mut here = 0;
        for copy in 0..COPIES {
            File::create(&path).unwrap().write_all(&spoiled(&bytes, &mut random)).unwrap();
            let Err(error) = read(&path, ending, kind) else { continue };
            let text = format!("{error:#}");
            assert!(
                text.contains(&own.display().to_string()) && !text.contains("internal"),
                "{kind} {ending}, copy {copy}: {text}"
            );
            here += 1;
        }
        // What is left unharmed by a copy (a date, say) is read as before.
        assert!(here > COPIES / 3, "{kind} {ending}: {here} of {COPIES}");
        refused += here as usize;
        println!("{kind} {ending}: {here} of {COPIES} refused");
    }
    assert!(refused >= REFUSALS, "{refused}");
}

#[test]
fn spoiled_files_are_refused() {
    let own = std::env::current_exe().unwrap();
    let done = mudit(["--exact", "--ignored", "fid_inputs::spoiled_files"]).program(&own).run();
    assert!(done.code == Some(0) && done.stdout.contains("1 passed"), "{done}");
    assert!(done.peak_bytes < MEMORY, "{} bytes were taken", done.peak_bytes);
}
