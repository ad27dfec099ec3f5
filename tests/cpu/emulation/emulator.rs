//! A queue that runs kernels at once, on the host: sources and stand-in for the device are compiled by the system's C++
//! compiler.
#![allow(unsafe_code, reason = "calls compiled kernels, which write to the addresses they are given")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use graph_builder::DType;
use half::{bf16, f16};
use runtime::RuntimeError;
use runtime::cuda::kernels::{Address, COMMON, Launch, Product, Queue, SOURCES, Source};

const DEVICE: &str = include_str!("../../gpu/emulator/device.h");
const EMULATOR: &str = include_str!("../../gpu/emulator/emulator.cpp");

type Entry =
    unsafe extern "C" fn(*const c_char, *const u32, u32, u32, bool, *mut *mut c_void) -> *const c_char;

/// The compiled sources by name.
struct Libraries(BTreeMap<&'static str, Entry>);

/// What a source becomes: the stand-in for `device.cuh`, the source, and a way to its kernels by name.
fn whole(source: &Source) -> String {
    let types = COMMON[1].1;
    let calls: String = source
        .kernels
        .iter()
        .flat_map(|k| {
            [
                "    if (!strcmp(name, \"",
                k,
                "\")) return launch(name, ",
                k,
                ", grid, threads, shared_bytes, ",
                "backwards, arguments);\n",
            ]
        })
        .collect();
    format!(
        "{EMULATOR}\n#line 1 \"types.cuh\"\n{types}\n#line 1 \"{}\"\n{}\nextern \"C\" const char *mudit_launch(const \
         char *name, const u32 *grid, u32 threads, u32 shared_bytes, bool backwards, void **arguments) \
         {{\n{calls}    return \"no such kernel\";\n}}\n",
        source.name, source.text
    )
}

fn compile(folder: &Path, source: &Source) -> Result<PathBuf, String> {
    let file = folder.join(source.name).with_extension("cpp");
    let library = folder.join(source.name).with_extension("so");
    fs::write(&file, whole(source)).map_err(|e| e.to_string())?;
    let mut compiler = Command::new("c++");
    compiler.args(["-O2", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-o"]);
    let output = compiler.arg(&library).arg(&file).arg("-I").arg(folder).output();
    let output = output.map_err(|e| format!("no C++ compiler: {e}"))?;
    assert!(output.status.success(), "{}: {}", source.name, String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

fn open(library: &Path) -> Entry {
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: C strings; the library was compiled from the sources above and has that function.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{} cannot be opened", library.display());
        let entry = libc::dlsym(handle, c"mudit_launch".as_ptr());
        assert!(!entry.is_null(), "{} has no entry", library.display());
        std::mem::transmute::<*mut c_void, Entry>(entry)
    }
}

fn libraries() -> &'static Result<Libraries, String> {
    static BUILT: OnceLock<Result<Libraries, String>> = OnceLock::new();
    BUILT.get_or_init(|| {
        // Of this process alone: another one may be compiling too.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(folder.path().join("device.h"), DEVICE).unwrap();
        let entries = SOURCES.map(|source| Ok((source.name, open(&compile(folder.path(), source)?))));
        entries.into_iter().collect::<Result<_, String>>().map(Libraries)
    })
}

/// Whether kernels can be emulated; a machine without a C++ compiler says so aloud, and with `CI` set it fails.
#[allow(clippy::print_stderr, reason = "a proof that was not tried says so")]
pub(super) fn possible(what: &str) -> bool {
    match libraries() {
        Ok(_) => true,
        Err(reason) if std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED: {what}: {reason}");
            false
        }
        Err(reason) => panic!("{what}: {reason}"),
    }
}

/// Memory that begins at a multiple of 16 bytes.
#[derive(Clone, PartialEq)]
pub(super) struct Buffer(Vec<u128>);

impl Buffer {
    /// Filled with ones: no number in any float type.
    pub(super) fn new(bytes: usize) -> Self {
        Self(vec![u128::MAX; bytes.div_ceil(16).max(1)])
    }

    pub(super) fn of<T: Copy>(values: &[T]) -> Self {
        let buffer = Self::new(size_of_val(values));
        // SAFETY: the buffer is large enough; plain values.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.0.as_ptr().cast_mut().cast(), values.len());
        }
        buffer
    }

    pub(super) fn at(&self) -> Address {
        Address(self.0.as_ptr() as u64)
    }

    pub(super) fn read<T: Copy>(&self, count: usize) -> Vec<T> {
        assert!(count * size_of::<T>() <= self.0.len() * 16);
        // SAFETY: inside the buffer; callers read numbers.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<T>(), count).to_vec() }
    }

    /// Values of a float type.
    pub(super) fn floats(dtype: DType, values: impl Iterator<Item = f64>) -> Self {
        match dtype {
            DType::Bf16 => Self::of(&values.map(|v| bf16::from_f32(v as f32)).collect::<Vec<_>>()),
            DType::F16 => Self::of(&values.map(|v| f16::from_f32(v as f32)).collect::<Vec<_>>()),
            _ => Self::of(&values.map(|v| v as f32).collect::<Vec<_>>()),
        }
    }

    pub(super) fn widened(&self, dtype: DType, count: usize) -> Vec<f64> {
        match dtype {
            DType::Bf16 => self.read::<bf16>(count).iter().map(|v| v.to_f64()).collect(),
            DType::F16 => self.read::<f16>(count).iter().map(|v| v.to_f64()).collect(),
            _ => self.read::<f32>(count).iter().map(|v| f64::from(*v)).collect(),
        }
    }
}

/// Runs what is enqueued at once, threads and blocks in order or in the opposite one.
pub(super) struct Emulation {
    backwards: bool,
    scratch: RefCell<Vec<Buffer>>,
}

impl Emulation {
    pub(super) fn new(backwards: bool) -> Self {
        Self { backwards, scratch: RefCell::default() }
    }
}

fn failed(source_file: &str, reason: &str) -> RuntimeError {
    RuntimeError::Kernel { source_file: source_file.to_owned(), reason: reason.to_owned() }
}

/// Values at an address.
fn view(dtype: DType, at: Address, count: usize) -> Vec<f64> {
    let bytes = count * dtype.bytes();
    let buffer = Buffer::new(bytes);
    // SAFETY: callers give addresses of that many values.
    unsafe {
        std::ptr::copy_nonoverlapping(at.0 as *const u8, buffer.0.as_ptr().cast_mut().cast(), bytes);
    }
    buffer.widened(dtype, count)
}

impl Queue for Emulation {
    fn launch(&self, mut launch: Launch<'_>) -> Result<(), RuntimeError> {
        let libraries = libraries().as_ref().map_err(|e| failed(launch.source.name, e))?;
        let (name, mut pointers) = (CString::new(launch.kernel).unwrap(), launch.arguments.pointers());
        let (grid, threads, shared) = (launch.grid.as_ptr(), launch.threads, launch.shared_bytes);
        let entry = libraries.0[launch.source.name];
        // SAFETY: the arguments are those of the kernel's parameters; proofs run one at a time in each library.
        let complaint = unsafe {
            let _turn = TURN.lock();
            let words = entry(name.as_ptr(), grid, threads, shared, self.backwards, pointers.as_mut_ptr());
            (!words.is_null()).then(|| CStr::from_ptr(words).to_string_lossy().into_owned())
        };
        complaint.map_or(Ok(()), |words| Err(failed(launch.source.name, &words)))
    }

    fn multiply(&self, p: &Product) -> Result<(), RuntimeError> {
        let (a, b) = (view(p.dtype, p.a.0, p.m * p.k), view(p.dtype, p.b.0, p.k * p.n));
        let bias = if p.bias == Address::NONE { vec![0.0; p.n] } else { view(p.dtype, p.bias, p.n) };
        let left = |i: usize, k: usize| if p.a.1 { a[k * p.m + i] } else { a[i * p.k + k] };
        let right = |k: usize, j: usize| if p.b.1 { b[j * p.k + k] } else { b[k * p.n + j] };
        let sum = |i: usize, j: usize| (0..p.k).map(|k| left(i, k) * right(k, j)).sum::<f64>() + bias[j];
        let out = Buffer::floats(p.dtype, (0..p.m * p.n).map(|at| sum(at / p.n, at % p.n)));
        self.copy(out.at(), p.out, p.m * p.n * p.dtype.bytes())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), RuntimeError> {
        // SAFETY: callers give addresses of that many bytes.
        unsafe { std::ptr::copy(from.0 as *const u8, to.0 as *mut u8, bytes) };
        Ok(())
    }

    fn scratch(&self, bytes: usize) -> Result<Address, RuntimeError> {
        let buffer = Buffer::new(bytes);
        let at = buffer.at();
        self.scratch.borrow_mut().push(buffer);
        Ok(at)
    }
}

/// A library runs one block at a time.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
