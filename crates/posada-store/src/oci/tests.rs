//! Images from archives and from a registry that does all that registries do.

mod fixture;

use super::*;
use crate::manifest::tests::example;
use crate::{Problem, Quiet};
use fixture::{Build, Item as F, Registry as Fake, Serve, debugfs, listing};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

struct Place {
    folder: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let ingest = store.ingest().unwrap();
        let kernel = ingest.add(&mut &b"kernel"[..], Path::new("kernel"), &Quiet).unwrap();
        ingest
            .commit(&example(Some(kernel), None), &["kernel".parse().unwrap()])
            .unwrap();
        drop(ingest);
        Self { folder, store }
    }

    fn kernel(&self) -> Image {
        self.store.image("kernel").unwrap()
    }

    fn pull(&self, name: &str) -> Result<Digest, Error> {
        let kernel = self.kernel();
        self.store.pull(&name.parse().unwrap(), &options(&kernel), &Quiet)
    }

    fn import(&self, archive: &[u8]) -> Result<(Digest, Vec<Name>), Error> {
        let path = self.folder.path().join("archive.tar");
        fs::write(&path, archive).unwrap();
        let kernel = self.kernel();
        self.store.import_oci(&path, None, &options(&kernel), &Quiet)
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.store.image(name).unwrap().disk().unwrap()
    }

    /// Nothing but what belongs there.
    fn assert_clean(&self) {
        assert_eq!(self.store.verify(true, &Quiet).unwrap(), Vec::<Problem>::new());
        assert_eq!(fs::read_dir(self.store.root().join("tmp")).unwrap().count(), 0);
    }
}

fn options(kernel: &Image) -> PullOptions<'_> {
    PullOptions {
        room: 16 << 20,
        largest: 64 << 20,
        ..PullOptions::new(kernel)
    }
}

/// A small system with everything that is hard.
fn system() -> Build {
    Build::new()
        .layer(&[
            F::folder("etc", 0o755),
            F::file("etc/passwd", "root:x:0:0::/root:/bin/sh\n"),
            F::file("etc/gone", "x"),
            F::folder("usr/lib", 0o755),
            F::symlink("lib", "usr/lib"),
            F::file("bin/su", "su").owned(0, 0, 0o4755),
            F::file("home/user/file", "mine").owned(1000, 70_000, 0o640),
            F::hard_link("home/user/same", "home/user/file"),
            F::file("cache/old", "old"),
            F::file("cache/deep/old", "old"),
            F::device("devices/null", 1, 3),
            F::fifo("devices/pipe"),
            F::file("bin/ping", "ping").attribute("security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ])
        .layer(&[
            F::file("lib/added.so", "library"),
            F::file("etc/.wh.gone", ""),
            F::file("cache/new", "new"),
            F::file("cache/.wh..wh..opq", ""),
            F::file("we\"ird <2> naïve", "weird"),
            F::file("<2>", "number"),
            F::file("etc/passwd", "root:x:0:0:new:/root:/bin/sh\n"),
            F::file("empty", ""),
            F::file("a/very/long/path/that/needs/an/extension/of/tar/because/it/has/more/than/one/hundred/characters/in/it/x", "long"),
        ])
}

fn check_system(disk: &Path) {
    assert_eq!(debugfs(disk, "cat /etc/passwd"), "root:x:0:0:new:/root:/bin/sh\n");
    assert_eq!(debugfs(disk, "cat /usr/lib/added.so"), "library");
    assert_eq!(debugfs(disk, "cat \"/we\"\"ird <2> naïve\""), "weird");
    assert_eq!(debugfs(disk, "cat \"./<2>\""), "number");
    assert_eq!(listing(disk, "/etc"), ["passwd"]);
    assert_eq!(listing(disk, "/cache"), ["new"]);
    assert_eq!(listing(disk, "/tmp"), [""; 0]);
    let file = debugfs(disk, "stat /home/user/same");
    for part in [
        "Mode:  0640",
        "User:  1000",
        "Group: 70000",
        "Links: 2",
        "mtime: 0x00000064",
    ] {
        assert!(file.contains(part), "{part}: {file}");
    }
    assert!(debugfs(disk, "stat /bin/su").contains("Mode:  04755"));
    assert!(debugfs(disk, "stat /devices/null").contains("major/minor number: 01:03"));
    assert!(debugfs(disk, "stat /devices/pipe").contains("Type: FIFO"));
    assert!(debugfs(disk, "stat /lib").contains("Fast link dest: \"usr/lib\""));
    assert!(debugfs(disk, "stat /tmp").contains("Mode:  01777"));
    assert!(debugfs(disk, "stat /bin/ping").contains("security.capability (20)"));
    let long =
        "/a/very/long/path/that/needs/an/extension/of/tar/because/it/has/more/than/one/hundred/characters/in/it/x";
    assert_eq!(debugfs(disk, &format!("cat {long}")), "long");
    fixture::fsck(disk);
}

#[test]
fn archives_of_all_kinds_become_bootable_disks() {
    let mut disks = Vec::new();
    for archive in [
        system().oci_archive("example/system:1"),
        fixture::gzip(&system().oci_archive("example/system:1")),
        system().compressed("zstd").oci_archive("example/system:1"),
        system().docker_archive("example/system:1"),
    ] {
        let place = Place::new();
        let (id, names) = place.import(&archive).unwrap();
        assert_eq!(names, ["example/system:1".parse().unwrap()]);
        let image = place.store.image("example/system:1").unwrap();
        let manifest = image.manifest();
        assert_eq!((image.id(), manifest.kernel), (id, place.kernel().manifest().kernel));
        assert_eq!(
            (&manifest.config.cmd[..], &manifest.config.workdir[..]),
            (&["/bin/sh".to_string()][..], "/root")
        );
        check_system(&image.disk().unwrap());
        // The same again is not made again.
        assert_eq!(place.import(&archive).unwrap().0, id);
        place.assert_clean();
        disks.push(manifest.disk.unwrap().digest);
    }
    // One manifest, one disk, to the byte.
    assert_eq!(disks[0], disks[1]);
}

#[test]
fn no_file_of_an_image_leaves_its_root() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap().trim_start_matches('/').to_string();
    for (files, why) in [
        (vec![F::file("../evil", "x")], "outside of its root"),
        (vec![F::file("a/../../evil", "x")], "outside of its root"),
        (
            vec![F::hard_link("passwd", "../../etc/passwd")],
            "hard link leads to no file",
        ),
        (
            vec![F::hard_link("passwd", "/etc/passwd")],
            "hard link leads to no file",
        ),
        (vec![F::file("f", "x"), F::file("f/below", "x")], "no folder"),
        (
            vec![F::symlink("a", "b"), F::symlink("b", "a"), F::file("a/x", "x")],
            "no folder",
        ),
        (vec![F::file("line\nbreak", "x")], "line break"),
        (vec![F::file(&"n".repeat(300), "x")], "too long"),
        (vec![F::file(&"n/".repeat(3000), "x")], "too long"),
        (vec![F::file("x/.wh...", "")], "whiteout"),
        (vec![F::file("big", &"x".repeat(65 << 20))], "that are accepted"),
    ] {
        let place = Place::new();
        let error = place
            .import(&Build::new().layer(&files).oci_archive("a/b:1"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{why}: {error}");
        place.assert_clean();
        assert_eq!(place.store.list().unwrap().len(), 1);
    }
    // Links that lead out lead nowhere but into the root.
    let place = Place::new();
    let archive = Build::new().layer(&[
        F::symlink("absolute", outside.path().to_str().unwrap()),
        F::symlink("up", &format!("../../../../{target}")),
        F::folder(&target, 0o755),
        F::file("absolute/one", "1"),
        F::file("up/two", "2"),
        F::file("/rooted", "3"),
    ]);
    place.import(&archive.oci_archive("a/b:1")).unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    let disk = place.disk("a/b:1");
    assert_eq!(listing(&disk, &format!("/{target}")), ["one", "two"]);
    assert_eq!(debugfs(&disk, "cat /rooted"), "3");
}

#[test]
fn damaged_archives_are_refused() {
    let good = system().oci_archive("a/b:1");
    let at = good.windows(7).position(|window| window == b"diff_id").unwrap();
    let mut flipped = good.clone();
    flipped[at] ^= 1;
    let wrong_layer = system().with_wrong_diff_id().oci_archive("a/b:1");
    let arm = system().architecture("arm64");
    for (archive, why) in [
        (flipped, "is damaged: it should be"),
        (wrong_layer, "an unpacked layer of"),
        (good[..at].to_vec(), "cut off"),
        (good[..good.len() - 1524].to_vec(), "cut off"),
        (arm.oci_archive("a/b:1"), "it is for linux/arm64"),
        (b"nonsense".to_vec(), "archive"),
        (vec![0; 2048], "neither an index.json"),
    ] {
        let place = Place::new();
        let error = place.import(&archive).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
        place.assert_clean();
    }
}

#[test]
fn what_is_added_is_part_of_the_image() {
    let place = Place::new();
    let agent = place.folder.path().join("agent");
    fs::write(&agent, "agent").unwrap();
    let path = place.folder.path().join("archive.tar");
    fs::write(&path, system().oci_archive("a/b:1")).unwrap();
    let kernel = place.kernel();
    let mut with = options(&kernel);
    let plain = place.store.import_oci(&path, None, &with, &Quiet).unwrap().0;
    with.added.push(AddedFile {
        path: "lib/agent".into(),
        mode: 0o755,
        from: agent,
    });
    let added = place.store.import_oci(&path, None, &with, &Quiet).unwrap().0;
    assert_ne!(plain, added);
    let disk = place.disk("a/b:1");
    assert_eq!(debugfs(&disk, "cat /usr/lib/agent"), "agent");
    assert_eq!(place.store.import_oci(&path, None, &with, &Quiet).unwrap().0, added);
}

#[test]
fn an_image_is_pulled_and_known_again() {
    let fake = Fake::start(system(), Serve::default());
    let place = Place::new();
    let name = fake.name();
    let id = place.pull(&name).unwrap();
    check_system(&place.disk(&name));
    place.assert_clean();
    assert_eq!(fs::read_dir(place.store.root().join("partial")).unwrap().count(), 0);
    let blobs = fake.blobs_served();
    assert_eq!(place.pull(&name).unwrap(), id);
    assert_eq!(fake.blobs_served(), blobs);
    // By the digest of its manifest too.
    let Origin::Oci { manifest, .. } = &place.store.image(&name).unwrap().manifest().origin.clone() else {
        panic!("of another origin");
    };
    let repository = name.rsplit_once(':').unwrap().0;
    assert_eq!(place.pull(&format!("{repository}@{manifest}")).unwrap(), id);
}

#[test]
fn a_registry_that_cuts_connections_only_takes_longer() {
    for ranges in [true, false] {
        // In the middle of each blob, twice.
        let serve = Serve {
            cuts: 2,
            ranges,
            ..Serve::default()
        };
        let fake = Fake::start(system().layer(&[F::noise("noise", 300_000)]), serve);
        let place = Place::new();
        place.pull(&fake.name()).unwrap();
        check_system(&place.disk(&fake.name()));
    }
}

#[test]
fn a_half_pulled_image_goes_on_where_it_stopped() {
    let build = system().layer(&[F::noise("noise", 300_000)]);
    let serve = Serve {
        cuts: u32::MAX,
        cut_at: Some(100_000),
        ranges: true,
        ..Serve::default()
    };
    let fake = Fake::start(build.clone(), serve);
    let place = Place::new();
    let error = place.pull(&fake.name()).unwrap_err().to_string();
    assert!(
        error.contains("the connection failed") && error.contains("(5 tries)"),
        "{error}"
    );
    place.assert_clean();
    let kept: u64 = fs::read_dir(place.store.root().join("partial"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(kept >= 100_000, "{kept}");
    // Not garbage yet.
    place.store.collect_garbage().unwrap();
    let ranges = Serve {
        ranges: true,
        ..Serve::default()
    };
    fake.serve(ranges);
    let before = fake.bytes_served();
    place.pull(&fake.name()).unwrap();
    check_system(&place.disk(&fake.name()));
    let whole = build.layers_length() as u64;
    assert!(fake.bytes_served() - before < whole - 90_000, "all anew");
}

#[test]
fn wrong_content_is_refused_and_not_kept() {
    for (serve, why) in [
        (
            Serve {
                flip: Some("blobs"),
                ..Serve::default()
            },
            "is damaged: it should be",
        ),
        (
            Serve {
                flip: Some("manifests"),
                ..Serve::default()
            },
            "is damaged: it should be",
        ),
        (
            Serve {
                longer: true,
                ..Serve::default()
            },
            "longer than the",
        ),
    ] {
        let fake = Fake::start(system(), serve);
        let place = Place::new();
        let error = place.pull(&fake.name()).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
        assert_eq!(place.store.list().unwrap().len(), 1);
        place.assert_clean();
        fake.serve(Serve::default());
        place.pull(&fake.name()).unwrap();
    }
}

#[test]
fn registries_that_refuse_say_what_to_do() {
    let fake = Fake::start(
        system(),
        Serve {
            user: Some(("me", "secret")),
            ..Serve::default()
        },
    );
    let place = Place::new();
    let error = place.pull(&fake.name()).unwrap_err().to_string();
    assert!(error.contains("check user and password"), "{error}");
    let kernel = place.kernel();
    let mut options = options(&kernel);
    options.credentials = Some(Credentials {
        user: "me".into(),
        password: "secret".into(),
    });
    assert!(!format!("{options:?}").contains("secret"));
    place
        .store
        .pull(&fake.name().parse().unwrap(), &options, &Quiet)
        .unwrap();
    let repository = fake.name().rsplit_once(':').unwrap().0.to_string();
    let error = place
        .store
        .pull(&format!("{repository}:other").parse().unwrap(), &options, &Quiet)
        .unwrap_err();
    assert!(error.to_string().contains("check the name and the tag"), "{error}");
    drop(fake);
    let error = place.pull("127.0.0.1:1/a/b:1").unwrap_err().to_string();
    assert!(error.contains("(5 tries)"), "{error}");
}

#[test]
fn concurrent_pulls_of_one_image_download_it_once() {
    let fake = Fake::start(system().layer(&[F::noise("noise", 100_000)]), Serve::default());
    let place = Place::new();
    let ids: Vec<Digest> = std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let store = Store::open(place.store.root()).unwrap();
                    let kernel = store.image("kernel").unwrap();
                    store
                        .pull(&fake.name().parse().unwrap(), &options(&kernel), &Quiet)
                        .unwrap()
                })
            })
            .collect();
        pulls.into_iter().map(|pull| pull.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(place.store.list().unwrap().len(), 2);
    place.assert_clean();
}

#[test]
fn a_pull_can_be_cancelled_and_tells_how_far_it_is() {
    struct Until {
        bytes: AtomicU64,
        most: u64,
    }
    impl Progress for Until {
        fn update(&self, step: Step, done: u64, total: Option<u64>) {
            if step == Step::Download {
                assert!(done <= total.unwrap());
                self.bytes.store(done, Ordering::Relaxed);
            }
        }
        fn cancelled(&self) -> bool {
            self.bytes.load(Ordering::Relaxed) > self.most
        }
    }
    let fake = Fake::start(system().layer(&[F::noise("noise", 1_000_000)]), Serve::default());
    let place = Place::new();
    let kernel = place.kernel();
    let progress = Until {
        bytes: 0.into(),
        most: 300_000,
    };
    let pulled = place
        .store
        .pull(&fake.name().parse().unwrap(), &options(&kernel), &progress);
    assert!(matches!(pulled, Err(Error::Cancelled)), "{pulled:?}");
    place.assert_clean();
}

#[test]
fn a_full_disk_ends_an_import_and_leaves_nothing() {
    crate::tests::in_small_file_system("oci::tests::full_disk");
}

#[test]
#[ignore = "run by another test, on a file system of 1 MiB"]
fn full_disk() {
    let store = Store::open(&crate::tests::small()).unwrap();
    let ingest = store.ingest().unwrap();
    let kernel = ingest.add(&mut &b"kernel"[..], Path::new("kernel"), &Quiet).unwrap();
    ingest
        .commit(&example(Some(kernel), None), &["kernel".parse().unwrap()])
        .unwrap();
    drop(ingest);
    let place = Place {
        folder: tempfile::tempdir().unwrap(),
        store,
    };
    // Too much for the files, and for the disk that they make.
    for noise in [2 << 20, 600 << 10] {
        let archive = system().layer(&[F::noise("noise", noise)]).oci_archive("a/b:1");
        let error = place.import(&archive).unwrap_err().to_string();
        assert!(error.contains("free some space"), "{error}");
        place.assert_clean();
        assert_eq!(place.store.list().unwrap().len(), 1);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

    /// Layers that are right up to a few bytes, whose checksums are made right again.
    #[test]
    fn no_damage_of_a_layer_makes_the_merge_panic(hits in proptest::collection::vec((0usize..20_000, 0u8..=255), 1..8)) {
        let work = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(work.path(), 1 << 20);
        for layer in system().layers() {
            let mut layer = layer.clone();
            for (at, value) in &hits {
                let at = at % layer.len();
                layer[at] = *value;
                let block = at / 512 * 512;
                let mut header = tar::Header::from_byte_slice(&layer[block..block + 512]).clone();
                header.set_cksum();
                layer[block..block + 512].copy_from_slice(header.as_bytes());
            }
            let _ = tree.apply(&layer[..], "damaged", &Quiet);
        }
    }
}
