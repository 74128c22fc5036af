//! Files that an image store reads and that anybody may have written: manifests, names, layers with right checksums, qcow2
//! disks. What is accepted is written as it was read, and no layer leads outside of its disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_store::layer::{GRANULE, Header, Layer, Source};
use posada_store::{Digest, ImportOptions, Manifest, Name, Quiet, Store};
use std::path::Path;
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_64;

const BASE: usize = 3 * GRANULE as usize + 512;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("base"), [7; BASE]).expect("a root disk");
    folder
});

fn layer(folder: &Path, input: &[u8]) {
    let (base, path) = (folder.join("base"), folder.join("layer"));
    let digest = Digest::of(b"base");
    let mut file = input.to_vec();
    file.resize(file.len().max(4096), 0);
    file[..16].copy_from_slice(b"PosadaLy\x01\0\0\0\0\x10\0\0");
    // A disk of a few MiB at most, so that an input can be all of its file.
    file[19..24].fill(0);
    file[24..32].copy_from_slice(&(BASE as u64).to_le_bytes());
    file[32..64].copy_from_slice(digest.bytes());
    let sum = xxh3_64(&file[..64]);
    file[64..72].copy_from_slice(&sum.to_le_bytes());
    let Ok(header) = Header::parse(&file) else { return };
    // As long as it must be, and now and then a little shorter.
    file.resize(((1 << 20) + header.size as usize).saturating_sub(usize::from(input[0] == 1)), 0);
    std::fs::write(&path, &file).expect("a layer");
    let Ok(layer) = Layer::open(&path, &base, digest, false) else { return };
    let mut at = 0;
    while at < layer.size() {
        let (source, length) = layer.locate(at, layer.size() - at);
        assert!(length > 0);
        match source {
            Source::Layer(from) => assert!(from + length <= file.len() as u64),
            Source::Base(from) => assert!(from + length <= BASE as u64),
            Source::Zero => {}
        }
        at += length;
    }
    assert_eq!(at, layer.size());
    let mut before = vec![0; layer.size() as usize];
    layer.read_at(&mut before, 0).expect("its content");
    let offset = u64::from(input[0]) * 512 % layer.size();
    let length = 512.min(layer.size() - offset);
    layer.write_at(&vec![9; length as usize], offset).expect("a write");
    before[offset as usize..][..length as usize].fill(9);
    drop(layer);
    let layer = Layer::open(&path, &base, digest, true).expect("the same layer");
    let mut after = vec![0; layer.size() as usize];
    layer.read_at(&mut after, 0).expect("its content");
    assert!(before == after);
}

fuzz_target!(|input: &[u8]| {
    let Some((which, input)) = input.split_first() else { return };
    let folder = FOLDER.path();
    match which % 4 {
        0 => {
            if let Ok(manifest) = Manifest::parse(input) {
                let bytes = manifest.to_bytes().expect("what was read can be written");
                assert_eq!(Manifest::parse(&bytes), Ok(manifest));
            }
        }
        1 => {
            if let Ok(name) = String::from_utf8_lossy(input).parse::<Name>() {
                assert_eq!(name.to_string().parse::<Name>().expect("a name"), name);
            }
        }
        2 if !input.is_empty() => layer(folder, input),
        2 => {}
        _ => {
            let path = folder.join("disk.qcow2");
            std::fs::write(&path, [b"QFI\xfb", input].concat()).expect("a disk");
            let store = Store::open(&folder.join("store")).expect("a store");
            let options = ImportOptions {
                largest: 16 << 20,
                ..Default::default()
            };
            let ingest = store.ingest().expect("the right to add");
            let imported = ingest.import_disk(&path, &options, &Quiet);
            drop(ingest);
            if imported.is_ok() {
                store.collect_garbage().expect("what is of no image");
            }
        }
    }
});
