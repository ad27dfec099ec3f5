//! TensorBoard event files: scalars only.
//!
//! An event file is a sequence of records (length, its checksum, bytes, their checksum); each record is a protobuf `Event`.
//! The few fields needed are encoded here by hand.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc, Table};

use crate::error::{Result, TrainError};

const CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// Field numbers of `tensorflow.Event`, `Summary`, `Summary.Value` and `SessionLog`.
mod field {
    pub(super) const EVENT_WALL_TIME: u8 = 1;
    pub(super) const EVENT_STEP: u8 = 2;
    pub(super) const EVENT_FILE_VERSION: u8 = 3;
    pub(super) const EVENT_SUMMARY: u8 = 5;
    pub(super) const EVENT_SESSION_LOG: u8 = 7;
    pub(super) const SUMMARY_VALUE: u8 = 1;
    pub(super) const VALUE_TAG: u8 = 1;
    pub(super) const VALUE_SIMPLE: u8 = 2;
    pub(super) const SESSION_STATUS: u8 = 1;
}

const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.START`: readers drop events at and after its step that earlier files hold, so it names the first new one.
const SESSION_START: u64 = 1;

/// An event file that scalars are appended to.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in a directory; `first_step` is the first step it will hold.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn create(directory: &Path, first_step: u64) -> Result<Self> {
        fs::create_dir_all(directory).map_err(TrainError::io("create", directory))?;
        let seconds = now() as u64;
        for attempt in 0.. {
            // The second and the process may not suffice: a process may resume more than once a second.
            let name = format!("events.out.tfevents.{seconds}.mudit.{}.{attempt}", process::id());
            let path = directory.join(name);
            match File::options().append(true).create_new(true).open(&path) {
                Ok(file) => {
                    let mut writer = Self { path, file };
                    writer.write(&event(now(), 0, |out| {
                        put_bytes(out, field::EVENT_FILE_VERSION, FILE_VERSION.as_bytes());
                    }))?;
                    writer.write(&event(now(), first_step, |out| {
                        let mut start = Vec::new();
                        put_varint(&mut start, field::SESSION_STATUS, SESSION_START);
                        put_bytes(out, field::EVENT_SESSION_LOG, &start);
                    }))?;
                    return Ok(writer);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(TrainError::io("write", &path)(error)),
            }
        }
        Err(TrainError::Internal("no name is left for an event file".into()))
    }

    /// Appends the scalars of a step.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.write(&scalar_event(now(), step, values))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).map_err(TrainError::io("write", &self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn scalar_event(wall_time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    event(wall_time, step, |out| {
        let mut summary = Vec::new();
        for (tag, scalar) in values {
            let mut value = Vec::new();
            put_bytes(&mut value, field::VALUE_TAG, tag.as_bytes());
            put_fixed(&mut value, field::VALUE_SIMPLE, &(*scalar as f32).to_le_bytes());
            put_bytes(&mut summary, field::SUMMARY_VALUE, &value);
        }
        put_bytes(out, field::EVENT_SUMMARY, &summary);
    })
}

fn event(wall_time: f64, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put_fixed(&mut out, field::EVENT_WALL_TIME, &wall_time.to_le_bytes());
    put_varint(&mut out, field::EVENT_STEP, step);
    what(&mut out);
    out
}

/// Length (u64), masked CRC-32C of the length, bytes, masked CRC-32C of the bytes; little-endian.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(bytes.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(bytes);
    out.extend(masked_crc(bytes).to_le_bytes());
    out
}

/// The checksum rotated and shifted, so that a checksum over data with checksums in it stays sound.
fn masked_crc(bytes: &[u8]) -> u32 {
    CRC32C.checksum(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

fn put_varint(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    push_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    push_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// A `float` (4 bytes) or a `double` (8 bytes).
fn put_fixed(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | if bytes.len() == 8 { 1 } else { 5 });
    out.extend(bytes);
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_give_the_known_answers() {
        assert_eq!(CRC32C.checksum(b"123456789"), 0xE306_9283);
        assert_eq!(CRC32C.checksum(&[0; 32]), 0x8A91_36AA);
        // The eight bytes of length 24, as in every event file's first record.
        assert_eq!(masked_crc(&24u64.to_le_bytes()), 0x224B_7FA3);
    }

    #[test]
    fn a_scalar_event_has_the_documented_bytes() {
        let bytes = scalar_event(1.0, 300, &[("loss", 0.5)]);
        let expected = [
            &[0x09, 0, 0, 0, 0, 0, 0, 0xF0, 0x3F][..], // wall_time 1.0
            &[0x10, 0xAC, 0x02],                       // step 300
            &[0x2A, 13, 0x0A, 11],                     // summary { value {
            &[0x0A, 4, b'l', b'o', b's', b's'],        // tag
            &[0x15, 0, 0, 0, 0x3F],                    // simple_value 0.5
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn files_are_whole_records_and_never_shared() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 5).unwrap();
        let other = EventWriter::create(dir.path(), 5).unwrap();
        assert_ne!(writer.path, other.path);
        writer.scalars(5, &[("a", 1.0), ("b", 2.0)]).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        let (mut rest, mut records) = (&bytes[..], 0);
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let (whole, after) = rest.split_at(length + 16);
            assert_eq!(record(&whole[12..12 + length]), whole);
            (rest, records) = (after, records + 1);
        }
        assert_eq!(records, 3);
        assert_eq!(bytes[12 + 9 + 2..12 + 9 + 4], [0x1A, 13]);
    }
}
