//! Kernel images of all kinds: whatever the file holds, loading it is refused or ends with a state to start from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_memory::GuestRam;
use posada_vmm::boot::Source;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::PathBuf;

unsafe extern "C" {
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
}

fuzz_target!(|image: &[u8]| {
    // SAFETY: a constant name; the descriptor is owned by the File alone.
    let mut file = unsafe { File::from_raw_fd(memfd_create(c"kernel".as_ptr(), 0)) };
    file.write_all(image).expect("memory for the image");
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
    let ram = GuestRam::new(64 << 20).expect("address space for guest RAM");
    if let Ok(source) = Source::open(&path, None, "console=ttyS0") {
        let _ = source.load(&ram);
    }
});
