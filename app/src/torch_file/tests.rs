//! Files that PyTorch wrote (`tests/peers/make_torch_files.py`), and what becomes of them when bytes are changed.

use std::path::{Path, PathBuf};

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/torch-files").join(name)
}

fn refusal(name: &str) -> String {
    TorchFile::open(fixture(name)).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn both_formats_give_the_same_tensors() {
    for name in ["zip.pth", "legacy.pth"] {
        let mut file = TorchFile::open(fixture(name)).unwrap();
        let shapes: Vec<(String, Vec<usize>)> =
            file.tensors().map(|(n, _, s)| (n.to_owned(), s.to_vec())).collect();
        let shape = |name: &str| shapes.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        assert_eq!(shapes[0].0, "0.weight");
        assert_eq!(shape("0.weight"), Some([2, 3].as_slice()));
        assert_eq!(shape("empty"), Some([0, 4].as_slice()));
        let mut read = |tensor: &str| file.read_f32(tensor).unwrap();
        assert_eq!(read("0.weight"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{name}");
        assert_eq!(read("0.bias"), [10.0, 11.0], "{name}");
        assert_eq!(read("1.running_var"), [50.0, 51.0], "{name}");
        assert_eq!(read("half"), [0.5, -2.0]);
        assert_eq!(read("brain"), [1.5]);
        assert_eq!(read("double"), [0.1]);
        assert_eq!(read("turned"), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0], "{name}");
        assert_eq!(read("row"), [3.0, 4.0, 5.0], "{name}");
        assert_eq!(read("parameter"), [1.0, 1.0]);
        assert_eq!(read("empty"), [0.0; 0]);
        assert_eq!(read("scalar"), [7.0]);
        let whole = file.read_f32("1.num_batches_tracked").unwrap_err().to_string();
        assert!(whole.contains("num_batches_tracked") && whole.contains("I64"), "{whole}");
        let missing = file.read_f32("0.weights").unwrap_err();
        assert!(matches!(missing, TorchFileError::Missing { .. }), "{missing}");
    }
    let mut nested = TorchFile::open(fixture("nested.pt")).unwrap();
    assert_eq!(nested.read_f32("w").unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn what_is_no_state_dict_is_refused_by_name_and_nothing_is_executed() {
    for name in ["calls.pth", "calls-legacy.pth"] {
        let text = refusal(name);
        assert!(
            text.contains("system") && text.contains("nothing was executed") && text.contains(name),
            "{text}"
        );
    }
    assert!(refusal("module.pth").contains("torch.nn.modules.linear.Linear"), "{}", refusal("module.pth"));
    assert!(refusal("script.pt").contains("TorchScript"), "{}", refusal("script.pt"));
    assert!(refusal("list.pth").contains("something else than a dictionary"), "{}", refusal("list.pth"));
    assert!(matches!(TorchFile::open("no/such/file"), Err(TorchFileError::Io { .. })));
}

/// Opens bytes as a file and reads every tensor; gives how many numbers came out.
fn read_all(bytes: &[u8]) -> Result<usize, TorchFileError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let mut file = TorchFile::open(file.path())?;
    let names: Vec<String> = file.tensors().map(|(name, ..)| name.to_owned()).collect();
    let mut numbers = 0;
    for name in names {
        match file.read_f32(&name) {
            Ok(values) => numbers += values.len(),
            Err(TorchFileError::NotReal { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(numbers)
}

#[test]
fn changed_bytes_are_an_error_or_another_file_never_a_crash() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let (mut errors, mut good) = (0, 0);
    for name in ["zip.pth", "legacy.pth", "nested.pt"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        for round in 0..200 {
            let mut bytes = whole.clone();
            match round % 4 {
                0 => bytes.truncate(random(whole.len())),
                1 => {
                    let at = random(bytes.len());
                    bytes[at] ^= 1 << random(8);
                }
                2 => {
                    // The description of the tensors lies near the start.
                    let at = random(bytes.len().min(900));
                    bytes[at] = random(256) as u8;
                }
                _ => {
                    let (from, to) = (random(bytes.len()), random(bytes.len()));
                    let n = random(40).min(bytes.len() - from.max(to));
                    bytes.copy_within(from..from + n, to);
                }
            }
            match read_all(&bytes) {
                Ok(numbers) => {
                    assert!(numbers <= whole.len() * 8, "{name}, round {round}: {numbers} numbers");
                    good += 1;
                }
                Err(e) => {
                    assert!(!e.to_string().is_empty());
                    errors += 1;
                }
            }
        }
    }
    assert!(errors > 300 && good > 20, "{errors} errors, {good} files");
}

/// A pickle of the given opcodes inside an archive.
fn archive(pickle: &[u8], data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file("x/data.pkl", stored).unwrap();
    zip.write_all(pickle).unwrap();
    zip.start_file("x/data/0", stored).unwrap();
    zip.write_all(data).unwrap();
    zip.finish().unwrap().into_inner()
}

fn refused_pickle(pickle: &[u8]) -> String {
    read_all(&archive(pickle, &[0; 16])).unwrap_err().to_string()
}

#[test]
fn pickles_that_want_too_much_are_refused() {
    let text = |bytes: &[u8]| [b"X", &(bytes.len() as u32).to_le_bytes()[..], bytes].concat();
    // A text that claims four gigabytes.
    assert!(refused_pickle(b"\x80\x02X\xff\xff\xff\xff").contains("no name is that long"));
    // Tuples in tuples, a million and more deep.
    let mut deep = b"\x80\x02)".to_vec();
    deep.extend(std::iter::repeat_n(0x85, 2_000_000));
    assert!(refused_pickle(&deep).contains("objects"));
    // A mark for every byte.
    assert!(refused_pickle(&b"(".repeat(2_000_000)).contains("nests too deeply"));
    assert!(refused_pickle(b"\x80\x02h\x05").contains("slot 5"));
    assert!(refused_pickle(b"\x80\x02}a").contains("takes more than it has put"));
    assert!(refused_pickle(b"\x80\x02\x8c").contains("ends in the middle"));
    assert!(refused_pickle(b"\x80\x09.").contains("protocol 9"));
    // A storage of 2⁶⁰ numbers, and a tensor of as many that repeats one number.
    for (numel, shape, stride) in [(1_u64 << 60, 1 << 60, 1), (4, 1 << 60, 0), (4, 5, 1)] {
        let long = |n: u64| [b"\x8a\x08".as_slice(), &n.to_le_bytes()].concat();
        let pickle = [
            b"\x80\x02}(".to_vec(),
            text(b"w"),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text(b"storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text(b"0"),
            text(b"cpu"),
            long(numel),
            b"tQK\x00".to_vec(),
            long(shape),
            b"\x85".to_vec(),
            long(stride),
            b"\x85\x89Nt".to_vec(),
            b"Ru.".to_vec(),
        ]
        .concat();
        let message = refused_pickle(&pickle);
        assert!(message.contains("tensor `w`"), "{message}");
    }
}

#[test]
fn a_compressed_member_is_refused() {
    use std::io::Write as _;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let deflated = zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    zip.start_file("x/data.pkl", deflated).unwrap();
    zip.write_all(&b"(".repeat(100_000)).unwrap();
    let bytes = zip.finish().unwrap().into_inner();
    assert!(read_all(&bytes).unwrap_err().to_string().contains("is compressed"));
}
