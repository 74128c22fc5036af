use super::*;
use crate::spec::Boot;

/// A folder that goes with its value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("posada-store-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn places(&self) -> Places {
        Places {
            data: self.0.join("data"),
            run: self.0.join("run"),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const ID: &str = "0123456789ab";

fn kept() -> Kept {
    Kept {
        name: "web".into(),
        created: 7,
        key: None,
        spec: Spec::new(Boot::Snapshot { place: "/s".into() }),
    }
}

#[test]
fn a_store_has_one_daemon() {
    let scratch = Scratch::new("one");
    let first = Store::open(scratch.places()).unwrap();
    let error = Store::open(scratch.places()).unwrap_err().to_string();
    let pid = format!("process {}", std::process::id());
    assert!(error.contains("another daemon") && error.contains(&pid), "{error}");
    drop(first);
    Store::open(scratch.places()).unwrap();
}

#[test]
fn what_is_kept_is_found_again() {
    let scratch = Scratch::new("again");
    let store = Store::open(scratch.places()).unwrap();
    let folder = store.create(ID, &kept()).unwrap();
    let state = Progress {
        wanted: true,
        ..Progress::default()
    };
    folder.write_state(&state).unwrap();
    drop(store);
    let store = Store::open(scratch.places()).unwrap();
    assert_eq!(store.vms().unwrap(), [(ID.to_string(), folder.clone())]);
    assert_eq!(folder.spec().unwrap(), kept());
    assert_eq!(folder.state().unwrap(), state);
    assert_eq!(folder.exit(), None);
    store.remove(ID).unwrap();
    assert_eq!(store.vms().unwrap(), []);
}

#[test]
fn nobody_else_can_look() {
    let scratch = Scratch::new("private");
    let store = Store::open(scratch.places()).unwrap();
    let folder = store.create(ID, &kept()).unwrap();
    store.places().make_run().unwrap();
    for path in [
        &store.places().data,
        &store.places().run,
        &folder.0,
        &folder.0.join("spec.json"),
    ] {
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o077, 0, "{}", path.display());
    }
}

#[test]
fn a_file_that_is_damaged_is_named_and_what_is_half_made_goes() {
    let scratch = Scratch::new("damaged");
    let store = Store::open(scratch.places()).unwrap();
    let folder = store.create(ID, &kept()).unwrap();
    for content in [&b""[..], b"{", b"[]", &[0xff; 100], &[b' '; 2 << 20]] {
        fs::write(folder.0.join("spec.json"), content).unwrap();
        let error = folder.spec().unwrap_err().to_string();
        assert!(error.contains("spec.json is damaged"), "{error}");
        fs::write(folder.0.join("state.json"), content).unwrap();
        assert!(folder.state().is_err());
        fs::write(folder.0.join("exit.json"), content).unwrap();
        assert_eq!(folder.exit(), None);
    }
    let half = scratch.places().data.join("vms/.ba9876543210");
    fs::create_dir(&half).unwrap();
    assert_eq!(store.vms().unwrap().len(), 1);
    assert!(!half.exists());
}

#[test]
fn a_write_that_fails_leaves_the_older_file() {
    let scratch = Scratch::new("older");
    let path = scratch.0.join("file");
    write_whole(&path, b"old").unwrap();
    // In the way of the new one.
    fs::create_dir(scratch.0.join("file.new")).unwrap();
    assert!(write_whole(&path, b"new").is_err());
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_lock_says_who_has_it() {
    let scratch = Scratch::new("lock");
    let store = Store::open(scratch.places()).unwrap();
    let folder = store.create(ID, &kept()).unwrap();
    let Lock::Mine(file) = folder.lock().unwrap() else {
        panic!("nobody has it");
    };
    assert!(matches!(folder.lock().unwrap(), Lock::Theirs(None)));
    let holder = Holder {
        pid: 7,
        start_time: 8,
        sockets: "/run".into(),
        up: false,
    };
    sign(&file, &holder).unwrap();
    let up = Holder {
        up: true,
        ..holder.clone()
    };
    sign(&file, &up).unwrap();
    assert!(matches!(folder.lock().unwrap(), Lock::Theirs(Some(found)) if found == up));
    // What an inherited file keeps.
    let inherited = file.try_clone().unwrap();
    drop(file);
    assert!(matches!(folder.lock().unwrap(), Lock::Theirs(Some(_))));
    drop(inherited);
    assert!(matches!(folder.lock().unwrap(), Lock::Mine(_)));
}

#[test]
fn a_path_that_no_socket_can_have_is_refused() {
    let scratch = Scratch::new("long");
    let mut places = scratch.places();
    places.run = scratch.0.join("x".repeat(100));
    let error = places.make_run().unwrap_err().to_string();
    assert!(error.contains("XDG_RUNTIME_DIR"), "{error}");
}

#[test]
fn exits_mean_what_they_say() {
    let exit = |reason: &str, code| Exit {
        code,
        reason: reason.into(),
        message: None,
        time: 0,
        told: false,
    };
    assert_eq!(exit("power-off", 0).cause(), Cause::Done);
    assert_eq!(exit("debug-exit", 0).cause(), Cause::Done);
    assert_eq!(exit("debug-exit", 3).cause(), Cause::Failure);
    assert_eq!(exit("crash", 2).cause(), Cause::Failure);
    assert_eq!(exit("killed", 137).cause(), Cause::Failure);
    assert_eq!(exit("saved", 0).cause(), Cause::Wish);
    let told = Exit {
        told: true,
        ..exit("signal", 143)
    };
    assert_eq!(told.cause(), Cause::Wish);
}
