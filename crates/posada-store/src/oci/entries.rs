//! The entries of a layer's tar, with the extensions of GNU and POSIX (pax) that builders use. What they may take of memory is
//! bounded, which is why they are read here.

use super::spec::unusable;
use crate::Error;
use std::io::{self, Read};
use tar::EntryType;

/// Bytes of one extension header: of a path, or of all extended attributes of a file.
const LONGEST: u64 = 1 << 20;

/// An entry, all extensions applied. Paths are as they stand in the archive: anything.
#[derive(Debug)]
pub(super) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: EntryType,
    /// With set-user-ID, set-group-ID and sticky bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub modified: i64,
    pub device: (u32, u32),
    pub attributes: Vec<(String, Vec<u8>)>,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(String, Vec<u8>)>,
}

/// Hands each entry and its content to `each`.
pub(super) fn read_entries(
    stream: impl Read,
    what: &str,
    mut each: impl FnMut(Entry, &mut dyn Read) -> Result<(), Error>,
) -> Result<(), Error> {
    let wrong = |error: io::Error| unusable(what, format_args!("a layer cannot be read: {error}"));
    let mut archive = tar::Archive::new(stream);
    let mut extensions = Extensions::default();
    for entry in archive.entries().map_err(wrong)?.raw(true) {
        let mut entry = entry.map_err(wrong)?;
        let kind = entry.header().entry_type();
        let mut extension = || -> Result<Vec<u8>, Error> {
            let mut bytes = Vec::new();
            (&mut entry).take(LONGEST + 1).read_to_end(&mut bytes).map_err(wrong)?;
            if bytes.len() as u64 > LONGEST {
                return Err(unusable(
                    what,
                    "a file in it has a name or attributes of more than 1 MiB",
                ));
            }
            Ok(bytes)
        };
        let name = |mut bytes: Vec<u8>| {
            bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
            Some(bytes)
        };
        match kind {
            EntryType::GNULongName => extensions.path = name(extension()?),
            EntryType::GNULongLink => extensions.link = name(extension()?),
            EntryType::XHeader => {
                extensions.pax = parse_pax(&extension()?).ok_or_else(|| unusable(what, "a pax header is damaged"))?;
            }
            // Says nothing about files: comments of version control.
            EntryType::XGlobalHeader => {}
            _ => {
                let entry_of_file = assemble(entry.header(), std::mem::take(&mut extensions), what)?;
                each(entry_of_file, &mut entry)?;
            }
        }
    }
    Ok(())
}

fn assemble(header: &tar::Header, extensions: Extensions, what: &str) -> Result<Entry, Error> {
    let wrong = |error: io::Error| unusable(what, format_args!("a layer cannot be read: {error}"));
    let mut entry = Entry {
        path: extensions.path.unwrap_or_else(|| header.path_bytes().into_owned()),
        link: extensions
            .link
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default(),
        kind: header.entry_type(),
        mode: header.mode().map_err(wrong)? & 0o7777,
        uid: header.uid().map_err(wrong)? as u32,
        gid: header.gid().map_err(wrong)? as u32,
        modified: header.mtime().map_err(wrong)? as i64,
        device: (
            header.device_major().ok().flatten().unwrap_or(0),
            header.device_minor().ok().flatten().unwrap_or(0),
        ),
        attributes: Vec::new(),
    };
    for (key, value) in extensions.pax {
        let text = || std::str::from_utf8(&value).ok();
        let number = || text().and_then(|text| text.parse::<u32>().ok());
        match key.as_str() {
            "path" => entry.path = value,
            "linkpath" => entry.link = value,
            "uid" => entry.uid = number().unwrap_or(entry.uid),
            "gid" => entry.gid = number().unwrap_or(entry.gid),
            "mtime" => {
                // A decimal fraction, which nobody misses.
                let seconds = text().and_then(|text| text.split('.').next()?.parse().ok());
                entry.modified = seconds.unwrap_or(entry.modified);
            }
            "size" => {
                let size = text().and_then(|text| text.parse::<u64>().ok());
                if size != header.entry_size().ok() {
                    return Err(unusable(
                        what,
                        "a file in it has 8 GiB or more, which is too much for one file",
                    ));
                }
            }
            key if key.starts_with("GNU.sparse.") => {
                return Err(unusable(what, "a file in it is stored as a sparse file of GNU tar"));
            }
            _ => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    entry.attributes.push((name.into(), value));
                }
            }
        }
    }
    Ok(entry)
}

/// Records of the form `LENGTH KEY=VALUE\n`, where the length is that of the whole record.
fn parse_pax(mut bytes: &[u8]) -> Option<Vec<(String, Vec<u8>)>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
        let record = bytes.get(..length)?.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.push((
            String::from_utf8(record[..equals].into()).ok()?,
            record[equals + 1..].into(),
        ));
        bytes = &bytes[length..];
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_are_cut_by_their_length() {
        let records = parse_pax(b"12 path=a\nb\n26 SCHILY.xattr.user.x=\0=\n").unwrap();
        assert_eq!(records[0], ("path".into(), b"a\nb".to_vec()));
        assert_eq!(records[1], ("SCHILY.xattr.user.x".into(), b"\0=".to_vec()));
        for wrong in [
            &b"5"[..],
            b"99 a=b\n",
            b"3 a=b\n",
            b"0 a=b\n",
            b"x a=b\n",
            b"7 a=bcd",
            b"6 abc\n",
        ] {
            assert!(parse_pax(wrong).is_none(), "{wrong:?}");
        }
    }
}
