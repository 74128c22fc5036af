//! Snapshots that were changed by somebody who knows the format: some values of a real one's manifest and state, and some
//! bytes of its memory and index, are others, and all checksums are right. Whatever it is then, it is refused or restored.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_engine::cpu::CpuModel;
use posada_vmm::console::ConsoleConfig;
use posada_vmm::control::{Control, Ending};
use posada_vmm::remote::{Client, Request};
use posada_vmm::snapshot::{KeepDisks, Snapshot};
use posada_vmm::vm::{self, Config};
use posada_x86::Emulator;
use serde_json::{Value, json, value::RawValue};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use xxhash_rust::xxh3::xxh3_64;

/// RAM of the VM, and the most that a changed one may ask for.
const MEMORY: u64 = 2 << 20;
const MOST_MEMORY: u64 = 64 << 20;

/// A real snapshot, and where its changed copy lies.
struct Base {
    place: PathBuf,
    manifest: Value,
    state: Value,
    memory: Vec<u8>,
    index: Vec<u8>,
}

static BASE: LazyLock<Base> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("posada-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for temporary files");
    let (kernel, socket, place) = (folder.join("kernel"), folder.join("socket"), folder.join("snapshot"));
    fs::write(&kernel, halting_kernel()).expect("room for a kernel");
    let config = config(kernel, Some(socket.clone()));
    let control = Control::new();
    let stop = control.clone();
    let vm = std::thread::spawn(move || run(&config, &control));
    let mut client = loop {
        if let Ok(client) = Client::connect(&socket) {
            break client;
        }
        std::thread::yield_now();
    };
    let request = Request::SnapshotSave {
        place: place.clone(),
        force: true,
        stop: false,
        disks: KeepDisks::Copy,
    };
    client.ask(&request, &mut |_| {}).expect("the VM can be saved");
    stop.end(Ending::Quit);
    vm.join().expect("the VM's thread").expect("the VM runs");
    let read = |name: &str| fs::read(place.join(name)).expect("the snapshot has it");
    let json = |name: &str| serde_json::from_slice::<Value>(&read(name)).expect("it is JSON");
    Base {
        manifest: json("manifest.json")["snapshot"].take(),
        state: json("state.json"),
        memory: read("memory"),
        index: read("memory.index"),
        place,
    }
});

/// A multiboot kernel of one instruction.
fn halting_kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const HAS_ADDRESSES: u32 = 1 << 16;
    let (load, entry) = (0x10_0000, 0x10_0020);
    let checksum = 0_u32.wrapping_sub(MAGIC + HAS_ADDRESSES);
    let header = [MAGIC, HAS_ADDRESSES, checksum, load, load, 0, 0, entry];
    let code = [0xf4, 0xeb, 0xfd]; // hlt; jmp to it
    header.iter().flat_map(|word| word.to_le_bytes()).chain(code).collect()
}

fn config(kernel: PathBuf, control: Option<PathBuf>) -> Config {
    Config {
        kernel,
        initramfs: None,
        cmdline: String::new(),
        disks: Vec::new(),
        model: CpuModel::new(&Emulator::offer(), 2, None).expect("a model without a baseline"),
        memory: MEMORY,
        console: ConsoleConfig::None,
        virtio_console: true,
        vsock: None,
        gdb: None,
        debug_exit: true,
        no_reboot: true,
        control,
        paused: false,
        restore: None,
    }
}

fn run(config: &Config, control: &Arc<Control>) -> Result<vm::Report, vm::Error> {
    vm::run(config, &|ram, model| Ok(Arc::new(Emulator::new(ram, model)?)), control)
}

/// Numbers out of the fuzzer's bytes.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self, bytes: usize) -> Option<u64> {
        let (head, tail) = self.0.split_at_checked(bytes)?;
        self.0 = tail;
        Some(head.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

/// All values inside `value` that hold no others.
fn leaves<'v>(value: &'v mut Value, list: &mut Vec<&'v mut Value>) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| leaves(value, list)),
        Value::Object(values) => values.values_mut().for_each(|value| leaves(value, list)),
        leaf => list.push(leaf),
    }
}

fn change(value: &mut Value, choices: &mut Choices<'_>) -> Option<()> {
    let mut list = Vec::new();
    leaves(value, &mut list);
    let (which, how) = (choices.next(2)? as usize % list.len(), choices.next(1)?);
    let leaf = &mut *list[which];
    *leaf = match (how % 8, &*leaf) {
        (0, _) => Value::Null,
        (1, _) => json!(how & 8 != 0),
        // One digit of what is hexadecimal, mostly.
        (2..=4, Value::String(text)) if text.is_ascii() && !text.is_empty() => {
            let mut bytes = text.clone().into_bytes();
            let at = choices.next(2)? as usize % bytes.len();
            bytes[at] = b"0123456789abcdef-x"[choices.next(1)? as usize % 18];
            json!(String::from_utf8(bytes).expect("ASCII stays ASCII"))
        }
        (2, _) => json!(choices.next(1)?),
        (3, _) => json!(choices.next(8)?),
        (4, _) => json!(1_u64 << (choices.next(1)? % 64)),
        (5, _) => json!([choices.next(1)?]),
        (6, _) => json!({}),
        (_, old) => json!(old.as_u64().unwrap_or(0).wrapping_add(how)),
    };
    Some(())
}

fn change_byte(bytes: &mut [u8], choices: &mut Choices<'_>) -> Option<()> {
    let at = choices.next(3)? as usize % bytes.len();
    bytes[at] = choices.next(1)? as u8;
    Some(())
}

fuzz_target!(|input: &[u8]| {
    let base = &*BASE;
    let (mut manifest, mut state) = (base.manifest.clone(), base.state.clone());
    let (mut memory, mut index) = (base.memory.clone(), base.index.clone());
    let mut choices = Choices(input);
    while let Some(what) = choices.next(1) {
        let changed = match what % 8 {
            0..=3 => change(&mut state, &mut choices),
            4 | 5 => change(&mut manifest["vm"], &mut choices),
            6 => change_byte(&mut index, &mut choices),
            _ => change_byte(&mut memory, &mut choices),
        };
        if changed.is_none() {
            break;
        }
    }
    if manifest["vm"]["memory"]
        .as_u64()
        .is_some_and(|memory| memory > MOST_MEMORY)
    {
        return;
    }
    let state = serde_json::to_vec(&state).expect("it came from JSON");
    for (name, bytes) in [("state.json", &state), ("memory", &memory), ("memory.index", &index)] {
        fs::write(base.place.join(name), bytes).expect("room for a snapshot");
        manifest["files"][name] = json!({
            "length": bytes.len(),
            "xxh3": (name != "memory").then(|| format!("{:016x}", xxh3_64(bytes))),
        });
    }
    let snapshot = serde_json::to_string(&manifest).expect("it came from JSON");
    let checksum = format!("{:016x}", xxh3_64(snapshot.as_bytes()));
    let snapshot = RawValue::from_string(snapshot).expect("it is JSON");
    let text = format!("{{\"format\":1,\"checksum\":\"{checksum}\",\"snapshot\":{snapshot}}}");
    fs::write(base.place.join("manifest.json"), text).expect("room for a snapshot");

    let Ok(snapshot) = Snapshot::open(&base.place) else {
        return;
    };
    if snapshot.model().fits(&Emulator::offer()).is_err() {
        return;
    }
    let own = config(PathBuf::new(), None);
    let Ok(config) = snapshot.into_config(Vec::new(), own) else {
        return;
    };
    // It ends before its first instruction: what guests do is another target's.
    let control = Control::new();
    control.end(Ending::Quit);
    let _ = run(&config, &control);
});
