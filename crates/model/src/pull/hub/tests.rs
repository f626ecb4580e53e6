//! A hub of a few lines, on this machine.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::*;

/// Serves `files` of one model, each request on a connection of its own; notes the requests.
fn serve(files: Vec<(&'static str, Vec<u8>)>, damaged: bool) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(vec![]));
    let notes = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map(Result::unwrap)
                .take_while(|l| !l.is_empty())
                .collect();
            let path = lines[0].split(' ').nth(1).unwrap().to_owned();
            let range = lines.iter().find_map(|l| l.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
            let from: usize = range.as_ref().map_or(0, |r| r.trim_end_matches('-').parse().unwrap());
            let token = lines.iter().any(|l| l.to_lowercase().starts_with("authorization: bearer secret"));
            notes.lock().unwrap().push(format!("{path} {from} {token}"));
            let sibling = |(name, data): &(&str, Vec<u8>)| {
                let sha: String = Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect();
                serde_json::json!({"rfilename": name, "size": data.len(), "lfs": {"sha256": sha}})
            };
            let found = files.iter().find(|(n, _)| path.ends_with(&format!("/resolve/abc1/{n}")));
            let (status, body) = match found {
                _ if path == "/api/models/o/m?blobs=true" => {
                    let all: Vec<_> = files.iter().map(sibling).collect();
                    ("200 OK", serde_json::json!({"sha": "abc1", "siblings": all}).to_string().into_bytes())
                }
                Some((_, data)) => {
                    let mut data = data[from..].to_vec();
                    if damaged {
                        data[0] ^= 1;
                    }
                    (if from > 0 { "206 Partial Content" } else { "200 OK" }, data)
                }
                None => ("404 Not Found", vec![]),
            };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(&body).unwrap();
        }
    });
    (endpoint, seen)
}

fn pull_from(endpoint: &str, name: &str, models: &Path) -> Result<PathBuf, String> {
    let hub = Hub { endpoint: endpoint.to_owned(), token: Some("secret".into()) };
    hub.pull(name, models, &mut |_, _, _| {}).map_err(|e| e.to_string())
}

#[test]
fn a_folder_is_fetched_once_and_goes_on_where_it_stopped() {
    let files = vec![
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"[]".to_vec()),
        ("model.safetensors", vec![7; 5000]),
        ("README.md", b"no".to_vec()),
        ("pytorch_model.bin", b"no".to_vec()),
    ];
    let (endpoint, seen) = serve(files, false);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("o--m").join("abc1");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("model.safetensors.partial"), vec![7; 1234]).unwrap();
    assert_eq!(pull_from(&endpoint, "o/m", dir.path()).unwrap(), folder);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), vec![7; 5000]);
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert!(seen.lock().unwrap().contains(&"/o/m/resolve/abc1/model.safetensors 1234 true".to_owned()));
    let before = seen.lock().unwrap().len();
    pull_from(&endpoint, "o/m", dir.path()).unwrap();
    assert_eq!(seen.lock().unwrap().len(), before + 1, "only the question for the revision");
}

#[test]
fn damaged_files_and_wrong_names_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, _) = serve(vec![("config.json", b"{}".to_vec()), ("model.safetensors", vec![1; 9])], true);
    let e = pull_from(&endpoint, "o/m", dir.path()).unwrap_err();
    assert!(e.contains("SHA-256") && e.contains("run this again"), "{e}");
    assert_eq!(fs::read_dir(dir.path().join("o--m/abc1")).unwrap().count(), 0);
    assert!(pull_from(&endpoint, "o/other", dir.path()).unwrap_err().contains("no such model"));
    let e = pull_from("http://127.0.0.1:9", "o/m", dir.path()).unwrap_err();
    assert!(e.contains("cannot reach the hub"), "{e}");
}

#[test]
fn gguf_files_are_named_one_by_one() {
    let names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"];
    let (endpoint, _) = serve(names.map(|n| (n, n.as_bytes().to_vec())).to_vec(), false);
    let dir = tempfile::tempdir().unwrap();
    let e = pull_from(&endpoint, "o/m", dir.path()).unwrap_err();
    assert!(names.iter().all(|n| e.contains(n)), "{e}");
    let path = pull_from(&endpoint, "o/m/a-00001-of-00002.gguf", dir.path()).unwrap();
    assert!(path.ends_with("a-00001-of-00002.gguf") && path.with_file_name("a-00002-of-00002.gguf").exists());
    assert!(!path.with_file_name("b.gguf").exists());
    assert!(pull_from(&endpoint, "o/m/c.gguf", dir.path()).unwrap_err().contains("b.gguf"));
}

#[test]
fn names_of_files_stay_in_the_folder() {
    let of = |n: &str| Sibling { rfilename: n.into(), size: None, lfs: None };
    let all =
        ["config.json", "model.safetensors", "../model.safetensors", "onnx/model.safetensors", "model\\x.safetensors"];
    let got = wanted(&all.map(of), None).unwrap();
    assert_eq!(got.iter().map(|s| s.rfilename.as_str()).collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
}
