//! The decision between engines, kept as long as what it was made from: per boot, kernel, KVM, processor and program.

use posada_vmm::probe::Decision;
use serde::{Deserialize, Serialize};
use std::arch::x86_64::__cpuid;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, fs, io, process};

/// What a decision holds for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The boot of the host.
    boot: String,
    /// Its kernel: release and build.
    kernel: String,
    /// Its processor.
    processor: String,
    /// This program.
    program: String,
    /// The device and its modules.
    kvm: Vec<String>,
}

impl Key {
    /// This host, now.
    pub fn of_host() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_string();
        let program = fs::metadata("/proc/self/exe").map_or(String::new(), |file| {
            format!("{} {} {} {}", file.dev(), file.ino(), file.size(), file.mtime())
        });
        Self {
            boot: read("/proc/sys/kernel/random/boot_id"),
            kernel: format!(
                "{} {}",
                read("/proc/sys/kernel/osrelease"),
                read("/proc/sys/kernel/version")
            ),
            processor: format!(
                "{} microcode {}",
                processor_name(),
                read("/sys/devices/system/cpu/cpu0/microcode/version")
            ),
            program: format!("{} {program}", env!("CARGO_PKG_VERSION")),
            kvm: kvm(),
        }
    }
}

/// What tells one KVM from another: the device's node and its modules' parameters, sorted.
fn kvm() -> Vec<String> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let mut facts = Vec::new();
    if let Ok(node) = fs::metadata("/dev/kvm") {
        facts.push(format!("/dev/kvm {:x} {} {}", node.rdev(), node.ino(), node.ctime()));
    }
    for module in entries(Path::new("/sys/module")) {
        if !module.file_name().to_string_lossy().starts_with("kvm") {
            continue;
        }
        facts.push(module.path().display().to_string());
        for parameter in entries(&module.path().join("parameters")) {
            let value = fs::read_to_string(parameter.path()).unwrap_or_default();
            facts.push(format!("{} {}", parameter.path().display(), value.trim()));
        }
    }
    facts.sort();
    facts
}

/// Signature and brand of the host's processor (Intel SDM 2A, CPUID). /proc/cpuinfo has them too, and is slow where there
/// are many processors.
fn processor_name() -> String {
    let words = |leaf| {
        let result = __cpuid(leaf);
        [result.eax, result.ebx, result.ecx, result.edx]
    };
    let signature = words(1)[0];
    if words(0x8000_0000)[0] < 0x8000_0004 {
        return format!("{signature:#x}");
    }
    let brand = (0x8000_0002..=0x8000_0004).flat_map(words);
    let brand: Vec<u8> = brand.flat_map(u32::to_le_bytes).take_while(|byte| *byte != 0).collect();
    format!("{signature:#x} {}", String::from_utf8_lossy(&brand).trim())
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: Key,
    decision: Decision,
}

/// The file with the decision.
pub struct Cache(Option<PathBuf>);

impl Cache {
    /// The user's: `$XDG_CACHE_HOME/posada/accel.json`, by default below `~/.cache`. A user without a home has none.
    pub fn of_user() -> Self {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let folder = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Self(folder.map(|folder| folder.join("posada/accel.json")))
    }

    /// The decision for `key`, if there is one. A file that cannot be read or understood holds none.
    pub fn load(&self, key: &Key) -> Option<Decision> {
        let text = fs::read(self.0.as_ref()?).ok()?;
        match serde_json::from_slice::<Entry>(&text) {
            Ok(entry) => (entry.key == *key).then_some(entry.decision),
            Err(error) => {
                tracing::debug!(%error, "the cached choice of an engine is not understood");
                None
            }
        }
    }

    /// Keeps a decision, in place of any other, whole or not at all. If that fails the next start decides anew.
    pub fn store(&self, key: &Key, decision: &Decision) {
        let Some(path) = &self.0 else { return };
        let entry = Entry {
            key: key.clone(),
            decision: decision.clone(),
        };
        if let Err(error) = write(path, &entry) {
            tracing::info!(path = %path.display(), %error, "the choice of an engine cannot be kept");
        }
    }
}

fn write(path: &Path, entry: &Entry) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(entry)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension(format!("json.{}", process::id()));
    let result = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

#[cfg(test)]
pub mod testing {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A cache of a test's own.
    pub struct OwnCache(pub Cache, PathBuf);

    impl OwnCache {
        pub fn new() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let folder = env::temp_dir().join(format!("posada-accel-{}-{count}", process::id()));
            Self(Cache(Some(folder.join("posada/accel.json"))), folder)
        }

        pub fn file(&self) -> PathBuf {
            self.1.join("posada/accel.json")
        }
    }

    impl Drop for OwnCache {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::decision;
    use super::testing::OwnCache;
    use super::*;
    use posada_vmm::probe::Choice;

    #[test]
    fn a_decision_is_found_again_for_the_same_key_only() {
        let cache = OwnCache::new();
        let key = Key::of_host();
        assert_eq!(key, Key::of_host());
        assert_eq!(cache.0.load(&key), None);
        cache.0.store(&key, &decision(Choice::Kvm));
        assert_eq!(cache.0.load(&key), Some(decision(Choice::Kvm)));
        let changes: [fn(&mut Key); 5] = [
            |key| key.boot.push('x'),
            |key| key.kernel.push('x'),
            |key| key.processor.push('x'),
            |key| key.program.push('x'),
            |key| key.kvm.push("nested".into()),
        ];
        for change in changes {
            let mut other = key.clone();
            change(&mut other);
            assert_eq!(cache.0.load(&other), None, "{other:?}");
        }
        cache.0.store(&key, &decision(Choice::Emulation));
        assert_eq!(cache.0.load(&key), Some(decision(Choice::Emulation)));
        let folder = cache.file().parent().unwrap().to_path_buf();
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1, "only the file itself stays");
    }

    #[test]
    fn a_damaged_file_holds_nothing_and_is_replaced() {
        let cache = OwnCache::new();
        let key = Key::of_host();
        cache.0.store(&key, &decision(Choice::Kvm));
        let whole = fs::read(cache.file()).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"", b"{}", b"\xff\xfe"] {
            fs::write(cache.file(), damaged).unwrap();
            assert_eq!(cache.0.load(&key), None);
        }
        cache.0.store(&key, &decision(Choice::Kvm));
        assert!(cache.0.load(&key).is_some());
    }

    #[test]
    fn without_a_place_nothing_is_kept_and_nothing_fails() {
        let key = Key::of_host();
        for cache in [Cache(None), Cache(Some("/proc/no/such/accel.json".into()))] {
            cache.store(&key, &decision(Choice::Kvm));
            assert_eq!(cache.load(&key), None);
        }
    }
}
