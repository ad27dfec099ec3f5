//! Compiling by NVRTC, with what was compiled before kept on disk.
#![allow(unsafe_code, reason = "calls NVRTC")]

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::{Architecture, COMMON, Source};
use crate::cuda::libraries::NVRTC;
use crate::error::{Result, RuntimeError};
use crate::file::{hexadecimal, sha256_bytes, write_atomically};

/// What the assembler says of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// The kernel.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of shared memory of a block, without what the launch adds.
    pub shared_bytes: u32,
    /// Bytes of registers that a thread keeps in memory for want of room.
    pub spilled_bytes: u32,
}

/// A source compiled for one architecture.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The machine code, for the driver to load.
    pub cubin: Vec<u8>,
    /// The assembler's figures of each kernel, by name.
    pub kernels: Vec<KernelInfo>,
}

/// NVRTC, open.
#[derive(Debug)]
pub struct Compiler {
    version: (i32, i32),
    cache: Option<PathBuf>,
}

impl Compiler {
    /// The compiler where one is installed; machine code is kept in a folder of `cache` where one is given.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] when there is no NVRTC.
    pub fn open(cache: Option<&Path>) -> Result<Self> {
        // What was opened by its path is found by its name from then on.
        let complaint = NVRTC.complaint();
        // SAFETY: asks the dynamic loader for the library by its usual names.
        if complaint.is_some() || !unsafe { sys::is_culib_present() } {
            return Err(RuntimeError::ProviderUnavailable {
                provider: "cuda".to_owned(),
                reason: complaint.unwrap_or_else(|| format!("{NVRTC} has another name than expected")),
                remedy: NVRTC.install.to_owned(),
            });
        }
        let mut version = (0, 0);
        // SAFETY: two places for the answer.
        check("its version", unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) })?;
        NVRTC.same_as(&format!("{}.{}", version.0, version.1))?;
        Ok(Self { version, cache: cache.map(|c| c.join("kernels")) })
    }

    /// NVRTC's version: major, minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Machine code of a source, from the cache where it was compiled before.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] with the compiler's words, [`RuntimeError::Io`] when it cannot be kept.
    pub fn compile(&self, source: &Source, architecture: Architecture) -> Result<Compiled> {
        let text = whole(source);
        let options = options(source, architecture);
        let Some(cache) = &self.cache else { return compile(source.name, &text, &options) };
        let stem = cache.join(format!("{}-{architecture}-{}", source.name, self.key(&text, &options)));
        let (cubin, log) = (stem.with_added_extension("cubin"), stem.with_added_extension("log"));
        if let (Ok(cubin), Ok(log)) = (fs::read(&cubin), fs::read_to_string(&log)) {
            return Ok(Compiled { cubin, kernels: figures(&log) });
        }
        fs::create_dir_all(cache).map_err(|e| RuntimeError::io("create", cache, e))?;
        let (compiled, words) = compile_with_log(source.name, &text, &options)?;
        write_atomically(&log, |out| out.write_all(words.as_bytes()))?;
        write_atomically(&cubin, |out| out.write_all(&compiled.cubin))?;
        Ok(compiled)
    }

    /// What the machine code depends on.
    fn key(&self, text: &str, options: &[String]) -> String {
        let mut hash = Sha256::new();
        for part in [text, &options.join(" "), &format!("{}.{}", self.version.0, self.version.1)] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hexadecimal(&hash.finalize()[..12])
    }
}

impl Source {
    /// SHA-256 of all that is compiled: machine code of another text is not of this source.
    pub fn sha256(&self) -> String {
        sha256_bytes(whole(self).as_bytes())
    }
}

/// The source with what it begins with; messages name the files.
fn whole(source: &Source) -> String {
    let parts = COMMON.into_iter().chain([(source.name, source.text)]);
    parts.fold(String::new(), |whole, (name, text)| whole + "#line 1 \"" + name + "\"\n" + text)
}

fn options(source: &Source, architecture: Architecture) -> Vec<String> {
    let common =
        [format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "--ptxas-options=-v".into()];
    common.into_iter().chain(source.options.iter().map(|&o| o.to_owned())).collect()
}

fn compile(name: &str, text: &str, options: &[String]) -> Result<Compiled> {
    compile_with_log(name, text, options).map(|(compiled, _)| compiled)
}

/// A program of NVRTC, destroyed with its owner.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `nvrtcCreateProgram` and destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn compile_with_log(name: &str, text: &str, options: &[String]) -> Result<(Compiled, String)> {
    let c_string = |s: &str| CString::new(s).map_err(|e| failed(name, e.to_string()));
    let (c_name, c_text) = (c_string(name)?, c_string(text)?);
    let options: Vec<CString> = options.iter().map(|o| c_string(o)).collect::<Result<_>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = Program(ptr::null_mut());
    // SAFETY: C strings and places for answers that outlive the calls; buffers are as large as NVRTC says.
    unsafe {
        let none = ptr::null();
        let (text, name) = (c_text.as_ptr(), c_name.as_ptr());
        check("a program", sys::nvrtcCreateProgram(&raw mut program.0, text, name, 0, none, none))?;
        let status = sys::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr());
        let mut size = 0;
        check("its log", sys::nvrtcGetProgramLogSize(program.0, &raw mut size))?;
        let mut log = vec![0_u8; size.max(1)];
        check("its log", sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()))?;
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(c_name.to_string_lossy().as_ref(), log.trim().to_owned()));
        }
        check("machine code", sys::nvrtcGetCUBINSize(program.0, &raw mut size))?;
        let mut cubin = vec![0_u8; size];
        check("machine code", sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()))?;
        Ok((Compiled { cubin, kernels: figures(&log) }, log))
    }
}

fn failed(source: &str, reason: String) -> RuntimeError {
    RuntimeError::Kernel { source_file: source.to_owned(), reason }
}

fn check(what: &str, status: sys::nvrtcResult) -> Result<()> {
    if status == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(failed("NVRTC", format!("it gives no {what}: {status:?}")))
}

/// The number before `unit` in a line.
fn before(line: &str, unit: &str) -> Option<u32> {
    line.split_once(unit)?.0.split_whitespace().last()?.parse().ok()
}

/// The assembler's figures in a log.
fn figures(log: &str) -> Vec<KernelInfo> {
    let (mut kernels, mut name, mut spilled) = (Vec::new(), None, 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("entry function '") {
            name = rest.split('\'').next().map(str::to_owned);
        } else if let Some(bytes) = before(line, " bytes spill stores") {
            spilled = bytes;
        } else if let Some(registers) = before(line, " registers")
            && let Some(name) = name.take()
        {
            let shared_bytes = before(line, " bytes smem").unwrap_or(0);
            kernels.push(KernelInfo { name, registers, shared_bytes, spilled_bytes: spilled });
        }
    }
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_figures_are_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'b_f32' for 'sm_80'\n\
            ptxas info    : Function properties for b_f32\n    16 bytes stack frame, 12 bytes spill stores, 16 bytes \
            spill loads\nptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 416 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'a' for 'sm_80'\n    0 bytes stack frame, 0 bytes spill stores, \
            0 bytes spill loads\nptxas info    : Used 26 registers, used 0 barriers\n";
        let expected = [("a", 26, 0, 0), ("b_f32", 40, 512, 12)];
        let got: Vec<_> = figures(log);
        let got: Vec<_> =
            got.iter().map(|k| (k.name.as_str(), k.registers, k.shared_bytes, k.spilled_bytes)).collect();
        assert_eq!(got, expected);
    }
}
