//! Models of the Hugging Face hub, by ORG/NAME (the safetensors and what belongs to them) or ORG/NAME/FILE.gguf.
//!
//! A revision gets a folder of its own. Files are fetched to `*.partial`, which a later call goes on with, compared with
//! the size and, where the hub tells it, the SHA-256, and renamed.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Progress, PullError, Store, failed};

const ENDPOINT: &str = "https://huggingface.co";
/// What belongs to the weights.
const SMALL: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
const INDEX: &str = "model.safetensors.index.json";
/// Without a byte for so long, a transfer is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the hub says of a model.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize, Clone)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize, Clone)]
struct Lfs {
    sha256: Option<String>,
}

/// Fetches `name`, which is ORG/NAME or ORG/NAME/FILE.gguf; returns the folder or the file.
pub(super) fn pull(name: &str, store: &Store, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    let endpoint = env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty()).unwrap_or_else(|| ENDPOINT.to_owned());
    let token = env::var("HF_TOKEN").ok().filter(|t| !t.is_empty());
    Hub { endpoint, token }.pull(name, store.folder(), progress)
}

struct Hub {
    endpoint: String,
    token: Option<String>,
}

impl Hub {
    fn pull(&self, name: &str, models: &Path, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
        let mut parts = name.splitn(3, '/');
        let (org, model, file) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next());
        let url = format!("{}/api/models/{org}/{model}?blobs=true", self.endpoint);
        let broken = |problem: String| PullError::Hub { url: url.clone(), problem };
        progress("asking the hub", 0, 1);
        let mut response = self.get(&url, 0)?;
        let info: Info =
            response.body_mut().read_json().map_err(|e| broken(format!("not what the hub answers: {e}")))?;
        if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(broken(format!("the revision is {:?}, not a hash", info.sha)));
        }
        let wanted = wanted(&info.siblings, file).map_err(broken)?;
        let folder = models.join(format!("{org}--{model}")).join(&info.sha);
        fs::create_dir_all(&folder).map_err(failed("making the folder", &folder))?;
        for sibling in &wanted {
            let url = format!("{}/{org}/{model}/resolve/{}/{}", self.endpoint, info.sha, sibling.rfilename);
            self.fetch(&url, sibling, &folder, progress)?;
        }
        Ok(match (file, wanted.first()) {
            (Some(_), Some(first)) => folder.join(&first.rfilename),
            _ => folder,
        })
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, PullError> {
        let broken = |problem: String| PullError::Hub { url: url.to_owned(), problem };
        let mut request =
            ureq::get(url).config().timeout_connect(Some(PATIENCE)).timeout_recv_response(Some(PATIENCE)).build();
        if let Some(token) = &self.token {
            // Not sent on to the hosts that the hub redirects to.
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        request.call().map_err(|e| match e {
            ureq::Error::StatusCode(code @ (401 | 403)) => {
                broken(format!("the hub refuses ({code}); accept the model's terms there and set HF_TOKEN"))
            }
            ureq::Error::StatusCode(404) => broken("the hub has no such model or file; check the name".into()),
            ureq::Error::StatusCode(code) => broken(format!("the hub answers {code}; try again later")),
            e => broken(format!("cannot reach the hub: {e}; check the network, or give the path of a file or folder")),
        })
    }

    /// Fetches one file, unless it is there; goes on where an earlier call stopped.
    fn fetch(&self, url: &str, s: &Sibling, folder: &Path, progress: &mut Progress<'_>) -> Result<(), PullError> {
        let path = folder.join(&s.rfilename);
        if path.exists() {
            return Ok(());
        }
        let broken = |problem: String| PullError::Hub { url: url.to_owned(), problem };
        let partial = folder.join(format!("{}.partial", s.rfilename));
        let total = s.size.unwrap_or(0);
        let mut have = fs::metadata(&partial).map_or(0, |m| m.len());
        if s.size.is_none() || have > total {
            have = 0;
        }
        if s.size.is_none_or(|size| have < size) {
            let mut response = self.get(url, have)?;
            if response.status().as_u16() != 206 {
                have = 0;
            }
            let file = OpenOptions::new().create(true).write(true).truncate(have == 0).append(have > 0).open(&partial);
            let mut file = file.map_err(failed("writing", &partial))?;
            let mut body = response.body_mut().as_reader();
            let mut buffer = vec![0; 1 << 20];
            loop {
                let n = body.read(&mut buffer).map_err(|e| {
                    broken(format!("the transfer broke off: {e}; run this again: what was fetched is kept"))
                })?;
                if n == 0 {
                    break;
                }
                file.write_all(&buffer[..n]).map_err(failed("writing", &partial))?;
                have += n as u64;
                progress(&s.rfilename, have, total.max(have));
                if s.size.is_some_and(|size| have > size) {
                    break;
                }
            }
            file.sync_all().map_err(failed("writing", &partial))?;
        }
        let wrong = |what: String| {
            // Best effort: the error that matters is that of the content.
            let _ = fs::remove_file(&partial);
            broken(format!("{what}; what came was removed: run this again"))
        };
        if let Some(size) = s.size.filter(|size| *size != have) {
            return Err(wrong(format!("{have} bytes came, the hub promised {size}")));
        }
        if let Some(expected) = s.lfs.as_ref().and_then(|l| l.sha256.as_ref()) {
            let got = hash(&partial)?;
            if got != expected.to_ascii_lowercase() {
                return Err(wrong(format!("the file has SHA-256 {got}, the hub promised {expected}")));
            }
        }
        fs::rename(&partial, &path).map_err(failed("renaming", &partial))
    }
}

fn hash(path: &Path) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(failed("reading", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(failed("reading", path))?;
        if n == 0 {
            return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hash.update(&buffer[..n]);
    }
}

/// The files to fetch: of a GGUF model the file and the other parts of a split one, else weights and what belongs to them.
fn wanted(all: &[Sibling], file: Option<&str>) -> Result<Vec<Sibling>, String> {
    // Only files of the repository's own folder: their names are file names here.
    let here: Vec<&Sibling> = all.iter().filter(|s| super::plain(&s.rfilename)).collect();
    let find = |name: &str| here.iter().find(|s| s.rfilename == name).map(|s| (*s).clone());
    let ggufs: Vec<&str> = here.iter().map(|s| s.rfilename.as_str()).filter(|n| n.ends_with(".gguf")).collect();
    if let Some(name) = file {
        let first = find(name).ok_or_else(|| format!("the model has no {name}; it has: {}", ggufs.join(", ")))?;
        let mut out = vec![first];
        if let Some((stem, count)) = name.split_once("-00001-of-") {
            let others = ggufs.iter().filter(|n| n.starts_with(stem) && n.ends_with(count) && **n != name);
            out.extend(others.filter_map(|n| find(n)));
        }
        return Ok(out);
    }
    let weights = |s: &&&Sibling| s.rfilename.starts_with("model") && s.rfilename.ends_with(".safetensors");
    let mut out: Vec<Sibling> = SMALL.iter().filter_map(|n| find(n)).collect();
    match find(INDEX) {
        Some(index) => {
            out.push(index);
            out.extend(
                here.iter().filter(weights).filter(|s| s.rfilename != "model.safetensors").map(|s| (*s).clone()),
            );
        }
        None => out.extend(find("model.safetensors")),
    }
    if out.iter().any(|s| s.rfilename.ends_with(".safetensors")) && find("config.json").is_some() {
        return Ok(out);
    }
    let files =
        if ggufs.is_empty() { "no GGUF file either".to_owned() } else { format!("name one of {}", ggufs.join(", ")) };
    Err(format!("the model has no config.json with model*.safetensors; {files}"))
}

#[cfg(test)]
mod tests;
