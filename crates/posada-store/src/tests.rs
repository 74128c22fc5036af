//! The store as its users see it, with other processes and with damage.

use crate::manifest::Blob;
use crate::manifest::tests::example;
use crate::*;
use std::fs;
use std::io::Write;
use std::path::Path;

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    (folder, store)
}

fn add(store: &Store, content: &[u8]) -> Blob {
    let ingest = store.ingest().unwrap();
    ingest.add(&mut &content[..], Path::new("test"), &Quiet).unwrap()
}

/// An image with this kernel.
fn make(store: &Store, content: &[u8], names: &[&str]) -> Digest {
    let ingest = store.ingest().unwrap();
    let kernel = add(store, content);
    let names: Vec<Name> = names.iter().map(|name| name.parse().unwrap()).collect();
    ingest.commit(&example(Some(kernel), None), &names).unwrap()
}

fn blob_file(store: &Store, content: &[u8]) -> std::path::PathBuf {
    store.root().join("blobs/sha256").join(Digest::of(content).hex())
}

/// Changes a file that is there for reading only.
fn damage(path: &Path, content: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, content).unwrap();
}

#[test]
fn images_are_found_by_name_id_and_prefix() {
    let (_folder, store) = store();
    let id = make(&store, b"kernel", &["debian:12", "debian"]);
    for text in [
        "debian",
        "debian:12",
        "docker.io/library/debian",
        &id.to_string(),
        &id.hex(),
        &id.hex()[..8],
    ] {
        assert_eq!(store.resolve(text).unwrap(), id, "{text}");
    }
    let image = store.image("debian").unwrap();
    assert_eq!(fs::read(image.kernel().unwrap()).unwrap(), b"kernel");
    assert_eq!((image.initramfs(), image.disk(), image.id()), (None, None, id));
    let listed = store.list().unwrap();
    let names: Vec<String> = listed[0].names.iter().map(Name::to_string).collect();
    assert_eq!(
        (listed.len(), names),
        (1, vec!["debian:12".into(), "debian:latest".into()])
    );
    // Another process sees the same.
    assert_eq!(Store::open(store.root()).unwrap().resolve("debian").unwrap(), id);
}

#[test]
fn an_unknown_name_brings_the_nearest() {
    let (_folder, store) = store();
    make(&store, b"kernel", &["debian:12", "alpine"]);
    for (text, near) in [
        ("debain:12", "debian:12"),
        ("debain", "debian:12"),
        ("alpin", "alpine:latest"),
    ] {
        let error = store.image(text).unwrap_err().to_string();
        assert!(error.contains(&format!("did you mean {near}?")), "{error}");
    }
    let error = store.image("windows").unwrap_err().to_string();
    assert!(error.contains("list the images"), "{error}");
    let error = store.image("sha256:0123").unwrap_err().to_string();
    assert!(error.starts_with("there is no image sha256:0123"), "{error}");
}

#[test]
fn an_ambiguous_prefix_is_refused() {
    let (_folder, store) = store();
    let folder = store.root().join("images");
    for tail in ["0", "1"] {
        fs::write(folder.join(format!("{:0>63}{tail}.json", "")), "").unwrap();
    }
    assert!(matches!(store.resolve("0000"), Err(Error::Ambiguous { count: 2, .. })));
}

#[test]
fn a_removed_image_leaves_its_blobs_to_the_next_collection() {
    let (_folder, store) = store();
    let id = make(&store, b"one", &["a:1", "a:2"]);
    make(&store, b"two", &["b"]);
    store.remove("a:1").unwrap();
    assert_eq!(store.resolve("a:2").unwrap(), id);
    store.remove("a:2").unwrap();
    assert!(matches!(store.resolve(&id.hex()), Err(Error::Unknown { .. })));
    assert!(blob_file(&store, b"one").exists());
    let freed = store.collect_garbage().unwrap();
    assert_eq!((freed.blobs, freed.leftovers, freed.bytes), (1, 0, 4096));
    assert!(!blob_file(&store, b"one").exists() && blob_file(&store, b"two").exists());
    let all = make(&store, b"three", &["c:1", "c:2"]);
    store.remove(&all.hex()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn an_image_in_use_stays() {
    let (_folder, store) = store();
    make(&store, b"kernel", &["a", "b"]);
    let image = store.image("a").unwrap();
    // A name of several may go.
    store.remove("a").unwrap();
    let error = store.remove("b").unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert_eq!(store.collect_garbage().unwrap(), Freed::default());
    assert!(image.kernel().unwrap().exists() && store.resolve("b").is_ok());
    drop(image);
    store.remove("b").unwrap();
}

#[test]
fn garbage_is_not_collected_under_somebody_who_adds() {
    let (_folder, store) = store();
    let ingest = store.ingest().unwrap();
    let blob = add(&store, b"kernel");
    let error = store.collect_garbage().unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    ingest.commit(&example(Some(blob), None), &[]).unwrap();
    drop(ingest);
    assert_eq!(store.collect_garbage().unwrap(), Freed::default());
}

#[test]
fn leftovers_of_a_killed_process_are_garbage() {
    let (_folder, store) = store();
    fs::write(store.root().join("tmp/half"), [1; 5000]).unwrap();
    fs::write(store.root().join("partial/young"), [1; 5000]).unwrap();
    let old = fs::File::create(store.root().join("partial/old")).unwrap();
    old.set_modified(std::time::SystemTime::now() - 2 * PARTIAL_LIFE)
        .unwrap();
    add(&store, b"of no image");
    // Somebody's, and no leftover.
    fs::write(store.root().join("blobs/sha256/letter.txt"), "hello").unwrap();
    let freed = store.collect_garbage().unwrap();
    assert_eq!((freed.blobs, freed.leftovers), (1, 2));
    assert!(store.root().join("partial/young").exists() && store.root().join("blobs/sha256/letter.txt").exists());
}

#[test]
fn a_blob_is_kept_only_with_its_digest() {
    let (_folder, store) = store();
    let ingest = store.ingest().unwrap();
    let mut writer = ingest.blob().unwrap();
    writer.write_all(b"wrong").unwrap();
    let error = writer.finish(Some(Digest::of(b"right"))).err().unwrap();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    // One that is given up leaves nothing either.
    ingest.blob().unwrap().write_all(b"half").unwrap();
    for folder in ["tmp", "blobs/sha256"] {
        assert_eq!(fs::read_dir(store.root().join(folder)).unwrap().count(), 0);
    }
    let gone = Blob {
        digest: Digest::of(b"gone"),
        size: 4,
    };
    let error = ingest.commit(&example(Some(gone), None), &[]).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
}

#[test]
fn zeroes_take_no_space_and_change_no_digest() {
    use std::os::unix::fs::MetadataExt;
    let (_folder, store) = store();
    let mut content = vec![0; 300_001];
    content[100_000..110_000].fill(7);
    content[299_999] = 1;
    let ingest = store.ingest().unwrap();
    // In pieces that fit no page.
    let mut writer = ingest.blob().unwrap();
    for piece in content.chunks(7777) {
        writer.write_all(piece).unwrap();
    }
    let blob = writer.finish(Some(Digest::of(&content))).unwrap();
    assert_eq!(fs::read(blob_file(&store, &content)).unwrap(), content);
    assert_eq!(add(&store, &content), blob);
    let mut writer = ingest.blob().unwrap();
    writer.zeroes(1 << 30);
    writer.write_all(b"end").unwrap();
    let blob = writer.finish(None).unwrap();
    let file = fs::metadata(store.root().join("blobs/sha256").join(blob.digest.hex())).unwrap();
    assert_eq!((file.len(), blob.size), ((1 << 30) + 3, (1 << 30) + 3));
    assert!(file.blocks() <= 16, "{} blocks", file.blocks());
    assert!(file.permissions().readonly());
}

#[test]
fn damage_is_found_and_taken_away_and_what_is_sound_stays() {
    let (_folder, store) = store();
    let sound = make(&store, b"sound", &["sound"]);
    let flipped = make(&store, b"flipped", &["flipped"]);
    make(&store, b"short", &["short"]);
    let absent = make(&store, b"absent", &["absent"]);
    let garbled = make(&store, b"garbled", &["garbled"]);
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
    damage(&blob_file(&store, b"flipped"), b"flIpped");
    damage(&blob_file(&store, b"short"), b"sho");
    fs::remove_file(blob_file(&store, b"absent")).unwrap();
    damage(&store.root().join(format!("images/{}.json", garbled.hex())), b"{}");
    fs::write(
        store.root().join("names/nothing%3a1"),
        format!("{}\n", Digest::of(b"?")),
    )
    .unwrap();
    fs::write(store.root().join("images/notes.txt"), "hello").unwrap();

    assert!(matches!(store.image("absent"), Err(Error::Missing { image, .. }) if image == absent));
    assert!(matches!(store.image("short"), Err(Error::Missing { .. })));
    assert!(matches!(store.image("garbled"), Err(Error::Manifest { .. })));
    // What a damaged manifest needs is not known.
    assert!(matches!(store.collect_garbage(), Err(Error::Manifest { .. })));

    assert_eq!(store.verify(false, &Quiet).unwrap().len(), 5);
    let problems = store.verify(true, &Quiet).unwrap();
    assert_eq!(problems.len(), 7, "{problems:?}");
    let images = vec![flipped];
    let digest = Digest::of(b"flipped");
    assert!(problems.contains(&Problem::Corrupt { digest, images }));
    let moved = store.repair(&problems, &Quiet).unwrap();
    assert_eq!(moved.len(), 4, "{moved:?}");
    let notes = moved.iter().find(|path| path.to_str().unwrap().contains("notes"));
    assert_eq!(fs::read(notes.unwrap()).unwrap(), b"hello");

    // What is left is what only its maker can give.
    let left = store.verify(true, &Quiet).unwrap();
    let of = |problem: &Problem| matches!(problem, Problem::Missing { .. });
    assert!(
        left.len() == 4 && left.iter().filter(|p| of(p)).count() == 3,
        "{left:?}"
    );
    store.repair(&left, &Quiet).unwrap();
    store.collect_garbage().unwrap();
    assert_eq!(store.resolve("sound").unwrap(), sound);
    for content in [&b"flipped"[..], b"short", b"absent"] {
        add(&store, content);
    }
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
    assert!(store.image("flipped").is_ok());
}

#[test]
fn strange_folders_and_newer_stores_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("letter.txt"), "").unwrap();
    let error = Store::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::NotAStore { .. }), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    let (_folder, store) = store();
    damage(&store.root().join("posada-store"), b"{\"version\": 7}");
    let error = Store::open(store.root()).unwrap_err();
    assert!(matches!(error, Error::Version { version: 7, .. }), "{error}");
    damage(&store.root().join("posada-store"), b"what");
    assert!(matches!(Store::open(store.root()), Err(Error::Io { .. })));
}

#[test]
fn many_threads_on_one_store_lose_nothing() {
    let (_folder, store) = store();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            // A handle of its own, as another process has.
            let store = Store::open(store.root()).unwrap();
            scope.spawn(move || {
                for round in 0..8u8 {
                    // Half of the content is everybody's.
                    let content = [if round % 2 == 0 { 9 } else { thread }, round];
                    make(&store, &content, &[&format!("t{thread}:{round}")]);
                    match store.collect_garbage() {
                        Ok(_) | Err(Error::Busy { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
    assert_eq!(store.names().unwrap().len(), 32);
    assert_eq!(store.list().unwrap().len(), 20);
    for name in store.names().unwrap().keys() {
        store.image(&name.to_string()).unwrap();
    }
}

#[test]
fn processes_that_are_killed_leave_a_sound_store() {
    let (_folder, store) = store();
    let mut children: Vec<_> = (0..2)
        .map(|number| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "tests::add_for_ever", "--ignored"])
                .env("POSADA_STORE", store.root())
                .env("POSADA_NUMBER", number.to_string())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in &mut children {
        // The other goes on meanwhile.
        let before = store.names().unwrap().len();
        while store.names().unwrap().len() < before + 10 {
            assert!(child.try_wait().unwrap().is_none(), "ended by itself");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    store.collect_garbage().unwrap();
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
    for name in store.names().unwrap().keys() {
        store.image(&name.to_string()).unwrap();
    }
}

#[test]
#[ignore = "run by another test, which ends it"]
fn add_for_ever() {
    let store = Store::open(Path::new(
        &std::env::var_os("POSADA_STORE").expect("run by another test"),
    ))
    .unwrap();
    let number = std::env::var("POSADA_NUMBER").unwrap();
    for round in 0u64.. {
        make(
            &store,
            &[round.to_le_bytes(); 5000].concat(),
            &[&format!("p{number}:{round}")],
        );
    }
}

/// A full disk and a read-only home need a file system of their own, which only root can mount; in a mount namespace, so that
/// nothing is left. What `steps` writes is asserted on.
pub(crate) fn in_small_file_system(steps: &str) -> Option<()> {
    let probe = std::process::Command::new("unshare")
        .args(["-m", "-r", "true"])
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no user namespaces");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = format!(
        "mount -t tmpfs -o size=1m none {0} && export POSADA_SMALL={0}",
        folder.path().display()
    );
    let output = std::process::Command::new("unshare")
        .args(["-m", "-r", "sh", "-c"])
        .arg(format!("{mount} && \"$0\" --exact {steps} --ignored --nocapture"))
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    Some(())
}

pub(crate) fn small() -> std::path::PathBuf {
    std::env::var_os("POSADA_SMALL").expect("run by another test").into()
}

#[test]
fn a_full_disk_is_an_error_and_loses_nothing() {
    in_small_file_system("tests::full_disk");
}

#[test]
#[ignore = "run by another test, on a file system of 1 MiB"]
fn full_disk() {
    let store = Store::open(&small()).unwrap();
    let id = make(&store, b"kernel", &["a"]);
    let ingest = store.ingest().unwrap();
    let content = vec![7; 2 << 20];
    let error = ingest.add(&mut &content[..], Path::new("test"), &Quiet).unwrap_err();
    assert!(error.to_string().contains("free some space"), "{error}");
    drop(ingest);
    assert_eq!(store.collect_garbage().unwrap(), Freed::default());
    assert_eq!(store.image("a").unwrap().id(), id);
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
}

#[test]
fn a_read_only_store_can_be_used_and_says_why_it_cannot_be_changed() {
    in_small_file_system("tests::read_only");
}

#[test]
#[ignore = "run by another test, on a file system of its own"]
fn read_only() {
    let store = Store::open(&small()).unwrap();
    make(&store, b"kernel", &["a"]);
    let mount = ["-o", "remount,ro", store.root().to_str().unwrap()];
    assert!(
        std::process::Command::new("mount")
            .args(mount)
            .status()
            .unwrap()
            .success()
    );
    let store = Store::open(&small()).unwrap();
    let image = store.image("a").unwrap();
    assert!(image.kernel().is_some() && store.list().unwrap().len() == 1);
    assert_eq!(store.verify(true, &Quiet).unwrap(), []);
    drop(image);
    let ingest = store.ingest().unwrap();
    let error = ingest.add(&mut &b"x"[..], Path::new("test"), &Quiet).unwrap_err();
    assert!(
        error.to_string().contains("file system that can be written to"),
        "{error}"
    );
    drop(ingest);
    for error in [
        store.remove("a").unwrap_err(),
        store.tag("a", &"b".parse().unwrap()).unwrap_err(),
        Store::open(&small().join("new")).unwrap_err(),
    ] {
        assert!(error.to_string().contains("can be written to"), "{error}");
    }
}
