use super::testing::{Segment, bz_image, elf64, multiboot};
use super::*;
use crate::testing::{Random, TempDir};
use std::io::Write;

const MEMORY: u64 = 16 << 20;

struct Boot {
    dir: TempDir,
    ram: GuestRam,
}

impl Boot {
    fn new() -> Self {
        Self {
            dir: TempDir::new(),
            ram: GuestRam::new(MEMORY).unwrap(),
        }
    }

    fn load(&self, kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> Result<CpuState, Error> {
        let kernel = self.dir.file("kernel", kernel);
        let initramfs = initramfs.map(|content| self.dir.file("initramfs", content));
        Source::open(&kernel, initramfs.as_deref(), cmdline)?.load(&self.ram)
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn word(&self, at: u64) -> u32 {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn long(&self, at: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn string(&self, at: u64) -> String {
        let bytes = self.bytes(at, 256);
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }
}

/// Content that compresses and is larger than a chunk.
fn content() -> Vec<u8> {
    (0..200_000_u32).map(|at| (at / 64 ^ at % 7) as u8).collect()
}

fn pvh_kernel(content: &[u8]) -> Vec<u8> {
    let segments = [
        Segment(0x10_0000, content, content.len() as u64 + 0x5000),
        Segment(0x40_0000, b"second", 6),
    ];
    elf64(&segments, Some(0x10_0040))
}

#[test]
fn an_elf_kernel_with_a_pvh_note_starts_in_protected_mode_with_its_start_info() {
    let (boot, content) = (Boot::new(), content());
    let state = boot.load(&pvh_kernel(&content), Some(b"files"), "a=b c").unwrap();
    assert_eq!(
        (state.rip, state.gprs[3], state.cr0 & 0x8000_0001),
        (0x10_0040, 0x6000, 1)
    );
    assert_eq!((state.segments[1].base, state.segments[1].limit), (0, u32::MAX));
    assert_eq!((state.rflags, state.efer, state.cr4), (2, 0, 0));
    assert_eq!(boot.bytes(0x10_0000, content.len()), content);
    assert_eq!(boot.bytes(0x40_0000, 7), b"second\0");
    // Magic, version, flags, modules; module list, command line, RSDP, memory map, entries.
    assert_eq!([0, 4, 8, 12].map(|at| boot.word(0x6000 + at)), [0x336e_c578, 1, 0, 1]);
    assert_eq!(boot.string(boot.long(0x6018)), "a=b c");
    assert_eq!(boot.long(0x6020), 0xe_0000);
    let module = boot.long(0x6010);
    assert_eq!((boot.long(module), boot.long(module + 8)), (MEMORY - 0x1000, 5));
    assert_eq!(boot.bytes(boot.long(module), 5), b"files");
    let (map, entries) = (boot.long(0x6028), boot.word(0x6030));
    assert_eq!(entries as usize, layout::memory_map(MEMORY).len());
    assert_eq!(
        (boot.long(map + 48), boot.long(map + 56), boot.word(map + 64)),
        (0x10_0000, MEMORY - 0x10_0000, 1)
    );
}

fn compressed(kernel: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gzip.write_all(kernel).unwrap();
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    xz.write_all(kernel).unwrap();
    let options = lzma_rust2::LzmaOptions::with_preset(1);
    let mut lzma = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
    lzma.write_all(kernel).unwrap();
    let mut lz4 = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in kernel.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        lz4.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        lz4.extend_from_slice(&packed);
    }
    let mut all = vec![
        ("xz", xz.finish().unwrap()),
        ("lzma", lzma.finish().unwrap()),
        ("zstd", zstd::encode_all(kernel, 19).unwrap()),
        ("lz4", lz4),
        ("none", kernel.to_vec()),
    ];
    // The kernel's build puts the unpacked length behind all but gzip.
    for (_, packed) in &mut all {
        packed.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
    }
    all.push(("gzip", gzip.finish().unwrap()));
    all
}

#[test]
fn a_bzimage_of_any_compression_is_unpacked_and_entered_by_pvh() {
    let content = content();
    for (name, packed) in compressed(&pvh_kernel(&content)) {
        let boot = Boot::new();
        let state = boot
            .load(&bz_image(&packed), None, "")
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(state.rip, 0x10_0040, "{name}");
        assert_eq!(boot.bytes(0x10_0000, content.len()), content, "{name}");
    }
}

#[test]
fn a_bzimage_without_a_pvh_entry_starts_by_the_64_bit_protocol() {
    for payload in [
        elf64(&[Segment(0x10_0000, b"kernel", 6)], None),
        b"BZh9 not known".to_vec(),
    ] {
        let boot = Boot::new();
        let file = bz_image(&payload);
        let state = boot.load(&file, Some(b"files"), "quiet").unwrap();
        assert_eq!((state.rip, state.gprs[6]), (0x20_0200, 0x7000));
        assert_eq!((state.cr3, state.efer), (0x9000, 0x500));
        assert_eq!(boot.bytes(0x20_0000, file.len() - 1024), &file[1024..]);
        assert_eq!(boot.string(boot.word(0x7228).into()), "quiet");
        assert_eq!(
            boot.bytes(boot.word(0x7218).into(), boot.word(0x721c) as usize),
            b"files"
        );
        assert_eq!(boot.word(0x7202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(boot.long(0x7070), 0xe_0000);
        assert_eq!(usize::from(boot.bytes(0x71e8, 1)[0]), layout::memory_map(MEMORY).len());
        // 0x8765_4321 through the page tables.
        let entry = |table: u64, index: u64| boot.long((table & !0xfff) + index * 8);
        let page = entry(entry(entry(state.cr3, 0), 2), 0x3b);
        assert_eq!(page, 0x8760_0083);
        // The selectors of the protocol name what the hidden parts hold.
        assert_eq!((state.segments[1].selector, state.segments[0].selector), (0x10, 0x18));
        assert_eq!(
            boot.long(state.gdtr.base + 0x10) >> 53 & 1,
            1,
            "the code segment is a 64-bit one"
        );
    }
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    let result = Boot::new().load(&bz_image(b"unknown"), None, &"x".repeat(65));
    assert!(matches!(result, Err(Error::Cmdline { length: 65, most: 64 })));
    let result = Boot::new().load(&pvh_kernel(b"x"), None, &"x".repeat(1 << 16));
    assert!(matches!(result, Err(Error::Cmdline { .. })));
}

#[test]
fn a_multiboot_elf_gets_module_command_line_and_memory() {
    let boot = Boot::new();
    let body = multiboot(3, &[]);
    let state = boot
        .load(
            &elf64(&[Segment(0x10_0000, &body, 0x2000)], None),
            Some(b"module"),
            "one two",
        )
        .unwrap();
    assert_eq!((state.gprs[0], state.gprs[3]), (0x2bad_b002, 0x6000));
    // The ELF entry is virtual.
    assert_eq!((state.rip, state.cr0 & 0x8000_0001), (0x10_0000, 1));
    let kernel = boot.dir.path("kernel");
    assert_eq!(
        boot.string(boot.word(0x6010).into()),
        format!("{} one two", kernel.display())
    );
    assert_eq!(boot.word(0x6000), 0x24d);
    assert_eq!(
        (boot.word(0x6004), boot.word(0x6008)),
        (639, (MEMORY >> 10) as u32 - 1024)
    );
    let module = u64::from(boot.word(0x6018));
    assert_eq!([0, 4].map(|at| boot.word(module + at)), [0x10_2000, 0x10_2006]);
    assert_eq!(
        boot.string(boot.word(module + 8).into()),
        boot.dir.path("initramfs").display().to_string()
    );
    assert_eq!(boot.bytes(0x10_2000, 6), b"module");
    let (length, map) = (boot.word(0x602c), u64::from(boot.word(0x6030)));
    assert_eq!(length % 24, 0);
    assert_eq!((boot.word(map), boot.long(map + 4), boot.word(map + 20)), (20, 0, 1));
    assert_eq!(boot.string(boot.word(0x6040).into()), "posada");
}

#[test]
fn a_flat_multiboot_kernel_goes_where_its_address_fields_say() {
    let boot = Boot::new();
    // 16 bytes lie before the header; 8 bytes behind load_end are not loaded.
    let mut file = vec![0xaa; 16];
    file.extend_from_slice(&multiboot(
        1 << 16,
        &[0x20_0010, 0x20_0000, 0x20_0040, 0x20_3000, 0x20_0030],
    ));
    file.resize(72, 0xbb);
    let state = boot.load(&file, None, "").unwrap();
    assert_eq!(state.rip, 0x20_0030);
    assert_eq!(boot.bytes(0x20_0000, 64), &file[..64]);
    assert_eq!(boot.bytes(0x20_0040, 8), [0; 8]);
    // The same with neither end: the whole file.
    file[16..16 + 32].copy_from_slice(&multiboot(1 << 16, &[0x20_0010, 0x20_0000, 0, 0, 0x20_0030]));
    boot.load(&file, None, "").unwrap();
    assert_eq!(boot.bytes(0x20_0040, 8), [0xbb; 8]);
}

#[test]
fn a_multiboot_kernel_that_wants_what_there_is_not_is_refused() {
    let result = Boot::new().load(&multiboot(1 << 4, &[]), None, "");
    assert!(matches!(result, Err(Error::Malformed { .. })));
}

#[test]
fn what_is_no_kernel_is_said_to_be_none() {
    let boot = Boot::new();
    assert!(matches!(
        boot.load(b"#!/bin/sh\n", None, ""),
        Err(Error::Foreign { .. })
    ));
    assert!(matches!(
        boot.load(b"", None, ""),
        Err(Error::Empty { what: "kernel", .. })
    ));
    let plain = elf64(&[Segment(0x10_0000, b"program", 7)], None);
    assert!(matches!(boot.load(&plain, None, ""), Err(Error::Foreign { .. })));
    let directory = Source::open(&std::env::temp_dir(), None, "");
    assert!(matches!(directory, Err(Error::Kind { what: "kernel", .. })));
}

#[test]
fn what_does_not_fit_into_memory_is_refused() {
    let boot = Boot::new();
    let high = elf64(&[Segment(MEMORY - 0x1000, b"x", 0x2000)], Some(0));
    assert!(matches!(boot.load(&high, None, ""), Err(Error::Memory { needed, .. }) if needed == MEMORY + 0x1000));
    let low = elf64(&[Segment(0x1000, b"x", 1)], Some(0));
    assert!(matches!(boot.load(&low, None, ""), Err(Error::Malformed { .. })));
    let large = vec![0; MEMORY as usize - 0x10_0000];
    assert!(matches!(
        boot.load(&pvh_kernel(b"x"), Some(&large), ""),
        Err(Error::Initramfs { .. })
    ));
    let mut body = multiboot(0, &[]);
    body.resize(0x1000, 0);
    let kernel = elf64(&[Segment(0x10_0000, &body, 0x1000)], None);
    assert!(matches!(
        boot.load(&kernel, Some(&large), ""),
        Err(Error::Initramfs { .. })
    ));
    let small = GuestRam::new(1 << 20).unwrap();
    let source = Source::open(&boot.dir.path("kernel"), None, "").unwrap();
    assert!(matches!(source.load(&small), Err(Error::Memory { .. })));
}

/// One of each kind, small.
fn kernels() -> Vec<Vec<u8>> {
    let content = &content()[..3000];
    let kernel = pvh_kernel(content);
    let mut all: Vec<Vec<u8>> = compressed(&kernel).iter().map(|(_, packed)| bz_image(packed)).collect();
    let mut body = multiboot(3, &[]);
    body.resize(64, 0);
    all.push(elf64(&[Segment(0x10_0000, &body, 0x2000)], None));
    all.push(multiboot(1 << 16, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0000]));
    all.push(kernel);
    all
}

#[test]
fn a_truncated_kernel_is_an_error_and_no_panic() {
    let boot = Boot::new();
    for kernel in kernels() {
        assert!(boot.load(&kernel, None, "").is_ok());
        for length in (1..kernel.len() - 16).step_by(13) {
            let kept = &kernel[..length];
            // A multiboot kernel needs no more than its header and what that names.
            let whole = multiboot::Header::find(kept).is_some();
            assert!(
                boot.load(kept, None, "").is_err() || whole,
                "{length} of {} bytes",
                kernel.len()
            );
        }
    }
}

#[test]
fn a_kernel_with_bytes_changed_at_random_never_panics() {
    let boot = Boot::new();
    let mut random = Random(5);
    let kernels = kernels();
    for round in 0..4000 {
        let mut kernel = kernels[round % kernels.len()].clone();
        // Most of the damage goes to the headers.
        let reach = [0x300, kernel.len() as u64][round / 2 % 2].min(kernel.len() as u64);
        for _ in 0..1 + random.below(6) {
            kernel[random.below(reach) as usize] = [0, 0xff, random.below(256) as u8][random.below(3) as usize];
        }
        let _ = boot.load(&kernel, Some(b"files"), "quiet");
    }
}
