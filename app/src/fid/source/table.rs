//! Encoded pictures in a column of a Parquet file, as image data sets are often kept.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use train_engine::picture::MAX_ENCODED;

use super::fingerprint::Fingerprint;
use super::{Numbers, Picture, Pictures, Source, inside, open_file};

/// Names of image columns, the likelier first.
const USUAL: [&str; 5] = ["image.bytes", "image", "img.bytes", "png", "jpg"];

/// A Parquet file; one picture at a time is read (and one page is unpacked).
pub struct Table {
    file: SerializedFileReader<File>,
    path: PathBuf,
    column: usize,
    name: String,
    /// Level at which a value is there, not null.
    level: i16,
    /// First row of each row group, and the number of rows.
    starts: Vec<u64>,
}

impl Table {
    /// Reads the file's schema; `column` is needed when more than one column may hold pictures.
    ///
    /// # Errors
    /// No Parquet, no column of bytes, a column that repeats, no rows.
    pub fn open(path: &Path, column: Option<&str>) -> anyhow::Result<Self> {
        let unusable = || format!("{} is no usable Parquet file", path.display());
        let file = SerializedFileReader::new(open_file(path)?).with_context(unusable)?;
        let metadata = file.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let columns: Vec<(usize, String)> = (0..schema.num_columns())
            .filter(|i| schema.column(*i).physical_type() == Type::BYTE_ARRAY)
            .map(|i| (i, schema.column(i).path().string()))
            .collect();
        let wanted = |name: &str| columns.iter().find(|(_, n)| n == name || *n == format!("{name}.bytes"));
        let found = match column {
            Some(name) => wanted(name),
            None if columns.len() == 1 => columns.first(),
            None => USUAL.iter().find_map(|name| wanted(name)),
        };
        let (index, name) = found.cloned().with_context(|| {
            let names: Vec<&str> = columns.iter().map(|(_, n)| n.as_str()).collect();
            format!(
                "{}: which column holds the images? give --column; columns of bytes: {}",
                path.display(),
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            )
        })?;
        let leaf = schema.column(index);
        ensure!(
            leaf.max_rep_level() == 0,
            "{}: column `{name}` holds lists, expected one image a row",
            path.display()
        );
        let level = leaf.max_def_level();
        let mut starts = vec![0u64];
        for group in metadata.row_groups() {
            let rows = u64::try_from(group.num_rows()).ok().with_context(unusable)?;
            let last = starts.last().copied().unwrap_or(0);
            starts.push(last.checked_add(rows).with_context(unusable)?);
        }
        ensure!(starts.last().is_some_and(|n| *n > 0), "{} has no rows", path.display());
        Ok(Self { path: path.to_owned(), column: index, name, level, starts, file })
    }

    /// The rows of one group.
    fn group(&self, group: usize) -> anyhow::Result<ColumnReaderImpl<ByteArrayType>> {
        let rows = self.file.get_row_group(group)?;
        let ColumnReader::ByteArrayColumnReader(reader) = rows.get_column_reader(self.column)? else {
            anyhow::bail!("internal: column `{}` changed its type", self.name)
        };
        Ok(reader)
    }

    fn next(&self, reader: &mut ColumnReaderImpl<ByteArrayType>, name: &str) -> anyhow::Result<Picture> {
        let (mut values, mut levels) = (Vec::<ByteArray>::new(), Vec::new());
        let (records, _, _) =
            reader.read_records(1, (self.level > 0).then_some(&mut levels), None, &mut values)?;
        ensure!(records == 1, "the row is missing");
        let bytes = values.first().context("the row holds no image (null)")?.data();
        ensure!((bytes.len() as u64) < MAX_ENCODED, "{} bytes are no picture", bytes.len());
        Picture::decode(name, bytes)
    }
}

impl Source for Table {
    fn count(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        self.picked(Box::new(range))
    }

    fn picked<'a>(&'a mut self, numbers: Numbers<'a>) -> Pictures<'a> {
        // The row group that is being read, the row it stands at.
        let mut open: Option<(usize, u64, ColumnReaderImpl<ByteArrayType>)> = None;
        Box::new(numbers.map(move |row| {
            let name = inside(&self.path, format_args!("{} of row {row}", self.name));
            let group = self.starts.partition_point(|start| *start <= row) - 1;
            let mut read = || -> anyhow::Result<Picture> {
                let (at, mut reader) = match open.take() {
                    Some((own, at, reader)) if own == group => (at, reader),
                    _ => (self.starts[group], self.group(group)?),
                };
                let skip = row - at;
                if skip > 0 {
                    let skipped = reader.skip_records(skip as usize)? as u64;
                    ensure!(skipped == skip, "row group {group} has fewer rows than it says");
                }
                let picture = self.next(&mut reader, &name);
                open = Some((group, row + 1, reader));
                picture
            };
            read().with_context(|| format!("cannot read `{name}`"))
        }))
    }

    fn fingerprint(&mut self, _range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        let failed = || format!("cannot read {}", self.path.display());
        fingerprint.times(&std::fs::metadata(&self.path).with_context(failed)?);
        // Pages are packed, so the sizes differ where any picture does.
        for group in self.file.metadata().row_groups() {
            let column = group.column(self.column);
            for number in [group.num_rows(), column.compressed_size(), column.uncompressed_size()] {
                fingerprint.content(&number.to_le_bytes());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::Arc;

    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::Values;
    use super::*;

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let image = image::GrayImage::from_pixel(1, 1, image::Luma([value]));
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    /// Row groups of rows of an optional `image.bytes` and a required `path`.
    fn write(path: &Path, groups: &[&[Option<u8>]], compression: Compression) {
        let schema =
            "message m { optional group image { optional binary bytes; } required binary path (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let images: Vec<ByteArray> = rows.iter().flatten().map(|v| png(*v).into()).collect();
            let levels: Vec<i16> = rows.iter().map(|v| if v.is_some() { 2 } else { 1 }).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&images, Some(&levels), None).unwrap();
            column.close().unwrap();
            let names: Vec<ByteArray> = rows.iter().map(|_| ByteArray::from("x")).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&names, None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn rows_are_read_from_anywhere_in_each_compression() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let groups: [&[Option<u8>]; 3] = [&[Some(0), Some(1)], &[Some(2)], &[Some(3), Some(4), Some(5)]];
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ] {
            write(&path, &groups, compression);
            let mut table = Table::open(&path, None).unwrap();
            assert_eq!((table.count(), table.name.as_str()), (6, "image.bytes"));
            for (start, end) in [(0, 6), (1, 4), (5, 6)] {
                let found: Vec<Values> = table.pictures(start..end).map(|p| p.unwrap().values).collect();
                let expected: Vec<Values> = (start..end).map(|i| Values::U8(vec![i as u8])).collect();
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn missing_images_and_unclear_columns_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, &[&[Some(0), None]], Compression::SNAPPY);
        let mut table = Table::open(&path, Some("image")).unwrap();
        let error = format!("{:#}", table.pictures(1..2).next().unwrap().unwrap_err());
        assert!(error.contains("row 1") && error.contains("null"), "{error}");
        let error = Table::open(&path, Some("nope")).err().unwrap().to_string();
        assert!(error.contains("image.bytes, path") && error.contains("--column"), "{error}");
        std::fs::write(&path, [b'x'; 300]).unwrap();
        assert!(Table::open(&path, None).err().unwrap().to_string().contains("no usable Parquet"));
    }
}
