//! Disks of users, in and out: raw and qcow2 in, raw out, sparse on both sides.

use crate::blob::{BlobWriter, scan};
use crate::layout::sync_folder_of;
use crate::manifest::{Blob, LARGEST};
use crate::progress::{Progress, Step, go_on};
use crate::{Error, Image, Ingest};
use imago::file::File as Storage;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, Mapping, Storage as _, StorageOpenOptions};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of a header of version 3 (qcow2's specification, "Header").
const HEADER: usize = 104;
/// Bytes: QEMU's limit of the L1 table (`QCOW_MAX_L1_SIZE`).
const LARGEST_L1: u64 = 32 << 20;
/// Incompatible features that change nothing for a reader: the dirty bit, which is about refcounts, and the kind of compression.
const HARMLESS: u64 = 1 | 1 << 3;
const EXTERNAL_DATA: u64 = 1 << 2;
const CORRUPT: u64 = 1 << 1;
/// Backing files of backing files; a chain that bites its tail ends here.
const DEEPEST: u32 = 16;
/// Bytes read at once.
const BUFFER: u64 = 1 << 20;
/// Bytes of zeroes that are hashed between two looks at whether to go on.
const ZEROES: u64 = 256 << 20;

/// How the content of a disk lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// As it is.
    Raw,
    /// QEMU's format, of version 2 or 3.
    Qcow2,
}

/// What an import may do.
#[derive(Clone, Copy, Debug)]
pub struct ImportOptions {
    /// `None`: qcow2 if it begins like that, else raw.
    pub format: Option<DiskFormat>,
    /// Read the files that a qcow2 file names as its backing. They may be any file that this process can read, so only for
    /// files of one's own.
    pub follow_backing: bool,
    /// Bytes of the largest disk to accept.
    pub largest: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            format: None,
            follow_backing: false,
            largest: LARGEST,
        }
    }
}

fn refused(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Refused(format!("{} {why}", path.display()))
}

fn check_size(path: &Path, size: u64, options: &ImportOptions) -> Result<(), Error> {
    let most = options.largest.min(LARGEST);
    match size {
        0 => Err(refused(path, "is an empty disk")),
        _ if size > most => Err(refused(
            path,
            format_args!("is a disk of {size} bytes, and at most {most} are accepted"),
        )),
        _ => Ok(()),
    }
}

/// What a qcow2 header must say before anything is read by its tables.
fn check_header(path: &Path, header: &[u8], options: &ImportOptions) -> Result<(), Error> {
    let number = |at: usize, bytes: usize| big_endian(&header[at..at + bytes]);
    let version = number(4, 4);
    if !(2..=3).contains(&version) {
        return Err(refused(
            path,
            format_args!("is qcow2 of version {version}, and only 2 and 3 are known"),
        ));
    }
    if number(8, 8) != 0 && !options.follow_backing {
        return Err(refused(
            path,
            "has a backing file, and only a part of the disk itself: flatten it with qemu-img convert -O raw, or ask for \
             its backing file to be read, if both are your own",
        ));
    }
    let cluster_bits = number(20, 4);
    if !(9..=21).contains(&cluster_bits) {
        return Err(refused(
            path,
            format_args!("has clusters of 2^{cluster_bits} bytes, which qcow2 cannot have"),
        ));
    }
    check_size(path, number(24, 8), options)?;
    if number(32, 4) != 0 {
        return Err(refused(path, "is encrypted: decrypt it with qemu-img convert"));
    }
    let l1 = number(36, 4) * 8;
    if l1 > LARGEST_L1 {
        return Err(refused(
            path,
            format_args!("has an L1 table of {l1} bytes, which no disk needs"),
        ));
    }
    if version == 3 {
        let features = number(72, 8);
        if features & CORRUPT != 0 {
            return Err(refused(
                path,
                "is marked as corrupt: repair it with qemu-img check -r all",
            ));
        }
        if features & EXTERNAL_DATA != 0 {
            return Err(refused(
                path,
                "has its data in another file: convert it with qemu-img convert -O raw",
            ));
        }
        if features & !HARMLESS & !(1 << 4) != 0 {
            return Err(refused(
                path,
                format_args!("has qcow2 features {features:#x}, not all of which are known"),
            ));
        }
    }
    Ok(())
}

/// That a qcow2 file is whole as far as its L1 table tells: what lies behind its end would be taken for zeroes, and a download
/// that was cut off for a disk.
fn check_tables(path: &Path, file: &File, header: &[u8]) -> Result<(), Error> {
    /// Bits of an L1 entry that are the offset of an L2 table.
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let number = |at: usize, bytes: usize| big_endian(&header[at..at + bytes]);
    let cluster = 1 << number(20, 4);
    let (entries, begin) = (number(36, 4), number(40, 8));
    let length = file.metadata().map_err(Error::io("look at", path))?.len();
    let inside = |begin: u64, bytes: u64| begin.checked_add(bytes).is_some_and(|end| end <= length);
    let cut = || {
        refused(
            path,
            format_args!("is cut off: its {length} bytes are not all of it; get it anew"),
        )
    };
    if !inside(begin, entries * 8) {
        return Err(cut());
    }
    let mut table = vec![0; entries as usize * 8];
    file.read_exact_at(&mut table, begin).map_err(Error::io("read", path))?;
    for entry in table.chunks_exact(8) {
        let at = big_endian(entry) & OFFSET;
        if at != 0 && !inside(at, cluster) {
            return Err(cut());
        }
    }
    Ok(())
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn read_header(file: &File, path: &Path) -> Result<Vec<u8>, Error> {
    let mut header = Vec::new();
    let mut from = file;
    from.rewind().map_err(Error::io("read", path))?;
    from.take(HEADER as u64)
        .read_to_end(&mut header)
        .map_err(Error::io("read", path))?;
    Ok(header)
}

/// All that is checked of a qcow2 file before its tables are used.
fn check_qcow2(path: &Path, file: &File, mut header: Vec<u8>, options: &ImportOptions) -> Result<(), Error> {
    // A file of version 2 may end behind its 72 bytes.
    header.resize(HEADER, 0);
    check_header(path, &header, options)?;
    check_tables(path, file, &header)
}

/// Opens backing files, down to a depth.
struct Gate {
    left: u32,
    options: ImportOptions,
}

impl ImplicitOpenGate<Storage> for Gate {
    fn open_format<F: FormatDriverBuilder<Storage>>(&mut self, builder: F) -> io::Result<FormatAccess<Storage>> {
        let left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("its backing files are too many, or name each other"))?;
        if F::FORMAT == imago::format::Format::Qcow2 {
            let path = builder.get_image_path().ok_or(io::ErrorKind::InvalidInput)?;
            let file = File::open(&path)?;
            let header = read_header(&file, &path).map_err(io::Error::other)?;
            check_qcow2(&path, &file, header, &self.options).map_err(io::Error::other)?;
        }
        let options = self.options;
        Ok(FormatAccess::new(builder.open(Self { left, options })?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        // No devices and pipes, which may block or have effects.
        let path = options.get_filename().ok_or(io::ErrorKind::InvalidInput)?;
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::other(format!(
                "its backing file {} is no file",
                path.display()
            )));
        }
        Storage::open(options)
    }
}

impl Ingest {
    /// Takes in the content of a disk, as a raw blob. The disk must not change meanwhile.
    ///
    /// # Errors
    /// [`Error::Refused`] says what is wrong with a qcow2 file; what the host says; [`Error::Cancelled`].
    pub fn import_disk(&self, path: &Path, options: &ImportOptions, progress: &dyn Progress) -> Result<Blob, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let kind = file.metadata().map_err(Error::io("look at", path))?.file_type();
        use std::os::unix::fs::FileTypeExt;
        if !kind.is_file() && !kind.is_block_device() {
            return Err(refused(path, "is neither a file nor a block device"));
        }
        let header = read_header(&file, path)?;
        let looks = if header.starts_with(MAGIC) {
            DiskFormat::Qcow2
        } else {
            DiskFormat::Raw
        };
        match options.format.unwrap_or(looks) {
            DiskFormat::Raw => self.import_raw(&file, path, options, progress),
            DiskFormat::Qcow2 if looks == DiskFormat::Raw => Err(refused(path, "is not qcow2")),
            DiskFormat::Qcow2 => {
                check_qcow2(path, &file, header, options)?;
                self.import_qcow2(file, path, options, progress)
            }
        }
    }

    fn import_raw(
        &self,
        file: &File,
        path: &Path,
        options: &ImportOptions,
        progress: &dyn Progress,
    ) -> Result<Blob, Error> {
        let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
            .map_err(|error| Error::io("read", path)(error.into()))?;
        check_size(path, size, options)?;
        let mut writer = self.blob()?;
        let to = self.layout().tmp();
        scan(
            file,
            path,
            Step::Copy,
            progress,
            &mut writer,
            |writer, bytes| writer.write_all(bytes).map_err(Error::io("write to", &to)),
            |writer, count| append_zeroes(writer, count, progress),
        )?;
        writer.finish(None)
    }

    fn import_qcow2(
        &self,
        file: File,
        path: &Path,
        options: &ImportOptions,
        progress: &dyn Progress,
    ) -> Result<Blob, Error> {
        let wrong = |error: io::Error| refused(path, format_args!("cannot be read as qcow2: {error}"));
        // The same file that was checked, and no second look at the path.
        let storage = Storage::from_open_file(file, StorageOpenOptions::new().filename(path)).map_err(wrong)?;
        let left = if options.follow_backing { DEEPEST } else { 0 };
        let disk = Qcow2::<Storage>::builder(storage)
            .open(Gate {
                left,
                options: *options,
            })
            .map_err(wrong)?;
        let disk = FormatAccess::new(disk);
        let size = disk.size();
        check_size(path, size, options)?;
        let mut writer = self.blob()?;
        let to = self.layout().tmp();
        let mut buffer = vec![0; BUFFER as usize];
        let mut at = 0;
        while at < size {
            go_on(progress)?;
            let (mapping, length) = disk.get_mapping(at, size - at).map_err(wrong)?;
            if length == 0 {
                return Err(refused(
                    path,
                    format_args!("cannot be read as qcow2: nothing is mapped at {at}"),
                ));
            }
            if let Mapping::Raw { storage, offset, .. } = mapping {
                // Only what ends the disk may lie in a last cluster that was never written in full.
                let there = storage.size().map_err(wrong)?;
                let needed = if at + length == size { 1 } else { length };
                if offset.saturating_add(needed) > there {
                    return Err(refused(path, "is cut off: its end is missing; get it anew"));
                }
            }
            let zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
            let part = if zero { length } else { length.min(BUFFER) };
            if zero {
                append_zeroes(&mut writer, part, progress)?;
            } else {
                let buffer = &mut buffer[..part as usize];
                disk.read(&mut *buffer, at).map_err(wrong)?;
                writer.write_all(buffer).map_err(Error::io("write to", &to))?;
            }
            at += part;
            progress.update(Step::Copy, at, Some(size));
        }
        writer.finish(None)
    }
}

fn append_zeroes(writer: &mut BlobWriter, mut count: u64, progress: &dyn Progress) -> Result<(), Error> {
    while count > 0 {
        go_on(progress)?;
        let part = count.min(ZEROES);
        writer.zeroes(part);
        count -= part;
    }
    Ok(())
}

impl Image {
    /// Writes the root disk into a new raw file, with holes where it has zeroes. After an error there is no such file.
    ///
    /// # Errors
    /// [`Error::Refused`] if the image has no disk; what the host says, also if there is a file `to` already.
    pub fn export_disk(&self, to: &Path, progress: &dyn Progress) -> Result<(), Error> {
        let path = self
            .disk()
            .ok_or_else(|| Error::Refused(format!("the image {} has no disk to export", self.id())))?;
        let from = File::open(&path).map_err(Error::io("open", &path))?;
        let mut temporary = beside(to)?;
        let mut at = 0;
        let size = scan(
            &from,
            &path,
            Step::Copy,
            progress,
            &mut at,
            |at, bytes| {
                temporary
                    .as_file()
                    .write_all_at(bytes, *at)
                    .map_err(Error::io("write", to))?;
                *at += bytes.len() as u64;
                Ok(())
            },
            |at, count| {
                *at += count;
                Ok(())
            },
        )?;
        temporary.as_file_mut().set_len(size).map_err(Error::io("write", to))?;
        place(temporary, to)
    }
}

/// A temporary file in the folder where `to` will be.
pub(crate) fn beside(to: &Path) -> Result<tempfile::NamedTempFile, Error> {
    use std::os::unix::fs::PermissionsExt;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    tempfile::Builder::new()
        .prefix(".posada-")
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .map_err(Error::io("write", to))
}

/// Makes it durable under its name, if that is free.
pub(crate) fn place(temporary: tempfile::NamedTempFile, to: &Path) -> Result<(), Error> {
    temporary.as_file().sync_all().map_err(Error::io("write", to))?;
    temporary
        .persist_noclobber(to)
        .map_err(|error| Error::io("write", to)(error.error))?;
    match to.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        Some(_) => sync_folder_of(to),
        None => sync_folder_of(&Path::new(".").join(to)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::example;
    use crate::{Digest, Quiet, Store};
    use imago::FormatCreateBuilder;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    const MIB: u64 = 1 << 20;

    fn storage(path: &Path) -> Storage {
        File::create_new(path).unwrap();
        Storage::open(StorageOpenOptions::new().write(true).filename(path)).unwrap()
    }

    fn permissive() -> Gate {
        let options = ImportOptions {
            follow_backing: true,
            ..Default::default()
        };
        Gate { left: DEEPEST, options }
    }

    /// A qcow2 file of 8 MiB with these pieces, perhaps over a backing file.
    fn qcow2(path: &Path, backing: Option<&Path>, pieces: &[(u64, &[u8])]) {
        let mut builder = Qcow2::<Storage>::create_builder(storage(path)).size(8 * MIB);
        if let Some(backing) = backing {
            builder = builder.backing(backing.to_str().unwrap().into(), "qcow2".into());
        }
        let open = |image| Ok(Qcow2::<Storage>::builder(image).write(true));
        let disk = FormatAccess::new(builder.create_open(permissive(), open).unwrap());
        for (at, bytes) in pieces {
            disk.write(*bytes, *at).unwrap();
        }
        disk.flush().unwrap();
    }

    fn place_of_test() -> (tempfile::TempDir, Ingest, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        (folder, store.ingest().unwrap(), store)
    }

    fn path_of(store: &Store, blob: Blob) -> PathBuf {
        store.root().join("blobs/sha256").join(blob.digest.hex())
    }

    #[test]
    fn a_raw_disk_comes_in_and_goes_out_sparse() {
        let (folder, ingest, store) = place_of_test();
        let path = folder.path().join("in.raw");
        let file = File::create(&path).unwrap();
        file.set_len(64 * MIB + 512).unwrap();
        file.write_all_at(b"middle", 20 * MIB + 100).unwrap();
        file.write_all_at(&[0; 1 << 20], 30 * MIB).unwrap();
        let blob = ingest.import_disk(&path, &ImportOptions::default(), &Quiet).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(
            blob,
            Blob {
                digest: Digest::of(&content),
                size: content.len() as u64
            }
        );
        ingest
            .commit(&example(None, Some(blob)), &["disk".parse().unwrap()])
            .unwrap();
        let (image, out) = (store.image("disk").unwrap(), folder.path().join("out.raw"));
        image.export_disk(&out, &Quiet).unwrap();
        assert!(std::fs::read(&out).unwrap() == content);
        for path in [out.clone(), image.disk().unwrap()] {
            assert!(std::fs::metadata(path).unwrap().blocks() <= 32);
        }
        // What is there already is not written over.
        assert!(
            image
                .export_disk(&out, &Quiet)
                .unwrap_err()
                .to_string()
                .contains("exists")
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_qcow2_disk_comes_in_as_raw() {
        let (folder, ingest, store) = place_of_test();
        let path = folder.path().join("in.qcow2");
        qcow2(
            &path,
            None,
            &[(0, b"begin"), (3 * MIB - 3, b"across"), (8 * MIB - 3, b"end")],
        );
        let blob = ingest.import_disk(&path, &ImportOptions::default(), &Quiet).unwrap();
        let mut content = vec![0; 8 << 20];
        content[..5].copy_from_slice(b"begin");
        content[(3 << 20) - 3..][..6].copy_from_slice(b"across");
        content[(8 << 20) - 3..].copy_from_slice(b"end");
        assert_eq!(blob.digest, Digest::of(&content));
        assert!(std::fs::metadata(path_of(&store, blob)).unwrap().blocks() <= 64);
        // On demand, the file as it is.
        let raw = ImportOptions {
            format: Some(DiskFormat::Raw),
            ..Default::default()
        };
        let blob = ingest.import_disk(&path, &raw, &Quiet).unwrap();
        assert_eq!(blob.digest, Digest::of(&std::fs::read(&path).unwrap()));
    }

    #[test]
    fn backing_files_are_read_only_on_demand_and_not_for_ever() {
        let (folder, ingest, _store) = place_of_test();
        let (base, top) = (folder.path().join("base"), folder.path().join("top"));
        qcow2(&base, None, &[(0, b"below"), (MIB, b"kept")]);
        qcow2(&top, Some(&base), &[(0, b"ABOVE")]);
        let error = ingest.import_disk(&top, &ImportOptions::default(), &Quiet).unwrap_err();
        assert!(error.to_string().contains("has a backing file"), "{error}");
        let follow = ImportOptions {
            follow_backing: true,
            ..Default::default()
        };
        let blob = ingest.import_disk(&top, &follow, &Quiet).unwrap();
        let mut content = vec![0; 8 << 20];
        content[..5].copy_from_slice(b"ABOVE");
        content[1 << 20..][..4].copy_from_slice(b"kept");
        assert_eq!(blob.digest, Digest::of(&content));
        std::fs::rename(&top, &base).unwrap();
        let error = ingest.import_disk(&base, &follow, &Quiet).unwrap_err();
        assert!(error.to_string().contains("too many, or name each other"), "{error}");
    }

    #[test]
    fn headers_that_no_disk_needs_are_refused() {
        let (folder, ingest, _store) = place_of_test();
        let path = folder.path().join("in.qcow2");
        qcow2(&path, None, &[(0, b"x")]);
        let good = std::fs::read(&path).unwrap();
        for (at, value, why) in [
            (7, 9u8, "version 9"),
            (15, 1, "backing file"),
            (23, 63, "clusters of 2^63"),
            (24, 0xff, "bytes, and at most"),
            (35, 1, "encrypted"),
            (36, 0xff, "L1 table"),
            (79, 2, "corrupt"),
            (79, 4, "another file"),
            (72, 0x80, "not all of which are known"),
            (40, 0xff, "is cut off"),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            std::fs::write(&path, bad).unwrap();
            let error = ingest
                .import_disk(&path, &ImportOptions::default(), &Quiet)
                .unwrap_err()
                .to_string();
            assert!(error.contains(why), "{at}: {error}");
        }
        for length in [4, 50, 104, good.len() / 2] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(
                ingest.import_disk(&path, &ImportOptions::default(), &Quiet).is_err(),
                "{length}"
            );
        }
        std::fs::write(&path, "").unwrap();
        let error = ingest
            .import_disk(&path, &ImportOptions::default(), &Quiet)
            .unwrap_err();
        assert!(error.to_string().contains("empty disk"), "{error}");
        let error = ingest
            .import_disk(folder.path(), &ImportOptions::default(), &Quiet)
            .unwrap_err();
        assert!(error.to_string().contains("neither a file nor"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_damage_of_a_qcow2_file_makes_the_import_panic(hits in prop::collection::vec((0usize..0x60000, any::<u8>()), 1..6)) {
            let (folder, ingest, _store) = place_of_test();
            let path = folder.path().join("in.qcow2");
            qcow2(&path, None, &[(0, b"x"), (5 * MIB, b"y")]);
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, value) in hits {
                // Mostly where the tables begin: at clusters.
                let at = if at % 3 == 0 { at } else { at / 0x10000 * 0x10000 + at % 0x80 };
                let length = bytes.len();
                bytes[at % length] = value;
            }
            std::fs::write(&path, bytes).unwrap();
            let options = ImportOptions { largest: 64 << 20, ..Default::default() };
            let _ = ingest.import_disk(&path, &options, &Quiet);
        }
    }

    #[test]
    fn an_import_can_be_cancelled() {
        struct Never;
        impl Progress for Never {
            fn cancelled(&self) -> bool {
                true
            }
        }
        let (folder, ingest, store) = place_of_test();
        let path = folder.path().join("in.raw");
        std::fs::write(&path, [1; 4096]).unwrap();
        let error = ingest
            .import_disk(&path, &ImportOptions::default(), &Never)
            .unwrap_err();
        assert!(matches!(error, Error::Cancelled));
        assert_eq!(std::fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    }
}
