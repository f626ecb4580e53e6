//! Writes small GGUF files, sound or not: nothing is checked here.

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    Str(&'static str),
    String(String),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(u8),
    Strs(Vec<&'static str>),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    /// Type id and the bytes of the value.
    Raw(u32, Vec<u8>),
}

#[derive(Clone)]
struct Tensor {
    name: String,
    dims: Vec<u64>,
    ty: u32,
    offset: u64,
}

/// Collects the parts of a file.
#[derive(Clone)]
pub struct Builder {
    version: u32,
    metas: Vec<(String, Meta)>,
    tensors: Vec<Tensor>,
    data: Vec<u8>,
}

fn string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, ty: u32, n: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(ty.to_le_bytes());
            out.extend((n as u64).to_le_bytes());
        };
        match self {
            Self::Str(s) => {
                out.extend(8u32.to_le_bytes());
                string(out, s);
            }
            Self::String(s) => {
                out.extend(8u32.to_le_bytes());
                string(out, s);
            }
            Self::U32(v) => {
                out.extend(4u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Self::I32(v) => {
                out.extend(5u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Self::F32(v) => {
                out.extend(6u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Self::Bool(v) => {
                out.extend(7u32.to_le_bytes());
                out.push(*v);
            }
            Self::Strs(v) => {
                array(out, 8, v.len());
                v.iter().for_each(|s| string(out, s));
            }
            Self::Strings(v) => {
                array(out, 8, v.len());
                v.iter().for_each(|s| string(out, s));
            }
            Self::I32s(v) => {
                array(out, 5, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::Raw(ty, bytes) => {
                out.extend(ty.to_le_bytes());
                out.extend(bytes);
            }
        }
    }
}

impl Builder {
    pub fn new() -> Self {
        Self { version: 3, metas: vec![], tensors: vec![], data: vec![] }
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metas.push((key.to_owned(), value));
        self
    }

    /// The same key with another value, or nothing of the key.
    pub fn replace(mut self, key: &str, value: Option<Meta>) -> Self {
        self.metas.retain(|(k, _)| k != key);
        if let Some(value) = value {
            self.metas.push((key.to_owned(), value));
        }
        self
    }

    /// A tensor at the next multiple of 32.
    pub fn tensor(mut self, name: &str, dims: &[u64], ty: u32, data: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(data);
        // A tensor without data still needs a place of its own.
        if data.is_empty() {
            self.data.push(0);
        }
        self.tensor_at(name, dims, ty, offset)
    }

    /// An entry of the tensor table alone.
    pub fn tensor_at(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Self {
        self.tensors.push(Tensor { name: name.to_owned(), dims: dims.to_vec(), ty, offset });
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metas.len() as u64).to_le_bytes());
        for (key, value) in &self.metas {
            string(&mut out, key);
            value.write(&mut out);
        }
        for t in &self.tensors {
            string(&mut out, &t.name);
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        if !self.tensors.is_empty() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&self.data);
        }
        out
    }
}
