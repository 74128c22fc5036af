//! Compares a VM's layer with a plain raw file and with a qcow2 overlay (by imago) over the same root disk.
//! `cargo run --release -p posada-store --example layer_speed [FOLDER]`; the folder's file system is what is measured.

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage as _, StorageOpenOptions,
};
use posada_store::{Digest, Layer};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const SIZE: u64 = 1 << 30;
const COUNT: u64 = 20_000;
const FLUSHES: u64 = 200;

trait Disk {
    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    fn flush(&self) -> io::Result<()>;
}

impl Disk for File {
    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }
    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }
}

impl Disk for Layer {
    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_at(bytes, at)
    }
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_at(bytes, at)
    }
    fn flush(&self) -> io::Result<()> {
        Layer::flush(self)
    }
}

impl Disk for FormatAccess<Storage> {
    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        FormatAccess::read(self, bytes, at)
    }
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FormatAccess::write(self, bytes, at)
    }
    fn flush(&self) -> io::Result<()> {
        FormatAccess::flush(self)?;
        FormatAccess::sync(self)
    }
}

/// Pages in an order that visits each at most once.
fn page(number: u64) -> u64 {
    number * 99_991 % (SIZE / 4096) * 4096
}

fn timed(name: &str, what: &str, count: u64, mut each: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    let begin = Instant::now();
    for number in 0..count {
        each(number)?;
    }
    let nanoseconds = begin.elapsed().as_nanos() as u64 / count;
    println!("{name:6} {what:40} {:>10.2} µs", nanoseconds as f64 / 1000.0);
    Ok(())
}

fn measure(name: &str, disk: &dyn Disk) -> io::Result<()> {
    let mut bytes = [7; 4096];
    timed(name, "read 4 KiB of the root disk", COUNT, |number| {
        disk.read(&mut bytes, page(number))
    })?;
    let bytes = [8; 4096];
    timed(name, "write 4 KiB, the first time", COUNT, |number| {
        disk.write(&bytes, page(number))
    })?;
    timed(name, "flush after that", 1, |_| disk.flush())?;
    timed(name, "write 4 KiB again", COUNT, |number| {
        disk.write(&bytes, page(number))
    })?;
    let mut read = [0; 4096];
    timed(name, "read 4 KiB of what was written", COUNT, |number| {
        disk.read(&mut read, page(number))
    })?;
    timed(name, "write 4 KiB elsewhere and flush", FLUSHES, |number| {
        disk.write(&bytes, page(COUNT + number))?;
        disk.flush()
    })?;
    timed(name, "write 4 KiB in place and flush", FLUSHES, |number| {
        disk.write(&bytes, page(number))?;
        disk.flush()
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let under = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let folder = tempfile::tempdir_in(under)?;
    let base = folder.path().join("base");
    let file = File::create(&base)?;
    let bytes = vec![3; 1 << 20];
    for at in 0..SIZE >> 20 {
        file.write_all_at(&bytes, at << 20)?;
    }
    file.sync_all()?;
    let storage = |path: &Path, write| Storage::open(StorageOpenOptions::new().write(write).filename(path));
    for round in 0..2 {
        println!("round {round}");
        let raw = folder.path().join("raw");
        std::fs::copy(&base, &raw)?;
        let file = File::options().read(true).write(true).open(&raw)?;
        file.sync_all()?;
        measure("raw", &file)?;
        std::fs::remove_file(raw)?;

        let path = folder.path().join("layer");
        Layer::create(&path, &base, Digest::of(b"base"), SIZE)?;
        measure("layer", &Layer::open(&path, &base, Digest::of(b"base"), false)?)?;
        std::fs::remove_file(path)?;

        let path = folder.path().join("qcow2");
        File::create_new(&path)?;
        let below = Arc::new(FormatAccess::new(
            Raw::builder(storage(&base, false)?).open(DenyImplicitOpenGate::default())?,
        ));
        type Overlay = Qcow2<Storage, Arc<FormatAccess<Storage>>>;
        let overlay = Overlay::create_builder(storage(&path, true)?)
            .size(SIZE)
            .create_open(DenyImplicitOpenGate::default(), |image| {
                Ok(Overlay::builder(image).write(true).backing(Some(below)))
            })?;
        measure("qcow2", &FormatAccess::new(overlay))?;
        std::fs::remove_file(path)?;
    }
    Ok(())
}
