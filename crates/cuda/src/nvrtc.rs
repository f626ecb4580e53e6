//! NVIDIA's runtime compiler, found when it is needed.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::CudaError;

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// The compiler.
pub struct Nvrtc {
    create: Create,
    compile: Compile,
    cubin_size: Size,
    cubin: Text,
    log_size: Size,
    log: Text,
    destroy: Destroy,
    // Unloaded last.
    _libraries: Vec<Library>,
}

/// Machine code, and what the compiler says of it: registers, shared memory, spills.
pub struct Compiled {
    /// An ELF file.
    pub cubin: Vec<u8>,
    /// Lines of ptxas.
    pub log: String,
}

/// Opens a library so that later ones find it by its name.
fn open(path: impl libloading::AsFilename) -> Result<Library, libloading::Error> {
    // SAFETY: NVRTC's and its builtins' initializers only set up their own state.
    #[cfg(unix)]
    unsafe {
        use libloading::os::unix::{Library as Unix, RTLD_GLOBAL, RTLD_NOW};
        Unix::open(Some(path), RTLD_NOW | RTLD_GLOBAL).map(Library::from)
    }
    // SAFETY: as above.
    #[cfg(not(unix))]
    unsafe {
        Library::new(path)
    }
}

fn in_folder(folder: &Path, start: &str) -> Option<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).collect();
    files.retain(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(start)));
    files.sort();
    files.into_iter().next()
}

impl Nvrtc {
    /// Loads the compiler from a folder, else from `KVQUANT_NVRTC`, else from where the system keeps libraries.
    ///
    /// # Errors
    /// It is not there.
    pub fn load(folder: Option<&Path>) -> Result<Self, CudaError> {
        let folder = folder.map(Path::to_path_buf).or_else(|| std::env::var_os("KVQUANT_NVRTC").map(PathBuf::from));
        let mut tried = Vec::new();
        if let Some(folder) = folder {
            if let Some(found) = Self::from_folder(&folder, &mut tried) {
                return Ok(found);
            }
            return Err(CudaError::NoCompiler { tried: tried.join(", ") });
        }
        for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"] {
            match open(name).map(|l| Self::bind(vec![l])) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => tried.push(format!("{name} lacks functions")),
                Err(e) => tried.push(e.to_string()),
            }
        }
        for folder in ["/usr/local/cuda/lib64", "/usr/local/cuda-13.0/lib64", "/usr/local/cuda-13/lib64"] {
            if let Some(found) = Self::from_folder(Path::new(folder), &mut tried) {
                return Ok(found);
            }
        }
        Err(CudaError::NoCompiler { tried: tried.join(", ") })
    }

    fn from_folder(folder: &Path, tried: &mut Vec<String>) -> Option<Self> {
        let Some(main) = in_folder(folder, "libnvrtc.so") else {
            tried.push(format!("{} has no libnvrtc.so", folder.display()));
            return None;
        };
        // The compiler asks for its builtins by name.
        let builtins = in_folder(folder, "libnvrtc-builtins.so").and_then(|p| open(p).ok());
        match open(&main) {
            Ok(l) => Self::bind(builtins.into_iter().chain([l]).collect()),
            Err(e) => {
                tried.push(e.to_string());
                None
            }
        }
    }

    fn bind(libraries: Vec<Library>) -> Option<Self> {
        let library = libraries.last()?;
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11.2; the functions live as long as the library,
        // which Self keeps.
        unsafe {
            Some(Nvrtc {
                create: *library.get::<Create>(b"nvrtcCreateProgram\0").ok()?,
                compile: *library.get::<Compile>(b"nvrtcCompileProgram\0").ok()?,
                cubin_size: *library.get::<Size>(b"nvrtcGetCUBINSize\0").ok()?,
                cubin: *library.get::<Text>(b"nvrtcGetCUBIN\0").ok()?,
                log_size: *library.get::<Size>(b"nvrtcGetProgramLogSize\0").ok()?,
                log: *library.get::<Text>(b"nvrtcGetProgramLog\0").ok()?,
                destroy: *library.get::<Destroy>(b"nvrtcDestroyProgram\0").ok()?,
                _libraries: libraries,
            })
        }
    }

    /// Compiles a text.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile(&self, name: &str, text: &str, options: &[String]) -> Result<Compiled, String> {
        let text = CString::new(text).map_err(|_| "the text holds a zero byte".to_string())?;
        let name = CString::new(name).map_err(|_| "the name holds a zero byte".to_string())?;
        let options: Vec<CString> = options
            .iter()
            .map(|o| CString::new(o.as_str()).map_err(|_| "an option holds a zero byte".to_string()))
            .collect::<Result<_, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: all strings end in zero and outlive the calls; buffers have the sizes that NVRTC just gave; the program
        // is destroyed once.
        unsafe {
            let made = (self.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null());
            if made != 0 {
                return Err(format!("NVRTC cannot make a program: error {made}"));
            }
            let result = (self.compile)(program, pointers.len() as c_int, pointers.as_ptr());
            let take = |size: Size, get: Text| {
                let mut n = 0;
                if size(program, &mut n) != 0 {
                    return Vec::new();
                }
                let mut bytes = vec![0u8; n];
                if get(program, bytes.as_mut_ptr().cast()) != 0 { Vec::new() } else { bytes }
            };
            let log = String::from_utf8_lossy(&take(self.log_size, self.log)).trim_end_matches('\0').to_string();
            let cubin = if result == 0 { take(self.cubin_size, self.cubin) } else { Vec::new() };
            (self.destroy)(&mut program);
            if cubin.is_empty() { Err(format!("error {result}: {log}")) } else { Ok(Compiled { cubin, log }) }
        }
    }
}
