//! Disks whose blocks the file system can share: on xfs and btrfs in an image of the test's own, mounted where nobody else
//! sees it. Without the right to do that, or the tools, there is nothing to test.

use super::*;
use std::os::fd::AsRawFd;
use std::process::Command;

/// Runs `test` in an empty folder of such a file system.
fn on(file_system: &str, test: impl FnOnce(TempDir) + Send) {
    let outside = TempDir::new();
    let image = outside.path("image");
    let sized = fs::File::create(&image).and_then(|file| file.set_len(400 << 20));
    sized.unwrap();
    let mount_point = outside.path("mounted");
    fs::create_dir(&mount_point).unwrap();
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(error) => Err(format!("{}: {error}", command.get_program().display())),
    };
    thread::scope(|scope| {
        // The mount goes with the thread's name space, however the test ends.
        scope.spawn(|| {
            // SAFETY: concerns this thread and those that it starts.
            let apart = match unsafe { libc::unshare(libc::CLONE_NEWNS) } {
                0 => Ok(()),
                _ => Err(format!("unshare: {}", std::io::Error::last_os_error())),
            };
            let mounted = apart
                .and_then(|()| run(Command::new(format!("mkfs.{file_system}")).arg("-q").arg(&image)))
                .and_then(|()| run(Command::new("mount").args(["--make-rprivate", "/"])))
                .and_then(|()| run(Command::new("mount").args(["-o", "loop"]).args([&image, &mount_point])));
            match mounted {
                Ok(()) => test(TempDir::at(&mount_point)),
                Err(why) => eprintln!("skipped, as there is no {file_system} here: {why}"),
            }
        });
    });
}

/// True if the file's first block is another file's too.
fn shares(path: &Path) -> bool {
    /// `struct fiemap` of `linux/fiemap.h`, with room for one extent.
    #[repr(C)]
    #[derive(Default)]
    struct Map {
        start: u64,
        length: u64,
        flags: u32,
        mapped: u32,
        room: u32,
        reserved: u32,
        extent: Extent,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Extent {
        logical: u64,
        physical: u64,
        length: u64,
        reserved: [u64; 2],
        flags: u32,
        reserved2: [u32; 3],
    }
    const FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
    const SYNC: u32 = 1;
    const SHARED: u32 = 0x2000;
    let file = fs::File::open(path).unwrap();
    let mut map = Map {
        length: 4096,
        flags: SYNC,
        room: 1,
        ..Map::default()
    };
    // SAFETY: the kernel writes the structure, whose room for extents is as it says.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut map) };
    assert_eq!((answer, map.mapped), (0, 1), "{}", std::io::Error::last_os_error());
    map.extent.flags & SHARED != 0
}

#[test]
fn copies_share_the_disks_blocks_where_the_file_system_can() {
    for file_system in ["btrfs", "xfs"] {
        on(file_system, |dir| {
            let (report, kept, _) = saved(&dir, false, KeepDisks::Copy);
            assert_eq!((report.ending, kept.disks), (Ending::PowerOff, 73_728));
            let copy = dir.path("snap").join("disk0.raw");
            assert!(shares(&copy) && shares(&dir.path("data.raw")), "{file_system}");
            assert_eq!(fs::metadata(&copy).unwrap().len() % 512, 0);
            // What the VM writes later is not in the snapshot.
            let before = fs::read(&copy).unwrap();
            fs::write(dir.path("data.raw"), [1; 70_000]).unwrap();
            assert_eq!(fs::read(&copy).unwrap(), before);
            let (report, (), _) = count(&restored(&dir).unwrap(), || ());
            assert_eq!(report.ending, Ending::PowerOff);
            // The checksums, which are made when the VM runs on already, are of the copy.
            fs::write(dir.path("damaged.raw"), [1; 70_000]).unwrap();
            let damaged = Snapshot::open(&dir.path("snap")).unwrap();
            let damaged = damaged.into_config(vec![given(&dir.path("damaged.raw"))], own(&dir));
            assert!(refusal(damaged).contains("damaged.raw"));
        });
    }
}
