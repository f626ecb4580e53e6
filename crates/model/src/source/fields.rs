//! Typed access to a model's metadata, whatever file they come from.

use std::path::Path;

use super::SourceError;
use crate::gguf::Value;

/// Metadata by key. The accessors' errors name the file and the key.
pub trait Fields {
    /// The file that holds them.
    fn path(&self) -> &Path;

    /// The value of a key, of whatever kind.
    fn get(&self, key: &str) -> Option<&Value>;

    /// A string.
    ///
    /// # Errors
    /// When the key is missing or of another kind; so for the accessors below.
    fn str(&self, key: &str) -> Result<&str, SourceError> {
        required(self, key, self.opt_str(key)?)
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    fn uint(&self, key: &str) -> Result<u64, SourceError> {
        required(self, key, self.opt_uint(key)?)
    }

    /// A float.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    fn float(&self, key: &str) -> Result<f64, SourceError> {
        required(self, key, self.opt_float(key)?)
    }

    /// An array of strings.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    fn strings(&self, key: &str) -> Result<&[String], SourceError> {
        match required(self, key, self.get(key))? {
            Value::Strings(v) => Ok(v),
            other => Err(kind(self, key, "an array of strings", other)),
        }
    }

    /// A string, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind; so for the accessors below.
    fn opt_str(&self, key: &str) -> Result<Option<&str>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(kind(self, key, "a string", other)),
        }
    }

    /// A non-negative integer, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    fn opt_uint(&self, key: &str) -> Result<Option<u64>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::U64(v)) => Ok(Some(*v)),
            Some(Value::I64(v)) if *v >= 0 => Ok(Some(*v as u64)),
            Some(other) => Err(kind(self, key, "a non-negative integer", other)),
        }
    }

    /// A float, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    fn opt_float(&self, key: &str) -> Result<Option<f64>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F64(v)) => Ok(Some(*v)),
            // JSON does not tell a whole float from an integer.
            Some(Value::U64(v)) => Ok(Some(*v as f64)),
            Some(Value::I64(v)) => Ok(Some(*v as f64)),
            Some(other) => Err(kind(self, key, "a float", other)),
        }
    }

    /// A bool, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    fn opt_bool(&self, key: &str) -> Result<Option<bool>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(kind(self, key, "a bool", other)),
        }
    }

    /// An array of integers, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    fn opt_ints(&self, key: &str) -> Result<Option<&[i64]>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Ints(v)) => Ok(Some(v)),
            Some(other) => Err(kind(self, key, "an array of integers", other)),
        }
    }

    /// An array of numbers, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    fn opt_floats(&self, key: &str) -> Result<Option<Vec<f64>>, SourceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Floats(v)) => Ok(Some(v.clone())),
            Some(Value::Ints(v)) => Ok(Some(v.iter().map(|v| *v as f64).collect())),
            Some(other) => Err(kind(self, key, "an array of numbers", other)),
        }
    }

    /// An error about a key or tensor that breaks a rule.
    fn field(&self, field: &str, expected: &str, got: &str) -> SourceError {
        SourceError::Field {
            path: self.path().to_owned(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }

    /// An error about something that this program does not do.
    fn unsupported(&self, field: &str, got: &str, supported: &str) -> SourceError {
        SourceError::Unsupported {
            path: self.path().to_owned(),
            field: field.to_owned(),
            got: got.to_owned(),
            supported: supported.to_owned(),
        }
    }
}

fn required<T>(fields: &(impl Fields + ?Sized), key: &str, value: Option<T>) -> Result<T, SourceError> {
    value.ok_or_else(|| SourceError::MissingKey { path: fields.path().to_owned(), key: key.to_owned() })
}

fn kind(fields: &(impl Fields + ?Sized), key: &str, expected: &'static str, got: &Value) -> SourceError {
    SourceError::KeyType { path: fields.path().to_owned(), key: key.to_owned(), expected, got: got.kind() }
}
